"""Notebooks are what a reader runs in Colab: from a wheel, in an environment of their own."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
import execute  # noqa: E402

sys.path.remove(str(ROOT / "notebooks"))

SOURCES = {name: ROOT / "notebooks" / f"{name}.py" for name in execute.NAMES}


def cells(source):
    """The code of each cell; empty for text."""
    parts = re.split(r"^# %%(.*)\n", source.read_text(), flags=re.MULTILINE)[1:]
    return [code if kind.strip() == "" else "" for kind, code in zip(parts[::2], parts[1::2], strict=True)]


def test_every_source_is_run_and_read_of():
    found = {file.stem for file in (ROOT / "notebooks").glob("*.py")} - {"execute"}
    assert found == set(SOURCES)
    page = (ROOT / "docs" / "notebooks.md").read_text()
    assert all(f"../notebooks/{name}.py" in page for name in SOURCES)


@pytest.mark.parametrize("source", SOURCES.values(), ids=lambda s: s.stem)
def test_a_notebook_begins_with_what_installs_it(source):
    """The same in each, and nothing of rljax before it."""
    text, install, *rest = cells(source)
    assert not text and install == cells(SOURCES["quickstart"])[1]
    assert '"pip", "install"' in install and "RLJAX_WHEEL" in install
    # What a cell imports is there, so that a name that moves is noticed without a run.
    for node in (node for code in rest for node in ast.walk(ast.parse(code))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rljax"):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", execute.NAMES)
def test_it_runs_in_a_fresh_environment(name, tmp_path):
    for package in ("jupytext", "nbclient", "ipykernel", "pandas", "hatchling"):
        pytest.importorskip(package, reason="needs rljax-lm[notebooks]")
    import nbformat

    written = execute.execute(name, execute.build_wheel(tmp_path), tmp_path)
    notebook = nbformat.read(written, as_version=4)
    assert not [o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "error"]
    # The package is the wheel's, not the clone's.
    (packages,) = (tmp_path / name / "environment").glob("lib/python*/site-packages")
    assert (packages / "rljax" / "cli" / "main.py").exists()
