"""Corrections for stale data that compare tokens or rows of a whole minibatch with each other: functions
Rows -> `Correction`, of rows with any leading axes `[*M, B, T]`.

`Loss` carries one beside `token_weights`. The trainer applies it once per update, over all microbatches, when the old
log-probs are known and before any gradient; everything in it is constant for differentiation. Staleness is measured by
`exp(lp_old - lp_behavior)`, with `lp_old` the policy before the first update of the rollout: 1 on fresh data, where
none of this changes anything.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.ratios import log_difference
from rljax.ops import as_float, masked_mean, masked_sum
from rljax.types import ArrayLike, Rows


class Correction(NamedTuple):
    """The rows to train on, scalar metrics of the minibatch, and a factor for the optimizer's step (None is 1)."""

    rows: Rows
    metrics: dict[str, Array]
    step_scale: Array | None = None


CorrectFn = Callable[[Rows], Correction]

RowWeightFn = Callable[[Array, Array], Array]
"""(token log-ratios [B, T], loss_mask [B, T]) -> log-weights [B]."""


def second_moment_mask(
    log_ratios: Float[ArrayLike, "*shape"], mask: Bool[ArrayLike, "*shape"], *, threshold: float = 0.04
) -> Bool[Array, "*shape"]:
    """Keeps as many tokens as possible, smallest `d^2` first, with their mean `d^2` below `threshold` (M2PO,
    2510.01161). If even the smallest is not below, it alone is kept.

    `log_ratios` are d in nats; off the mask nothing is kept. Tokens that tie with a dropped one are dropped, so that
    the order of rows does not matter. An infinite threshold keeps everything.
    """
    mask = jnp.asarray(mask)
    squares = jnp.where(mask, jnp.square(jnp.where(mask, as_float(log_ratios), 0)), jnp.inf)
    ordered = jnp.sort(squares, axis=None)
    known = ordered < jnp.inf
    counts = jnp.arange(1, ordered.size + 1)
    below = known & (jnp.cumsum(jnp.where(known, ordered, 0)) / counts < threshold)
    kept = jnp.sum(below)  # means of growing sets of growing numbers only grow
    first_dropped = jnp.append(ordered, jnp.inf)[kept]
    position = jnp.arange(ordered.size).reshape(squares.shape)
    only_smallest = position == jnp.argmin(squares)
    return mask & jnp.where(kept > 0, squares < first_dropped, only_smallest)


def limit_second_moment(threshold: float = 0.04) -> CorrectFn:
    """Tokens that `second_moment_mask` of `lp_old - lp_behavior` drops get the advantage 0. They stay in the
    denominator. The metric is `loss/m2_kept_fraction`."""

    def correct(rows: Rows) -> Correction:
        mask = jnp.asarray(rows.loss_mask)
        keep = second_moment_mask(_log_ratios(rows), _flat(mask), threshold=threshold).reshape(mask.shape)
        share = jnp.sum(keep) / jnp.maximum(jnp.sum(mask), 1)
        advantages = jnp.where(keep, as_float(rows.advantages), 0)
        return Correction(dataclasses.replace(rows, advantages=advantages), {"loss/m2_kept_fraction": share})

    return correct


def effective_sample_size(log_weights: Float[ArrayLike, " B"], mask: Bool[ArrayLike, " B"]) -> Float[Array, ""]:
    """`(sum w)^2 / (n sum w^2)` over the `n` rows in `mask`, in (0, 1]; 0 for an empty mask.

    The largest log-weight is taken off first, so that nothing overflows: one row that outweighs all gives 1 / n.
    """
    mask = jnp.asarray(mask)
    log_weights = jnp.where(mask, as_float(log_weights), 0)
    largest = jnp.max(jnp.where(mask, log_weights, -jnp.inf), initial=-jnp.inf)
    weights = jnp.where(mask, jnp.exp(log_weights - jnp.where(jnp.any(mask), largest, 0)), 0)
    squares = jnp.sum(mask) * jnp.sum(jnp.square(weights))
    return jnp.square(jnp.sum(weights)) / jnp.where(squares > 0, squares, 1)


def product_log_weights(log_ratios: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]) -> Float[Array, " B"]:
    """`sum_t d`: the importance weight of the row. Over thousands of tokens one row nearly always outweighs all."""
    return masked_sum(log_ratios, mask, axis=1)


def geometric_log_weights(log_ratios: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]) -> Float[Array, " B"]:
    """`mean_t d`: the geometric mean of the token ratios, for long rows."""
    return masked_mean(log_ratios, mask, axis=1)


def scale_step_by_sample_size(*, base: float = 1.0, row_weight_fn: RowWeightFn = product_log_weights) -> CorrectFn:
    """Scales the optimizer's step, as a factor of the learning rate, by `sqrt(min(1, ess / base))` (VCPO, 2602.17616).

    `ess` is the effective sample size of the rows' weights, `base` what counts as healthy. Fresh data gives exactly 1.
    Metrics: `loss/effective_sample_size`, `loss/step_scale`.
    """

    def correct(rows: Rows) -> Correction:
        mask = _flat(rows.loss_mask)
        ess = effective_sample_size(row_weight_fn(_log_ratios(rows), mask), jnp.any(mask, axis=1))
        scale = jnp.sqrt(jnp.minimum(1, ess / base))
        return Correction(rows, {"loss/effective_sample_size": ess, "loss/step_scale": scale}, scale)

    return correct


def _log_ratios(rows: Rows) -> Array:
    """`lp_old - lp_behavior` of all rows, [M * B, T]; 0 off the mask."""
    return jax.lax.stop_gradient(
        log_difference(_flat(rows.old_logprobs), _flat(rows.behavior_logprobs), _flat(rows.loss_mask))
    )


def _flat(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return x.reshape(-1, x.shape[-1])
