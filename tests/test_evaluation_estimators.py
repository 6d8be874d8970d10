"""pass@k and its relatives against the worked examples and enumeration of subsets."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rljax.evaluation import Evaluation, EvaluationConfig, summarize
from rljax.evaluation.estimators import (
    all_at_k,
    avg_at_k,
    bootstrap_interval,
    maj_at_k,
    paired_difference,
    pass_at_k,
    standard_error,
)
from rljax.experiment.report import comparison_table, sample_table
from rljax.rollouts import ScoredGroup
from rljax.sampling import Sample
from rljax.tasks import Example, RewardResult

PASS_OF_4 = {0: [0, 0, 0, 0], 1: [0.25, 0.5, 0.75, 1], 2: [0.5, 0.8333333333, 1, 1], 4: [1, 1, 1, 1]}
CORRECT = np.array([[1, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("c", PASS_OF_4)
def test_pass_at_k_of_four_samples(c):
    got = [float(pass_at_k(4, c, k)) for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(got, PASS_OF_4[c], atol=1e-10)
    if c in (0, 4):
        assert got == PASS_OF_4[c]  # exactly


def test_two_problems_and_not_the_biased_plug_in():
    c = CORRECT.sum(axis=1)
    got = [pass_at_k(4, c, k).mean() for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(got, [0.375, 0.6666666667, 0.875, 1], atol=1e-10)
    plug_in = [(1 - (1 - c / 4) ** k).mean() for k in (2, 3, 4)]
    np.testing.assert_allclose(plug_in, [0.59375, 0.7265625, 0.810546875])
    assert all(a > b + 0.05 for a, b in zip(got[1:], plug_in, strict=True))


@pytest.mark.parametrize(
    ("n", "c", "k", "want"),
    [
        (256, 3, 128, 0.876470588235),
        (1024, 1, 256, 0.25),
        (1024, 5, 256, 0.763469174582),
        (1024, 5, 1024, 1),
        (200, 20, 10, 0.660225623763),
    ],
)
def test_pass_at_k_of_many_samples(n, c, k, want):
    assert float(pass_at_k(n, c, k)) == pytest.approx(want, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_and_all_at_k_equal_integer_binomials(nck):
    n, c, k = nck
    total = math.comb(n, k)
    assert float(pass_at_k(n, c, k)) == pytest.approx(1 - math.comb(n - c, k) / total, abs=1e-12)
    assert float(all_at_k(n, c, k)) == pytest.approx(math.comb(c, k) / total, abs=1e-12)
    assert 0 <= float(pass_at_k(n, c, k)) <= 1


def test_problems_may_have_different_numbers_of_samples():
    got = pass_at_k([4, 8, 2], [1, 1, 2], 2)
    np.testing.assert_allclose(got, [0.5, 0.25, 1])


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, 1, 5, "k=5 needs at least 5"),
        ([8, 3], 1, 4, "one has 3"),
        (4, 5, 2, "within"),
        (4, 1, 0, "at least 1"),
    ],
)
def test_impossible_arguments_are_refused_not_extrapolated(n, c, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


def test_avg_at_k_is_the_mean_of_the_first_k_samples_and_pass_at_1_of_all():
    np.testing.assert_allclose(avg_at_k(CORRECT), [0.5, 0.25])
    assert avg_at_k(CORRECT).mean() == 0.375
    np.testing.assert_allclose(avg_at_k(CORRECT), pass_at_k(4, CORRECT.sum(axis=1), 1))
    np.testing.assert_allclose(avg_at_k(CORRECT, 1), [1, 0])
    with pytest.raises(ValueError, match="avg@5"):
        avg_at_k(CORRECT, 5)


def enumerated_majority(answers, gold, k):
    scores = []
    for subset in itertools.combinations(answers, k):
        votes = Counter(a for a in subset if a is not None)
        winners = [a for a, n in votes.items() if n == max(votes.values())]
        scores.append((gold in winners) / len(winners) if winners else 0.0)
    return np.mean(scores)


@pytest.mark.parametrize(
    ("answers", "gold", "want"),
    [
        (["7", "3", "7", "5"], "7", [0.5, 0.5, 0.6666666667, 1]),
        (["a", "b", "b", "c"], "c", [0.25, 0.25, 0.1666666667, 0]),
        (["x", "y", "x", "y"], "x", [0.5, 0.5, 0.5, 0.5]),
        (["7", None, None, None], "7", [0.25, 0.5, 0.75, 1]),
        ([None] * 4, "7", [0, 0, 0, 0]),
        (["1"] * 4, "7", [0, 0, 0, 0]),
        (["7"] * 4, "7", [1, 1, 1, 1]),
    ],
)
def test_maj_at_k_examples(answers, gold, want):
    np.testing.assert_allclose([maj_at_k(answers, gold, k) for k in (1, 2, 3, 4)], want, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([None, *"abcdef"]), min_size=1, max_size=9), st.data())
def test_maj_at_k_equals_enumeration_of_subsets(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    assert maj_at_k(answers, "a", k) == pytest.approx(enumerated_majority(answers, "a", k), abs=1e-12)


def test_maj_at_k_of_many_samples_agrees_with_resampling():
    rng = np.random.default_rng(0)
    answers = [int(a) for a in rng.choice(40, size=256, p=np.arange(40, 0, -1) / 820)]
    scores = []
    for _ in range(4000):
        values, counts = np.unique(rng.choice(answers, 16, replace=False), return_counts=True)
        winners = values[counts == counts.max()]
        scores.append(np.isin(0, winners) / len(winners))
    assert abs(maj_at_k(answers, 0, 16) - np.mean(scores)) < 4 * np.std(scores) / math.sqrt(4000)


def test_maj_at_k_stays_a_probability_at_thousands_of_samples():
    answers = ["gold"] * 700 + [f"other {i % 300}" for i in range(1300)]
    values = [maj_at_k(answers, "gold", k) for k in (1, 2, 8, 64)]
    assert values[0] == pytest.approx(0.35, abs=1e-9)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert values[-1] <= 1
    assert values[-1] > 0.999


@pytest.mark.parametrize("k", [0, 5])
def test_maj_at_k_refuses_more_votes_than_answers(k):
    with pytest.raises(ValueError, match=f"maj@{k}"):
        maj_at_k(["a"] * 4, "a", k)


def test_standard_error_is_over_problems():
    assert standard_error(avg_at_k(CORRECT)) == pytest.approx(0.125)
    assert math.isnan(standard_error([0.5]))


def test_bootstrap_interval_is_seeded_and_covers_what_the_normal_interval_covers():
    values = np.random.default_rng(1).random(200)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert (low, high) != bootstrap_interval(values, seed=1)
    half = 1.96 * standard_error(values)
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.1 * half)
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5)


def test_bootstrap_interval_equals_plain_resampling_of_problems():
    values = np.array([0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.25])
    rng = np.random.default_rng(2)
    means = values[rng.integers(0, 7, (200_000, 7))].mean(axis=1)
    np.testing.assert_allclose(
        bootstrap_interval(values, resamples=200_000), np.quantile(means, [0.025, 0.975]), atol=0.01
    )


def test_bootstrap_interval_refuses_nothing_and_impossible_confidence():
    with pytest.raises(ValueError, match="one value per problem"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_interval([0.0, 1.0], confidence=95.0)


def test_paired_difference_removes_the_spread_between_problems():
    before = np.linspace(0, 0.8, 30)
    after = before + 0.1 + 0.01 * (-1.0) ** np.arange(30)
    difference = paired_difference(after, before)
    assert difference.mean == pytest.approx(0.1)
    assert difference.standard_error < standard_error(after) / 10
    assert difference.low < 0.1 < difference.high
    assert difference.low > 0.09
    with pytest.raises(ValueError, match="same problems"):
        paired_difference(after, before[:-1])


def group_of(texts, results, answers=()):
    """One problem as an evaluation is given it."""
    sample = Sample(np.zeros(2, np.int32), np.zeros(2, np.float32), np.zeros(2, np.float32), "stop")
    count = len(texts)
    steps = [np.zeros(2, np.int32)] * count
    return ScoredGroup(Example("?", {}), [1], [sample] * count, texts, results, steps, answers=answers)


def summary(results, answers=(), **config):
    texts = [f"thinking {i}, so {answer}" for i, answer in enumerate(answers or results)]
    sampled = group_of(texts, results, answers)
    greedy = group_of(texts[:1], results[:1], answers[:1])
    return summarize([greedy], [sampled], EvaluationConfig(samples=len(results), **config))


def test_the_majority_is_of_answers_and_not_of_texts():
    """Two of eight say 5, which is right, and six say 17, each in words of its own: the majority is wrong."""
    results = [RewardResult(float(i < 2), {}) for i in range(8)]
    metrics = summary(results, ["5", "5"] + ["17"] * 6).metrics
    assert metrics["maj@8"] == 0 and metrics["avg@8"] == 0.25
    split = summary(results, ["5", "5", "17", "18", "19", None, None, None])
    assert split.metrics["maj@8"] == 1
    assert split.problems[0]["answers"][2:6] == ["17", "18", "19", None]


def test_right_answers_vote_as_one_and_without_an_extractor_there_is_no_vote():
    results = [RewardResult(float(i < 4), {}) for i in range(8)]
    assert summary(results, ["1/2", "0.5", "2/4", "0.50", "3", "3", "3", "4"]).metrics["maj@8"] == 1
    metrics = summary(results).metrics
    assert "maj@8" not in metrics and metrics["pass@8"] == 1


def test_what_decides_says_what_is_solved_and_not_the_weighted_sum():
    """0.8 for the answer and 0.2 for the format: right without format sums to 0.8, wrong with two bonuses to 1."""
    parts = [{"right": 1.0, "format": 0.0}, {"right": 0.0, "format": 5.0}, {"right": 1.0, "format": 1.0}]
    results = [RewardResult(0.8 * p["right"] + 0.2 * p["format"], p, decided_by="right") for p in parts]
    assert [result.is_solved for result in results] == [True, False, True]
    assert [RewardResult(result.value, result.components).is_solved for result in results] == [False, True, True]
    found = summary(results)
    assert found.metrics["avg@3"] == pytest.approx(2 / 3) and found.solved_shares() == [pytest.approx(2 / 3)]
    with pytest.raises(ValueError, match=r"solved_by='rihgt' is no reward .* there are format, right"):
        summary(results, solved_by="rihgt")


def test_a_completion_that_was_cut_off_may_not_earn_by_any_part():
    cut = RewardResult(0.7, {"right": 1.0, "format": -0.3}, decided_by="right").voided()
    assert not cut.is_solved and (cut.value, cut.part("right"), cut.part("format")) == (0, 0, -0.3)
    assert cut.components["right"] == 1
    assert not RewardResult(0.0, {"right": 1.0}, False, decided_by="right").is_solved


def test_an_evaluation_of_which_less_is_written_can_be_read_and_compared():
    """Its records name neither answers nor what is solved, and its majority is of texts."""
    results = [RewardResult(1.0, {}), RewardResult(0.5, {}), RewardResult(0.0, {}, False), RewardResult(1.2, {})]
    after = summary(results)
    written = summary(results, ["a", "b", "c", "d"]).to_dict()
    for record in written["problems"]:
        del record["answers"], record["solved"]
    before = Evaluation.from_dict(written)
    assert before.solved_shares() == after.solved_shares() == [0.5]
    table = comparison_table(before, after)
    assert "avg@4" in table and "maj@4" not in table
    assert "before" in sample_table(before, after)
