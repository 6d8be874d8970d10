"""Chronicles and episodes: inference beside all worlds that a log allows, kinds, reasons, and what labels come to."""

import itertools
import random
import re
from collections import Counter

import pytest

from rljax.tasks.chronicle_facts import (
    BORN,
    EVE,
    FAR,
    IDLE,
    KNEW,
    MET,
    OLDER,
    PUPIL,
    SAW,
    THERE,
    TOGETHER,
    USED,
    Event,
    Fact,
    conflicts,
    derive,
)
from rljax.tasks.prelude import (
    CONSISTENT,
    CONTRADICT,
    KINDS,
    kind_of,
    read_cited,
    read_label,
    reasoned,
    right,
    rows,
    score,
    summary,
)
from rljax.tasks.stories import FULL

ROWS = rows(8, seed=3, length=1000)

# Each event says one thing, and most things follow from two.
LOG = [
    Event(i, i, "", says)
    for i, says in enumerate(
        [
            (Fact(USED, "Ben", ("sail", 2)),),
            (Fact(IDLE, "Ben", 3),),
            (Fact(PUPIL, "Ana", "Cleo"),),
            (Fact(KNEW, "Cleo", "sail", False),),
            (Fact(TOGETHER, "Ana", "Ben"),),
            (Fact(SAW, "Ben", "Oslo", False),),
            (Fact(MET, "Ben", "Cleo"),),
            (Fact(THERE, "Cleo", ("Oslo", 2)), Fact(FAR, "Oslo", ("Rome", 3))),
            (Fact(BORN, "Ben", -20),),
            (Fact(OLDER, "Ana", ("Ben", 2)),),
        ],
        1,
    )
]
CLAIMS = {
    Fact(KNEW, "Ben", "sail", False): (CONTRADICT, {(1, 2)}),
    Fact(KNEW, "Ana", "sail"): (CONTRADICT, {(3, 4)}),
    Fact(KNEW, "Cleo", "sail"): (CONTRADICT, {(4,)}),
    Fact(SAW, "Ana", "Oslo"): (CONTRADICT, {(5, 6)}),
    Fact(EVE, "Ana", "Oslo"): (CONTRADICT, {(5, 6)}),
    Fact(EVE, "Cleo", "Rome"): (CONTRADICT, {(8,)}),
    Fact(MET, "Ana", "Cleo", False): (CONTRADICT, {(5, 7)}),
    Fact(BORN, "Ana", -20): (CONTRADICT, {(9, 10)}),
    Fact(BORN, "Ana", -22): (CONSISTENT, {(9, 10)}),
    Fact(MET, "Ana", "Ben"): (CONSISTENT, {(5,)}),
    Fact(SAW, "Ben", "Oslo", False): (CONSISTENT, {(6,)}),
}


def worlds():
    """Every earlier life of the three, as far as the log can tell."""
    flags = [
        "Ana sail",
        "Ben sail",
        "Cleo sail",
        "Ana Oslo",
        "Ben Oslo",
        "Cleo Oslo",
        "Ana Ben",
        "Ana Cleo",
        "Ben Cleo",
    ]
    for bits in itertools.product((False, True), repeat=len(flags)):
        so = dict(zip(flags, bits, strict=True))
        for eve, ages in itertools.product(("Oslo", "Rome", ""), ((-22, -20), (-20, -20), (-20, -18))):
            for who in ("Ana", "Cleo"):
                if eve != "Oslo" or so[f"{who} Oslo"]:
                    yield so, (who, eve), dict(zip(("Ana", "Ben"), ages, strict=True))


def is_true(fact, world):
    """A fact in a world, by the words that events tell it with."""
    so, (sleeper, town), born = world
    relation, subject, value, holds = fact
    if relation == USED:
        # Whoever did it had known it, or had learned it by then: alone it says nothing.
        return True
    if relation in (IDLE, THERE, FAR):
        return True
    if relation == PUPIL:
        return so[f"{value} sail"] or not so[f"{subject} sail"]
    if relation == TOGETHER:
        return so["Ana Ben"] and so["Ana Oslo"] == so["Ben Oslo"] and so["Ana Cleo"] == so["Ben Cleo"]
    if relation == OLDER:
        return born[value[0]] - born[subject] == value[1]
    if relation == BORN:
        return born[subject] == value
    if relation == EVE:
        return (sleeper == subject and town == value) == holds
    return so[f"{subject} {value}"] == holds


