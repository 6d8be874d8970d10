"""Problems of plane geometry that are solved by drawing: lines and points are added, and what they show is asserted.

The environment is a text form of GeoSketch (2509.22460), whose model draws on pictures: the state is a figure of named
points whose coordinates are hidden, and predicates that are seen.
"""

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rljax.envs.base import Prompt, Step
from rljax.envs.formats import BAD_CALL, Parsed, ParseProblem, ToolCall, ToolFormat, after_thinking
from rljax.envs.instructions import tool_instructions
from rljax.envs.library.geometry import (
    CONSTRUCTIONS,
    Board,
    Construction,
    Degenerate,
    Places,
    Predicate,
    draw,
    fact,
    holds,
    incidences,
    read_predicate,
)
from rljax.envs.library.sketches import is_true, sample
from rljax.envs.tool_environment import ToolEnvironment
from rljax.envs.tools import ToolBox, final, named
from rljax.tasks.callables import load_callable
from rljax.tasks.examples import digest, with_paragraph

FULL = "full"
MUTE = "mute"
NONE = "none"
ARMS = {
    NONE: "no action: only an answer",
    MUTE: "drawing without effect: nothing is shown of it",
    FULL: "the full loop",
}
"""What an episode may do, for the claim that drawing helps."""

RESAMPLES = 3
"""Figures beside the diagram in which an assertion has to hold."""
TO = 0.01
"""How near a number has to come."""
MOST_SHOWN = 12
"""Incidences of one observation."""
DRAWN = "drawn"
"""What is told of a drawing without effect."""

COUNTS = ("is_right", "is_well_formed", "proven", "unused", "constructions", "assertions")
"""Counts of a step: where the episode ends, whether the answer is right, whether all actions were well formed, which
share of the needed predicates was proven, and how many constructions were of no use; and constructions and assertions
that were carried out."""

_TASK = (
    "Solve the problem of plane geometry. The figure is hidden; draw on it with the tools, and what is new in it is "
    "told. Assert what the answer rests on, then answer with a number, a ratio such as 1:2, or a word."
)
_NOTHING = "Nothing can be drawn.\n"
_VALUE = re.compile(r"(-?\d{1,9}(?:\.\d{1,9})?)(?:\s?[:/]\s?(\d{1,9}(?:\.\d{1,9})?))?")


@dataclass(frozen=True)
class Sketched:
    """What an episode came to, of which a reward is made."""

    is_right: bool
    """Whether the answer is right."""
    is_well_formed: bool
    """Whether every action was a call that could be carried out, whatever came of it."""
    proven: int
    """Predicates of the solution that were asserted, each counted once."""
    needed: int
    """Predicates of the solution."""
    unused: int
    """Constructions that no proven predicate of the solution speaks of, nor rests on."""


def sketch_reward(
    outcome: Sketched, *, form_weight: float = 0.1, proof_weight: float = 0.2, unused_weight: float = 0.02
) -> float:
    """`1[right] + 0.1 * 1[well formed] + 0.2 * min(1, proven / needed) - 0.02 * unused`.

    What is true and no part of the solution pays nothing, since anyone can assert trivial truths. Nothing is proven
    where nothing is needed.
    """
    proof = min(1.0, outcome.proven / outcome.needed) if outcome.needed else 0.0
    return (
        float(outcome.is_right)
        + form_weight * float(outcome.is_well_formed)
        + proof_weight * proof
        - unused_weight * outcome.unused
    )


def read_value(text: str) -> float | None:
    """The last number in a text, a ratio (`3:2`, `3/2`) as its quotient; None without a number, and for a quotient
    by 0."""
    matches = _VALUE.findall(text)
    if not matches:
        return None
    above, below = matches[-1]
    if not below:
        return float(above)
    return float(above) / float(below) if float(below) else None


def is_answer(text: str, answer: str) -> bool:
    """Whether an answer is that of a row: a number or ratio within `TO`, a word whatever its case."""
    wanted = read_value(answer)
    if wanted is None:
        return text.strip(" .\n").lower() == answer.strip().lower()
    value = read_value(text)
    # Both are decimals: a number that is off by just so much counts, whatever its last bit is.
    return value is not None and abs(value - wanted) <= TO + 1e-9


_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "midpoint": ("first", "second"),
    "foot": ("point", "line"),
    "parallel": ("point", "line"),
    "intersect": ("first", "second"),
    "reflect": ("point", "line"),
    "rotate": ("point", "centre", "degrees"),
    "assert": ("predicate",),
    "answer": ("answer",),
}
_ACTION = re.compile(r"(\w{1,20})\s*\((.{0,200})\)")


