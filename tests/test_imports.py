"""Whatever a file of the repository imports from rljax is there. mypy looks away from modules that it cannot find."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from rljax.moved import MODULES

ROOT = Path(__file__).parent.parent
EXPECTED = re.compile(r"pytest\.raises\((\(.*)?(ImportError|ModuleNotFoundError)")
"""Opens a block that imports what is not there, to see the error."""


def python_files():
    """The Python files that git knows; without git, those of the folders that hold any."""
    listed = subprocess.run(["git", "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        files = {ROOT / name for name in listed.stdout.split("\0") if name}
        return sorted(file for file in files if file.exists())
    folders = ("rljax", "tests", "launch", "configs", "benchmarks", "docs")
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def nodes(tree):
    """The nodes of a file, without blocks that expect an import to fail."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.With) and any(EXPECTED.match(ast.unparse(item)) for item in node.items):
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def imported(tree):
    """(line, module, name or None) of every import of rljax in a file, those inside functions included."""
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "rljax":
                    yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "rljax":
            for alias in node.names:
                yield node.lineno, node.module, alias.name


def defined(module):
    """The names at a module's top level and its submodules, read without running it; None where there is no module."""
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.exists():
        return None
    names = {child.stem for child in path.glob("*.py")} | {child.name for child in path.glob("*/")}
    waiting = list(ast.parse(file.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            waiting += ast.iter_child_nodes(node)
    return names


def problems(text, known):
    """The imports of a file's text that lead nowhere."""
    for line, module, name in imported(ast.parse(text)):
        if module not in known:
            known[module] = defined(module)
        if known[module] is None:
            yield f"line {line}: no module {module}"
        elif name not in (None, "*") and name not in known[module]:
            yield f"line {line}: {module} has no {name}"


def test_every_import_of_rljax_leads_somewhere():
    known = {}
    found = {str(file.relative_to(ROOT)): list(problems(file.read_text(), known)) for file in python_files()}
    assert len(found) > 300
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import rljax.nowhere", "line 1: no module rljax.nowhere"),
        ("def f():\n    from rljax.ops import nothing", "line 2: rljax.ops has no nothing"),
        ("from rljax.rollouts.plans import RolloutPlan", "line 1: no module rljax.rollouts.plans"),
    ],
)
def test_an_import_that_leads_nowhere_is_found(text, problem):
    assert list(problems(text, {})) == [problem]
    assert (
        list(problems(f"with pytest.raises(ModuleNotFoundError):\n    {text.strip().splitlines()[-1].strip()}", {}))
        == []
    )
    assert list(problems("from rljax import ops\nfrom rljax.ops import masked_mean", {})) == []


def test_where_a_moved_module_is_said_to_be_there_is_one():
    for old, new in MODULES.items():
        assert defined(old) is None, old
        first = new.split(" ")[0].split(",")[0]
        assert defined(first) is not None, new
