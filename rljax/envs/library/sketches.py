"""Problems of plane geometry, made without a picture and without a model: figures, what is known, what is asked.

A problem is a figure with what is left open in it, so that its answer is computed and what is known is true of it. Each
has a solution of its own: what to draw, and what to assert of the drawing. The published problems of GeoSketch
(2509.22460) have no licence that would let them be passed on.
"""

import itertools
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from rljax.envs.library.geometry import (
    TOLERANCE,
    Board,
    Places,
    angle,
    direction,
    holds,
    length,
    read_predicate,
    turned,
)
from rljax.tasks.examples import digest

NUMBER = "number"
RATIO = "ratio"
DESCRIPTOR = "descriptor"
"""Kinds of answers."""

SPLITS = ("all", "train", "test")

_TRIES = 500


@dataclass(frozen=True)
class Problem:
    """A problem in points A, B, ..., which rows name anew."""

    numbers: tuple[int | str, ...]
    """What distinguishes it from the others of its family; it decides of its split."""
    figure: tuple[str, ...]
    """Steps that place the points (`sample`)."""
    known: tuple[str, ...]
    """What is told: predicates and measures (`is_true`)."""
    asked: str
    """Capital letters in it are points."""
    kind: str
    """`NUMBER`, `RATIO` or `DESCRIPTOR`."""
    answer: str
    solution: tuple[str, ...]
    """Constructions and assertions, in order, as `geosketch.ACTIONS` reads them."""


def altitude(rng: random.Random) -> Problem:
    """The height on the hypotenuse."""
    one, other, hypotenuse = rng.choice([(3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25), (20, 21, 29)])
    times = rng.randint(1, 6)
    a, b = rng.sample([one * times, other * times], 2)
    return Problem(
        numbers=(a, b),
        figure=("A=free()", f"B=ray(A,{a})", f"C=turn(B,A,90,{b / a!r})"),
        known=("perp(AB,AC)", f"AB={a}", f"AC={b}"),
        asked="distance from A to BC",
        kind=NUMBER,
        answer=_told(a * b / (hypotenuse * times)),
        solution=("foot(A,BC,->H)", "assert(on(H,BC))", "assert(perp(AH,BC))"),
    )


def median(rng: random.Random) -> Problem:
    """The median to the hypotenuse is half of it."""
    c = rng.randint(7, 60)
    return Problem(
        numbers=(c,),
        figure=("B=free()", f"C=ray(B,{c})", "A=circle(B,C)"),
        known=("perp(AB,AC)", f"BC={c}"),
        asked="distance from A to the middle of BC",
        kind=NUMBER,
        answer=_told(c / 2),
        solution=("midpoint(B,C,->M)", "assert(midpoint(M,BC))", "assert(equal(AM,BM))"),
    )


def mirror(rng: random.Random) -> Problem:
    """A mirror image is twice as far as the mirror."""
    d = rng.randint(2, 49)
    return Problem(
        numbers=(d,),
        figure=("B=free()", "C=ray(B,?)", "D=between(B,C,?)", f"A=normal(D,B,C,{d})"),
        known=("on(D,BC)", "perp(AD,BC)", f"AD={d}"),
        asked="distance from A to its mirror image in BC",
        kind=NUMBER,
        answer=_told(2 * d),
        solution=("reflect(A,BC,->E)", "assert(midpoint(D,AE))", "assert(equal(AB,BE))"),
    )


def midline(rng: random.Random) -> Problem:
    """A parallel to one side cuts off a triangle like the whole."""
    p, q, times = rng.randint(1, 4), rng.randint(1, 4), rng.randint(2, 9)
    n = (p + q) * times
    return Problem(
        numbers=(p, q, n),
        figure=("A=free()", "B=free()", f"C=ray(B,{n})", f"D=between(A,B,{p / (p + q)!r})"),
        known=("on(D,AB)", f"AD:DB={p}:{q}", f"BC={n}"),
        asked="length of the parallel to BC from D to AC",
        kind=NUMBER,
        answer=_told(p * times),
        solution=("parallel(D,BC,->l)", "intersect(l,AC,->E)", "assert(on(E,AC))", "assert(parallel(DE,BC))"),
    )


def cut(rng: random.Random) -> Problem:
    """A parallel to one side cuts the two others alike."""
    p, q = rng.sample(range(1, 10), 2)
    return Problem(
        numbers=(p, q),
        figure=("A=free()", "B=free()", "C=free()", f"D=between(A,B,{p / (p + q)!r})"),
        known=("on(D,AB)", f"AD:DB={p}:{q}"),
        asked="ratio of AE to AC where E is on AC and DE is parallel to BC",
        kind=RATIO,
        answer=f"{p}:{p + q}",
        solution=("parallel(D,BC,->l)", "intersect(l,AC,->E)", "assert(on(E,AC))", "assert(parallel(DE,BC))"),
    )


