"""Importance weights for data that another policy sampled, `rho = exp(lp_old - lp_behavior)`.

Products over rows much beyond a thousand tokens are nearly always extreme: take token weights there.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.ratios import log_difference
from rljax.losses.signatures import WeightFn
from rljax.ops import masked_mean, masked_sum
from rljax.types import ArrayLike, Rows


def behavior_weights(rows: Rows) -> Float[Array, "B T"]:
    """`rho` of each token, 1 where masked."""
    return jnp.exp(log_difference(rows.old_logprobs, rows.behavior_logprobs, rows.loss_mask))


def sequence_behavior_weights(rows: Rows) -> Float[Array, "B T"]:
    """`prod_t rho` of the row, on each of its tokens; the log of the product is clamped to +-20."""
    difference = log_difference(rows.old_logprobs, rows.behavior_logprobs, rows.loss_mask)
    total = masked_sum(difference, rows.loss_mask, axis=1, keepdims=True)
    return jnp.broadcast_to(jnp.exp(jnp.clip(total, -20, 20)), difference.shape)


def truncated_is(cap: float = 2.0) -> WeightFn:
    """Token weights `min(rho, cap)`. With `cap` 5 this is decoupled PPO (2110.00641; AReaL, 2505.24298)."""

    def weights(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> Float[Array, "B T"]:
        return jnp.minimum(behavior_weights(rows), cap)

    return weights


def sequence_truncated_is(cap: float = 2.0) -> WeightFn:
    """Row weights `min(prod_t rho, cap)`."""

    def weights(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> Float[Array, "B T"]:
        return jnp.minimum(sequence_behavior_weights(rows), cap)

    return weights


def masked_is(low: float = 0.5, high: float = 2.0) -> WeightFn:
    """Token weights `rho` where `low <= rho <= high`, else 0."""

    def weights(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> Float[Array, "B T"]:
        rho = behavior_weights(rows)
        return jnp.where((rho >= low) & (rho <= high), rho, 0)

    return weights


def sequence_masked_is(cap: float = 3.0) -> WeightFn:
    """Row weights `P = prod_t rho` where `P <= cap`, else 0."""

    def weights(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> Float[Array, "B T"]:
        product = sequence_behavior_weights(rows)
        return jnp.where(product <= cap, product, 0)

    return weights


def batch_normalized(weights: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """`w / mean(w over mask)`, 0 off it. A function of the whole batch: means of microbatches do not add up, so apply
    it before splitting, e.g. to the advantages."""
    mean = masked_mean(weights, mask)
    return jnp.where(mask, weights, 0) / jnp.where(mean > 0, mean, 1)
