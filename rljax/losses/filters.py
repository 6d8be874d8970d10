"""Which tokens keep their policy loss: factories of functions (logprobs, entropies, rows) -> bool [B, T].

A dropped token stays in the denominator of the aggregation.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.ratios import behavior_ratio, is_bad_beyond, log_difference, token_ratio
from rljax.losses.signatures import FilterFn
from rljax.ops import as_float, masked_mean
from rljax.types import ArrayLike, Rows


def max_ratio(limit: float) -> FilterFn:
    """Keeps tokens with `exp(lp - lp_old) <= limit`."""

    def keep(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Bool[Array, "B T"]:
        return token_ratio(logprobs, rows) <= limit

    return keep


def off_policy_sequence(delta: float = 0.5) -> FilterFn:
    """Drops tokens of negative advantage in rows that the policy has left: `mean_t(lp_old - lp) > delta`
    (DeepSeek-V3.2, 2512.02556)."""

    def keep(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Bool[Array, "B T"]:
        drift = -_row_mean(log_difference(logprobs, rows.old_logprobs, rows.loss_mask), rows)
        return ~((jnp.asarray(rows.advantages) < 0) & (drift > delta))

    return keep


def geometric_band(low: float = 0.999, high: float = 1.001) -> FilterFn:
    """Keeps rows whose geometric mean of `rho = exp(lp_old - lp_behavior)` lies within [low, high]."""

    def keep(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Bool[Array, "B T"]:
        mean = jnp.exp(_row_mean(_log_rho(rows), rows))
        return (mean >= low) & (mean <= high)

    return keep


def max_behavior_k3(threshold: float = 0.01) -> FilterFn:
    """Keeps rows whose mean `rho - 1 - log rho`, an estimate of KL(behavior || old), is at most `threshold`."""

    def keep(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Bool[Array, "B T"]:
        log_rho = _log_rho(rows)
        return _row_mean(jnp.exp(log_rho) - 1 - log_rho, rows) <= threshold

    return keep


def max_dual_clipped(limit: int = 1, *, dual_clip: float = 10.0) -> FilterFn:
    """Drops rows with more than `limit` tokens whose loss the dual clip caps (A < 0 and r > `dual_clip`)."""

    def keep(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Bool[Array, "B T"]:
        capped = is_bad_beyond(logprobs, rows, dual_clip)
        return jnp.broadcast_to(jnp.sum(capped, axis=1, keepdims=True) <= limit, capped.shape)

    return keep


def veto(threshold: float = 1e-4) -> FilterFn:
    """Drops rows in which any token has `exp(lp - lp_behavior) < threshold` (slime; thresholds 1e-6 to 1e-4)."""

    def keep(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Bool[Array, "B T"]:
        ratio = behavior_ratio(logprobs, rows)
        impossible = jnp.asarray(rows.loss_mask) & (ratio < threshold)
        return jnp.broadcast_to(~jnp.any(impossible, axis=1, keepdims=True), ratio.shape)

    return keep


def probability_band(*, low: float = 0.2, high: float = 0.2) -> FilterFn:
    """Drops tokens that have gone far enough by probability: `d = p - p_behavior`, A > 0 and d > high, or A < 0 and
    d < -low (prime-rl; INTELLECT-3, 2512.16144). Rare tokens stay trainable, whatever their ratio."""

    def keep(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Bool[Array, "B T"]:
        new, behavior = (_probability(x, rows) for x in (logprobs, rows.behavior_logprobs))
        advantages = jnp.asarray(rows.advantages)
        d = new - behavior
        return ~(((advantages > 0) & (d > high)) | ((advantages < 0) & (d < -low)))

    return keep


def _log_rho(rows: Rows) -> Array:
    return log_difference(rows.old_logprobs, rows.behavior_logprobs, rows.loss_mask)


def _row_mean(x: Array, rows: Rows) -> Array:
    return jnp.broadcast_to(masked_mean(x, rows.loss_mask, axis=1, keepdims=True), x.shape)


def _probability(logprobs: ArrayLike, rows: Rows) -> Array:
    return jnp.exp(jnp.minimum(jnp.where(rows.loss_mask, as_float(logprobs), 0), 0))