_SHAPES = {
    "neither": ("D=turn(B,A,?,?)", ()),
    "perpendicular": ("D=turn(B,A,?,1)", ("equal(AB,AD)",)),
    "equal": ("D=turn(B,A,90,?)", ("perp(AB,AD)",)),
    "both": ("D=turn(B,A,90,1)", ("perp(AB,AD)", "equal(AB,AD)")),
}
"""Parallelograms by what their diagonals are, with what tells them."""


def diagonals(rng: random.Random) -> Problem:
    """What the diagonals of a parallelogram are to each other."""
    a = rng.randint(3, 30)
    shape = rng.choice(list(_SHAPES))
    step, told = _SHAPES[shape]
    seen = {"perpendicular": ("perp(AC,BD)",), "equal": ("equal(AO,BO)",), "both": ("perp(AC,BD)", "equal(AO,BO)")}
    return Problem(
        numbers=(shape, a),
        figure=("A=free()", f"B=ray(A,{a})", step, "C=shift(D,A,B)"),
        known=("parallel(AB,CD)", "parallel(AD,BC)", *told, f"AB={a}"),
        asked="what AC and BD are: perpendicular, equal, both or neither",
        kind=DESCRIPTOR,
        answer=shape,
        solution=(
            "intersect(AC,BD,->O)",
            "assert(midpoint(O,AC))",
            *(f"assert({predicate})" for predicate in seen.get(shape, ("midpoint(O,BD)",))),
        ),
    )


def landing(rng: random.Random) -> Problem:
    """Where a corner of a parallelogram falls when it is mirrored in the diagonal."""
    a = rng.randint(3, 30)
    shape = rng.choice(list(_SHAPES))
    step, told = _SHAPES[shape]
    return Problem(
        numbers=(shape, a),
        figure=("A=free()", f"B=ray(A,{a})", step, "C=shift(D,A,B)"),
        known=("parallel(AB,CD)", "parallel(AD,BC)", *told, f"AB={a}"),
        asked="corner of ABCD that the mirror image of B in AC is, or none",
        kind=DESCRIPTOR,
        answer="D" if shape in ("perpendicular", "both") else "none",
        solution=("reflect(B,AC,->P)", "assert(perp(BP,AC))", "assert(equal(BC,CP))"),
    )


def twins(rng: random.Random) -> Problem:
    """Two equilateral triangles with one corner in common: a turn by 60 degrees takes one segment to the other."""
    d = rng.randint(3, 60)
    return Problem(
        numbers=(d,),
        figure=("C=free()", f"D=ray(C,{d})", "A=free()", "B=turn(D,A,60,1)", "E=turn(C,A,60,1)"),
        known=("equal(AB,AD)", "equal(AB,BD)", "equal(AC,AE)", "equal(AC,CE)", f"CD={d}"),
        asked="distance from B to E, if ADB and ACE turn the same way",
        kind=NUMBER,
        answer=_told(d),
        solution=("rotate(C,A,60,->P)", "assert(equal(BP,CD))", "assert(angle(ABP,ADC))"),
    )


def base_angle(rng: random.Random) -> Problem:
    """The angles at the base of a triangle with two equal sides."""
    degrees = rng.choice([angle for angle in range(10, 171, 2) if angle not in (60, 90)])
    return Problem(
        numbers=(degrees,),
        figure=("A=free()", "B=ray(A,?)", f"C=turn(B,A,{degrees},1)"),
        known=("equal(AB,AC)", f"BAC={degrees}deg"),
        asked="degrees of the angle ABC",
        kind=NUMBER,
        answer=_told((180 - degrees) / 2),
        solution=("midpoint(B,C,->M)", "assert(perp(AM,BC))", "assert(angle(ABM,ACM))"),
    )


def inner_quadrilateral(rng: random.Random) -> Problem:
    """The middles of the sides of any quadrilateral are corners of a parallelogram along its diagonals (Varignon)."""
    p, q = rng.randint(4, 40), rng.randint(4, 40)
    return Problem(
        numbers=(p, q),
        figure=("A=free()", f"C=ray(A,{p})", "B=free()", f"D=ray(B,{q})"),
        known=(f"AC={p}", f"BD={q}"),
        asked="perimeter of the quadrilateral of the middles of AB, BC, CD, DA",
        kind=NUMBER,
        answer=_told(p + q),
        solution=(
            "midpoint(A,B,->K)",
            "midpoint(B,C,->L)",
            "assert(parallel(KL,AC))",
            "midpoint(C,D,->M)",
            "assert(parallel(LM,BD))",
            "midpoint(D,A,->N)",
            "assert(equal(KL,MN))",
        ),
    )


