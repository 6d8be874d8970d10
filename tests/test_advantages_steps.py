"""Credit for turns, by the worked examples of Role-Agent and DeepDive, and against loops in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import NAN, make_batch, map_fields

from rljax.advantages import (
    group_normalized,
    last_turn_reward,
    penalized,
    predicted_reward_returns,
    predictive_returns,
    state_group_advantages,
    state_grouped,
    turn_starts,
)
from rljax.algorithms import DeepDive, RoleAgent
from rljax.batching import stack, take_rows
from rljax.types import Trajectory

EVERY = np.ones((3, 3), bool)
REWARDS = np.array([[0, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32)
SCORES = np.array([[0.8, 0.5, 0], [0.9, 0.3, 0], [0.2, 0, 0]], np.float32)
STEPS = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 0]], bool)
STATES = np.array([[0, 1, 2], [0, 1, -1], [0, 2, -1]], np.int32)
RETURNS = np.array([[1.6245, 1.425, 1.0], [0, 0, 0], [1.14, 1.0, 0]])


def test_returns_meet_the_worked_example():
    np.testing.assert_allclose(predictive_returns(REWARDS, SCORES[..., None], STEPS, gamma=0.95), RETURNS, rtol=1e-6)
    task = predictive_returns(REWARDS, np.zeros((3, 3, 1), np.float32), STEPS, gamma=0.95)
    np.testing.assert_allclose(task, [[0.9025, 0.95, 1], [0, 0, 0], [0.95, 1, 0]], rtol=1e-6)


def test_two_steps_ahead_meets_the_worked_example():
    scores = np.array([[[0.9, 0.6], [0.8, 0.5], [0.7, 0], [0, 0]]], np.float32)
    rewards = np.array([[0, 0, 0, 1]], np.float32)
    got = predictive_returns(rewards, scores, np.ones((1, 4), bool), gamma=0.95)
    np.testing.assert_allclose(got, [[2.117716, 2.053188, 1.615, 1.0]], atol=1e-6)


def test_the_releases_multiplier_meets_the_worked_example():
    scores = np.array([[0.8, 0.5, 0.4]], np.float32)[..., None]
    got = predicted_reward_returns(np.array([[0, 0, 1]], np.float32), scores, EVERY[:1], gamma=0.95)
    np.testing.assert_allclose(got, [[0.9747, 1.026, 1.08]], atol=1e-6)


@pytest.mark.parametrize("returns_fn", [predictive_returns, predicted_reward_returns])
def test_a_penalty_is_no_worse_for_being_foreseen(returns_fn):
    rewards = np.array([[0, -0.2, 0]], np.float32)
    plain, foreseen = (returns_fn(rewards, np.full((1, 3, 1), s, np.float32), EVERY[:1], gamma=0.5) for s in (0, 1))
    np.testing.assert_array_equal(plain, foreseen)


def test_steps_count_and_not_columns():
    """The same steps with gaps between them, in which anything may stand."""
    place = [1, 4, 5]
    wide, mask = np.full((3, 7), NAN, np.float32), np.zeros((3, 7), bool)
    scores = np.full((3, 7, 1), NAN, np.float32)
    wide[:, place], mask[:, place], scores[:, place, 0] = REWARDS, STEPS, SCORES
    got = np.asarray(predictive_returns(wide, scores, mask, gamma=0.95))
    np.testing.assert_allclose(got[:, place], RETURNS, rtol=1e-6)
    assert not got[~mask].any()


@pytest.mark.parametrize(
    ("ddof", "expected"),
    [
        (1, [[0.842924, 0.707106, 0], [-1.104915, -0.707106, 0], [0.261990, 0, 0]]),
        (0, [[1.032367, 0.999999, 0], [-1.353238, -0.999999, 0], [0.320871, 0, 0]]),
    ],
)
def test_state_groups_meet_the_worked_example(ddof, expected):
    got = state_group_advantages(RETURNS.astype(np.float32), STATES, STEPS, ddof=ddof)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_nearly_equal_returns_of_a_state_give_0():
    returns, states = np.array([[1.0, 1.00005, 2.0, 2.3]], np.float32), np.array([[0, 0, 1, 1]], np.int32)
    got = np.asarray(state_group_advantages(returns, states, np.ones((1, 4), bool)))
    np.testing.assert_array_equal(got[0, :2], 0)
    np.testing.assert_allclose(np.abs(got[0, 2:]), 0.707107, atol=1e-5)


def episodes(**changes):
    """The worked example's three rollouts: turns of 2, 1 and 2 tokens, an observation token behind each."""
    turn_of = np.array([-1, 0, 0, -1, 1, -1, 2, 2])  # the token of the prompt, then turns and observations
    made = []
    for i in range(3):
        steps = int(STEPS[i].sum())
        turns = turn_of[: [0, 3, 5, 8][steps]]
        mask = turns >= 0
        on = np.maximum(turns, 0)
        fields = {
            "turn_rewards": np.where(mask, REWARDS[i][on], 0).astype(np.float32),
            "columns": {"prediction": np.where(mask, SCORES[i][on], 0).astype(np.float32)},
            "state_ids": np.where(mask, np.array([10**12, 7, 3])[STATES[i][on]], -1),
        }
        made.append(
            Trajectory(
                tokens=np.arange(len(turns), dtype=np.int32),
                action_mask=mask,
                behavior_logprobs=np.zeros(len(turns), np.float32),
                entropies=np.zeros(len(turns), np.float32),
                turn_ids=np.maximum.accumulate(on).astype(np.int32),
                policy_version=np.zeros(len(turns), np.int32),
                prompt_id=5,
                group_id=9,
                episode_id=i,
                reward=float(REWARDS[i].sum()),
                **{k: changes.get(k, v) for k, v in fields.items()},
            )
        )
    return made


