"""Learning from guided rollouts, by the worked examples of ActGuide-RL."""

import dataclasses

import numpy as np
import pytest
from objectives import make_batch, make_rows, term, value_and_grad

from rljax.algorithms import ActGuideRL
from rljax.losses import behavior_ratio, clipped, policy_loss, shaped_guidance, shift_stats, token_mean, token_sum
from rljax.types import SOURCE_GUIDED

NEW = np.log([[0.3, 0.5, 0.1, 0.5]])
GUIDED = np.log([[0.6, 0.4, 0.5, 0.1]])


def rows(new, behavior, advantages, mask=None, *, aggregate=token_mean, guided=()):
    """`old` is the policy itself: only the recorded log-probs may enter."""
    mask = np.ones(np.shape(new), bool) if mask is None else mask
    made = make_rows(mask, aggregate=aggregate, old=new, advantages=advantages, behavior=behavior)
    return dataclasses.replace(made, source=np.where(np.isin(range(len(mask)), guided), SOURCE_GUIDED, 0))


@pytest.mark.parametrize(
    ("advantage", "surrogates", "flows"),
    [(1, [0.5, 1.2, 0.2, 1.2], [1, 0, 1, 0]), (-1, [-0.8, -1.25, -0.8, -3], [0, 1, 0, 0])],
)
def test_ratio_and_clip_meet_the_worked_example(advantage, surrogates, flows):
    loss = ActGuideRL(kl_coef=0.0).build().loss
    made = rows(NEW, GUIDED, np.full((1, 4), advantage, float))
    value, metrics, gradient = value_and_grad(loss, made, NEW)
    assert value == pytest.approx(-np.mean(surrogates), abs=1e-6)
    assert metrics["loss/ratio_mean"] == pytest.approx(np.mean([0.5, 1.25, 0.2, 5]), rel=1e-5)
    np.testing.assert_array_equal(gradient[0] != 0, flows)
    ratio = np.array([0.5, 1.25, 0.2, 5])
    np.testing.assert_allclose(gradient[0], -advantage * ratio * flows / 4, atol=1e-6)
    each = policy_loss(behavior_ratio, clipped(dual_clip=3.0), token_sum)
    for t, expected in enumerate(surrogates):
        mask = np.arange(4)[None] == t
        value, _, _ = value_and_grad(each, rows(NEW, GUIDED, made.advantages, mask, aggregate=token_sum), NEW)
        assert value == pytest.approx(-expected, abs=1e-6)


def test_without_dual_clip_the_last_token_counts_in_full():
    loss = ActGuideRL(kl_coef=0.0, dual_clip=None).build().loss
    value, _, _ = value_and_grad(loss, rows(NEW, GUIDED, -np.ones((1, 4))), NEW)
    assert value == pytest.approx(np.mean([0.8, 1.25, 0.8, 5]), abs=1e-6)


def test_a_mixed_batch_meets_the_worked_example():
    mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
    new = np.zeros((2, 3))
    behavior = -np.log([[0.5, 1.25, 0.2], [1.1, 0.7, 1.0]])
    value, _, _ = value_and_grad(
        ActGuideRL(kl_coef=0.0).build().loss, rows(new, behavior, [[1.0] * 3, [-1.0] * 3], mask), new
    )
    assert value == pytest.approx(0, abs=1e-7)


def test_group_advantages_meet_the_worked_example():
    advantage_fn = ActGuideRL().build().advantage_fn
    guided = [0, 0, 1, 0, 0, 1, 0, 0]
    for rewards, fail, success in ((guided, -0.540061, 1.620182), (guided + [0] * 8, -0.365961, 2.561730)):
        batch = make_batch(group_id=[0] * len(rewards), rewards=rewards, lengths=[1] * len(rewards))
        got = np.asarray(advantage_fn(batch))[:, -1]
        np.testing.assert_allclose(got, np.where(np.array(rewards) == 1, success, fail), atol=5e-6)


def test_shift_meets_the_worked_example():
    plain = np.log([[0.3, 0.5, 0.1, 1.0], [0.2, 0.4, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0]])
    guided = np.log([[0.6, 0.4, 0.5, 0.1], [0.4, 0.5, 0.5, 0.1], [0.5, 0.5, 0.5, 0.5]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    got = shift_stats(plain, guided, mask)
    assert got["shift_mean"] == pytest.approx(-1.497866, abs=1e-5)
    assert got["shift_var"] == pytest.approx(0.338230, abs=1e-5)
    assert got["shift_var_unbiased"] == pytest.approx(0.676460, abs=1e-5)
    alone = shift_stats(plain[:1], guided[:1], mask[:1])
    assert alone["shift_mean"] == pytest.approx(-2.079442, abs=1e-5) and alone["shift_var_unbiased"] == 0
    assert shift_stats(plain, guided, np.zeros((3, 4), bool))["shift_mean"] == 0


def test_shaping_meets_the_worked_example_and_touches_guided_rows_alone():
    new, behavior = np.repeat(NEW, 2, axis=0), np.repeat(GUIDED, 2, axis=0)
    made = rows(new, behavior, np.ones((2, 4)), guided=[0])
    weights = term(shaped_guidance(0.1), new, made)
    np.testing.assert_allclose(weights[0], [0.833333, 0.925926, 0.666667, 0.980392], atol=1e-6)
    np.testing.assert_array_equal(weights[1], 1)
    shaped, plain = (ActGuideRL(kl_coef=0.0, shaping=s).build().loss for s in (0.1, 0.0))
    _, _, gradient = value_and_grad(shaped, made, new)
    np.testing.assert_allclose(gradient[0], -np.array([0.833333, 0.925926, 0.666667, 0.980392]) / 8, atol=1e-6)
    _, _, unshaped = value_and_grad(plain, made, new)
    np.testing.assert_array_equal(gradient[1], unshaped[1])


def test_enormous_shifts_stay_finite():
    new = np.full((1, 2), -500.0)
    for shaping in (0.0, 0.1):
        loss = ActGuideRL(kl_coef=0.0, shaping=shaping).build().loss
        for behavior in (np.zeros((1, 2)), np.full((1, 2), -1000.0)):
            value, metrics, gradient = value_and_grad(loss, rows(new, behavior, -np.ones((1, 2)), guided=[0]), new)
            assert np.isfinite([value, *metrics.values(), *gradient.ravel()]).all()
