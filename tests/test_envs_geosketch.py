"""Drawing on hidden figures: the worked example, what holds and what is an accident, problems, arms, bad actions."""

import cmath
import itertools
import json
import math

import numpy as np
import pytest

from rljax.envs.library import Sketched, SketchEnvironment, sketch_reward
from rljax.envs.library.geometry import (
    CONSTRUCTIONS,
    MOST_POINTS,
    PREDICATES,
    Board,
    Construction,
    Degenerate,
    Predicate,
    draw,
    fact,
    holds,
    incidences,
    read_predicate,
)
from rljax.envs.library.geosketch import ACTIONS, ARMS, is_answer, parse_actions, read_value, solved
from rljax.envs.library.sketches import FAMILIES, rows, sample

RIGHT = {"A": [0, 0], "B": [4, 0], "C": [0, 3]}
ROW = {
    "prompt": "Known: perp(AB,AC); AB=4; AC=3.\nAsked: distance from A to BC.\n",
    "points": RIGHT,
    "figure": ["A=free()", "B=ray(A,4)", "C=turn(B,A,90,0.75)"],
    "known": ["perp(AB,AC)", "AB=4", "AC=3"],
    "answer": "2.4",
    "solution": ["foot(A,BC,->H)", "assert(on(H,BC))", "assert(perp(AH,BC))"],
}
FREE = {
    "prompt": "?",
    "points": RIGHT,
    "answer": "2.5",
    "solution": [
        "midpoint(A,B,->M)",
        "midpoint(A,C,->N)",
        "foot(A,BC,->H)",
        *(f"assert({said})" for said in ("midpoint(M,AB)", "midpoint(N,AC)", "parallel(MN,BC)", "perp(AH,BC)")),
    ],
}
"""All points are free: that the angle at A is right is an accident."""


def board_of(points):
    return Board({name: np.array([place], np.float64) for name, place in points.items()})


def play(row, *actions, **options):
    environment = SketchEnvironment(**{"tool_format": ACTIONS, "system": "", **options})
    environment.reset(row)
    return [environment.step(action) for action in actions]


def totals(steps):
    return {name: sum(step.counts[name] for step in steps) for name in steps[0].counts}


def test_the_worked_example():
    board, foot = draw(board_of(RIGHT), Construction("foot", ("A", "BC"), name="H"))
    board, image = draw(board, Construction("reflect", ("A", "BC"), name="A'"))
    assert (foot, image) == ("H", "A'")
    np.testing.assert_allclose(board.points["H"], [[1.44, 1.92]], atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(board.points["H"]), 2.4, atol=1e-12)
    np.testing.assert_allclose(board.points["A'"], [[2.88, 3.84]], atol=1e-12)

    outcome = dict(is_well_formed=True, proven=2, needed=4, unused=1)
    assert sketch_reward(Sketched(True, **outcome)) == pytest.approx(1.18)
    assert sketch_reward(Sketched(False, **outcome)) == pytest.approx(0.18)
    assert sketch_reward(Sketched(True, False, 0, 0, 0)) == 1.0


@pytest.mark.parametrize(("answer", "reward"), [("2.5", 1.18), ("3", 0.18)])
def test_an_episode_earns_what_the_formula_says_whatever_its_points_are_called(answer, reward):
    steps = play(
        FREE,
        "midpoint(B,A,->X)",
        "foot(A,BC,->Y)",
        "reflect(C,AB,->Z)",
        "assert(midpoint(X,AB))",
        "assert(perp(YA,CY))",
        f"answer({answer})",
    )
    assert steps[-1].done and steps[-1].reward == pytest.approx(reward) and steps[-1].observation == ""
    found = totals(steps)
    assert (found["proven"], found["unused"], found["constructions"], found["assertions"]) == (0.5, 1, 3, 2)
    assert found["is_right"] == (answer == "2.5") and found["is_well_formed"] == 1


