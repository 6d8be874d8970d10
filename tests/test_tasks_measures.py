"""How hard a task is by samples of it: the worked examples, loops over them, and what has no token or one candidate."""

import math

import numpy as np
import pytest

from rljax.tasks import MEASURES, difficulties, measured_sample

TOP = np.log([[0.70, 0.15, 0.05, 0.03, 0.02], [0.40, 0.35, 0.10, 0.05, 0.02]])
SAID = np.log([0.70, 0.35])
NONE = -1e30


def test_a_sample_meets_the_worked_example():
    sample = measured_sample(SAID, TOP)
    np.testing.assert_allclose(sample.entropies, [1.243354, 1.749312], atol=5e-7)
    assert sample.nll == pytest.approx(1.406497, abs=5e-7) and sample.token_nll == pytest.approx(0.703249, abs=5e-7)
    assert sample.margin == pytest.approx((math.log(0.70 / 0.15) + math.log(0.40 / 0.35)) / 2)
    found = difficulties([sample, sample], [1.0, 0.0])
    wanted = {
        "sequence_entropy": 2.992666,
        "token_entropy": 1.496333,
        "token_perplexity": 2.821247,
        "sequence_perplexity": 2.020305,
        "margin": 0.836988,
    }
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=5e-7), name


def test_accuracy_and_variance_meet_the_worked_examples():
    solved = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    found = difficulties([measured_sample(SAID, TOP)] * 10, solved)
    assert found["accuracy"] == pytest.approx(0.7) and found["accuracy_variance"] == pytest.approx(0.21)

    samples = [measured_sample(np.full(2, -nll), TOP) for nll in (0.7, 0.9, 0.5, 1.1)]
    found = difficulties(samples, [1.0, math.nan, 0.0, 1.0])
    assert found["token_nll_variance"] == pytest.approx(0.05) and found["nll_variance"] == pytest.approx(0.2)
    assert found["accuracy"] == pytest.approx(2 / 3)  # nothing could tell of one


def test_every_measure_equals_a_loop_over_the_samples():
    rng = np.random.default_rng(0)
    given = []
    for length in (3, 5, 2):
        top = np.sort(np.log(rng.dirichlet(np.ones(9), length)), axis=1)[:, ::-1][:, :5]
        given.append((top[:, 1], top))
    found = difficulties([measured_sample(*one) for one in given], [1.0, 0.0, 1.0])

    entropies, margins, losses = [], [], []
    for said, top in given:
        rows = []
        for row in np.exp(top):
            q = row / sum(row)
            rows.append(-sum(x * math.log2(x) for x in q))
        entropies.append(rows)
        margins.append(sum(row[0] - row[1] for row in top) / len(top))
        losses.append(-sum(said))
    sums = [sum(rows) for rows in entropies]
    means = [sum(rows) / len(rows) for rows in entropies]
    pooled = [x for rows in entropies for x in rows]
    each = [loss / len(rows) for loss, rows in zip(losses, entropies, strict=True)]
    wanted = {
        "accuracy": 2 / 3,
        "sequence_perplexity": np.mean([math.exp(x) for x in each]),
        "token_perplexity": np.mean([2**x for x in means]),
        "margin": np.mean(margins),
        "sequence_entropy": np.mean(sums),
        "token_entropy": np.mean(means),
        "pooled_entropy": np.mean(pooled),
        "nll_variance": np.var(losses),
        "token_nll_variance": np.var(each),
        "sequence_entropy_variance": np.var(sums),
        "token_entropy_variance": np.var(means),
        "pooled_entropy_variance": np.var(pooled),
        "margin_variance": np.var(margins),
        "accuracy_variance": 2 / 9,
    }
    assert list(found) == list(MEASURES) == list(wanted)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    assert {one.dimension for one in MEASURES.values()} == {
        "problem",
        "surprisal",
        "margin",
        "uncertainty",
        "variability",
    }


def test_a_place_with_one_candidate_has_no_entropy_and_no_margin():
    top = np.array([[0.0, NONE, NONE], [math.log(0.5), math.log(0.5), NONE]])
    sample = measured_sample(np.array([0.0, math.log(0.5)]), top)
    np.testing.assert_allclose(sample.entropies, [0.0, 1.0])
    assert sample.margin == 0.0
    assert measured_sample(top[:1, 0], top[:1]).margin == 0.0


def test_a_sample_without_tokens_is_sure_of_nothing():
    empty = measured_sample(np.zeros(0), np.zeros((0, 5)))
    found = difficulties([empty, empty], [0.0, 0.0])
    assert found["sequence_perplexity"] == found["token_perplexity"] == 1.0
    assert all(found[name] == 0.0 for name in MEASURES if not name.endswith("perplexity"))


def test_where_nothing_could_tell_there_is_no_accuracy():
    found = difficulties([measured_sample(SAID, TOP)] * 2, [math.nan, math.nan])
    assert math.isnan(found["accuracy"]) and math.isnan(found["accuracy_variance"])
    with pytest.raises(ValueError, match="there is none"):
        difficulties([], [])
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        measured_sample(SAID, TOP[:, :1])
