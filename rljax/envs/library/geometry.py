"""Plane figures that are drawn on and looked at: points whose coordinates stay hidden, and what is true of them.

A point is an array of its places in several samples of one figure: the diagram itself, and re-samplings in which the
points that are free lie elsewhere. What holds in all of them is no accident of numbers.
"""

import itertools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

Places = Float[np.ndarray, "samples 2"]
"""Where a point lies in each sample, float64."""

TOLERANCE = 1e-6
"""Error up to which a predicate holds: of lengths and distances, of sines and cosines, and of angles in radians."""
FARTHEST = 1e3
"""Largest coordinate that is drawn; beyond it rounding would count."""
MOST_POINTS = 24
"""Points on a board at most, which bounds the work of looking at it."""

_POINT = r"[A-Z]\d?'{0,2}"
_LINE = r"[a-z]\d?"
_IN_WORDS = {1: "a point, such as A", 2: "two points, such as BC", 3: "an angle of three points, such as ABC"}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Degenerate(ValueError):
    """What is asked for is well said and does not exist: the line through a single point, where parallels meet."""


class Line(NamedTuple):
    """A line in every sample."""

    at: Places
    """A point of it."""
    unit: Places
    """Its direction, of length 1."""


@dataclass(frozen=True)
class Board:
    """What is drawn. Constructions return another board."""

    points: Mapping[str, Places]
    lines: Mapping[str, Line] = field(default_factory=dict)
    """Lines with names of their own; any two points are a line, too."""

    def point(self, name: str) -> Places:
        """Raises ValueError for a name that is none, or of no point."""
        (name,) = read_points(name, 1)
        if name not in self.points:
            raise ValueError(f"there is no point {name}; there are {', '.join(self.points)}")
        return self.points[name]

    def ends(self, pair: str) -> tuple[Places, Places]:
        """The ends of a segment such as `BC`. Raises ValueError as `point` does."""
        first, second = read_points(pair, 2)
        return self.point(first), self.point(second)

    def line(self, text: str) -> Line:
        """Of a name, or through two points. Raises ValueError as `point` does, Degenerate where both are one."""
        if re.fullmatch(_LINE, text):
            if text not in self.lines:
                raise ValueError(f"there is no line {text}; a line is two points, such as BC, or one that was drawn")
            return self.lines[text]
        start, end = self.ends(text)
        return Line(start, direction(start, end, text))


def read_points(text: str, count: int) -> tuple[str, ...]:
    """The names of so many points that are written without space. Raises ValueError for anything else."""
    match = re.fullmatch(f"({_POINT})" * count, text.strip())
    if match is None:
        raise ValueError(f"{text[:30]!r} is not {_IN_WORDS[count]}")
    return match.groups()


def names_in(text: str) -> tuple[str, ...]:
    """Names of points and lines that an argument of a construction or predicate is made of."""
    return (text,) if re.fullmatch(_LINE, text) else tuple(re.findall(_POINT, text))


def length(start: Places, end: Places) -> Float[np.ndarray, " samples"]:
    """Distance of two points."""
    return np.hypot(*(end - start).T)


def cross(u: Float[np.ndarray, "*b 2"], v: Float[np.ndarray, "*b 2"]) -> Float[np.ndarray, "*b"]:
    """`u_x v_y - u_y v_x`."""
    return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]


def dot(u: Float[np.ndarray, "*b 2"], v: Float[np.ndarray, "*b 2"]) -> Float[np.ndarray, "*b"]:
    """`u_x v_x + u_y v_y`."""
    return u[..., 0] * v[..., 0] + u[..., 1] * v[..., 1]


def direction(start: Places, end: Places, name: str) -> Places:
    """The unit vector from one point to another. Raises Degenerate, with the `name` of both, where they are one."""
    far = length(start, end)
    if not np.all(far > TOLERANCE):
        raise Degenerate(f"the points of {name} are one")
    return (end - start) / far[:, None]


