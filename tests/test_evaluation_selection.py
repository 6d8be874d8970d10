"""Rules that take one of many answers: the worked examples, what they see, and what a verifier is asked."""

import itertools
import math
import re

import pytest

from rljax.evaluation import (
    Candidates,
    at_k,
    borda,
    by_verifier,
    efficiency,
    expected_score,
    fewest_calls,
    first,
    majority,
    medoid,
    oracle_score,
    surest,
    verifier_prompt,
    weighted_majority,
)

RUNS = Candidates(
    answers=list("ABACBB"),
    texts=[f"found {i}" for i in range(6)],
    confidences=[2.0, 1.1, 1.9, 2.4, 1.0, 1.2],
    calls=[12, 40, 15, 30, 55, 33],
)


def answer_of(select, candidates=RUNS):
    return candidates.answers[select(candidates)]


def test_every_rule_takes_the_answer_of_the_worked_example():
    assert answer_of(majority) == "B"
    assert [answer_of(borda(b)) for b in (0.0, 0.5, 1.0, 2.0)] == ["B", "A", "A", "A"]
    assert answer_of(borda(40.0)) == "C"  # the surest one
    assert answer_of(weighted_majority) == "A"
    assert answer_of(fewest_calls) == "A"
    assert answer_of(surest) == "C"
    assert answer_of(first) == "A"


def test_ties_go_to_confidence_and_then_to_the_first():
    tie = Candidates(list("ABAB"), confidences=[1.0, 2.0, 1.0, 2.0], calls=[3, 3, 3, 3])
    assert answer_of(majority, tie) == answer_of(fewest_calls, tie) == "B"
    assert answer_of(majority, tie._replace(confidences=())) == "A"


def test_what_could_not_be_read_is_never_taken():
    some = Candidates([None, None, "A"], confidences=[9.0, 9.0, 0.1], calls=[0, 0, 50])
    for rule in (majority, weighted_majority, fewest_calls, surest, borda(1.0), medoid(lambda a, b: 1.0)):
        assert rule(some) == 2
        assert rule(Candidates([None, None], confidences=[1.0, 2.0], calls=[1, 1])) == 0


def test_the_medoid_is_the_answer_that_the_others_are_near_to():
    # Buckets of the distances between Paris, the Louvre, Versailles and Berlin.
    utility = {("P", "L"): 0.8, ("P", "V"): 0.4, ("L", "V"): 0.4}
    near = medoid(lambda a, b: utility.get((a, b), utility.get((b, a), 0.0)))
    assert near(Candidates(["P", "L", "V", "B"])) == 0


def test_a_single_answer_is_taken_by_all_rules():
    one = RUNS.taken([3])
    for rule in (first, majority, weighted_majority, fewest_calls, surest, borda(2.0), by_verifier("?", lambda _: "1")):
        assert rule(one) == 0


def test_scores_of_the_worked_example_of_verifiers():
    scores = [[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]]
    table = [Candidates(list(range(4)))] * 3
    rules = {"verifier": lambda i: lambda _: (1, 3, 2)[i]}
    found = at_k(rules, table, scores, [4])
    assert found["mean"][4] == pytest.approx(1 / 3)
    assert found["verifier"][4] == pytest.approx(1 / 3)
    assert found["oracle"][4] == pytest.approx(2 / 3)
    assert efficiency(found["verifier"][4], found["mean"][4], found["oracle"][4]) == 0.0
    assert math.isnan(efficiency(1.0, 1.0, 1.0))


def test_expected_scores_are_means_over_all_subsets():
    scores = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    subsets = list(itertools.combinations(range(6), 3))
    by_hand = [scores[s[majority(RUNS.taken(s))]] for s in subsets]
    assert expected_score(majority, RUNS, scores, 3) == pytest.approx(sum(by_hand) / len(subsets))
    assert oracle_score(scores, 3) == pytest.approx(1 - 4 / 20)
    assert expected_score(first, RUNS, scores, 1) == pytest.approx(1 / 3)
    assert expected_score(majority, RUNS, scores, 3, draws=5) == expected_score(majority, RUNS, scores, 3, draws=5)
    with pytest.raises(ValueError, match=r"k=7 must lie in \[1, 6\]"):
        expected_score(first, RUNS, scores, 7)


def test_a_verifier_reaches_its_ceiling_and_no_further():
    """True and false answers are accepted at rates t and g; one of the accepted is taken, or any where there is none:
    p t / (p t + (1 - p) g) is the limit."""
    p, t, g = 0.3, 0.9, 0.1
    found = []
    for n in (1, 2, 4, 16):
        total = 0.0
        for true in range(n + 1):
            chance = math.comb(n, true) * p**true * (1 - p) ** (n - true)
            for a, b in itertools.product(range(true + 1), range(n - true + 1)):
                weight = math.comb(true, a) * t**a * (1 - t) ** (true - a)
                weight *= math.comb(n - true, b) * g**b * (1 - g) ** (n - true - b)
                total += chance * weight * (a / (a + b) if a + b else true / n)
        found.append(round(total, 3))
    assert found == [0.3, 0.468, 0.652, 0.793]


def test_a_verifier_is_asked_once_with_the_answers_shuffled_and_equally_long():
    asked = []

    def third(prompt):
        asked.append(prompt)
        return "I take number 3."

    long = RUNS._replace(texts=["x" * 50 + text for text in RUNS.texts])
    chosen = by_verifier("Where?", third, max_chars=len("found 0"))(long)
    (prompt,) = asked
    assert "Question: Where?" in prompt and "xfound" not in prompt
    shown = re.findall(r"^Answer \d:\n(.*)$", prompt, flags=re.MULTILINE)
    assert sorted(shown) == sorted(RUNS.texts) and shown[2] == RUNS.texts[chosen]
    orders = {by_verifier(f"Where {i}?", lambda _: "1")(RUNS) for i in range(20)}
    assert len(orders) > 2  # whoever always takes the first place takes no answer in particular


def test_an_unusable_reply_leaves_it_to_the_majority_and_nothing_is_asked_without_an_answer():
    for reply in ("none of them", "0", "7", "9" * 5000):
        assert answer_of(by_verifier("?", lambda _, reply=reply: reply)) == "B"

    def never(prompt):
        raise AssertionError(prompt)

    assert by_verifier("?", never)(Candidates([None, None], texts=["a", "b"])) == 0


def test_a_verifier_cannot_see_rewards():
    """The prompt is made of question and texts alone, and there is no field that could hold a score."""
    assert set(Candidates._fields) == {"answers", "texts", "confidences", "calls"}
    changed = RUNS._replace(confidences=[0.0] * 6, calls=[0] * 6)
    order = range(6)
    assert verifier_prompt("?", RUNS, order=order) == verifier_prompt("?", changed, order=order)
