"""The page of families has a row, with figures that hold, for each family that there is."""

import re
from pathlib import Path

from rljax.models import FAMILIES, gguf

PAGE = (Path(__file__).parent.parent / "docs" / "families.md").read_text()
TOLERANCE = 1e-4
"""That of the parity tests."""


def rows():
    """Cells of the measured table by family."""
    lines = re.findall(r"^\| (\w+) \| (\w+ForCausalLM) \| (.+) \|$", PAGE, re.MULTILINE)
    return {family: [architecture, *rest.split(" | ")] for family, architecture, rest in lines}


def test_every_family_has_a_row_and_no_other_has():
    assert {name: cells[0] for name, cells in rows().items()} == {
        name: family.architecture for name, family in FAMILIES.items()
    }


def test_figures_are_within_what_the_parity_tests_allow():
    for name, (_, imported, exported, files, greedy, forks) in rows().items():
        assert max(float(imported), float(exported), float(forks)) < TOLERANCE, name
        assert files == "equal", name
        agreed, total = greedy.split("/")
        assert agreed == total, name


def test_every_architecture_of_gguf_files_is_named():
    named = re.search(r"GGUF files are read of the architectures (.+)\.", PAGE).group(1)
    assert set(re.findall(r"[a-z]+\d*\w*", re.sub(r"\(.*?\)", "", named))) - {"and"} == set(gguf.ARCHITECTURES)