def parse_actions(text: str) -> Parsed:
    """`foot(A,BC,->H)`, `assert(perp(AH,BC))`, `answer(2.4)`; several have a semicolon or a new line between them, and
    `->` the name of what is drawn behind it. What stands before `</think>` is not read."""
    pieces = [piece.strip() for piece in re.split(r"[;\n]", after_thinking(text))]
    calls: list[ToolCall] = []
    for piece in filter(None, pieces):
        call = _read_action(piece)
        if isinstance(call, ParseProblem):
            return Parsed(tuple(calls), call)
        calls.append(call)
    if not calls:
        return Parsed((), ParseProblem(BAD_CALL, "Write an action, such as foot(A,BC,->H) or answer(2.4)."))
    return Parsed(tuple(calls))


def _read_action(piece: str) -> ToolCall | ParseProblem:
    match = _ACTION.fullmatch(piece)
    if match is None:
        return ParseProblem(BAD_CALL, f"{piece[:40]!r} is no action; write one such as foot(A,BC,->H) or answer(2.4).")
    name, inside = match.groups()
    if name not in _PARAMETERS:
        return ParseProblem(BAD_CALL, f"There is no action {name!r}; there are {', '.join(_PARAMETERS)}.")

    parameters = _PARAMETERS[name]
    if len(parameters) == 1:
        return ToolCall(name, {parameters[0]: inside.strip()})
    parts = [part.strip() for part in inside.split(",")]
    named_as = {"name": parts.pop()} if parts[-1].startswith("->") else {}
    if len(parts) != len(parameters):
        usage = f"{name}({','.join(parameters)},->NAME)"
        return ParseProblem(BAD_CALL, f"{usage} takes {len(parameters)} arguments, not {len(parts)}.")
    values = dict(zip(parameters, parts, strict=True))
    return ToolCall(
        name, {key: _number(value) if key == "degrees" else value for key, value in values.items()} | named_as
    )


def _number(text: str) -> float | str:
    """A decimal as a number; anything else as it is, which the tool refuses."""
    return float(text) if re.fullmatch(r"[+-]?\d{1,6}(\.\d{1,6})?", text) else text


ACTIONS = ToolFormat("sketch", parse_actions, stop_strings=(";",), role="user", wrap=(" ", "\n"))
"""The short form of actions, one a turn."""


@dataclass(frozen=True)
class _Path:
    """What a row's own solution proves."""

    facts: frozenset[Hashable]
    known: Mapping[str, Places]
    """Points of the figure and of the solution, in whose names facts are."""