def turned(point: Places, centre: Places, degrees: float | Float[np.ndarray, " samples"]) -> Places:
    """`point` turned counterclockwise about `centre`."""
    angle = np.broadcast_to(np.radians(degrees), len(point))
    x, y = (point - centre).T
    return centre + np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], axis=1)


def projected(point: Places, line: Line) -> Places:
    """The foot of the perpendicular from a point to a line."""
    return line.at + dot(point - line.at, line.unit)[:, None] * line.unit


def meeting(first: Line, second: Line) -> Places:
    """Where two lines meet. Raises Degenerate where they are parallel, or one."""
    sine = cross(first.unit, second.unit)
    if not np.all(np.abs(sine) > TOLERANCE):
        raise Degenerate("these lines are parallel, or one: they meet in no single point")
    along = cross(second.at - first.at, second.unit) / sine
    return first.at + along[:, None] * first.unit


CONSTRUCTIONS: Mapping[str, tuple[str, ...]] = {
    "midpoint": ("point", "point"),
    "foot": ("point", "line"),
    "parallel": ("point", "line"),
    "intersect": ("line", "line"),
    "reflect": ("point", "line"),
    "rotate": ("point", "point", "degrees"),
}
"""What can be drawn, and from what. All are points but a parallel, which is a line."""


@dataclass(frozen=True)
class Construction:
    """One thing to draw."""

    kind: str
    """One of `CONSTRUCTIONS`."""
    arguments: tuple[str, ...]
    """Names of points (`A`) and lines (`BC`, or the name of one that was drawn)."""
    degrees: int | float = 0.0
    """Of a rotation, counterclockwise."""
    name: str = ""
    """Of what is drawn; empty for the first letter that is free."""

    @property
    def parents(self) -> tuple[str, ...]:
        """Names that it is drawn from."""
        return tuple(name for argument in self.arguments for name in names_in(argument))


def draw(board: Board, construction: Construction) -> tuple[Board, str]:
    """The board with one thing more, and its name.

    Raises ValueError for names that are taken, none, or of nothing, for an angle beyond 3600 degrees, and for a board
    that is full; Degenerate for what does not exist, or lies beyond `FARTHEST`.
    """
    name = _free_name(board, construction)
    if len(board.points) + len(board.lines) >= MOST_POINTS:
        raise ValueError(f"the board is full: it holds {MOST_POINTS} points and lines; answer now")

    drawn = _drawn(board, construction)
    if isinstance(drawn, Line):
        return replace(board, lines={**board.lines, name: drawn}), name
    if not np.all(np.abs(drawn) <= FARTHEST):
        raise Degenerate(f"{name} would lie too far away to be drawn")
    return replace(board, points={**board.points, name: drawn}), name


def _free_name(board: Board, construction: Construction) -> str:
    is_line = construction.kind == "parallel"
    wanted = construction.name.strip().removeprefix("->").strip()
    taken = {**board.points, **board.lines}
    if not wanted:
        letters = _LETTERS.lower() if is_line else _LETTERS
        return next(name for digit in ("", *"0123456789") for c in letters if (name := c + digit) not in taken)
    if not re.fullmatch(_LINE if is_line else _POINT, wanted):
        what = "a small letter, such as l" if is_line else "a capital letter, such as P"
        raise ValueError(f"{wanted[:30]!r} cannot be the name of a {'line' if is_line else 'point'}; take {what}")
    if wanted in taken:
        raise ValueError(f"the name {wanted} is taken")
    return wanted


def _drawn(board: Board, construction: Construction) -> Places | Line:
    first, second = construction.arguments
    match construction.kind:
        case "midpoint":
            return (board.point(first) + board.point(second)) / 2
        case "foot":
            return projected(board.point(first), board.line(second))
        case "parallel":
            return Line(board.point(first), board.line(second).unit)
        case "intersect":
            return meeting(board.line(first), board.line(second))
        case "reflect":
            return 2 * projected(board.point(first), board.line(second)) - board.point(first)
        case "rotate":
            # Compared as it is: a whole number may be beyond what a float can hold. NaN is refused, too.
            if not abs(construction.degrees) <= 3600:
                raise ValueError("an angle must be a number of degrees from -3600 to 3600")
            return turned(board.point(first), board.point(second), float(construction.degrees))
        case _:
            raise ValueError(f"{construction.kind[:30]!r} is not one of {', '.join(CONSTRUCTIONS)}")


