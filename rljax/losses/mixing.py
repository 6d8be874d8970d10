"""Named losses that rows mix: each term counts on a row as much as a column of the data says.

A column of one number a row (`rljax.plans.Column`) is the weight: some rows may have `ce` 1 and `rl` 0, and others the
reverse. Denominators stay those of all loss tokens.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.losses.penalties import Penalty, PenaltyFn
from rljax.losses.signatures import WeightFn
from rljax.ops import as_float
from rljax.types import ArrayLike, Rows


def cross_entropy(coef: float = 1.0) -> PenaltyFn:
    """`-coef * lp` per token: supervised learning of what stands there. The metric `loss/cross_entropy` is without the
    coefficient."""

    def penalty(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Penalty:
        value = -jnp.where(rows.loss_mask, as_float(logprobs), 0)
        return Penalty(coef * value, {"loss/cross_entropy": value})

    return penalty


def by_row(penalty_fn: PenaltyFn, column: str) -> PenaltyFn:
    """`penalty_fn` times the number that each row has in `column`; its metrics are as they were. ValueError for rows
    without the column."""

    def penalty(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Penalty:
        found = penalty_fn(jnp.asarray(logprobs), jnp.asarray(entropies), rows)
        return Penalty(found.loss * _of_rows(rows, column), found.metrics)

    return penalty


def column_weights(column: str) -> WeightFn:
    """Token weights, for the policy part of the loss: the number that the row has in `column`. ValueError as
    `by_row`."""

    def weights(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> Float[Array, "B T"]:
        return jnp.broadcast_to(_of_rows(rows, column), jnp.shape(logprobs))

    return weights


def _of_rows(rows: Rows, column: str) -> Array:
    """[B, 1]; of a column per token, [B, T]."""
    if column not in rows.columns:
        raise ValueError(
            f"a loss that rows mix needs the column {column!r}, which they lack; declare Column({column!r}, per='row') "
            "in the rollout plan, and give the data a number of this name"
        )
    values = as_float(rows.columns[column])
    return values if values.ndim == jnp.ndim(rows.loss_mask) else values[..., None]
