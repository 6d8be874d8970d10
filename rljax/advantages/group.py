"""Advantages from outcome rewards: factories of functions RolloutBatch -> float32 [B, T].

`R` is the reward of a row, a group the `n` valid rows with one `group_id`. Rows that are not valid (a failed reward,
padding) take no part in any statistic. A result is 0 off `action_mask` and for rows that are not valid, and constant
for differentiation. A group of equal rewards gives exactly 0, unless a function says otherwise.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.ops import (
    as_float,
    discounted_sum,
    masked_sum,
    masked_whiten,
    segment_count,
    segment_mean,
    segment_std,
)
from rljax.types import ArrayLike, RolloutBatch

AdvantageFn = Callable[[RolloutBatch], Array]
"""RolloutBatch -> advantages [B, T]."""


def group_normalized(*, epsilon: float = 1e-6, ddof: int = 1) -> AdvantageFn:
    """`(R - mean) / (std + epsilon)` of the group, std with ddof 1 (GRPO, 2402.03300) or as given."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        std = segment_std(batch.reward, batch.group_id, batch.is_valid, ddof=ddof)
        return _on_tokens(_centered(batch, batch.group_id) / (std[jnp.asarray(batch.group_id)] + epsilon), batch)

    return advantages


def group_centered() -> AdvantageFn:
    """`R - mean` of the group (Dr.GRPO, 2503.20783)."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        return _on_tokens(_centered(batch, batch.group_id), batch)

    return advantages


def leave_one_out() -> AdvantageFn:
    """`R - mean of the others = (R - mean) n / (n - 1)` (RLOO, 2402.14740); 0 for a row that is alone in its group."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        count = segment_count(batch.group_id, batch.is_valid)[jnp.asarray(batch.group_id)]
        return _on_tokens(_centered(batch, batch.group_id) * count / jnp.maximum(count - 1, 1), batch)

    return advantages


def group_centered_whitened(*, epsilon: float = 1e-8) -> AdvantageFn:
    """`R - mean` of the group, then whitened over all action tokens of the batch (REINFORCE++-baseline, 2501.03262).

    Long rows weigh more in the whitening, and a group of equal rewards can become non-zero beside other groups.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        centered = _on_tokens(_centered(batch, batch.group_id), batch)
        return _constant(masked_whiten(centered, _valid_tokens(batch), epsilon=epsilon))

    return advantages


def whitened_returns(*, kl_coef: float = 0.0, gamma: float = 1.0, epsilon: float = 1e-8) -> AdvantageFn:
    """Discounted return-to-go of `token_rewards`, whitened over all action tokens of the batch (REINFORCE++,
    2501.03262). The baseline is the batch; groups play no part."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        mask = _valid_tokens(batch)
        returns = discounted_sum(token_rewards(batch, kl_coef=kl_coef), mask, discount=gamma)
        return _constant(masked_whiten(returns, mask, epsilon=epsilon))

    return advantages


def batch_centered() -> AdvantageFn:
    """`R - mean` over all valid rows of the batch; groups play no part."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        everyone = jnp.zeros_like(jnp.asarray(batch.group_id))
        return _on_tokens(_centered(batch, everyone), batch)

    return advantages


def kl_in_reward(advantage_fn: AdvantageFn, *, kl_coef: float) -> AdvantageFn:
    """`advantage_fn` of the rewards `R - kl_coef * sum_t (lp_behavior - lp_ref)`, the k1 estimate of the row's
    KL(policy || ref). Rows of one group with equal rewards then differ by their KL.

    Raises ValueError when `batch.ref_logprobs` is None, unless `kl_coef` is 0.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        if kl_coef == 0:
            return advantage_fn(batch)
        kl = masked_sum(_token_k1(batch), _valid_tokens(batch), axis=1)
        shaped = as_float(batch.reward) - kl_coef * kl
        return advantage_fn(dataclasses.replace(batch, reward=shaped))

    return advantages


def once_per_episode(advantage_fn: AdvantageFn) -> AdvantageFn:
    """`advantage_fn`, whose credit is the same on all tokens of a row, of the first valid row of each episode; the
    other rows of an episode get what their first one got.

    For episodes of several rows that share one reward, as where a context was folded: an episode counts once in its
    group, however many rows it has. Without such episodes the result is that of `advantage_fn`.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        count = len(batch.episode_id)
        rows = jnp.arange(count)
        valid = jnp.asarray(batch.is_valid)
        # The first valid row of each episode; an episode without one has `count`, which no row is.
        same = (jnp.asarray(batch.episode_id)[:, None] == jnp.asarray(batch.episode_id)[None]) & valid[None]
        first = jnp.min(jnp.where(same, rows[None], count), axis=1)
        found = advantage_fn(dataclasses.replace(batch, is_valid=valid & (first == rows)))

        # Credit stands on action tokens alone; the first one of a row has that of the row.
        said = jnp.argmax(jnp.asarray(batch.action_mask), axis=1)
        own = jnp.take_along_axis(found, said[:, None], axis=1)[:, 0]
        return _on_tokens(own[jnp.minimum(first, count - 1)], batch)

    return advantages


def scaled(advantage_fn: AdvantageFn, factor: float) -> AdvantageFn:
    """`factor * advantage_fn`: one of several signals. 0 is no credit at all, whatever the rewards are."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        return factor * advantage_fn(batch)

    return advantages


def token_rewards(batch: RolloutBatch, *, kl_coef: float = 0.0) -> Float[Array, "B T"]:
    """The reward of a row on its last action token, minus `kl_coef * (lp_behavior - lp_ref)` on each action token.

    Raises ValueError when `batch.ref_logprobs` is None, unless `kl_coef` is 0.
    """
    mask = _valid_tokens(batch)
    position = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, position, -1), axis=1, keepdims=True)
    outcome = jnp.where(mask & (position == last), as_float(batch.reward)[:, None], 0)
    return outcome - kl_coef * _token_k1(batch) if kl_coef else outcome


def _token_k1(batch: RolloutBatch) -> Array:
    if batch.ref_logprobs is None:
        raise ValueError(
            "a KL term in the reward needs batch.ref_logprobs, which is None; set kl_coef=0, or score the rollout with "
            "a reference model before the advantages (RolloutPlan.needs_ref)"
        )
    difference = as_float(batch.behavior_logprobs) - as_float(batch.ref_logprobs)
    return jnp.clip(jnp.where(_valid_tokens(batch), difference, 0), -20, 20)


def _valid_tokens(batch: RolloutBatch) -> Array:
    return jnp.asarray(batch.action_mask) & jnp.asarray(batch.is_valid)[:, None]


def _centered(batch: RolloutBatch, group_id: ArrayLike) -> Array:
    """`R - mean` of the group, [B]; 0 for rows that are not valid."""
    mean = segment_mean(batch.reward, group_id, batch.is_valid)[jnp.asarray(group_id)]
    return jnp.where(batch.is_valid, as_float(batch.reward) - mean, 0)


def _on_tokens(row_values: ArrayLike, batch: RolloutBatch) -> Array:
    return _constant(jnp.where(_valid_tokens(batch), jnp.asarray(row_values)[:, None], 0))


def _constant(advantages: Array) -> Array:
    return jax.lax.stop_gradient(advantages)