def centroid(rng: random.Random) -> Problem:
    """Medians cut each other two to one, and the third goes through the same point."""
    m = 3 * rng.randint(1, 20)
    return Problem(
        numbers=(m,),
        figure=("A=free()", f"M=ray(A,{m})", "B=free()", "C=turn(B,M,180,1)", "N=between(A,C,0.5)"),
        known=("midpoint(M,BC)", "midpoint(N,AC)", f"AM={m}"),
        asked="distance from A to where AM meets BN",
        kind=NUMBER,
        answer=_told(2 * m // 3),
        solution=("intersect(AM,BN,->G)", "midpoint(A,B,->L)", "assert(on(G,CL))"),
    )


FAMILIES: Mapping[str, Callable[[random.Random], Problem]] = {
    make.__name__: make
    for make in (
        altitude,
        median,
        mirror,
        midline,
        cut,
        diagonals,
        landing,
        twins,
        base_angle,
        inner_quadrilateral,
        centroid,
    )
}


def rows(
    size: int,
    *,
    seed: int = 0,
    split: str = "all",
    test_fraction: float = 0.2,
    families: Sequence[str] = tuple(FAMILIES),
) -> list[dict[str, Any]]:
    """`size` different problems for `SketchEnvironment`, of the families in turn, the same again for the same seed.

    The splits "train" and "test" share no problem of a family with the same numbers, whatever its points are called: a
    problem belongs to "test" by its hash, with probability `test_fraction`.

    Columns: `prompt`, `points` (names and coordinates of the diagram), `figure`, `known`, `asked`, `answer`, `kind`,
    `solution` and `family`. ValueError for an argument out of range, a family that is none, and if there are not as
    many problems.
    """
    if size < 1 or split not in SPLITS or not 0 <= test_fraction <= 1:
        raise ValueError(
            f"size {size} must be at least 1, split {split!r} one of {', '.join(SPLITS)}, and test_fraction "
            f"{test_fraction} in [0, 1]"
        )
    if not families or not set(families) <= set(FAMILIES):
        raise ValueError(f"families {list(families)} must be some of {', '.join(FAMILIES)}")

    rng = random.Random(f"sketches {split} {seed}")
    found: dict[str, dict[str, Any]] = {}
    for family in itertools.islice(itertools.cycle(families), size):
        row = _new_row(family, rng, split, test_fraction, found)
        found[row["prompt"]] = row
    return list(found.values())


def is_of_split(family: str, problem: Problem, split: str, test_fraction: float) -> bool:
    """Whether a problem may stand in a split, one of `SPLITS`: family and numbers decide."""
    is_test = digest(["sketch", family, *problem.numbers]) < test_fraction * 2.0**128
    return split == "all" or is_test == (split == "test")


def _new_row(
    family: str, rng: random.Random, split: str, test_fraction: float, found: Mapping[str, Any]
) -> dict[str, Any]:
    for _ in range(_TRIES):
        problem = FAMILIES[family](rng)
        if not is_of_split(family, problem, split, test_fraction):
            continue
        row = _row(family, problem, rng)
        if row["prompt"] not in found:
            return row
    raise ValueError(f"{family} has too few problems of the split {split!r}; ask for fewer, or of other families")


def _row(family: str, problem: Problem, rng: random.Random) -> dict[str, Any]:
    letters = "".join(rng.sample(string.ascii_uppercase, len(string.ascii_uppercase)))
    table = str.maketrans(string.ascii_uppercase, letters)
    made: dict[str, Any] = {
        key: value.translate(table) if isinstance(value, str) else [part.translate(table) for part in value]
        for key, value in asdict(problem).items()
        if key not in ("numbers", "kind")
    }
    # Words of answers begin with a small letter; a capital one is a point.
    points = sample(made["figure"], rng=np.random.default_rng(rng.getrandbits(64)), samples=1)
    return {
        "prompt": f"Known: {'; '.join(made['known'])}.\nAsked: {made['asked']}.\n",
        **made,
        "points": {name: place[0].tolist() for name, place in points.items()},
        "kind": problem.kind,
        "family": family,
    }


def _told(value: int | float) -> str:
    """A number in at most two decimals, which is nearer than an answer has to be."""
    return f"{round(value, 2):g}"


def is_true(board: Board, text: str) -> bool:
    """Whether something that is told holds in every sample: a predicate, or a measure (`AB=4`, `AD:DB=1:2`,
    `BAC=40deg`). ValueError for what is neither, and as `geometry.holds`."""
    if match := _ANGLE.fullmatch(text):
        return bool(np.all(np.abs(np.degrees(angle(board, match[1])) - float(match[2])) <= TOLERANCE))
    if match := _LENGTH.fullmatch(text):
        return bool(np.all(np.abs(length(*board.ends(match[1])) - float(match[2])) <= TOLERANCE))
    if match := _SHARES.fullmatch(text):
        one, other = (length(*board.ends(pair)) for pair in match.group(1, 2))
        return bool(np.all(np.abs(float(match[4]) * one - float(match[3]) * other) <= TOLERANCE))
    return holds(board, read_predicate(text))


_VALUE = r"(\d{1,6}(?:\.\d{1,6})?)"
_ANGLE = re.compile(rf"([A-Z]{{3}})={_VALUE}deg")
_LENGTH = re.compile(rf"([A-Z]{{2}})={_VALUE}")
_SHARES = re.compile(rf"([A-Z]{{2}}):([A-Z]{{2}})={_VALUE}:{_VALUE}")

_STEP = re.compile(r"([A-Z])=(\w+)\(([^()]*)\)")
_SPREAD = {"radius": (3.0, 9.0), "degrees": (25.0, 80.0), "factor": (0.4, 0.85), "share": (0.25, 0.4)}
"""Where what a figure leaves open is drawn from: no right angle, no equal sides, no middle."""


def sample(
    steps: Sequence[str], *, rng: np.random.Generator, samples: int, nearest: float = 0.2
) -> dict[str, Float[np.ndarray, "{samples} 2"]]:
    """The points of a figure, placed anew in each of `samples`, no two nearer than `nearest`.

    A step places a point; a `?` in it is drawn: `A=free()`; `B=ray(A,4)`, so far from A in any direction;
    `C=turn(B,A,90,0.75)`, B turned about A by degrees and moved to that share of its distance; `D=between(B,C,0.5)`,
    that share of the way; `E=normal(D,B,C,3)`, so far from D at a right angle to BC; `F=circle(B,C)`, on the circle
    over the diameter BC; `G=shift(D,A,B)`, D moved as A to B. ValueError for anything else, and for a figure that
    does not come apart.
    """
    for _ in range(100):
        points: dict[str, Places] = {}
        for step in steps:
            match = _STEP.fullmatch(step)
            if match is None or match[2] not in _PLACED or match[1] in points:
                raise ValueError(f"the step {step[:60]!r} of a figure places no new point by {', '.join(_PLACED)}")
            try:
                points[match[1]] = _placed(points, match[2], match[3], rng, samples)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"the step {step[:60]!r} of a figure does not fit ({error})") from None
        if all(np.all(length(points[a], points[b]) > nearest) for a, b in itertools.combinations(points, 2)):
            return points
    raise ValueError(f"the points of the figure {list(steps)} come nearer to each other than {nearest}")


