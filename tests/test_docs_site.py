"""The site has every page, every page of the site is there, and it is built strictly."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def load():
    spec = importlib.util.spec_from_file_location("site_pages", DOCS / "site_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SITE = load()


def pages_of(nav):
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            for value in entry.values():
                yield from [value] if isinstance(value, str) else pages_of(value)


def test_every_page_stands_in_the_navigation_once():
    listed = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted([*(file.name for file in DOCS.glob("*.md")), *SITE.PAGES])


def test_every_room_has_a_page_of_its_public_names():
    rooms = SITE.rooms()
    assert {"losses", "advantages", "ops", "rollouts.engines", "types"} <= set(rooms)
    page = SITE.room_page("losses", rooms["losses"])
    assert page.startswith("# rljax.losses\n\nRatios,") and "\n        - token_ratio\n" in page
    # A function that is called as its module is named whole.
    assert "\n::: rljax.losses.policy_loss.policy_loss\n" in page and "        - policy_loss\n" not in page
    # A room without a page has nothing public.
    packages = {file.parent.name for file in (ROOT / "rljax").glob("*/__init__.py")} - {"cli", "configs"}
    assert packages <= set(rooms)


@pytest.mark.parametrize(
    ("target", "page", "leads"),
    [
        ("docs/forests.md", "README.md", "forests.md"),
        ("../BUILD.md", "docs/scale.md", "build.md"),
        ("viewer.md", "docs/scale.md", "viewer.md"),
        ("docs/quickstart.png", "README.md", "quickstart.png"),
        ("../configs/papers/grpo.py", "docs/papers.md", "source/configs/papers/grpo.py"),
        ("https://example.org/x", "README.md", "https://example.org/x"),
    ],
)
def test_links_of_the_repository_lead_to_the_same_place_in_the_site(target, page, leads):
    assert SITE.link_in_site(target, page) == leads


def test_files_that_are_linked_to_are_there():
    assert all((ROOT / file).exists() for file in SITE.linked_files())


def test_messages_that_are_explained_are_those_of_the_source():
    source = " ".join(re.sub(r'"\n\s+f?"', "", file.read_text()) for file in (ROOT / "rljax").rglob("*.py"))
    rows = re.findall(r"^\| `(.+?)`( \(of XLA\))? \|", (DOCS / "errors.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 20
    for message, is_of_others in rows:
        # Between values stand the words of one message.
        wanted = r".{0,80}?".join(re.escape(part) for part in message.split("..."))
        assert is_of_others or re.search(wanted, source), message


def test_configs_that_recipes_name_are_there():
    named = set(re.findall(r"`?(papers/\w+)", (DOCS / "recipes.md").read_text()))
    assert named and all((ROOT / "configs" / f"{name}.py").exists() for name in named)


def test_docstrings_hold_no_reference_that_leads_nowhere():
    """`[axis][axis]` outside of code is a link to Markdown, and its target a fault to a strict build."""
    found = {}
    for file in sorted((ROOT / "rljax").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                continue
            prose = re.sub(r"`[^`]*`|^ {4,}.*$", "", inspect.cleandoc(str(node.value.value)), flags=re.M)
            if re.search(r"\w\][\[(]", prose):
                found[f"{file.relative_to(ROOT)}:{node.lineno}"] = prose
    assert not found


def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

    index = (tmp_path / "site" / "index.html").read_text()
    assert "rljax" in index and 'href="forests/"' in index
    losses = (tmp_path / "site" / "api" / "losses" / "index.html").read_text()
    assert 'id="rljax.losses.policy_loss.policy_loss"' in losses and "Gradient flows through the log-probs" in losses
    assert (tmp_path / "site" / "source" / "configs" / "papers" / "grpo.py").is_file()
