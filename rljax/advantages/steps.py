"""Credit for the turns of an agent: rewards of steps, how well it foresaw them, and states that rollouts share.

A turn is a run of action tokens with one `turn_ids`; observations lie between them. What a batch says of a turn stands
on each of its action tokens. The functions of arrays below take steps `[B, T]` with gaps: a mask says where a step is,
so that a column may be a step, or a token of which the first of each turn counts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.advantages.group import AdvantageFn, _constant, _on_tokens, _valid_tokens
from rljax.ops import as_float, discounted_sum, segment_mean, segment_std, segment_whiten
from rljax.types import ArrayLike, RolloutBatch

StepReturnFn = Callable[..., Array]
"""(rewards [B, T], scores [B, T, H], mask [B, T], *, gamma) -> returns [B, T]: `predictive_returns` or
`predicted_reward_returns`."""


def predictive_returns(
    rewards: Float[ArrayLike, "B T"],
    scores: Float[ArrayLike, "B T H"],
    mask: Bool[ArrayLike, "B T"],
    *,
    gamma: float = 0.95,
) -> Float[Array, "B T"]:
    """Returns of steps, raised by how well what followed was predicted (Role-Agent, 2606.10917).

        R_task[t] = sum_{k >= t} gamma^(k - t) r[k]
        R_pre[t]  = sum_{h = 1..H} gamma^(h - 1) scores[t, h]
        R[t]      = R_task[t] (1 + R_pre[t])    where R_task[t] > 0, else R_task[t]

    Distance counts steps, those in `mask`. `scores[t, h]` in [0, 1] compares the prediction made at step t with what
    was seen h steps later; 0 where nothing was seen. A failure is no better for being foreseen: 0 stays 0, and a
    penalty, which the paper does not speak of, is not made worse. 0 off the mask.
    """
    returns = discounted_sum(rewards, mask, discount=gamma)
    return jnp.where(returns > 0, returns * (1 + _foresight(scores, mask, gamma)), returns)


def predicted_reward_returns(
    rewards: Float[ArrayLike, "B T"],
    scores: Float[ArrayLike, "B T H"],
    mask: Bool[ArrayLike, "B T"],
    *,
    gamma: float = 0.95,
    scale: float = 0.2,
) -> Float[Array, "B T"]:
    """As `predictive_returns`, but the reward of a step is raised before it is discounted (the release of 2606.10917):

        R[t] = sum_{k >= t} gamma^(k - t) r[k] (1 + scale R_pre[k])    (1 where r[k] <= 0)

    With a reward at the end alone, only the last prediction matters.
    """
    rewards = jnp.where(mask, as_float(rewards), 0)
    raised = rewards * (1 + scale * _foresight(scores, mask, gamma))
    return discounted_sum(jnp.where(rewards > 0, raised, rewards), mask, discount=gamma)


def state_group_advantages(
    returns: Float[ArrayLike, "B T"],
    state_ids: Int[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    epsilon: float = 1e-6,
    min_std: float = 1e-4,
    ddof: int = 1,
) -> Float[Array, "B T"]:
    """`(R - mean) / (std + epsilon)` over the steps that began in one state (GiGPO, 2505.10978).

    `state_ids` are from 0 to below `B * T`, negative for a step without one. 0 off the mask, for a step alone in its
    state, and where the std is below `min_std`, so that similarities that differ by a hair do not count like failures.
    """
    ids = jnp.asarray(state_ids).reshape(-1)
    known = jnp.asarray(mask).reshape(-1) & (ids >= 0)
    ids = jnp.maximum(ids, 0)
    flat = jnp.where(known, as_float(returns).reshape(-1), 0)
    score = segment_whiten(flat, ids, known, ddof=ddof, epsilon=epsilon)
    std = segment_std(flat, ids, known, ddof=ddof)[ids]
    return jnp.where(std >= min_std, score, 0).reshape(jnp.shape(state_ids))


def state_grouped(
    advantage_fn: AdvantageFn,
    *,
    returns_fn: StepReturnFn = predictive_returns,
    alpha: float = 1.0,
    gamma: float = 0.95,
    epsilon: float = 1e-6,
    min_std: float = 1e-4,
    predictions: str | None = None,
) -> AdvantageFn:
    """`state_group_advantages` of the turns' returns, on all tokens of a turn, plus `alpha` times `advantage_fn`
    (Role-Agent, 2606.10917; with no predictions GiGPO, 2505.10978).

    Of the batch it takes `turn_rewards` (without: the row's reward on its last turn), the column `predictions`, in
    [0, 1] on the tokens of a turn (None, or a batch without it: no prediction counts), and `state_ids`; without these,
    `alpha * advantage_fn` is all there is. A return looks ahead from the start of a turn, where the state was read.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        episode = alpha * advantage_fn(batch)
        if batch.state_ids is None:
            return episode
        mask = _valid_tokens(batch)
        starts = turn_starts(batch)
        rewards = last_turn_reward(batch) if batch.turn_rewards is None else as_float(batch.turn_rewards)
        scores = jnp.zeros(mask.shape)
        if predictions is not None and predictions in batch.columns:
            scores = as_float(batch.columns[predictions])
        returns = returns_fn(rewards, scores[:, :, None], starts, gamma=gamma)
        score = state_group_advantages(returns, batch.state_ids, starts, epsilon=epsilon, min_std=min_std)
        position = jnp.arange(mask.shape[1])
        first = jax.lax.cummax(jnp.where(starts, position, 0), axis=1)
        return _constant(jnp.where(mask, jnp.take_along_axis(score, first, axis=1), 0) + episode)

    return advantages


def turn_starts(batch: RolloutBatch) -> Bool[Array, "B T"]:
    """The first action token of each turn of the valid rows."""
    mask, turns = _valid_tokens(batch), jnp.asarray(batch.turn_ids)
    turn = jnp.where(mask, turns, -1)
    before = jnp.pad(jax.lax.cummax(turn, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return mask & (turn != before)


def last_turn_reward(batch: RolloutBatch) -> Float[Array, "B T"]:
    """The row's reward on all action tokens of its last turn, 0 elsewhere: `turn_rewards` of a reward at the end."""
    mask, turns = _valid_tokens(batch), jnp.asarray(batch.turn_ids)
    last = jnp.max(jnp.where(mask, turns, -1), axis=1, keepdims=True)
    return jnp.where(mask & (turns == last), as_float(batch.reward)[:, None], 0)


def penalized(advantage_fn: AdvantageFn, *, column: str, weight: float = 0.1) -> AdvantageFn:
    """`advantage_fn - weight (S - mean S of the group)`, `S` the batch's `column` [B] (DeepDive, 2509.10446, whose
    reward is `R - weight S`).

    The penalty keeps its own scale. Inside the reward it would be divided by the group's std, and full-size advantages
    would come of it where all rewards are equal. For a batch without the column it is `advantage_fn`.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        raw = advantage_fn(batch)
        if column not in batch.columns:
            return raw
        group, valid = jnp.asarray(batch.group_id), jnp.asarray(batch.is_valid)
        penalty = jnp.where(valid, as_float(batch.columns[column]), 0)
        return _constant(raw - weight * _on_tokens(penalty - segment_mean(penalty, group, valid)[group], batch))

    return advantages


def _foresight(scores: ArrayLike, mask: ArrayLike, gamma: float) -> Array:
    scores = jnp.where(jnp.asarray(mask)[:, :, None], as_float(scores), 0)
    return jnp.sum(scores * gamma ** jnp.arange(scores.shape[2]), axis=2)