def _placed(points: Mapping[str, Places], kind: str, text: str, rng: np.random.Generator, samples: int) -> Places:
    shapes, place = _PLACED[kind]
    given = [part.strip() for part in text.split(",")] if text.strip() else []
    values: list[Any] = []
    for part, shape in zip(given, shapes, strict=True):
        if shape == "point":
            values.append(points[part])
        elif part == "?":
            values.append(rng.uniform(*_SPREAD[shape], size=samples))
        else:
            values.append(np.full(samples, float(part)))
    return place(*values, rng=rng, samples=samples)


def _free(*, rng: np.random.Generator, samples: int) -> Places:
    return rng.uniform(-6, 6, size=(samples, 2))


def _ray(start: Places, radius: Any, *, rng: np.random.Generator, samples: int) -> Places:
    turn = rng.uniform(0, 2 * np.pi, size=samples)
    return start + radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)


def _turn(point: Places, centre: Places, degrees: Any, factor: Any, *, rng: Any, samples: int) -> Places:
    return centre + factor[:, None] * (turned(point, centre, degrees) - centre)


def _between(start: Places, end: Places, share: Any, *, rng: Any, samples: int) -> Places:
    return start + share[:, None] * (end - start)


def _normal(at: Places, start: Places, end: Places, far: Any, *, rng: Any, samples: int) -> Places:
    x, y = direction(start, end, "a normal").T
    return at + far[:, None] * np.stack([-y, x], axis=1)


def _circle(start: Places, end: Places, *, rng: np.random.Generator, samples: int) -> Places:
    return turned(end, (start + end) / 2, rng.uniform(*_SPREAD["degrees"], size=samples))


def _shift(point: Places, start: Places, end: Places, *, rng: Any, samples: int) -> Places:
    return point + end - start


_PLACED: Mapping[str, tuple[tuple[str, ...], Callable[..., Places]]] = {
    "free": ((), _free),
    "ray": (("point", "radius"), _ray),
    "turn": (("point", "point", "degrees", "factor"), _turn),
    "between": (("point", "point", "share"), _between),
    "normal": (("point", "point", "point", "radius"), _normal),
    "circle": (("point", "point"), _circle),
    "shift": (("point", "point", "point"), _shift),
}
