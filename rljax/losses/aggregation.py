"""Aggregations as token weights: `loss_mask` [B, T] of the *global* minibatch -> weights [B, T], 0 off the mask.

The loss is `sum(weights * token_loss)`. `n_i` is the number of loss tokens of row i, `B'` the number of rows that have
any. Since the weights are fixed before the backward pass, losses of microbatches and of devices just add up.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.types import ArrayLike

AggregateFn = Callable[[ArrayLike], Array]
"""loss_mask [B, T] -> token weights [B, T]."""


def token_mean(loss_mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """`1 / sum_i n_i`: every token counts the same (DAPO, 2503.14476)."""
    mask, _, _ = _counts(loss_mask)
    return mask / jnp.maximum(jnp.sum(mask), 1)


def sequence_mean(loss_mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """`1 / (B' n_i)`: every row counts the same (GRPO, 2402.03300)."""
    mask, lengths, rows = _counts(loss_mask)
    return mask / (jnp.maximum(lengths, 1) * rows)


def sequence_sum(loss_mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """`1 / B'`: the mean over rows of the sum over tokens."""
    mask, _, rows = _counts(loss_mask)
    return mask / rows


def fixed_length(horizon: int) -> AggregateFn:
    """`1 / (B' horizon)`: as `sequence_sum`, over a constant length (Dr.GRPO, 2503.20783)."""

    def aggregate(loss_mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
        return sequence_sum(loss_mask) / horizon

    return aggregate


def token_sum(loss_mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """1: the plain sum, scaled elsewhere."""
    return _counts(loss_mask)[0]


def _counts(loss_mask: ArrayLike) -> tuple[Array, Array, Array]:
    """The mask as numbers, `n_i` [B, 1], and `B'` (at least 1)."""
    mask = jnp.asarray(loss_mask).astype(jnp.result_type(float))
    lengths = jnp.sum(mask, axis=1, keepdims=True)
    return mask, lengths, jnp.maximum(jnp.sum(lengths > 0), 1)