@dataclass(frozen=True)
class Predicate:
    """Something that is said of a board, such as `perp(AH,BC)`."""

    kind: str
    """One of `PREDICATES`."""
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}({','.join(self.arguments)})"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of points and lines in it."""
        return tuple(name for argument in self.arguments for name in names_in(argument))


_Errors = Float[np.ndarray, " samples"]


def _same(a: Places, b: Places) -> _Errors:
    return length(a, b)


def _on(point: Places, line: Line) -> _Errors:
    return np.abs(cross(line.unit, point - line.at))


def _midpoint(point: Places, ends: tuple[Places, Places]) -> _Errors:
    return length(point, (ends[0] + ends[1]) / 2)


def _perp(first: Line, second: Line) -> _Errors:
    return np.abs(dot(first.unit, second.unit))


def _parallel(first: Line, second: Line) -> _Errors:
    # A line is no parallel of itself.
    return np.where(_on(first.at, second) > TOLERANCE, np.abs(cross(first.unit, second.unit)), np.inf)


def _equal(first: tuple[Places, Places], second: tuple[Places, Places]) -> _Errors:
    return np.abs(length(*first) - length(*second))


def _angle(first: Float[np.ndarray, " samples"], second: Float[np.ndarray, " samples"]) -> _Errors:
    return np.abs(first - second)


def _concyclic(a: Places, b: Places, c: Places, d: Places) -> _Errors:
    # Four points lie on a circle or a line just where their cross-ratio is real.
    z = [point[:, 0] + 1j * point[:, 1] for point in (a, b, c, d)]
    below = (z[1] - z[2]) * (z[0] - z[3])
    ratio = (z[0] - z[2]) * (z[1] - z[3]) * np.conj(below)
    on_line = np.abs(cross(b - a, c - a)) <= TOLERANCE
    return np.where(on_line | (np.abs(ratio) <= TOLERANCE), np.inf, np.abs(ratio.imag) / np.abs(ratio))


PREDICATES: Mapping[str, tuple[tuple[str, ...], Callable[..., _Errors]]] = {
    "same": (("point", "point"), _same),
    "on": (("point", "line"), _on),
    "midpoint": (("point", "segment"), _midpoint),
    "perp": (("line", "line"), _perp),
    "parallel": (("line", "line"), _parallel),
    "equal": (("segment", "segment"), _equal),
    "angle": (("angle", "angle"), _angle),
    "concyclic": (("point",) * 4, _concyclic),
}
"""What can be said, of what, and how far it is from being true in each sample. None knows a number, so no answer can
be tried out."""


def read_predicate(text: str) -> Predicate:
    """Raises ValueError, saying what is wrong, for another form, kind or number of arguments."""
    match = re.fullmatch(r"\s*(\w{1,20})\s*\(([^()]{0,60})\)\s*", text)
    if match is None:
        raise ValueError(f"{text[:30]!r} is no predicate; write one such as perp(AH,BC) or equal(AM,BM)")
    kind = match[1]
    arguments = tuple(argument.strip() for argument in match[2].split(","))
    if kind not in PREDICATES:
        raise ValueError(f"there is no predicate {kind!r}; there are {', '.join(PREDICATES)}")
    shapes, _ = PREDICATES[kind]
    if len(arguments) != len(shapes):
        raise ValueError(f"{kind} is said of {' and '.join(shapes)}, {len(shapes)} arguments, not {len(arguments)}")
    return Predicate(kind, arguments)