def test_constructions_are_those_of_complex_numbers():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5, 7, 2)) * 4
    board = Board(dict(zip("ABCDE", points, strict=True)))
    a, b, c, d, _ = (place[:, 0] + 1j * place[:, 1] for place in points)

    def drawn(kind, *arguments, degrees=0.0):
        after, name = draw(board, Construction(kind, arguments, degrees, "P"))
        return after.points[name][:, 0] + 1j * after.points[name][:, 1]

    turn = (c - b) / abs(c - b)
    mirrored = b + turn * np.conj((a - b) / turn)
    np.testing.assert_allclose(drawn("midpoint", "A", "B"), (a + b) / 2)
    np.testing.assert_allclose(drawn("reflect", "A", "BC"), mirrored)
    np.testing.assert_allclose(drawn("foot", "A", "BC"), (a + mirrored) / 2)
    np.testing.assert_allclose(drawn("rotate", "A", "D", degrees=37), d + (a - d) * cmath.exp(1j * math.radians(37)))
    met = drawn("intersect", "AB", "CD")
    for start, end in ((a, b), (c, d)):
        np.testing.assert_allclose(((met - start) / (end - start)).imag, 0, atol=1e-9)

    after, line = draw(board, Construction("parallel", ("A", "BC")))
    met = draw(after, Construction("intersect", (line, "BD"), name="P"))[0].points["P"]
    np.testing.assert_allclose((((met[:, 0] + 1j * met[:, 1]) - a) / (c - b)).imag, 0, atol=1e-9)


def test_what_is_true_of_the_diagram_alone_is_an_accident():
    assert play(FREE, "assert(perp(AB,AC))")[0].observation == "not so"
    assert play(ROW, "assert(perp(AB,AC))")[0].observation == "holds"


@pytest.mark.parametrize(
    ("text", "is_so"),
    [
        ("same(E,E)", True),
        ("on(E,AC)", True),
        ("on(B,AC)", False),
        ("midpoint(E,BD)", True),
        ("midpoint(B,AC)", False),
        ("perp(AC,BD)", True),
        ("perp(AB,AC)", False),
        ("parallel(AB,DC)", True),
        ("parallel(AE,EC)", False),
        ("equal(AE,BE)", True),
        ("equal(AB,AC)", False),
        ("angle(BAC,ACD)", True),
        ("angle(BAC,BAD)", False),
        ("concyclic(A,B,C,D)", True),
        ("concyclic(A,B,C,E)", False),
        ("concyclic(F,E,A,C)", False),
    ],
)
def test_predicates_say_of_a_square_what_they_mean(text, is_so):
    square = {"A": [0, 0], "B": [3, 1], "C": [2, 4], "D": [-1, 3], "E": [1, 2], "F": [0.5, 1]}
    assert holds(board_of(square), read_predicate(text)) is is_so


def test_a_drawing_tells_what_is_new_and_nothing_twice():
    told = [step.observation for step in play(ROW, "midpoint(B,C,->M)", "parallel(M,AB,->l)", "intersect(l,AC,->E)")]
    assert told[0] == "M: on(M,BC), midpoint(M,BC), equal(MB,MA)"
    assert told[1] == "l: perp(l,AC)"
    assert "on(E,AC)" in told[2] and "on(E,l)" in told[2] and "midpoint(E,AC)" in told[2]

    square = {**FREE, "points": {"A": [0, 0], "B": [3, 1], "C": [2, 4], "D": [-1, 3]}, "solution": []}
    square["figure"] = ["A=free()", "B=ray(A,?)", "D=turn(B,A,90,1)", "C=shift(D,A,B)"]
    square["points"] = {name: place[0].tolist() for name, place in _sampled(square["figure"]).items()}
    crossing, mirrored = play(square, "intersect(AC,BD,->O)", "reflect(B,AC,->P)")
    assert "perp(BD,AC)" in crossing.observation and "midpoint(O,AC)" in crossing.observation
    assert mirrored.observation == "P: same(P,D)"


def _sampled(figure):
    return sample(figure, rng=np.random.default_rng(0), samples=1)


def test_incidences_hold_and_leave_out_no_line_midpoint_or_right_angle():
    """Against one look at every predicate that the points allow."""
    points = sample(
        ["A=free()", "B=ray(A,4)", "C=turn(B,A,90,0.75)", "D=shift(C,A,B)"], rng=np.random.default_rng(3), samples=4
    )
    board, _ = draw(Board(points), Construction("intersect", ("AD", "BC"), name="O"))
    found = incidences(board, "O")
    assert all(holds(board, predicate) for predicate in found)
    facts = {fact(board, predicate, board.points) for predicate in found}
    pairs = ["".join(pair) for pair in itertools.combinations("ABCD", 2)]
    for predicate in (Predicate(kind, ("O", pair)) for kind in ("on", "midpoint") for pair in pairs):
        assert holds(board, predicate) == (fact(board, predicate, board.points) in facts)
    assert sum(predicate.kind == "equal" for predicate in found) == 1


