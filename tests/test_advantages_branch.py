"""Credit of branches: dual groups and procedure weights of APPO, entropy scaling of AEPO, by their worked examples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forests import forest_batch
from objectives import NAN, float64, make_batch, make_rows, term

from rljax import advantages as A
from rljax import losses as L
from rljax.losses import clipped, policy_loss, sequence_mean, token_mean, token_ratio
from rljax.ops import future_value

# APPO's example: two initial rows of six tokens, two branches from each.
MASK = np.array([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0]], bool)
LOG_RATIO = np.array([[0.10, -0.05, 0.20, 0.90, 0.00, 0.05], [-0.10, 0.15, 0.05, -0.20, 0.10, 0.30]])
OMEGA = np.array(
    [
        [1.134920, 1.054561, 1.229060, 1.012578, 1.025315, 1.051271],
        [0.969233, 1.147402, 0.975310, 0.860708, 1.105171, 1],
    ]
)
BASE = np.array([0.788673, -1.366022])
FINAL = np.array(
    [
        [1.236214, 1.204526, 1.261878, 0, 1.192993, 1.203228],
        [-2.049034, -2.149711, -2.049034, -2.049034, -2.120867, 0],
    ]
)


def roots_and_branches(branches=(0, 1, 1, 1), *, keeps_token=0, roots=(1, 0)):
    """Branches at tokens 2 and 1 of the first row and 4 and 2 of the second; these keep the token if `keeps_token`."""
    batch = forest_batch(
        parent_row=[-1, -1, 0, 0, 1, 1],
        fork_index=[0, 0, *(t + keeps_token for t in (2, 1, 4, 2))],
        lengths=[6] * 6,
        prompt=0,
        rewards=[*roots, *branches],
        dtype=np.float64,
    )
    return dataclasses.replace(batch, action_mask=np.concatenate([MASK, np.ones((4, 6), bool)]))


def run(function, batch):
    with float64():
        return np.asarray(function(batch))


def test_future_value_example():
    with float64():
        got = np.asarray(future_value(np.where(MASK, LOG_RATIO, NAN), MASK, discount=0.5))
    np.testing.assert_allclose(got, OMEGA, atol=1e-6)


def test_future_value_equals_a_loop_and_is_clamped():
    rng = np.random.default_rng(0)
    log_ratio, mask = rng.normal(size=(3, 40)), rng.random((3, 40)) < 0.7
    with float64():
        got = np.asarray(future_value(log_ratio, mask, discount=0.9))
        huge = np.asarray(future_value(np.full((1, 40), 9.0), np.ones((1, 40), bool), discount=1.0))
    for b in range(3):
        for t in range(40):
            total = sum(0.9 ** (k - t) * log_ratio[b, k] for k in range(t, 40) if mask[b, k])
            np.testing.assert_allclose(got[b, t], np.exp(total), rtol=1e-10)
    assert huge.max() == np.exp(20.0)


def test_dual_group_example():
    got = run(A.dual_group(), roots_and_branches())
    np.testing.assert_allclose(got[:2], np.where(MASK, BASE[:, None], 0), atol=1e-5)
    assert not got[2:].any()


def test_dual_group_equals_a_loop():
    rng = np.random.default_rng(1)
    parent = np.array([-1, -1, 0, -1, 3, 3, -1, -1, 1, 0])
    group = np.array([0, 0, 0, 1, 1, 1, 1, 0, 0, 0])
    valid = np.array([1, 1, 1, 1, 1, 1, 1, 0, 1, 1], bool)
    rewards = np.where(valid, rng.normal(size=10), NAN)
    batch = forest_batch(
        parent_row=parent, fork_index=np.where(parent < 0, 0, 2), lengths=[4] * 10, rewards=rewards, group_id=group,
        is_valid=valid, dtype=np.float64,
    )  # fmt: skip
    got = run(A.dual_group(), batch)
    for b in range(10):
        want = 0.0
        if valid[b] and parent[b] < 0:
            sets = [rewards[valid & (group == group[b]) & kind] for kind in (parent < 0, parent >= 0)]
            want = np.mean([(rewards[b] - r.mean()) / (r.std() + 1e-6) for r in sets if len(r) > 1])
        np.testing.assert_allclose(got[b, 1:], want, atol=1e-9)


def test_dual_group_leaves_a_flat_set_out_of_the_mean():
    """Without the guard branches of equal reward would give an advantage of the order 1e6."""
    got = run(A.dual_group(), roots_and_branches((0.3, 0.3, 0.3, 0.3)))
    np.testing.assert_allclose(got[:2, 0], [0.999998, -0.999998], atol=1e-6)
    flat = run(A.dual_group(), roots_and_branches(roots=(1, 1)))
    np.testing.assert_allclose(flat[:2, 0], (1 - 0.75) / (np.std([0, 1, 1, 1]) + 1e-6), atol=1e-9)


def test_scaling_all_rewards_changes_nothing():
    a, b = (
        run(A.dual_group(), roots_and_branches(c * np.array([0, 1, 1, 1]), roots=c * np.array([1, 0]))) for c in (1, 64)
    )
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_released_branch_credit_example():
    got = run(A.shared_branch_credit(), roots_and_branches(keeps_token=1))
    want = [[0.422649, 0.422649, -0.732049, 0, 0.999998, 0.999998], [-0.422649] * 5 + [0]]
    np.testing.assert_allclose(got[:2], want, atol=1e-5)
    assert not got[2:].any()


def policy(advantages, aggregate):
    """J of the roots under current log-probs that differ from the old ones by LOG_RATIO."""
    loss = policy_loss(
        token_ratio,
        clipped(clip_low=0.2, clip_high=0.2),
        aggregate,
        weight_fns=[L.procedure_weights(discount=0.5, scale=0.5, low=1.0, high=1.2)],
    )
    rows = make_rows(MASK, aggregate=aggregate, old=np.zeros((2, 6)), advantages=advantages)
    value, _ = loss.loss(jnp.asarray(np.where(MASK, LOG_RATIO, NAN)), jnp.zeros((2, 6)), rows)
    return -float(value), rows


def test_procedure_weights_example():
    with float64():
        _, rows = policy(np.where(MASK, BASE[:, None], 0), token_mean)
        weights = np.asarray(term(L.procedure_weights(discount=0.5, scale=0.5), jnp.asarray(LOG_RATIO), rows))
        np.testing.assert_allclose(np.where(MASK, BASE[:, None] * weights, 0), FINAL, atol=1e-5)
        # The paper divides by all six rows though it sums the two initial ones.
        base = run(A.dual_group(), roots_and_branches())[:2]
        assert policy(base, sequence_mean)[0] * 2 / 6 == pytest.approx(-0.134770, abs=1e-5)
        assert policy(base, token_mean)[0] == pytest.approx(-0.404309, abs=1e-5)
        released = run(A.shared_branch_credit(), roots_and_branches(keeps_token=1))[:2]
        assert policy(released, sequence_mean)[0] * 2 / 6 == pytest.approx(-0.007502, abs=1e-5)


def test_procedure_weights_are_constants_and_1_5_before_the_first_update():
    with float64():
        rows = policy(np.ones((2, 6)), token_mean)[1]
        weights = L.procedure_weights()
        np.testing.assert_allclose(term(weights, jnp.zeros((2, 6)), rows), 1.5)
        slope = jax.grad(lambda lp: term(weights, lp, rows).sum())(jnp.asarray(LOG_RATIO))
    np.testing.assert_array_equal(slope, 0)


def test_root_tokens_leave_branches_out():
    batch = roots_and_branches()
    np.testing.assert_array_equal(A.root_tokens(batch), np.concatenate([MASK, np.zeros((4, 6), bool)]))


def test_entropy_scaled_example():
    batch = make_batch(group_id=[0, 0, 1, 1], rewards=[1, 0, 1, 0], lengths=[1] * 4, prompt=1, dtype=np.float64)
    entropies = np.array([[NAN, 0.2], [NAN, 1.4], [NAN, 0.6], [NAN, 0.8]])
    batch = dataclasses.replace(batch, entropies=entropies)
    credit = np.array([[0, 1], [0, 1], [0, -1], [0, -1]], float)

    def given(_):
        return jnp.asarray(credit)

    got = run(A.entropy_scaled(given, scale=0.2), batch)
    np.testing.assert_allclose(got[:, 1], [0.745966, 1.300222, -0.930718, -1.023094], atol=1e-6)
    floored = run(A.entropy_scaled(given, scale=5.0), batch)
    assert floored[0, 1] == 0 and (np.sign(floored[1:, 1]) * [1, -1, -1] >= 0).all()
    equal = dataclasses.replace(batch, entropies=np.full((4, 2), 0.7))
    np.testing.assert_array_equal(run(A.entropy_scaled(given), equal), credit)
    # A row that failed has no say in the mean.
    failed = dataclasses.replace(batch, is_valid=np.array([True, True, True, False]))
    z = (np.array([0.2, 1.4, 0.6]) - np.mean([0.2, 1.4, 0.6])) / np.std([0.2, 1.4, 0.6])
    np.testing.assert_allclose(
        run(A.entropy_scaled(given), failed)[:, 1], [*([1, 1, -1] * (1 + 0.2 * z)), 0], atol=1e-9
    )