def holds(board: Board, predicate: Predicate) -> bool:
    """Whether it is true in every sample, to `TOLERANCE`. Raises as `Board.line` does."""
    shapes, error = PREDICATES[predicate.kind]
    values = [_resolved(board, text, shape) for text, shape in zip(predicate.arguments, shapes, strict=True)]
    return bool(np.all(error(*values) <= TOLERANCE))


def _resolved(board: Board, text: str, shape: str) -> Any:
    match shape:
        case "point":
            return board.point(text)
        case "line":
            return board.line(text)
        case "segment":
            return board.ends(text)
        case _:
            return angle(board, text)


def angle(board: Board, text: str) -> Float[np.ndarray, " samples"]:
    """Of three points the angle at the middle one, in radians from 0 to pi. Raises as `Board.line` does."""
    a, at, b = read_points(text, 3)
    u, v = (direction(board.point(at), board.point(end), at + end) for end in (a, b))
    return np.arctan2(np.abs(cross(u, v)), dot(u, v))


def fact(board: Board, predicate: Predicate, known: Mapping[str, Places]) -> Hashable | None:
    """What a predicate says of the points `known`: equal for predicates that say the same in other names.

    A point is known by its place, and a line by the known points on it, so `perp(AH,BC)` and `perp(AH,HC)` are one
    fact. None for what speaks of points that are not known, and for what is true of any points: `on(B,BC)`.
    """
    shapes, _ = PREDICATES[predicate.kind]
    parts = [_part(board, text, shape, known) for text, shape in zip(predicate.arguments, shapes, strict=True)]
    if any(part is None for part in parts):
        return None

    match predicate.kind:
        case "on" | "midpoint":
            point, others = parts
            # A point lies on any line that is named by it.
            named = {_known(board.point(name), known) for name in names_in(predicate.arguments[1]) if name[0].isupper()}
            return None if point in named else (predicate.kind, point, others)
        case _:
            # The order of the rest changes nothing.
            return None if len(set(parts)) < len(parts) else (predicate.kind, frozenset(parts))


def _part(board: Board, text: str, shape: str, known: Mapping[str, Places]) -> Hashable | None:
    match shape:
        case "point":
            return _known(board.point(text), known)
        case "line":
            line = board.line(text)
            on_it = frozenset(name for name, point in known.items() if np.all(_on(point, line) <= TOLERANCE))
            return on_it if len(on_it) > 1 else None
        case "segment":
            ends = frozenset(_known(board.point(name), known) for name in read_points(text, 2))
            return None if None in ends or len(ends) < 2 else ends
        case _:
            a, at, b = (_known(board.point(name), known) for name in read_points(text, 3))
            return None if None in (a, at, b) else (at, frozenset({a, b}))


def _known(point: Places, known: Mapping[str, Places]) -> str | None:
    return next((name for name, place in known.items() if np.all(np.abs(place - point) <= TOLERANCE)), None)


def incidences(board: Board, name: str) -> list[Predicate]:
    """What is true of a point or a line that was drawn last, beside the points that were there.

    Of a point: the one that it is; else on which lines it lies, which of them cross there at a right angle, midpoints,
    and of every line and segment from it to another point one that it is perpendicular to, parallel to, as long as. Of
    a line: the points on it, but the first, and one line that it is perpendicular to. What follows from another one of
    these is left out.
    """
    if name in board.lines:
        return _of_line(board, name)

    new = board.points[name]
    others = _apart({other: point for other, point in board.points.items() if other != name})
    twin = _known(new, others)
    if twin is not None:
        return [Predicate("same", (name, twin))]

    old = _lines_of(others)
    through = [pair for pair, line in old.items() if np.all(_on(new, line) <= TOLERANCE)]
    on_old = {end for pair in through for end in others if np.all(_on(others[end], old[pair]) <= TOLERANCE)}
    found = [Predicate("on", (name, pair)) for pair in through]
    found += [Predicate("on", (name, own)) for own, line in board.lines.items() if np.all(_on(new, line) <= TOLERANCE)]

    halves = _halves(name, new, others)
    found += halves
    # Two old lines may cross here at a right angle.
    for index, pair in enumerate(through):
        found += _first("perp", pair, old[pair], {other: old[other] for other in through[:index]}, _perp)
    fresh = {name + end: Line(new, direction(new, at, name + end)) for end, at in others.items() if end not in on_old}
    for pair, line in fresh.items():
        earlier = [other for other in fresh if other < pair]
        found += _first("perp", pair, line, old | {other: fresh[other] for other in earlier}, _perp)
        found += _first("parallel", pair, line, old, _parallel)
    return found + _as_long(name, new, others, halves)