ORDERED = {
    "altitude": lambda a, b, c: abs(((a - b) * (c - b).conjugate()).imag) / abs(c - b),
    "median": lambda b, c, a: abs(a - (b + c) / 2),
    "mirror": lambda b, c, d, a: 2 * abs(((a - b) * (c - b).conjugate()).imag) / abs(c - b),
    "midline": lambda a, b, c, d: abs(c - b) * abs(d - a) / abs(b - a),
    "cut": lambda a, b, c, d: abs(d - a) / abs(b - a),
    "twins": lambda c, d, a, b, e: abs(b - e),
    "base_angle": lambda a, b, c: math.degrees(abs(cmath.phase((a - b) / (c - b)))),
    "inner_quadrilateral": lambda a, c, b, d: abs(a - c) + abs(b - d),
    "centroid": lambda a, m, b, c, n: abs(a - (a + b + c) / 3),
}
"""Answers from coordinates, the points in the order of the figure."""


def test_problems_have_the_answer_that_their_coordinates_give_and_a_solution_that_earns_all():
    made = rows(2 * len(FAMILIES), seed=1)
    assert [row["family"] for row in made] == 2 * list(FAMILIES)
    for row in made:
        places = [complex(*row["points"][step[0]]) for step in row["figure"]]
        if row["family"] in ORDERED:
            assert read_value(row["answer"]) == pytest.approx(ORDERED[row["family"]](*places), abs=0.0051)
        else:
            a, b, d, c = places
            is_perpendicular = abs(((c - a) * (d - b).conjugate()).real) < 1e-6
            is_equal = abs(abs(c - a) - abs(d - b)) < 1e-6
            words = {(0, 0): "neither", (1, 0): "perpendicular", (0, 1): "equal", (1, 1): "both"}
            landed = row["figure"][2][0] if is_perpendicular else "none"
            is_word = row["family"] == "diagonals"
            assert row["answer"] == (words[is_perpendicular, is_equal] if is_word else landed)

        assert all(name in row["prompt"] for name in row["points"])
        prompt, turns = solved(row)
        assert prompt == row["prompt"]
        steps = play(row, *turns[::2])
        assert [f" {step.observation}\n" for step in steps[:-1]] == turns[1::2]
        assert steps[-1].done and steps[-1].reward == pytest.approx(1.3)


def test_problems_are_the_same_again_and_splits_share_no_numbers():
    train, test = rows(110, split="train"), rows(44, split="test")
    assert train == rows(110, split="train")

    def numbers(row):
        return (row["family"], tuple("".join(c for c in text if not c.isupper()) for text in row["known"]))

    assert not {numbers(row) for row in train} & {numbers(row) for row in test}
    assert len({row["prompt"] for row in train}) == 110
    for options in ({"size": 0}, {"size": 1, "split": "dev"}, {"size": 1, "families": ["chess"]}):
        with pytest.raises(ValueError, match="must be"):
            rows(**options)
    with pytest.raises(ValueError, match="median has too few problems of the split 'test'"):
        rows(1, split="test", test_fraction=0.0, families=["median"])


def test_under_mute_nothing_is_told_of_drawings_and_under_none_nothing_is_drawn():
    for arm in ARMS:
        prompt, turns = solved(ROW, arm=arm)
        assert prompt.endswith("Nothing can be drawn.\n") == (arm == "none")
        steps = play(ROW, *turns[::2], arm=arm)
        assert steps[-1].reward == pytest.approx({"full": 1.3, "mute": 1.08, "none": 1.1}[arm])
    told = play(
        {**ROW, "arm": "mute"},
        "foot(A,BC,->H)",
        "intersect(AB,BA)",
        "assert(on(H,BC))",
        "assert(perp(AB,AC))",
        "midpoint(H,A)",
    )
    assert [s.observation for s in told] == ["drawn", "drawn", "The diagram does not show this.", "holds", "drawn"]

    refused, answered = play({**ROW, "arm": "none"}, "foot(A,BC,->H)", "answer(2.4)")
    assert refused.observation.startswith("There is no tool 'foot'") and answered.reward == pytest.approx(1.0)
    with pytest.raises(ValueError, match="arm 'half' is not one of none, mute, full"):
        SketchEnvironment(arm="half")