def is_possible(events, claim):
    """Whether any world has the claim and all events, those included that say something only together."""
    facts = [fact for event in events for fact in event.says]
    relations = {fact.relation for fact in facts}
    for world in worlds():
        if not is_true(claim, world) or not all(is_true(fact, world) for fact in facts):
            continue
        if {USED, IDLE} <= relations and not world[0]["Ben sail"]:
            continue
        if {THERE, FAR} <= relations and world[1] == ("Cleo", "Rome"):
            continue
        return True
    return False


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.subject}-{claim.relation}-{claim.value}")
def test_inference_finds_what_no_world_allows(claim):
    label, evidence = CLAIMS[claim]
    found = conflicts(LOG, claim) if label == CONTRADICT else derive(LOG)[claim]
    assert found == {frozenset(numbers) for numbers in evidence}

    # Of what it finds, no world has all, and without any one of it some world does. What is implied has no denial.
    for numbers in evidence:
        needed = [event for event in LOG if event.number in numbers]
        denied = claim if label == CONTRADICT else claim._replace(holds=not claim.holds)
        if claim.relation == BORN and label == CONSISTENT:
            denied = Fact(BORN, "Ana", -20)
        assert not is_possible(needed, denied)
        assert all(is_possible([e for e in needed if e is not left], denied) for left in needed)
    assert is_possible(LOG, claim) == (label == CONSISTENT)


def test_kinds_are_told_by_the_check():
    assert kind_of(LOG, Fact(KNEW, "Cleo", "sail"))[0] == "local"
    assert kind_of(LOG, Fact(KNEW, "Ana", "sail"))[0] == "global"
    assert kind_of(LOG, Fact(BORN, "Ana", -22))[0] == "core"
    assert kind_of(LOG, Fact(SAW, "Ana", "Rome")) == ("irrelevant", frozenset({frozenset()}))
    # Somebody who does a thing may have learned it since: it is told of, and nothing follows.
    assert kind_of(LOG[:1], Fact(KNEW, "Ben", "sail", False))[0] == ""


def test_every_chronicle_has_an_episode_of_each_kind_with_its_evidence():
    assert [row["kind"] for row in ROWS] == [*KINDS] * 8
    for row in ROWS:
        story, _, asked = row["prompt"].partition("\n\n")
        assert 900 <= len(story) <= 1100
        numbers = [int(number) for number in re.findall(r"^\[(\d+)\] Year", story, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1))

        least = min(map(len, row["evidence"]))
        assert {"core": least >= 1, "irrelevant": least == 0, "local": least == 1, "global": least > 1}[row["kind"]]
        assert all(number in numbers for support in row["evidence"] for number in support)
        assert score(row, row["completion"]) == {"right": 1.0, "reasoned": 1.0, "readable": 1.0}
        if row["kind"] in ("local", "global"):
            assert asked.split("\n")[0].removeprefix("Character: ") in story


def test_labels_are_balanced_also_among_episodes_that_read_alike():
    labels = Counter(row["answer"] for row in ROWS)
    assert labels[CONSISTENT] == labels[CONTRADICT]
    made = [row for seed in range(4) for row in rows(20, seed=seed, length=1000)]
    for says_never in (True, False):
        alike = [row["answer"] for row in made if (" never " in row["prompt"].split("Episode")[1]) == says_never]
        assert 0.38 < alike.count(CONSISTENT) / len(alike) < 0.62


def test_rows_are_the_same_again_and_splits_share_no_cast():
    assert rows(8, seed=3, length=1000) == ROWS
    train, test = (
        {row["prompt"].split("\n")[0] for row in rows(12, split=split, length=1000)} for split in ("train", "test")
    )
    assert not train & test
    for options in ({"size": 0}, {"size": 1, "length": 10}, {"size": 1, "split": "dev"}, {"size": 1, "windows": (-2,)}):
        with pytest.raises(ValueError, match="must be"):
            rows(**options)