class SketchEnvironment(ToolEnvironment):
    """A problem of plane geometry. Rows are those of `rljax.envs.library.sketches.rows`, or have the columns `prompt`,
    `points` (coordinates by name), `answer`, `solution` (actions as `parse_actions` reads them) and, if there are any,
    `figure` (steps of `sketches.sample` that place the points; without, all are free), `known` (what is told and has
    to be true of the figure) and `arm`.

    Tools: `midpoint`, `foot`, `parallel`, `intersect`, `reflect` and `rotate` draw, and tell what is new in the figure
    (`geometry.incidences`); `assert` tells whether a predicate holds in the diagram and in `RESAMPLES` re-samplings
    of what the figure leaves open; `answer` ends the episode. A message without a call is an answer, too. What cannot
    be done is told in one line. It is well formed, though, to draw what does not exist, such as the point where
    parallels meet, and to assert what is false.

    The reward is `reward` of `Sketched` (or its name `module:function`), given with the answer. A predicate is of the
    solution whatever its points are called. Steps count `COUNTS`. `arm` is one of `ARMS`: under `mute` drawings are
    taken and never shown, and nothing can be asserted of them; under `none` only an answer is taken, as the prompt
    says. `system` stands before the problem; by default it says what to do and which tools there are. ValueError for
    an arm or a format that does not exist; and, when an episode begins, for a row whose figure or solution is wrong.
    """

    def __init__(
        self,
        *,
        arm: str = FULL,
        tool_format: str | ToolFormat = "hermes",
        reward: str | Callable[[Sketched], float] = sketch_reward,
        system: str | None = None,
    ):
        drawing, only_answer = self._tools()
        self._boxes = {FULL: ToolBox([*drawing, only_answer]), NONE: ToolBox([only_answer])}
        super().__init__(self._boxes[FULL], self._judge, tool_format=tool_format, system=system, task=_TASK)
        self._default_arm = _checked(arm)
        self._is_told = system is None
        self._worth: Callable[[Sketched], float] = load_callable(reward) if isinstance(reward, str) else reward

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """The problem; nothing is drawn yet."""
        self._arm = _checked(row.get("arm", self._default_arm))
        self.tools = self._boxes.get(self._arm, self._boxes[FULL])
        if self._is_told:
            self._system = f"{_TASK}\n\n{tool_instructions(self.tools, self.format)}"

        self._board = _board_of(row)
        self._visible = [read_predicate(text) for text in row.get("known", ()) if "(" in text]
        self._path = _path_of(self._board, self._visible, row["solution"])
        self._given = frozenset(self._board.points)
        self._drawn: dict[str, tuple[str, ...]] = {}
        self._proven: dict[Hashable, tuple[str, ...]] = {}
        self._num_wrong = 0
        self._num_asserted = 0
        self._is_right = False

        prompt = super().reset(row)
        if self._arm != NONE:
            return prompt
        return prompt + _NOTHING if isinstance(prompt, str) else with_paragraph(prompt, _NOTHING.strip())

    def step(self, action: str) -> Step:
        """Carry the action out; where the episode ends, judge it."""
        before = (len(self._drawn), self._num_asserted)
        step = super().step(action)
        self._num_wrong += int(step.counts["tool_errors"] + step.counts["malformed_calls"])

        counts = dict.fromkeys(COUNTS, 0.0)
        counts["constructions"] = float(len(self._drawn) - before[0])
        counts["assertions"] = float(self._num_asserted - before[1])
        if not step.done:
            return Step(step.observation, counts={**step.counts, **counts})

        outcome = self._outcome()
        counts["is_right"] = float(outcome.is_right)
        counts["is_well_formed"] = float(outcome.is_well_formed)
        counts["proven"] = outcome.proven / max(1, outcome.needed)
        counts["unused"] = float(outcome.unused)
        return Step("", self._worth(outcome), True, {**step.counts, **counts})

    def _outcome(self) -> Sketched:
        # What proven predicates speak of is of use, and whatever that was drawn from.
        used = {name for names in self._proven.values() for name in names}
        for name, parents in reversed(self._drawn.items()):
            if name in used:
                used |= set(parents)
        return Sketched(
            is_right=self._is_right,
            is_well_formed=self._num_wrong == 0,
            proven=len(self._proven),
            needed=len(self._path.facts),
            unused=sum(name not in used for name in self._drawn),
        )

    def _judge(self, answer: Any, row: Mapping[str, Any]) -> float:
        """Notes whether the answer is right. `step` makes the reward, which needs to know of the whole message."""
        self._is_right = is_answer(str(answer), row["answer"])
        return 0.0

    def _draws(self, construction: Construction) -> str:
        try:
            board, name = draw(self._board, construction)
        except Degenerate as error:
            # That something does not exist is shown, too.
            return DRAWN if self._arm == MUTE else f"Nothing is drawn: {error}."
        self._board = board
        self._drawn[name] = construction.parents
        if self._arm == MUTE:
            return DRAWN

        seen = {self._fact(predicate) for predicate in self._visible} - {None}
        new = [predicate for predicate in incidences(board, name) if self._fact(predicate) not in seen]
        self._visible += new
        shown = ", ".join(map(str, new[:MOST_SHOWN])) or "nothing new"
        more = f" and {len(new) - MOST_SHOWN} more" if len(new) > MOST_SHOWN else ""
        return f"{name}: {shown}{more}"

    def _fact(self, predicate: Predicate) -> Hashable | None:
        return fact(self._board, predicate, self._board.points)

    def _asserts(self, text: str) -> str:
        predicate = read_predicate(text)
        try:
            is_so = holds(self._board, predicate)
        except Degenerate as error:
            return f"This says nothing: {error}."
        if self._arm == MUTE and not set(predicate.names) <= self._given:
            return "The diagram does not show this."

        self._num_asserted += 1
        if not is_so:
            return "not so"
        said = fact(self._board, predicate, self._path.known)
        if said in self._path.facts:
            self._proven.setdefault(said, predicate.names)
        return "holds"

    def _tools(self) -> tuple[list[Callable[..., Any]], Callable[..., Any]]:
        """Those that draw and assert, and the answer."""

        def midpoint(first: str, second: str, name: str = "") -> str:
            """Draw the midpoint of two points.

            Args:
                first: A point, such as A.
                second: Another one.
                name: A capital letter for the midpoint.
            """
            return self._draws(Construction("midpoint", (first, second), name=name))

        def foot(point: str, line: str, name: str = "") -> str:
            """Draw the foot of the perpendicular from a point to a line.

            Args:
                point: A point, such as A.
                line: Two points, such as BC, or the name of a line.
                name: A capital letter for the foot.
            """
            return self._draws(Construction("foot", (point, line), name=name))

        def parallel(point: str, line: str, name: str = "") -> str:
            """Draw the line through a point that is parallel to a line.

            Args:
                point: A point, such as A.
                line: Two points, such as BC, or the name of a line.
                name: A small letter for the new line.
            """
            return self._draws(Construction("parallel", (point, line), name=name))

        def intersect(first: str, second: str, name: str = "") -> str:
            """Draw the point where two lines meet.

            Args:
                first: Two points, such as BC, or the name of a line.
                second: Another line.
                name: A capital letter for the point.
            """
            return self._draws(Construction("intersect", (first, second), name=name))

        def reflect(point: str, line: str, name: str = "") -> str:
            """Draw the mirror image of a point in a line.

            Args:
                point: A point, such as A.
                line: Two points, such as BC, or the name of a line.
                name: A capital letter for the mirror image.
            """
            return self._draws(Construction("reflect", (point, line), name=name))

        def rotate(point: str, centre: str, degrees: int | float, name: str = "") -> str:
            """Draw a point turned counterclockwise about a centre.

            Args:
                point: A point, such as A.
                centre: The centre, a point.
                degrees: The angle.
                name: A capital letter for the new point.
            """
            return self._draws(Construction("rotate", (point, centre), degrees, name))

        def asserted(predicate: str) -> str:
            """Say what the answer rests on. It is told whether it holds.

            Args:
                predicate: Such as on(H,BC), midpoint(M,AB), perp(AH,BC), parallel(AB,CD), equal(AM,BM),
                    angle(ABC,DEF), concyclic(A,B,C,D) or same(P,Q).
            """
            return self._asserts(predicate)

        @final
        def answer(answer: str | int | float) -> str:
            """Give the final answer. Nothing can be done after it.

            Args:
                answer: A number, a ratio such as 1:2, or a word.
            """
            return str(answer)

        return [midpoint, foot, parallel, intersect, reflect, rotate, named(asserted, "assert")], answer


