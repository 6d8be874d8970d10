"""The contract of `lint-imports`: a module imports what the table of rooms in docs/architecture.md allows, and no more.

The table is the only list of rooms. Its columns are a room, what it holds, the rooms that it may import and the
packages that it may import beside the standard library.
"""

import dataclasses
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output

HEADER = ("room", "holds", "may import", "packages")


@dataclasses.dataclass(frozen=True)
class Room:
    """A row of the table."""

    module: str
    """Dotted name below the root package; empty for the root package's own `__init__`."""
    rooms: frozenset[str]
    """Rooms that it may import, as dotted names; a sub-room is not included in the room that it lies in."""
    packages: frozenset[str]
    """Packages that it may import."""


@dataclasses.dataclass(frozen=True, order=True)
class Violation:
    """An import that the table does not allow."""

    importer: str
    imported: str
    reason: str


def read_rooms(page: str) -> dict[str, Room]:
    """The rooms of a page of Markdown, by their dotted names.

    ValueError for a page without the table, for a room that stands there twice, for one that may import a room that is
    not there, and for a circle. A sub-room may stand on the room that it lies in although that room's `__init__` makes
    it public: `broken_imports` lets no other module of the room import it.
    """
    rooms: dict[str, Room] = {}
    for cells in _rows(page):
        module = _dotted(cells[0])
        if module in rooms:
            raise ValueError(f"the table of rooms has two rows for {cells[0]}")
        rooms[module] = Room(
            module=module,
            rooms=frozenset(map(_dotted, _listed(cells[2]))),
            packages=frozenset(_listed(cells[3])),
        )

    for room in rooms.values():
        if unknown := sorted(room.rooms - rooms.keys()):
            raise ValueError(f"the table of rooms lets {room.module} import {unknown[0]}, which has no row")

    # Without the sub-rooms that only a room's `__init__` imports: with them room and sub-room would be a circle.
    floors = {name: {r for r in room.rooms if not _stands_on(r, name, rooms)} for name, room in rooms.items()}

    # The order is of no use here; to ask for it is how the sorter reports a circle.
    try:
        tuple(graphlib.TopologicalSorter(floors).static_order())
    except graphlib.CycleError as error:
        raise ValueError(f"the table of rooms has a circle: {' <- '.join(error.args[1])}") from None
    return rooms


def room_of(module: str, rooms: dict[str, Room], root: str) -> str | None:
    """The room that a module is in, the innermost if there are several; None where the table has none for it."""
    name = module.removeprefix(root).removeprefix(".")
    while name not in rooms:
        if "." not in name:
            return None
        name = name.rpartition(".")[0]
    return name


def imports(graph: ImportGraph, root: str) -> Iterator[tuple[str, str]]:
    """Every (importer, imported) of the modules of the package `root`."""
    for importer in sorted(graph.modules):
        if _inside(importer, root):
            for imported in sorted(graph.find_modules_directly_imported_by(importer)):
                yield importer, imported


def broken_imports(graph: ImportGraph, rooms: dict[str, Room], root: str) -> list[Violation]:
    """The direct imports that the table does not allow, and modules that it has no room for. Indirect imports need no
    look of their own: each of their steps is a direct one."""
    broken = [
        Violation(module, "", "no row of the table holds this module")
        for module in sorted(graph.modules)
        if _inside(module, root) and room_of(module, rooms, root) is None
    ]

    for importer, imported in imports(graph, root):
        home = room_of(importer, rooms, root)
        if home is None:
            continue

        # A package outside counts as a whole: the table says nothing of its modules.
        if not _inside(imported, root):
            package = imported.partition(".")[0]
            if package not in rooms[home].packages | sys.stdlib_module_names:
                broken.append(Violation(importer, imported, f"{package} is no package of {home}"))
            continue

        target = room_of(imported, rooms, root)
        if target is None or target == home:
            continue

        if target not in rooms[home].rooms:
            broken.append(Violation(importer, imported, f"{home} may not import {target}"))
        # The sub-room is built on its room, so the room may make it public but not be built on it.
        elif _stands_on(target, home, rooms) and importer != f"{root}.{home}":
            broken.append(Violation(importer, imported, f"only the __init__ of {home} may import {target}"))
    return broken


def unused_permissions(graph: ImportGraph, rooms: dict[str, Room], root: str) -> list[str]:
    """What the table allows and no module does, as `room: name`."""
    used: dict[str, set[str]] = {name: set() for name in rooms}
    for importer, imported in imports(graph, root):
        home = room_of(importer, rooms, root)
        name = room_of(imported, rooms, root) if _inside(imported, root) else imported.partition(".")[0]
        if home is not None and name is not None:
            used[home].add(name)
    return [
        f"{name or root}: {allowed}"
        for name, room in rooms.items()
        for allowed in sorted((room.rooms | room.packages) - used[name])
    ]


class RoomsContract(Contract):
    """Configuration: `table` is the page of Markdown with the table, from the folder that `lint-imports` runs in."""

    table = fields.StringField()

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Kept if no import breaks the table."""
        (root,) = self.session_options["root_packages"]
        rooms = read_rooms(Path(str(self.table)).read_text())
        broken = broken_imports(graph, rooms, root)
        return ContractCheck(kept=not broken, metadata={"broken": broken})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """One line for each import that breaks it."""
        for violation in check.metadata["broken"]:
            imports = f" -> {violation.imported}" if violation.imported else ""
            output.print_error(f"{violation.importer}{imports}: {violation.reason}", bold=False)
        output.print_error(f"The table of rooms is in {self.table}.", bold=False)
        output.new_line()


def _rows(page: str) -> Iterator[list[str]]:
    """The cells of the table whose header is `HEADER`, row by row."""
    lines = iter(page.splitlines())
    for line in lines:
        if tuple(_cells(line)) == HEADER:
            next(lines)  # the rule under the header
            break
    else:
        raise ValueError(f"no table of rooms: a line | {' | '.join(HEADER)} | opens it")
    for line in lines:
        if not line.startswith("|"):
            return
        yield _cells(line)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _listed(cell: str) -> list[str]:
    return [name.strip() for name in cell.split(",") if name.strip()]


def _dotted(name: str) -> str:
    """`envs/library/` and `types.py` as they are imported."""
    return re.sub(r"(^|\.)__init__$", "", name.strip("`").strip("/").removesuffix(".py").replace("/", "."))


def _stands_on(sub_room: str, room: str, rooms: dict[str, Room]) -> bool:
    """Whether `sub_room` lies in `room` and imports it."""
    return _inside(sub_room, room) and room in rooms[sub_room].rooms


def _inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")