def test_a_stacked_batch_numbers_states_per_group_and_fits_them():
    batch = stack(episodes())
    assert batch.turn_rewards.dtype == batch.columns["prediction"].dtype == np.float32
    assert batch.state_ids.dtype == np.int32
    assert set(np.unique(batch.state_ids)) == {-1, 0, 1, 2}
    np.testing.assert_array_equal(batch.state_ids >= 0, batch.action_mask)
    others = [dataclasses.replace(t, group_id=4) for t in episodes()]
    both = stack([*episodes(), *others]).state_ids
    assert len(np.unique(both)) == 7  # the same states in another group are others
    assert stack([*episodes(), dataclasses.replace(others[0], state_ids=None)]).state_ids is None
    rows = take_rows(batch, np.array([2, 0]))
    np.testing.assert_array_equal(rows.state_ids, batch.state_ids[[2, 0]])


def test_a_batch_without_a_single_state_is_stacked():
    nothing = [dataclasses.replace(t, state_ids=np.full(len(t.tokens), -1)) for t in episodes()]
    assert (stack(nothing).state_ids == -1).all()


EXPECTED = np.array([[1.420274, 0.577350 + 0.707106, 0.577350], [-2.259616, -1.861807, 0], [0.839340, 0.577350, 0]])


def test_the_recipe_meets_the_worked_example_on_tokens():
    batch = stack(episodes())
    got = np.asarray(RoleAgent(group_size=3).build().advantage_fn(batch))
    for i, (row, mask) in enumerate(zip(got, np.asarray(batch.action_mask), strict=True)):
        if i < 3:
            np.testing.assert_allclose(row[mask], EXPECTED[i][batch.turn_ids[i][mask]], atol=1e-5)
    np.testing.assert_array_equal(got[~batch.action_mask], 0)
    np.testing.assert_allclose(
        jax.jit(RoleAgent(group_size=3).build().advantage_fn)(map_fields(batch, jnp.asarray)), got, atol=1e-6
    )


def test_starts_of_turns_and_a_reward_at_the_end():
    batch = stack(episodes())
    np.testing.assert_array_equal(np.flatnonzero(turn_starts(batch)[0]), [1, 4, 6])
    np.testing.assert_array_equal(np.flatnonzero(turn_starts(batch)[1]), [1, 4])
    assert not turn_starts(batch)[3:].any()
    without = dataclasses.replace(batch, turn_rewards=None)
    np.testing.assert_array_equal(last_turn_reward(without), batch.turn_rewards)
    advantages = RoleAgent(group_size=3).build().advantage_fn
    np.testing.assert_array_equal(advantages(without), advantages(batch))  # the example's rewards come at the end


def test_without_predictions_it_is_gigpo_and_without_states_grpo():
    batch = stack(episodes())
    advantages = RoleAgent(group_size=3).build().advantage_fn
    blind = advantages(dataclasses.replace(batch, columns={}))
    zero = advantages(dataclasses.replace(batch, columns={"prediction": np.zeros(batch.tokens.shape, np.float32)}))
    np.testing.assert_array_equal(blind, zero)
    assert np.abs(np.asarray(blind) - advantages(batch)).max() > 0.1
    alone = dataclasses.replace(batch, state_ids=None)
    np.testing.assert_array_equal(advantages(alone), group_normalized()(batch))