def solved(
    row: Mapping[str, Any], *, arm: str = FULL, environment: SketchEnvironment | None = None
) -> tuple[Prompt, list[str]]:
    """A demonstration under an arm: the prompt of `row`, and in turn actions of its solution in the form `ACTIONS` and
    what the environment tells of them, up to the answer. What an arm does not take is left out.

    `environment` is what it is played on, for many rows the same; it must take `ACTIONS`."""
    environment = environment or SketchEnvironment(tool_format=ACTIONS, system="")
    prompt = environment.reset({**row, "arm": arm})
    before, after = ACTIONS.wrap
    turns: list[str] = []
    for action in row["solution"]:
        # Of what is not shown nothing can be asserted.
        if arm == NONE or (arm == MUTE and action.startswith("assert")):
            continue
        step = environment.step(action)
        turns += [f"{action};", f"{before}{step.observation}{after}"]
    return prompt, [*turns, f"answer({row['answer']});"]


def _checked(arm: str) -> str:
    if arm not in ARMS:
        raise ValueError(f"arm {arm!r} is not one of {', '.join(ARMS)}")
    return arm


def _board_of(row: Mapping[str, Any]) -> Board:
    """The diagram of a row and its re-samplings, the same at every reset. ValueError where what is told is not so."""
    steps = row.get("figure") or [f"{name}=free()" for name in row["points"]]
    again = sample(steps, rng=np.random.default_rng(digest([steps, row["points"]])), samples=RESAMPLES)
    if set(again) != set(row["points"]):
        raise ValueError(f"the figure places {', '.join(again)}, and the row has the points {', '.join(row['points'])}")

    points = {name: np.array([row["points"][name], *again[name]], np.float64) for name in again}
    if not all(np.isfinite(place).all() for place in points.values()):
        raise ValueError(f"the points {row['points']} must be finite")
    board = Board(points)
    untrue = [text for text in row.get("known", ()) if not is_true(board, text)]
    if untrue:
        raise ValueError(f"{', '.join(untrue)} is told, and does not hold in all samples of the figure")
    return board


def _path_of(board: Board, told: Sequence[Predicate], solution: Sequence[str]) -> _Path:
    """What the actions of a solution prove. ValueError for one that does not go through, or asserts what is false, told
    or trivial."""
    predicates = []
    for call in _calls_of(solution):
        arguments = dict(call.arguments)
        if call.name == "assert":
            predicates.append((board, read_predicate(arguments["predicate"])))
        elif call.name in CONSTRUCTIONS:
            name = arguments.pop("name", "")
            degrees = arguments.pop("degrees", 0.0)
            board, _ = draw(board, Construction(call.name, tuple(arguments.values()), degrees, name))

    givens = {fact(board, predicate, board.points) for predicate in told}
    facts = set()
    for at, predicate in predicates:
        said = fact(board, predicate, board.points)
        if not holds(at, predicate) or said is None or said in givens or predicate.kind == "same":
            raise ValueError(f"the solution asserts {predicate}, which is not so, told already, or true of any points")
        facts.add(said)
    return _Path(frozenset(facts), board.points)


def _calls_of(solution: Sequence[str]) -> Iterator[ToolCall]:
    for action in solution:
        parsed = parse_actions(action)
        if parsed.problem is not None:
            raise ValueError(f"the solution does {action!r}: {parsed.problem.text}")
        yield from parsed.calls
