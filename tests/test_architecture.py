"""The table of rooms in docs/architecture.md is the contract on imports: complete, narrow, and able to fail."""

import sys
from pathlib import Path

import grimp
import pytest
from importlinter.api import read_configuration, use_cases

from rljax.testing.layering import broken_imports, read_rooms, room_of, unused_permissions

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
TABLE = """
| room | holds | may import | packages |
|---|---|---|---|
| `low/` | arrays | | numpy |
| `high/` | objects | low, high/deep | |
| `high/deep/` | more of them | high | |
"""
FILES = {
    "__init__": "",
    "low.__init__": "import os\nimport numpy",
    "low.part": "",
    "high.__init__": "from house.high.deep import x",
    "high.part": "from house.low import part",
    "high.deep": "from house.high import part\nx = 1",
}
"""A package that keeps to the table, but for its own `__init__`."""


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("rljax", include_external_packages=True)


@pytest.fixture
def build(tmp_path, monkeypatch):
    """From module names and their text to the imports of a package `house`."""
    monkeypatch.syspath_prepend(tmp_path)

    def graph_of(**changes):
        for name, text in (FILES | changes).items():
            path = tmp_path / "house" / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return grimp.build_graph("house", include_external_packages=True, cache_dir=None)

    yield graph_of
    sys.modules.pop("house", None)


def broken(graph, table=TABLE):
    return [(v.importer, v.imported) for v in broken_imports(graph, read_rooms(table), "house")]


def test_every_import_of_rljax_is_in_the_table(graph):
    assert broken_imports(graph, read_rooms(PAGE.read_text()), "rljax") == []


def test_every_package_and_module_has_a_room_and_every_room_exists():
    rooms = read_rooms(PAGE.read_text())
    files = (ROOT / "rljax").rglob("*.py")
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    found = {module: room_of(module, rooms, "rljax") for module in modules}
    assert [module for module, room in found.items() if room is None] == []
    assert set(found.values()) == set(rooms)


def test_the_table_allows_nothing_that_no_module_needs(graph):
    assert unused_permissions(graph, read_rooms(PAGE.read_text()), "rljax") == []


def test_trainer_and_pure_rooms_are_as_blind_as_promised():
    """What the table may never come to allow."""
    rooms = read_rooms(PAGE.read_text())
    hidden = {"algorithms", "losses", "advantages", "rollouts", "evaluation", "text", "tasks", "envs"}
    assert not rooms["training"].rooms & hidden
    for name in ("ops", "losses", "trees", "batching", "advantages", "plans", "algorithms"):
        assert rooms[name].packages <= {"jax", "jaxtyping", "numpy"}, name
    for name in ("text", "tasks", "envs", "envs.library", "envs.sandbox"):
        assert not rooms[name].packages & {"jax", "jaxlib", "flax", "chex", "optax"}, name
        assert rooms[name].rooms <= {"gguf_header", "settings", "text", "tasks", "envs", "envs.sandbox"}, name
    assert not rooms["settings"].rooms and not rooms["settings"].packages
    assert [name for name, room in rooms.items() if "flax" in room.packages] == ["models"]
    assert "envs.library" not in rooms["envs"].rooms


def test_a_module_outside_of_every_room_is_reported(build):
    assert broken(build()) == [("house", "")]
    assert broken(build(**{"attic": ""})) == [("house", ""), ("house.attic", "")]


@pytest.mark.parametrize(
    ("importer", "text", "imported"),
    [
        ("low.part", "import house.high.part", "house.high.part"),
        ("low.part", "def later():\n    from house.high import deep", "house.high.deep"),
        ("high.part", "import house.high.deep", "house.high.deep"),
        ("high.part", "import numpy.linalg", "numpy"),
        ("high.deep", "import house.low", "house.low"),
    ],
    ids=["upwards", "inside a function", "a sub-room beside __init__", "a package", "what its parent may"],
)
def test_an_import_that_the_table_lacks_is_reported(build, importer, text, imported):
    table = TABLE + "| `__init__.py` | nothing | | |\n"
    assert broken(build(), table) == []
    assert broken(build(**{importer: text}), table) == [(f"house.{importer}", imported)]


def test_an_entry_that_nothing_needs_is_reported(build):
    table = TABLE.replace("| arrays | |", "| arrays | | jax,")
    assert unused_permissions(build(), read_rooms(table), "house") == ["low: jax"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("| `low/` | again | | |", "two rows for `low/`"),
        ("| `top/` | more | cellar | |", "lets top import cellar, which has no row"),
        ("| `a/` | one | b | |\n| `b/` | two | a | |", "has a circle: "),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        read_rooms(f"{TABLE}{row}\n")
    with pytest.raises(ValueError, match="no table of rooms"):
        read_rooms("# A page")


def test_lint_imports_fails_for_a_violation(build, tmp_path, monkeypatch):
    """The contract as import-linter runs it, from a configuration like the project's."""
    (tmp_path / "page.md").write_text(TABLE + "| `__init__.py` | nothing | | |\n")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.importlinter]\nroot_package = "house"\ninclude_external_packages = true\n'
        'contract_types = ["rooms: rljax.testing.layering.RoomsContract"]\n'
        '[[tool.importlinter.contracts]]\nname = "rooms"\ntype = "rooms"\ntable = "page.md"\n'
    )
    monkeypatch.chdir(tmp_path)
    build()
    assert use_cases.lint_imports(cache_dir=None)
    build(**{"low.part": "import house.high.part"})
    assert not use_cases.lint_imports(cache_dir=None)


def test_the_project_has_this_contract_and_no_other(monkeypatch):
    monkeypatch.chdir(ROOT)
    (contract,) = read_configuration()["contracts_options"]
    assert (contract["type"], contract["table"]) == ("rooms", "docs/architecture.md")
