"""Advantages against the worked examples and float64 loops."""

import dataclasses

import jax
import numpy as np
import pytest
from objectives import MASK, NAN, OLD, REF, float64, make_batch, map_fields

from rljax import advantages as A

TOL = {"rtol": 0, "atol": 2e-10}


def rows_of(function, rewards, *, group_id=None, dtype=np.float64, **more):
    """One advantage per row (its first action token's)."""
    group_id = np.zeros(len(rewards), np.int32) if group_id is None else group_id
    batch = make_batch(group_id=group_id, rewards=rewards, lengths=[1] * len(rewards), prompt=1, dtype=dtype, **more)
    with float64():
        return np.asarray(function(batch))[:, 1]


THIRD = 1 / 3


@pytest.mark.parametrize(
    ("function", "rewards", "want"),
    [
        (
            A.group_normalized(epsilon=1e-6),
            [1, 0, 0, 0],
            [1.499997000006, *[-0.499999000002] * 3],
        ),
        (A.group_centered(), [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
        (A.leave_one_out(), [1, 0, 0, 0], [1, -THIRD, -THIRD, -THIRD]),
        (A.group_normalized(), [1, 0, 0, 1], [0.8660239038, -0.8660239038, -0.8660239038, 0.8660239038]),
        (A.group_centered(), [1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5]),
        (A.leave_one_out(), [1, 0, 0, 1], [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        (A.group_normalized(), [1, 0], [0.7071057812, -0.7071057812]),
        (A.group_centered(), [1, 0], [0.5, -0.5]),
        (A.leave_one_out(), [1, 0], [1, -1]),
        (A.batch_centered(), [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_worked_examples(function, rewards, want):
    np.testing.assert_allclose(rows_of(function, rewards), want, rtol=0, atol=1e-10)


def fixture_batch(rewards):
    batch = make_batch(group_id=[0, 0], rewards=rewards, lengths=[4, 3], prompt=0, dtype=np.float64)
    return dataclasses.replace(batch, action_mask=MASK, behavior_logprobs=OLD, ref_logprobs=REF)


def test_reinforce_pp_baseline_whitens_over_the_tokens_of_the_batch():
    with float64():
        got = A.group_centered_whitened()(fixture_batch([1.0, 0.0]))
    want = np.where(MASK, [[0.8017837117], [-1.0690449489]], 0)
    np.testing.assert_allclose(got, want, **TOL)


def test_reinforce_pp_takes_kl_off_each_token_and_whitens_the_returns():
    batch = fixture_batch([1.0, 0.0])
    with float64():
        rewards = A.token_rewards(batch, kl_coef=0.1)
        got = A.whitened_returns(kl_coef=0.1)(batch)
    np.testing.assert_allclose(rewards, [[-0.01, 0.005, 0.03, 0.99], [0.01, -0.03, 0.06, 0]], atol=1e-12)
    want = [[0.8063112706, 0.8256076087, 0.8159594397, 0.7580704254], [-1.0750816942, -1.0943780323, -1.0364890180, 0]]
    np.testing.assert_allclose(got, want, **TOL)


def test_kl_in_reward_takes_the_row_sum_of_k1_off_before_the_baseline():
    with float64():
        got = A.kl_in_reward(A.leave_one_out(), kl_coef=0.1)(fixture_batch([1.0, 0.0]))
    shaped = np.array([1.0, 0.0]) - 0.1 * np.where(MASK, OLD - REF, 0).sum(axis=1)
    want = shaped - shaped[::-1]
    np.testing.assert_allclose(got, np.where(MASK, want[:, None], 0), atol=1e-12)


def test_kl_clamp_keeps_impossible_reference_tokens_finite():
    batch = dataclasses.replace(fixture_batch([1.0, 0.0]), ref_logprobs=np.full(MASK.shape, -np.inf))
    assert np.isfinite(A.whitened_returns(kl_coef=0.1)(batch)).all()


@pytest.mark.parametrize("function", [A.whitened_returns(kl_coef=0.1), A.kl_in_reward(A.leave_one_out(), kl_coef=0.1)])
def test_kl_without_reference_logprobs_is_refused(function):
    batch = dataclasses.replace(fixture_batch([1.0, 0.0]), ref_logprobs=None)
    with pytest.raises(ValueError, match=r"needs batch\.ref_logprobs.*kl_coef=0"):
        function(batch)


PER_GROUP = {
    "normalized": (A.group_normalized(epsilon=1e-6), lambda r: (r - r.mean()) / (np.std(r, ddof=1) + 1e-6)),
    "centered": (A.group_centered(), lambda r: r - r.mean()),
    "leave_one_out": (A.leave_one_out(), lambda r: np.array([x - np.delete(r, i).mean() for i, x in enumerate(r)])),
}
EVERY = [function for function, _ in PER_GROUP.values()] + [
    A.group_centered_whitened(),
    A.whitened_returns(),
    A.batch_centered(),
]


@pytest.mark.parametrize("name", PER_GROUP)
def test_group_statistics_equal_a_loop_over_ragged_scattered_groups(name):
    function, loop = PER_GROUP[name]
    rng = np.random.default_rng(0)
    group_id = rng.permutation([0, 0, 0, 2, 2, 5, 5, 5, 5, 0])
    rewards, is_valid = rng.normal(size=10), np.ones(10, bool)
    is_valid[[1, 7]] = False
    rewards = np.where(is_valid, rewards, NAN)  # a failed reward may hold anything
    got = rows_of(function, rewards, group_id=group_id, is_valid=is_valid)
    for group in (0, 2, 5):
        members = is_valid & (group_id == group)
        np.testing.assert_allclose(got[members], loop(rewards[members]), atol=1e-9)
    np.testing.assert_array_equal(got[~is_valid], 0)


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_equal_rewards_give_exactly_0(function, value):
    batch = make_batch(group_id=[0, 0, 0, 1, 1, 1, 1], rewards=[value] * 7, lengths=[3, 1, 2, 5, 2, 4, 1])
    np.testing.assert_array_equal(function(batch), 0)


def test_a_uniform_group_beside_others_is_0_except_under_batch_whitening():
    batch = make_batch(group_id=[0, 0, 1, 1], rewards=[1, 1, 1, 0], lengths=[2, 2, 1, 4])
    for function, _ in PER_GROUP.values():
        np.testing.assert_array_equal(function(batch)[:2], 0)
    whitened = np.asarray(A.group_centered_whitened()(batch))[:2]
    assert (whitened[batch.action_mask[:2]] != 0).all()


@pytest.mark.parametrize("function", EVERY)
def test_padding_rows_and_columns_with_garbage_change_nothing(function):
    batch = make_batch(group_id=[0, 0, 1, 1], rewards=[1, 0, 0.3, 0.9], lengths=[3, 1, 2, 3])
    bigger = make_batch(
        group_id=[0, 0, 1, 1, 0, 1],
        rewards=[1, 0, 0.3, 0.9, NAN, 7],
        lengths=[3, 1, 2, 3, 0, 2],
        width=9,
        is_valid=[1, 1, 1, 1, 0, 0],
    )
    got, padded = np.asarray(function(batch)), np.asarray(function(bigger))
    np.testing.assert_allclose(padded[:4, : got.shape[1]], got, atol=1e-6)
    assert not padded[4:].any()
    assert not padded[:, got.shape[1] :].any()
    assert got[batch.action_mask].any()


@pytest.mark.parametrize("function", EVERY)
def test_advantages_are_float32_jit_able_and_0_off_the_action_mask(function):
    batch = make_batch(group_id=[0, 0, 1, 1], rewards=[1, 0, 0.3, 0.9], lengths=[3, 1, 2, 3])
    eager, jitted = function(batch), jax.jit(function)(map_fields(batch, jax.numpy.asarray))
    assert eager.dtype == np.float32
    np.testing.assert_allclose(eager, jitted, atol=1e-6)
    assert not np.asarray(eager)[~batch.action_mask].any()


@pytest.mark.parametrize("function", EVERY)
def test_rows_without_action_tokens_and_lone_rows_are_harmless(function):
    batch = make_batch(group_id=[0, 0, 1], rewards=[1, 0, 1], lengths=[0, 2, 1])
    got = np.asarray(function(batch))
    assert np.isfinite(got).all()
    empty = make_batch(group_id=[0, 0], rewards=[1, 0], lengths=[0, 0])
    np.testing.assert_array_equal(function(empty), 0)


def test_a_row_whose_tokens_are_masked_still_counts_in_the_mean_of_its_group():
    """What overlong filtering relies on."""
    batch = make_batch(group_id=[0, 0, 0], rewards=[1, 0, 0], lengths=[2, 2, 2])
    mask = np.array(batch.action_mask)
    mask[2] = False
    got = np.asarray(A.group_centered()(dataclasses.replace(batch, action_mask=mask)))
    np.testing.assert_allclose(got[0, 2], 2 / 3, atol=1e-6)
    assert not got[2].any()


def test_a_single_valid_token_whitens_to_0():
    batch = make_batch(group_id=[0], rewards=[1], lengths=[1])
    np.testing.assert_array_equal(A.whitened_returns()(batch), 0)