def test_what_is_true_and_not_needed_pays_nothing_and_a_fact_counts_once():
    steps = play(
        ROW,
        "foot(A,BC,->H)",
        "assert(perp(AH,BC))",
        "assert(perp(CH,HA))",
        "assert(on(H,HC))",
        "assert(on(A,AB))",
        "assert(equal(AB,BA))",
        "assert(perp(AB,AC))",
        "assert(same(H,H))",
        "answer(nothing)",
    )
    assert [step.observation for step in steps[1:-1]] == ["holds"] * 7
    assert steps[-1].reward == pytest.approx(0.1 + 0.2 * 0.5)


def test_a_construction_is_used_if_what_was_proven_rests_on_it():
    row = {**FREE, "solution": [*FREE["solution"][:2], "assert(parallel(MN,BC))"], "answer": "1"}
    steps = play(
        row,
        "midpoint(A,B,->M)",
        "parallel(M,BC,->l)",
        "intersect(l,AC,->N)",
        "midpoint(B,C,->O)",
        "assert(parallel(MN,BC))",
        "answer(1)",
    )
    assert steps[-1].reward == pytest.approx(1 + 0.1 + 0.2 - 0.02)


MALFORMED = [
    ("foot(Q,BC)", "there is no point Q; there are A, B, C"),
    ("foot(A,BCD)", "'BCD' is not two points, such as BC"),
    ("foot(A,k)", "there is no line k"),
    ("foot(A)", "takes 2 arguments, not 1"),
    ("midpoint(A,B,C)", "takes 2 arguments, not 3"),
    ("midpoint(A,B,->A)", "the name A is taken"),
    ("midpoint(A,B,->m)", "'m' cannot be the name of a point"),
    ("parallel(A,BC,->L)", "'L' cannot be the name of a line"),
    ("rotate(A,B,nan)", "must be of type"),
    ("rotate(A,B,1e400)", "must be of type"),
    ("rotate(A,B,99999)", "from -3600 to 3600"),
    ("rotate(A,B,90x)", "must be of type"),
    ("erase(A)", "There is no action 'erase'"),
    ("draw a line", "is no action"),
    ("", "Write an action"),
    (";;\n", "Write an action"),
    ("foot(" * 5000, "is no action"),
    ("assert(" + "(" * 5000, "is no action"),
    ("assert((((A))))", "is no predicate"),
    ("assert(perp(AB))", "2 arguments, not 1"),
    ("assert(bigger(AB,AC))", "there is no predicate 'bigger'"),
    ("assert(equal(AB,4))", "'4' is not two points"),
    ("assert(angle(AB,AC))", "'AB' is not an angle of three points"),
    ("assert(on(A,\u0130\u00df))", "is not two points"),
]
DEGENERATE = [
    ("intersect(AB,BA)", "Nothing is drawn: these lines are parallel, or one"),
    ("intersect(AB,DC)", "Nothing is drawn: these lines are parallel, or one"),
    ("foot(A,BB)", "Nothing is drawn: the points of BB are one"),
    ("assert(perp(AA,BC))", "This says nothing: the points of AA are one"),
    ("assert(angle(ABB,ABC))", "This says nothing: the points of BB are one"),
    ("assert(perp(AB,BC))", "not so"),
]


@pytest.mark.parametrize(("action", "told"), [*MALFORMED, *DEGENERATE], ids=lambda text: text[:20])
def test_a_bad_action_costs_a_line_that_says_what_is_wrong(action, told):
    row = {**ROW, "points": {**RIGHT, "D": [4, 3]}, "figure": [*ROW["figure"], "D=shift(C,A,B)"]}
    bad, answer = play(row, action, "answer(2.4)")
    assert told in bad.observation and "\n" not in bad.observation and len(bad.observation) < 220
    assert not bad.done and bad.reward == 0.0
    is_well_formed = (action, told) in DEGENERATE
    assert answer.done and answer.reward == pytest.approx(1.1 if is_well_formed else 1.0)


def call(tool, **arguments):
    return f"<tool_call>{json.dumps({'name': tool, 'arguments': arguments})}</tool_call>"


