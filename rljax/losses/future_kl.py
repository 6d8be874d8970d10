"""Weights from how far the policy has already moved on the rest of a row: FIPO, 2603.19835.

With `D = lp - lp_old` clamped to +-20 and `r = exp(D)`, per row of the batch (nothing crosses rows):

    F[t] = M[t] D[t] + 2^(-1 / half_life) F[t + 1],   M = loss_mask and r <= max_ratio
    f = clip(exp(F), low, high);  where A < 0 and r > safety_ratio: clip(f, 0.8, 1)

All of it is constant for differentiation; `A f` has the sign of A. Distance is counted in positions of the row, so
tokens off the loss mask add nothing to F but do advance the discount. With `lp == lp_old` F is 0 and f is 1 exactly,
which leaves the loss it weighs as it is.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.filters import FilterFn
from rljax.losses.policy_loss import ReportFn
from rljax.losses.ratios import log_difference
from rljax.losses.weights import WeightFn
from rljax.ops import as_float, discounted_sum
from rljax.types import ArrayLike, Rows

SAFE_LOW, SAFE_HIGH = 0.8, 1.0


def future_log_ratio(
    logprobs: Float[ArrayLike, "B T"], rows: Rows, *, half_life: float = 32.0, max_ratio: float = 10.0
) -> Float[Array, "B T"]:
    """F (nats), the token's own log-ratio included; `half_life` in tokens. Clipping and dual clip do not enter."""
    difference = log_difference(logprobs, rows.old_logprobs, rows.loss_mask)
    difference = jnp.where(difference <= math.log(max_ratio), difference, 0)
    return discounted_sum(difference, jnp.ones(difference.shape, bool), discount=2 ** (-1 / half_life))


def future_kl_weights(
    *,
    low: float = 1.0,
    high: float = 1.2,
    half_life: float = 32.0,
    max_ratio: float = 10.0,
    safety_ratio: float | None = 10.0,
) -> WeightFn:
    """f. The published ranges: `low` 1.0, `high` 1.2, `safety_ratio` 10 (32B); 0.8, 1.2 and 3 (7B). `low = high = 1`
    switches the weights off; `safety_ratio` None the safety. `0 < low <= high`."""

    def weights(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> Float[Array, "B T"]:
        future = future_log_ratio(logprobs, rows, half_life=half_life, max_ratio=max_ratio)
        # F reaches log(max_ratio) / (1 - discount), beyond float32's exp; one nat past the bounds is enough.
        weight = jnp.clip(jnp.exp(jnp.clip(future, math.log(low) - 1, math.log(high) + 1)), low, high)
        if safety_ratio is None:
            return weight
        return jnp.where(_is_unsafe(logprobs, rows, safety_ratio), jnp.clip(weight, SAFE_LOW, SAFE_HIGH), weight)

    return weights


def max_dual_clipped(limit: int = 1, *, dual_clip: float = 10.0) -> FilterFn:
    """Drops rows with more than `limit` tokens whose loss the dual clip caps (A < 0 and r > `dual_clip`)."""

    def keep(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Bool[Array, "B T"]:
        capped = _is_unsafe(logprobs, rows, dual_clip)
        return jnp.broadcast_to(jnp.sum(capped, axis=1, keepdims=True) <= limit, capped.shape)

    return keep


def future_kl_report(
    *,
    low: float = 1.0,
    high: float = 1.2,
    half_life: float = 32.0,
    max_ratio: float = 10.0,
    safety_ratio: float | None = 10.0,
) -> ReportFn:
    """`loss/future_kl` (F), the shares of tokens at either bound (`loss/influence_low`, `loss/influence_high`), left
    out of F (`loss/future_kl_excluded`) and caught by the safety (`loss/influence_safety`), and the paper's health
    metric `loss/advantage_mean`, the mean of A over tokens, which should rise."""
    weights = future_kl_weights(low=low, high=high, half_life=half_life, max_ratio=max_ratio, safety_ratio=None)

    def report(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> dict[str, Array]:
        weight = weights(as_float(logprobs), as_float(entropies), rows)
        excluded = log_difference(logprobs, rows.old_logprobs, rows.loss_mask) > math.log(max_ratio)
        never = jnp.zeros(weight.shape, bool)
        return {
            "loss/future_kl": future_log_ratio(logprobs, rows, half_life=half_life, max_ratio=max_ratio),
            "loss/influence_low": (weight == low) & (low < 1),
            "loss/influence_high": (weight == high) & (high > 1),
            "loss/future_kl_excluded": excluded,
            "loss/influence_safety": never if safety_ratio is None else _is_unsafe(logprobs, rows, safety_ratio),
            "loss/advantage_mean": as_float(rows.advantages),
        }

    return report


def _is_unsafe(logprobs: ArrayLike, rows: Rows, limit: float) -> Array:
    """A < 0 and r > limit, on loss tokens."""
    difference = log_difference(logprobs, rows.old_logprobs, rows.loss_mask)
    return (jnp.asarray(rows.advantages) < 0) & (difference > math.log(limit)) & jnp.asarray(rows.loss_mask)
