"""Importance ratios of the current policy, `[B, T]`: functions of (logprobs, rows).

Every log difference is masked first and clamped to +-20, so that no ratio overflows; beyond it the gradient is 0.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.ops import as_float, masked_mean, masked_sum
from rljax.types import SOURCE_GUIDED, ArrayLike, Rows

MAX_LOG_RATIO = 20.0
MAX_LOG_SEQUENCE_RATIO = 10.0

RatioFn = Callable[[Array, Rows], Array]
"""(logprobs [B, T], rows) -> ratio [B, T], differentiable in logprobs."""


def log_difference(
    new: Float[ArrayLike, "B T"], old: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]
) -> Float[Array, "B T"]:
    """`new - old` in nats, clamped to +-20; 0 where masked, whatever stands there."""
    return jnp.clip(jnp.where(mask, as_float(new) - as_float(old), 0), -MAX_LOG_RATIO, MAX_LOG_RATIO)


def token_ratio(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, "B T"]:
    """`r = exp(lp - lp_old)` of each token (PPO, 1707.06347)."""
    return jnp.exp(log_difference(logprobs, rows.old_logprobs, rows.loss_mask))


def behavior_ratio(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, "B T"]:
    """`exp(lp - lp_behavior)`: one ratio carries off-policy correction and clip anchor alike ("bypass")."""
    return jnp.exp(log_difference(logprobs, rows.behavior_logprobs, rows.loss_mask))


def sequence_ratio(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, "B T"]:
    """`s = exp(mean_t (lp - lp_old))` of the row, on each of its tokens (GSPO, 2507.18071); the log is at most 10."""
    difference = log_difference(logprobs, rows.old_logprobs, rows.loss_mask)
    mean = masked_mean(difference, rows.loss_mask, axis=1, keepdims=True)
    return jnp.broadcast_to(jnp.exp(jnp.minimum(mean, MAX_LOG_SEQUENCE_RATIO)), difference.shape)


def sequence_token_ratio(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, "B T"]:
    """`sg(s) * exp(lp - sg(lp))`: the value of `sequence_ratio`, to each token its own gradient.

    GSPO-token, 2507.18071. With one advantage per row and equal weights within a row, value and gradient equal those of
    `sequence_ratio`.
    """
    difference = log_difference(logprobs, rows.old_logprobs, rows.loss_mask)
    mean = masked_mean(difference, rows.loss_mask, axis=1, keepdims=True)
    live = jax.lax.stop_gradient(mean - difference) + difference
    return jnp.exp(jnp.minimum(live, MAX_LOG_SEQUENCE_RATIO))


def behavior_sequence_ratio(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, "B T"]:
    """`W = exp(sum_t (lp - lp_behavior))` of the row, on each of its tokens; the log of the product is clamped to +-20.

    As `sequence_token_ratio`, `sg(W) * exp(lp - sg(lp))`: every token has its own gradient, of size W.
    """
    difference = log_difference(logprobs, rows.behavior_logprobs, rows.loss_mask)
    total = masked_sum(difference, rows.loss_mask, axis=1, keepdims=True)
    weight = jax.lax.stop_gradient(jnp.exp(jnp.clip(total, -MAX_LOG_RATIO, MAX_LOG_RATIO)))
    return weight * jnp.exp(difference - jax.lax.stop_gradient(difference))


def unguided_ratio(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, "B T"]:
    """`behavior_ratio`; in guided rows `exp(lp - sg(lp))`, 1 with the gradient of the policy itself. Take it together
    with `shaped_guidance`, which then carries the off-policy weight."""
    plain = behavior_ratio(logprobs, rows)
    live = log_difference(logprobs, jax.lax.stop_gradient(jnp.asarray(logprobs)), rows.loss_mask)
    return jnp.where(is_guided(rows), jnp.exp(live), plain)


def geometric_ratio(*, log_clip: float = 0.4) -> RatioFn:
    """Geometric mean of one-sidedly clipped token ratios, on each token of the row (GMPO, 2507.20673).

    `D' = g min(g D, g clip(D, -log_clip, log_clip))`, `g = sign(A)`, then `exp(mean_t D')`: clipped before averaging.
    """

    def ratio(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, "B T"]:
        difference = log_difference(logprobs, rows.old_logprobs, rows.loss_mask)
        sign = jnp.sign(jnp.where(rows.loss_mask, as_float(rows.advantages), 0))
        clipped = jnp.clip(difference, -log_clip, log_clip)
        one_sided = sign * jnp.minimum(sign * difference, sign * clipped)
        mean = masked_mean(one_sided, rows.loss_mask, axis=1, keepdims=True)
        return jnp.broadcast_to(jnp.exp(mean), difference.shape)

    return ratio


def interpolated_logprobs(
    logprobs: Float[ArrayLike, "B T"],
    behavior_logprobs: Float[ArrayLike, "B T"],
    *,
    behavior_version: Int[ArrayLike, "B T"] | int,
    old_version: Int[ArrayLike, "B T"] | int,
    version: Int[ArrayLike, "B T"] | int,
) -> Float[Array, "B T"]:
    """Log-linear stand-in for `old_logprobs`, which saves their forward pass in decoupled PPO (2110.00641, as AReaL,
    2505.24298, implements it): `lp_b + a (sg(lp) - lp_b)`, `a = (v_old - v_b) / (v - v_b)`, 0 where `v == v_b`.

    Versions count policy updates, one per token or one for all.
    """
    span = jnp.asarray(version) - jnp.asarray(behavior_version)
    step = jnp.asarray(old_version) - jnp.asarray(behavior_version)
    fraction = jnp.where(span == 0, 0.0, step / jnp.where(span == 0, 1, span))
    behavior = as_float(behavior_logprobs)
    return behavior + fraction * (jax.lax.stop_gradient(as_float(logprobs)) - behavior)


def is_guided(rows: Rows) -> Bool[Array, "B 1"]:
    """Rows that were sampled under a prompt with guidance."""
    return (jnp.asarray(rows.source) == SOURCE_GUIDED)[..., None]


def is_bad_beyond(logprobs: Float[ArrayLike, "B T"], rows: Rows, limit: float) -> Bool[Array, "B T"]:
    """Loss tokens with A < 0 and `exp(lp - lp_old)` above `limit`."""
    difference = log_difference(logprobs, rows.old_logprobs, rows.loss_mask)
    return (jnp.asarray(rows.advantages) < 0) & (difference > math.log(limit)) & jnp.asarray(rows.loss_mask)