def _of_line(board: Board, name: str) -> list[Predicate]:
    line = board.lines[name]
    on_it = [
        Predicate("on", (end, name))
        for end, point in board.points.items()
        if np.all(_on(point, line) <= TOLERANCE) and not np.all(length(point, line.at) <= TOLERANCE)
    ]
    return on_it + _first("perp", name, line, _lines_of(_apart(board.points)), _perp)


def _first(
    kind: str, own: str, line: Line, others: Mapping[str, Line], error: Callable[[Line, Line], _Errors]
) -> list[Predicate]:
    pair = next((pair for pair, other in others.items() if np.all(error(line, other) <= TOLERANCE)), None)
    return [] if pair is None else [Predicate(kind, (own, pair))]


def _apart(points: Mapping[str, Places]) -> dict[str, Places]:
    """Of points that are one the first alone; and none that another one meets in some sample."""
    kept: dict[str, Places] = {}
    for name, point in points.items():
        if all(np.all(length(point, other) > TOLERANCE) for other in kept.values()):
            kept[name] = point
    return kept


def _lines_of(points: Mapping[str, Places]) -> dict[str, Line]:
    """The lines through two points, each once, by the first two of its points."""
    lines: dict[str, Line] = {}
    covered: set[frozenset[str]] = set()
    for first, second in itertools.combinations(points, 2):
        if frozenset({first, second}) in covered:
            continue
        line = Line(points[first], direction(points[first], points[second], first + second))
        on_it = [name for name, point in points.items() if np.all(_on(point, line) <= TOLERANCE)]
        covered |= {frozenset(pair) for pair in itertools.combinations(on_it, 2)}
        lines[first + second] = line
    return lines


def _halves(name: str, new: Places, others: Mapping[str, Places]) -> list[Predicate]:
    found = []
    for first, second in itertools.combinations(others, 2):
        if np.all(_midpoint(new, (others[first], others[second])) <= TOLERANCE):
            found.append(Predicate("midpoint", (name, first + second)))
    for middle, end in itertools.permutations(others, 2):
        if np.all(_midpoint(others[middle], (new, others[end])) <= TOLERANCE):
            found.append(Predicate("midpoint", (middle, name + end)))
    return found


def _as_long(name: str, new: Places, others: Mapping[str, Places], halves: Sequence[Predicate]) -> list[Predicate]:
    """Of every segment from the new point one that is as long: the first old one, or the first from it."""
    # Halves are equal, as is said already; of two halves from the new point one tells for both.
    halved = set()
    partners: dict[str, str] = {}
    for middle, first, second in (half.names for half in halves):
        halved.add(frozenset({frozenset({middle, first}), frozenset({middle, second})}))
        if middle == name:
            partners |= {first: second, second: first}

    pairs = itertools.combinations(others, 2)
    segments = {first + second: length(others[first], others[second]) for first, second in pairs}
    found = []
    for end, point in others.items():
        far = length(new, point)
        pair = next((pair for pair, other in segments.items() if np.all(np.abs(other - far) <= TOLERANCE)), None)
        is_told = end in partners and name + partners[end] in segments
        if pair is not None and not is_told:
            is_half = frozenset({frozenset({name, end}), frozenset(names_in(pair))}) in halved
            found += [] if is_half else [Predicate("equal", (name + end, pair))]
        segments[name + end] = far
    return found
