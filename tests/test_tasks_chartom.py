"""Stories of what others think: answers read off the text a second way, windows, letters, and what judges may reply."""

import itertools
import math
import re

import pytest

from rljax.tasks import longcontext
from rljax.tasks.chartom import (
    KINDS,
    MODES,
    Verdict,
    cut,
    judged,
    read_letter,
    read_numbers,
    right,
    rows,
    score,
    summary,
    told_points,
)
from rljax.tasks.chartom_stories import EMOTIONS, GOALS, favourite, goals_of
from rljax.tasks.stories import FULL

ROWS = rows(6, seed=2, length=1500, modes=MODES)
CHOICES = [row for row in ROWS if row["mode"] == "choice"]
LINE = re.compile(r"In the (\w+) (?:was|were) (.+?)\. (.+)$")


def scenes(row):
    """(place, who was there, what happened) of each line of the story."""
    found = [LINE.match(line).groups() for line in row["prompt"].split("\n\n")[0].split("\n")[1:]]
    return [(place, set(re.split(r", | and ", who)), action) for place, who, action in found]


def believed(row, *who):
    """Where who is asked about saw the thing last, all of them together."""
    seen = [
        re.search(r"into the (\w+)", action)[1]
        for _, present, action in scenes(row)
        if re.search(r"(put|moved) the \w+ into", action) and present >= set(who)
    ]
    return seen[-1]


def read_off(row):
    """The answer to a question, from the text of the story alone."""
    asked = row["question"]
    if row["kind"].startswith("belief"):
        return believed(row, *re.findall(r"\b[A-Z][a-z]+\b", asked)[1:])
    name = re.findall(r"\b[A-Z][a-z]+\b", asked)[1]
    own = [action for _, _, action in scenes(row) if action.startswith(name)]
    if row["kind"] == "intention":
        taken = {match[1] for action in own if (match := re.search(r"took the (\w+) and carried", action))}
        (goal,) = (goal for goal, needs in GOALS.items() if taken <= set(needs))
        return goal
    if row["kind"] == "desire":
        refused = set()
        for action in own:
            if match := re.search(r"offered (\w+) or (\w+) and took the (\w+)", action):
                refused |= {match[1], match[2]} - {match[3]}
        (best,) = set(row["options"]) - refused
        return best

    is_wanted = any("hoped for" in action for action in own)
    heard = [action for _, present, action in scenes(row) if "messenger" in action and name in present]
    has_come = any("took place" in action for _, _, action in scenes(row))
    return EMOTIONS[is_wanted, "not take place" not in heard[-1], has_come]


def test_every_answer_is_what_the_text_says():
    assert [row["kind"] for row in CHOICES] == [*KINDS] * 6
    for row in ROWS:
        assert 1300 <= len(row["prompt"].split("\n\n")[0]) <= 1800
        answer = row["options"][row["roles"].index("answer")]
        assert answer == read_off(row), row["prompt"]
        assert score(row, row["completion"])["readable"] == 1.0
        assert right(row["completion"], **{k: v for k, v in row.items() if k != "completion"}) == 1.0
        assert answer in row["reference"]


def test_options_are_four_and_wrong_in_the_way_that_their_role_says():
    is_misled = []
    for row in CHOICES:
        assert len(set(row["options"])) == 4 and row["roles"].count("answer") == 1
        by_role = dict(zip(row["roles"], row["options"], strict=True))
        if row["kind"] == "belief":
            cast = set.union(*(present for _, present, _ in scenes(row)))
            (name,) = re.findall(r"\b[A-Z][a-z]+\b", row["question"])[1:]
            truth = [a for _, _, a in scenes(row) if re.search(r"(put|moved) the \w+ into", a)][-1]
            is_misled.append("truth" in by_role)
            assert by_role.get("truth", by_role["answer"]) in truth
            if "other" in by_role:
                assert by_role["other"] in {believed(row, other) for other in cast - {name}}
        if row["kind"] == "belief2" and "other" in by_role:
            assert by_role["other"] in {believed(row, n) for n in re.findall(r"\b[A-Z][a-z]+\b", row["question"])[1:]}
    assert any(is_misled)


def test_any_two_things_tell_a_goal_and_any_one_leaves_three():
    things = sorted({thing for needs in GOALS.values() for thing in needs})
    assert len(things) == 7
    assert all(len(goals_of([thing])) == 3 for thing in things)
    assert all(len(goals_of(pair)) == 1 for pair in itertools.combinations(things, 2))
    assert len(set(EMOTIONS.values())) == 8


def test_a_favourite_is_what_nothing_was_taken_before():
    assert favourite([("figs", "nuts"), ("nuts", "fish"), ("honey", "figs")]) == "honey"
    with pytest.raises(ValueError, match="leave \\['figs', 'honey'\\], and one must be left"):
        favourite([("figs", "nuts"), ("honey", "nuts")])


