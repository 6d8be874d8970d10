"""Which tokens keep their policy loss: factories of functions (logprobs, entropies, rows) -> bool [B, T].

A dropped token stays in the denominator of the aggregation.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.ratios import log_difference, token_ratio
from rljax.ops import masked_mean
from rljax.types import ArrayLike, Rows

FilterFn = Callable[[Array, Array, Rows], Array]
"""(logprobs [B, T], entropies [B, T] in nats, rows) -> keep [B, T]."""


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


def _log_rho(rows: Rows) -> Array:
    return log_difference(rows.old_logprobs, rows.behavior_logprobs, rows.loss_mask)


def _row_mean(x: Array, rows: Rows) -> Array:
    return jnp.broadcast_to(masked_mean(x, rows.loss_mask, axis=1, keepdims=True), x.shape)