def test_calls_in_json_do_the_same_and_are_refused_alike():
    steps = play(
        ROW,
        call("foot", point="A", line="BC", name="H"),
        call("assert", predicate="perp(AH,BC)"),
        call("rotate", point="A", centre="B", degrees=10**400),
        call("rotate", point="A", centre="B", degrees=float("nan")),
        call("answer", answer=2.4),
        tool_format="hermes",
        system=None,
    )
    assert steps[0].observation == play(ROW, "foot(A,BC,->H)")[0].observation
    assert "from -3600 to 3600" in steps[2].observation and "not valid JSON" in steps[3].observation
    assert steps[4].done and steps[4].reward == pytest.approx(1.0 + 0.1)
    (plain,) = play(ROW, "It is 2.4", tool_format="hermes")
    assert plain.done and plain.reward == pytest.approx(1.1)

    environment = SketchEnvironment()
    assert '"foot"' in environment.reset(ROW) and '"foot"' not in environment.reset({**ROW, "arm": "none"})


def test_a_full_board_takes_no_more_and_nothing_is_drawn_far_away():
    steps = play(ROW, *["midpoint(A,B)"] * 30)
    drawn = int(totals(steps)["constructions"])
    assert drawn == MOST_POINTS - len(RIGHT) and "the board is full" in steps[-1].observation
    with pytest.raises(Degenerate, match="too far away"):
        far = board_of({"A": [0, 0], "B": [1, 0], "C": [0, 1], "D": [1, 1 + 1e-5]})
        draw(far, Construction("intersect", ("AB", "CD")))


def test_several_actions_are_read_in_order_up_to_one_that_cannot_be():
    parsed = parse_actions("<think>foot(B,AC)</think>foot(A,BC,->H); assert(on(H,BC))\nwhat; answer(1)")
    assert [call.name for call in parsed.calls] == ["foot", "assert"] and parsed.problem is not None
    step = play(ROW, "foot(A,BC,->H); assert(on(H,BC)); answer(2.4)")[0]
    assert step.done and step.reward == pytest.approx(1 + 0.1 + 0.2 * 0.5)
    step = play(ROW, "foot(Q,BC); answer(2.4)")[0]
    assert step.reward == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "answer", "is_so"),
    [
        ("2.4", "2.4", True),
        ("It is 2.41", "2.4", True),
        ("2.42", "2.4", False),
        ("12/5", "2.4", True),
        ("1:2", "2:4", True),
        ("0.5", "1:2", True),
        ("2:1", "1:2", False),
        ("1/0", "1:2", False),
        ("nan", "2.4", False),
        ("inf", "2.4", False),
        ("9" * 400, "2.4", False),
        ("1e400", "2.4", False),
        ("", "2.4", False),
        ("Both.", "both", True),
        ("neither", "both", False),
        ("D", "D", True),
    ],
)
def test_what_is_a_right_answer(text, answer, is_so):
    assert is_answer(text, answer) is is_so


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"known": ["perp(AB,BC)"]}, r"perp\(AB,BC\) is told, and does not hold"),
        ({"known": ["AB=5"]}, "AB=5 is told"),
        ({"figure": ["A=free()", "B=ray(A,4)"]}, "the figure places A, B, and the row has the points A, B, C"),
        ({"figure": ["A=free()", "B=ray(Q,4)", "C=free()"]}, r"the step 'B=ray\(Q,4\)' of a figure does not fit"),
        ({"figure": ["A=magic()"]}, "places no new point by free, ray"),
        ({"figure": ["A=free()", "B=shift(A,A,A)", "C=free()"]}, "come nearer to each other than"),
        ({"points": {**RIGHT, "B": [math.inf, 0]}, "known": []}, "must be finite"),
        ({"solution": ["assert(perp(AB,AC))"]}, "which is not so, told already, or true of any points"),
        ({"solution": ["assert(equal(AB,AC))"]}, "which is not so"),
        ({"solution": ["assert(equal(AB,BA))"]}, "true of any points"),
        ({"solution": ["foot(A,BC,->H"]}, "the solution does"),
        ({"arm": "half"}, "arm 'half' is not one of"),
    ],
)
def test_a_row_that_is_wrong_is_refused_with_the_reason(changed, message):
    with pytest.raises(ValueError, match=message):
        play({**ROW, **changed})


def test_everything_that_can_be_done_is_in_the_tables():
    environment = SketchEnvironment()
    assert environment.tools.names == (*CONSTRUCTIONS, "assert", "answer")
    told = next(s for s in environment.tools.schemas if s["function"]["name"] == "assert")
    words = told["function"]["parameters"]["properties"]["predicate"]["description"]
    assert all(f"{kind}(" in words for kind in PREDICATES)