def test_a_window_shows_what_comes_before_the_last_four_scenes():
    made = rows(2, seed=4, length=2500, windows=(0, 1000, FULL))
    for none, some, whole in zip(made[::3], made[1::3], made[2::3], strict=True):
        counts = [len(scenes(row)) for row in (none, some, whole)]
        assert counts[0] == 4 and counts == sorted(counts)
        assert scenes(whole)[-counts[1] :] == scenes(some)
        assert whole["visible"] and none["answer"] == whole["answer"] and none["options"] == whole["options"]
        if some["visible"]:
            assert read_off(some) == read_off(whole)
        if none["kind"] in ("intention", "desire", "emotion"):
            assert not none["visible"]


def test_rows_are_the_same_again_and_splits_share_no_cast():
    assert rows(6, seed=2, length=1500, modes=MODES) == ROWS
    train, test = (
        {row["prompt"].split("\n")[0] for row in rows(10, split=split, length=1500)} for split in ("train", "test")
    )
    assert not train & test
    for options in ({"length": 1000}, {"modes": ("both",)}, {"split": "dev"}):
        with pytest.raises(ValueError, match="must be"):
            rows(1, **options)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (C) ", "C"),
        ("D. In the boot", "D"),
        ("The answer is B.", "B"),
        ("Not (A), but (D)", "D"),
        ("She would look in the jar", "C"),
        ("In the jar or in the boot", None),
        ("A boot, I think", "B"),
        ("To answer a question", None),
        ("", None),
    ],
)
def test_the_letter_of_a_text(text, letter):
    assert read_letter(text, ["chest", "boot", "jar", "basket"]) == letter


def test_an_answer_is_cut_to_half_more_than_the_reference():
    assert cut("w " * 30, "one two three") == " ".join(["w"] * 8)
    assert cut("w " * 30, " ".join(["r"] * 11)) == " ".join(["w"] * 16)
    assert cut("w " * 30, " ".join(["r"] * 13)) == " ".join(["w"] * 19)
    assert told_points("The Jar, in a mill.", ["jar", "mill", "yard"]) == {1, 2}


@pytest.mark.parametrize(
    ("reply", "numbers"),
    [
        ("1,2", {1, 2}),
        ("1, 2", {1, 2}),
        (" [1 ,3]. ", {1, 3}),
        ("2, 2, 9, 0", {2}),
        ("None", set()),
        ("none.", set()),
        ("Null", None),
        ("", None),
        ("points 1 and 2", None),
        ("1;2", None),
    ],
)
def test_numbers_of_a_judge_are_read_as_they_are_meant(reply, numbers):
    """The released script rejects `1, 2`, makes three points of a rejected reply (the letters of "Null"), and takes
    numbers beyond the list."""
    assert read_numbers(reply, 3) == numbers


def stub(replies):
    """A judge that says these in turn, and keeps what it was asked."""
    asked = []

    def judge(prompt):
        asked.append(prompt)
        return replies[len(asked) - 1]

    return judge, asked


def test_missing_replies_are_neither_points_nor_faults():
    row = next(row for row in ROWS if row["mode"] == "generative" and row["kind"] == "emotion")
    judge, asked = stub(["1, 3", "None", "Null", "Null", "2,7", "1"])
    verdicts = [judged(row, "w " * 60, judge) for _ in range(3)]
    assert verdicts == [
        Verdict(3, frozenset({1, 3}), frozenset()),
        Verdict(3, None, None),
        Verdict(3, frozenset({2}), frozenset({1})),
    ]
    found = summary(verdicts)
    assert found.bpc == pytest.approx(3 / 6) and found.penalty_rate == 0.5 and found.missing == pytest.approx(2 / 6)
    assert row["points"][0] in asked[0] and row["reference"] in asked[1] and "w w" in asked[0]
    # The judge sees no more of an answer than is judged.
    assert asked[0].count("w w") < 30

    nothing = summary(verdicts[1:2])
    assert math.isnan(nothing.bpc) and math.isnan(nothing.penalty_rate) and nothing.missing == 1
    with pytest.raises(ValueError, match="0 verdicts"):
        summary([])


def test_both_suites_are_one_set_of_rows_with_one_reward():
    made = longcontext.rows(2, seed=1, length=1500, split="test", modes=MODES)
    assert [(r["suite"], r["item"]) for r in made] == [
        (suite, item) for item in (0, 1) for suite, count in (("prelude", 4), ("chartom", 10)) for _ in range(count)
    ]
    for row in made:
        columns = {name: value for name, value in row.items() if name != "completion"}
        assert longcontext.right(completion=row["completion"], token_ids=[], **columns) == 1.0
        assert longcontext.right(completion="?", **columns) == longcontext.readable(completion="", **columns) == 0.0
    with pytest.raises(ValueError, match="suite 'cogmath' must be one of prelude, chartom"):
        longcontext.score({"suite": "cogmath"}, "")
