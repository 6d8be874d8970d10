"""The Python blocks of README and docs run as they stand, each page from top to bottom."""

import re
from pathlib import Path

import pytest

from rljax.envs import Sandbox

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "BUILD.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def can_isolate():
    try:
        with Sandbox(workers=1):
            return True
    except ValueError:
        return False


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_the_python_of_a_page_runs(page):
    if page.stem == "environments" and not can_isolate():
        pytest.skip("no isolation of programs on this machine")
    names = {"__name__": page.stem}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target
