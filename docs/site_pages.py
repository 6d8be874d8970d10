"""What `make docs` adds to the pages of docs/: README, BUILD and their like, files that pages link to, and a page of
reference for each room. A hook of mkdocs."""

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "index.md": "README.md",
    "build.md": "BUILD.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages that lie at the root of the repository, by their place in the site."""
SOURCES = "source"
"""Where the site has the files of the repository that pages link to."""

_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def rooms() -> dict[str, str]:
    """Each room with public names, and what it holds, in the order of docs/architecture.md."""
    table = (ROOT / "docs" / "architecture.md").read_text()
    found = re.findall(r"^\| `([\w/]+?)(?:\.py|/)` \| (.+?) \|", table, flags=re.MULTILINE)
    return {name.replace("/", "."): holds for name, holds in found if public_names(name)}


def public_names(room: str) -> list[str]:
    """What a room's `__all__` lists, or the names that a module of its own begins without an underscore."""
    package = ROOT / "rljax" / room / "__init__.py"
    file = package if package.exists() else ROOT / "rljax" / f"{room}.py"
    if not file.exists():
        return []
    tree = ast.parse(file.read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    own = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return [] if package.exists() else [name for name in own if not name.startswith("_")]


def room_page(room: str, holds: str) -> str:
    """Markdown with the docstrings of a room's public names."""
    path = room.replace(".", "/")
    names = public_names(path)
    # Of a function that is called as its module, the module would be shown.
    hidden = [name for name in names if (ROOT / "rljax" / path / f"{name}.py").exists()]
    listed = "".join(f"        - {name}\n" for name in names if name not in hidden)
    page = (
        f"# rljax.{room}\n\n{holds[0].upper()}{holds[1:]}.\n\n::: rljax.{room}\n    options:\n      members:\n{listed}"
    )
    own = "    options:\n      show_root_heading: true\n      show_root_toc_entry: true\n"
    return page + "".join(f"\n::: rljax.{room}.{name}.{name}\n{own}" for name in hidden)


def link_in_site(target: str, page: str) -> str:
    """Where a link of `page`, a path in the repository, leads in the site: to a page by its own place, to another
    file of the repository in `SOURCES`. Addresses stay."""
    if "://" in target or target.startswith("mailto:"):
        return target
    file = ((ROOT / page).parent / target).resolve().relative_to(ROOT).as_posix()
    placed = {source: place for place, source in PAGES.items()}
    if file in placed:
        return placed[file]
    if file.startswith("docs/") and not file.endswith(".py"):
        return file.removeprefix("docs/")
    return f"{SOURCES}/{file}"


def linked_files() -> set[str]:
    """Files of the repository outside of the site that pages link to."""
    pages = [*PAGES.values(), *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
    links = {link_in_site(target, page) for page in pages for _, target, _ in _LINK.findall((ROOT / page).read_text())}
    return {link.removeprefix(f"{SOURCES}/") for link in links if link.startswith(f"{SOURCES}/")}


def on_config(config: Any) -> Any:
    """Adds the rooms to the navigation, and headings their names as repositories have them."""
    from pymdownx.slugs import slugify

    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    config.nav.append({"API by room": [{f"rljax.{room}": f"api/{room}.md"} for room in rooms()]})
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Adds what does not lie in docs/."""
    from mkdocs.structure.files import File

    for place, source in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text()))
    for room, holds in rooms().items():
        files.append(File.generated(config, f"api/{room}.md", content=room_page(room, holds)))
    for file in sorted(linked_files()):
        if (ROOT / file).is_file():
            files.append(File.generated(config, f"{SOURCES}/{file}", abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns links of the repository into those of the site."""
    place = page.file.src_uri
    if place.startswith("api/"):
        return markdown
    source = PAGES.get(place, f"docs/{place}")
    return _LINK.sub(lambda found: found[1] + link_in_site(found[2], source) + found[3], markdown)