def test_alpha_weighs_the_episode_and_the_release_differs():
    batch = stack(episodes())
    for alpha in (0.0, 0.5):
        step = state_grouped(group_normalized(), alpha=0.0, predictions="prediction")(batch)
        got = RoleAgent(group_size=3, alpha=alpha).build().advantage_fn(batch)
        np.testing.assert_allclose(got, step + alpha * group_normalized()(batch), atol=1e-6)
    released = RoleAgent(group_size=3, wia_mode="reward").build().advantage_fn(batch)
    assert np.abs(released - RoleAgent(group_size=3).build().advantage_fn(batch)).max() > 0.05


def test_an_invalid_row_leaves_its_state_group():
    batch = stack(episodes())
    valid = np.array(batch.is_valid)
    valid[1] = False
    advantages = RoleAgent(group_size=3).build().advantage_fn
    got = np.asarray(advantages(dataclasses.replace(batch, is_valid=valid)))
    assert not got[1].any()
    np.testing.assert_allclose(np.abs(got[0, 1]), 0.707107, atol=1e-5)  # two are left in s0, both succeeded
    np.testing.assert_allclose(got[0, 4], 0, atol=1e-6)  # alone in s1 now


def test_order_of_rows_and_padding_change_nothing():
    made = [dataclasses.replace(t, columns={**t.columns, "tax": 0.1 * i}) for i, t in enumerate(episodes())]
    advantage_fn = penalized(RoleAgent(group_size=3).build().advantage_fn, column="tax")
    want = np.asarray(advantage_fn(stack(made)))
    order = [2, 0, 1]
    got = np.asarray(advantage_fn(stack([made[i] for i in order], row_buckets=(8,), length_buckets=(32,))))
    np.testing.assert_allclose(got[:3, :16], want[order][:, :16], atol=1e-6)
    assert not got[3:].any() and not got[:, 16:].any()


def fixed_rewards(rewards, penalty):
    rows = len(rewards)
    batch = make_batch(group_id=[0] * rows, rewards=rewards, lengths=range(1, rows + 1))
    return dataclasses.replace(batch, columns={} if penalty is None else {"redundancy": np.array(penalty, np.float32)})


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([1, 0, 1, 0], [1.002498, -1.037498, 1.022498, -0.987498]), ([0, 0, 0, 0], [0.0025, -0.0375, 0.0225, 0.0125])],
)
def test_the_redundancy_penalty_meets_the_worked_example(rewards, expected):
    batch = fixed_rewards(rewards, [0.2, 0.6, 0.0, 0.1])
    got = np.asarray(DeepDive(group_size=4).build().advantage_fn(batch))
    np.testing.assert_allclose(got, np.array(expected)[:, None] * batch.action_mask, atol=2e-6)


@pytest.mark.parametrize(
    ("ddof", "expected"),
    [(0, [0.97981, -1.048055, 1.018807, -0.950562]), (1, [0.848541, -0.907643, 0.882313, -0.823211])],
)
def test_the_papers_penalty_in_the_reward_meets_the_worked_example(ddof, expected):
    batch = fixed_rewards([0.98, -0.06, 1.0, -0.01], None)
    got = np.asarray(group_normalized(ddof=ddof)(batch))
    np.testing.assert_allclose(got, np.array(expected)[:, None] * batch.action_mask, atol=2e-6)


def test_penalties_are_centred_in_the_valid_rows_of_a_group():
    batch = make_batch(group_id=[0, 0, 0, 1, 1], rewards=[1, 0, 5, 1, 0], lengths=[2] * 5, is_valid=[1, 1, 0, 1, 1])
    batch = dataclasses.replace(batch, columns={"tax": np.array([0.4, 0.2, NAN, 0.5, 0.5], np.float32)})
    raw = group_normalized()
    extra = np.asarray(penalized(raw, column="tax", weight=0.5)(batch)) - np.asarray(raw(batch))
    np.testing.assert_allclose(extra[:, -1], [-0.05, 0.05, 0, 0, 0], atol=1e-6)
    without = dataclasses.replace(batch, columns={})
    np.testing.assert_array_equal(penalized(raw, column="tax")(without), raw(without))