def test_a_window_shows_the_last_events_and_says_whether_they_decide():
    made = rows(2, seed=1, length=1500, windows=(0, 500, FULL))
    for none, some, whole in zip(made[::3], made[1::3], made[2::3], strict=True):
        assert "(left out)" in none["prompt"] and none["visible"] == (none["kind"] == "irrelevant")
        assert whole["visible"] and whole["answer"] == none["answer"]
        events = some["prompt"].split("\n\n")[0].split("\n")[1:]
        assert sum(len(event) + 1 for event in events) <= 500
        assert whole["prompt"].split("\n\n")[0].endswith("\n".join(events))
        seen = {int(event[1 : event.index("]")]) for event in events}
        assert some["visible"] == any(seen >= set(support) for support in some["evidence"])


@pytest.mark.slow
def test_chronicles_grow_to_their_longest():
    (row, *_) = rows(1, length=64_000)
    story = row["prompt"].partition("\n\n")[0]
    assert 0.95 * 64_000 < len(story) < 1.05 * 64_000 and 60 <= story.count("\n") <= 300


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("consistent [3]", CONSISTENT),
        ("Contradict [1, 2]", CONTRADICT),
        ("It is inconsistent with [4].", CONTRADICT),
        ("This is not consistent with the chronicle.", CONTRADICT),
        ("It does not contradict anything", CONSISTENT),
        ("There is no contradiction.", CONSISTENT),
        ("It contradicts event 3, though it looks consistent.", CONTRADICT),
        ("consistently", None),
        ("", None),
    ],
)
def test_the_label_of_a_text(text, label):
    assert read_label(text) == label


def test_a_reason_is_right_if_it_holds_a_smallest_set_and_little_else():
    row = {"answer": CONTRADICT, "evidence": [[2, 5], [7, 9]]}
    assert read_cited("contradict [2, 5] and [9]") == {2, 5, 9}
    assert score(row, "contradict [5,2, 8]")["reasoned"] == 1.0
    assert score(row, "contradict [7][9]")["reasoned"] == 1.0
    assert score(row, "contradict [2, 9]") == {"right": 1.0, "reasoned": 0.0, "readable": 1.0}
    assert score(row, "consistent [2, 5]") == {"right": 0.0, "reasoned": 0.0, "readable": 1.0}
    assert score(row, "contradict [1, 2, 3, 4, 5, 6]")["reasoned"] == 0.0
    assert score(row, "[2, 5]") == {"right": 0.0, "reasoned": 0.0, "readable": 0.0}
    assert right("contradict", CONTRADICT, kind="local") == 1.0
    assert reasoned("contradict [2, 5]", CONTRADICT, row["evidence"], kind="local") == 1.0


def test_always_consistent_scores_what_is_published():
    answers = [CONSISTENT] * 434 + [CONTRADICT] * 361
    found = summary(answers, [CONSISTENT] * 795)
    assert found.accuracy == pytest.approx(0.5459, abs=5e-5)
    assert found.f1[CONSISTENT] == pytest.approx(0.7063, abs=5e-5) and found.f1[CONTRADICT] == 0
    assert found.macro_f1 == pytest.approx(0.3531, abs=5e-5)


def test_labels_add_up_beside_counts_of_true_and_false_ones():
    draw = random.Random(0)
    answers = [draw.choice((CONSISTENT, CONTRADICT)) for _ in range(50)]
    found = [draw.choice((CONSISTENT, CONTRADICT, None)) for _ in answers]
    got = summary(answers, found)
    for label in (CONSISTENT, CONTRADICT):
        hit = sum(a == label and f == label for a, f in zip(answers, found, strict=True))
        precision = hit / found.count(label)
        recall = hit / answers.count(label)
        assert got.f1[label] == pytest.approx(2 * precision * recall / (precision + recall))
    assert got.unreadable == found.count(None) / 50
    for bad in (([], []), ([CONSISTENT], []), (["true"], ["true"])):
        with pytest.raises(ValueError, match="must be as many"):
            summary(*bad)
