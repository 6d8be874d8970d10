"""CogMath's dimensions: worked numbers, references read a second way, what is a pass, how passes add up."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from rljax.tasks.cogmath import (
    DIMENSIONS,
    FAMILIES,
    NO_ANSWER,
    UNANSWERABLE,
    execute,
    passed,
    problem,
    readable,
    rows,
    says_unanswerable,
    summary,
)

EGGS = {"all": 16, "first": 3, "second": 4, "each": 2, "extra": 5}
ROWS = rows(12, seed=1)


def test_the_worked_problem_and_its_references():
    made = problem(FAMILIES[0], 0, EGGS, random.Random(0))
    answers = {dimension: answer for dimension, (_, answer) in made.items()}
    assert [answers[i] for i in (0, 1, 4, 5)] == ["18"] * 4
    assert [answers[i] for i in (2, 3)] == [UNANSWERABLE] * 2
    assert answers[7] == "23" and answers[8] == "9"
    fresh = execute(FAMILIES[0].program, {"all": 20, "first": 4, "second": 5, "each": 2})
    assert fresh == {"rest": 16, "left": 11, "earned": 22}

    question, hidden = made[9]
    assert " x " in question and hidden in {"16", "3", "4", "2"} and hidden not in re.findall(r"\d+", question)


def test_a_program_says_when_it_has_no_answer():
    program = (("half", "/", "all", 2), ("rest", "-", "half", "gone"))
    assert execute(program, {"all": 10, "gone": 2}) == {"half": 5, "rest": 3}
    assert execute(program, {"all": 9, "gone": 2}) is None
    assert execute(program, {"all": 10, "gone": 6}) is None
    assert execute(program, {"all": 10}) is None
    with pytest.raises(ValueError, match="give no whole answer of at least 0"):
        problem(FAMILIES[1], 0, {"all": 13, "more": 2, "extra": 0}, random.Random(0))


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text.split("\n")[0])]


def test_every_problem_has_its_nine_follow_ups_and_what_each_is_to_change():
    by_problem = {}
    for row in ROWS:
        by_problem.setdefault(row["problem"], {})[row["dimension"]] = row
    assert len(by_problem) == 12
    for made in by_problem.values():
        assert sorted(made) == [0, *DIMENSIONS]
        text = {dimension: row["prompt"].split("\n")[0] for dimension, row in made.items()}
        answer = {dimension: row["answer"] for dimension, row in made.items()}
        assert {answer[i] for i in (0, 1, 4, 5)} == {answer[0]}
        assert {answer[i] for i in NO_ANSWER} == {UNANSWERABLE}

        told = numbers(text[0])
        assert Counter(numbers(text[1])) == Counter(told) and text[1] != text[0]
        assert Counter(re.findall(r"\w+", text[2])) == Counter(re.findall(r"\w+", text[0])) and text[2] != text[0]
        assert len(numbers(text[3])) == len(told) - 1 and set(text[3].split()) < set(text[0].split())
        assert len(numbers(text[4])) == len(told) + 1
        assert numbers(text[5]) == told and text[5] != text[0]
        assert re.sub(r"\d+", "", text[6]) == re.sub(r"\d+", "", text[0]) and answer[6] != answer[0]
        assert text[8].startswith(text[0].rsplit(". ", 1)[0])
        assert "What is x?" in text[9] and f"The answer to this is {answer[0]}." in text[9]

        # The hidden number stands nowhere, and is where the x is.
        place = re.sub(r"\bx\b", answer[9], text[9].split(" The answer")[0], count=1)
        assert place == text[0]


def test_answers_are_those_of_the_arithmetic_that_the_stories_tell():
    for row in ROWS:
        if row["answer"] == UNANSWERABLE or row["dimension"] in (4, 8, 9):
            continue
        n = numbers(row["prompt"])
        if len(n) >= 4:  # eggs or books, and the changed rule's number last
            want = (n[0] - n[1] - n[2]) * n[3] + (n[4] if len(n) > 4 else 0)
        else:
            gone = n[0] // (3 if "third" in row["prompt"] else 2)
            want = n[0] - gone + n[1]
        assert row["answer"] == str(want), row["prompt"]


def test_problems_are_the_same_again_and_splits_share_none():
    assert rows(12, seed=1) == ROWS
    train, test = ({r["prompt"] for r in rows(60, split=split) if r["dimension"] == 0} for split in ("train", "test"))
    assert not train & test
    for options in ({"size": 0}, {"size": 1, "split": "dev"}):
        with pytest.raises(ValueError, match="must be at least 1, and split"):
            rows(**options)


@pytest.mark.parametrize(
    ("text", "answer", "is_pass"),
    [
        ("She earns 9 * 2 = 18 dollars.", "18", 1.0),
        ("18.0", "18", 1.0),
        ("18 of 20", "18", 0.0),
        ("eighteen", "18", 0.0),
        ("It cannot be answered; perhaps 18", "18", 0.0),
        ("Unanswerable.", UNANSWERABLE, 1.0),
        ("This cannot be determined.", UNANSWERABLE, 1.0),
        ("18", UNANSWERABLE, 0.0),
    ],
)
def test_what_is_a_pass(text, answer, is_pass):
    assert passed(completion=text, answer=answer, prompt="?", token_ids=[]) == is_pass
    assert readable(completion=text, prompt="?") == float(text != "eighteen")
    assert says_unanswerable(text) == ("nanswerable" in text or "cannot" in text)


def test_passes_add_up_as_in_the_worked_example():
    passes = np.ones((4, 9))
    passes[:, 3] = [1, 0, 1, 1]
    passes[3, 1] = 0
    found = summary(passes, np.array([1, 1, 1, 0]))
    assert found.original == 0.75 and found.rates[4] == 0.75
    assert found.relative[4] == pytest.approx(2 / 3)
    assert found.mastered == 0.5 and found.mastered_without_2 == 0.75
    assert found.product == pytest.approx(0.75**2)

    # Nine of .95 each, if they were independent.
    many = np.ones((100, 9))
    for i in range(9):
        many[11 * i : 11 * i + 5, i] = 0
    assert summary(many, np.ones(100)).product == pytest.approx(0.6302, abs=5e-5)
    assert np.isnan(summary(passes, np.zeros(4)).relative[1])
    with pytest.raises(ValueError, match=r"passes \(4, 8\) must be \[N, 9\]"):
        summary(passes[:, :8], np.ones(4))
