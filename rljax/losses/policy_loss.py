"""The policy loss, composed of functions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.losses.aggregation import AggregateFn
from rljax.losses.corrections import CorrectFn
from rljax.losses.penalties import PenaltyFn
from rljax.losses.ratios import RatioFn, log_difference
from rljax.losses.selection import SelectFn
from rljax.losses.signatures import FilterFn, ReportFn, WeightFn
from rljax.losses.surrogates import SurrogateFn
from rljax.ops import as_float, masked_max, masked_sum
from rljax.types import TEACHER_DIVERGENCE, ArrayLike, Rows

LossFn = Callable[[Array, Array, Rows], tuple[Array, dict[str, Array]]]
"""(logprobs [B, T], entropies [B, T], rows) -> (loss, metrics), scalars."""


class Loss(NamedTuple):
    """`token_weights(loss_mask [B, T])` runs once over the global minibatch and fills `rows.loss_weights`;
    `loss(logprobs, entropies, rows)` runs on each microbatch. Losses and metrics of microbatches add up, except metrics
    named `*_max`, which combine by maximum.

    `select_fn`, if there is one, also runs over the global minibatch, once per update: the advantages of tokens that it
    does not select count as 0. Denominators and penalties stay those of all loss tokens. So does `correct_fn`: it is
    given the rows with the old log-probs, and returns those to train on, metrics, and a factor for the step."""

    token_weights: AggregateFn
    loss: LossFn
    select_fn: SelectFn | None = None
    correct_fn: CorrectFn | None = None


def policy_loss(
    ratio_fn: RatioFn,
    surrogate_fn: SurrogateFn,
    aggregate_fn: AggregateFn,
    weight_fns: Sequence[WeightFn] = (),
    filter_fns: Sequence[FilterFn] = (),
    penalties: Sequence[PenaltyFn] = (),
    report_fns: Sequence[ReportFn] = (),
    select_fn: SelectFn | None = None,
    correct_fn: CorrectFn | None = None,
) -> Loss:
    """`sum(loss_weights * (keep * prod(weights) * surrogate(ratio, A, lp) + sum(penalties)))`.

    Gradient flows through the log-probs and entropies only, never through advantages, weights, or anything off
    `rows.loss_mask`, where NaN is harmless. Metrics, means over `rows.token_count` unless said otherwise: `loss/policy`
    (the policy part of the loss), `loss/clip_fraction`, `loss/ratio_mean`, `loss/ratio_max` (a maximum),
    `loss/approx_kl` (k3 of old against current policy), `loss/entropy`, with weights `loss/weight_mean`, with filters
    `loss/kept_fraction`, and what penalties and `report_fns` add. `select_fn` and `correct_fn` are passed on, for the
    trainer to apply.
    """

    def loss(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        # NaN in masked places would come back through the gradient of `where`, so it goes before anything else.
        mask = jnp.asarray(rows.loss_mask)
        rows = _without_garbage(rows)
        logprobs = _masked(logprobs, mask)
        entropies = _masked(entropies, mask)

        ratio = ratio_fn(logprobs, rows)
        token_loss, is_clipped = surrogate_fn(ratio, jnp.asarray(rows.advantages), logprobs)

        weight = jnp.ones(mask.shape, token_loss.dtype)
        for weight_fn in weight_fns:
            weight = weight * jax.lax.stop_gradient(weight_fn(logprobs, entropies, rows))

        keep = mask
        for filter_fn in filter_fns:
            keep = keep & filter_fn(logprobs, entropies, rows)

        # Kept tokens are chosen before the product, so that 0 * inf cannot arise.
        token_loss = jnp.where(keep, token_loss, 0) * jnp.where(keep, weight, 0)
        policy = masked_sum(rows.loss_weights * token_loss, mask)

        # Token values, of which metrics are the means.
        log_ratio = log_difference(logprobs, rows.old_logprobs, mask)
        values = {
            "loss/clip_fraction": is_clipped.astype(ratio.dtype),
            "loss/ratio_mean": ratio,
            "loss/approx_kl": jnp.exp(log_ratio) - 1 - log_ratio,
            "loss/entropy": entropies,
        }
        if weight_fns:
            values["loss/weight_mean"] = weight
        if filter_fns:
            values["loss/kept_fraction"] = keep.astype(ratio.dtype)

        # Penalties count on all tokens, whatever weights and filters say.
        total = policy
        for penalty_fn in penalties:
            penalty = penalty_fn(logprobs, entropies, rows)
            total = total + masked_sum(rows.loss_weights * penalty.loss, mask)
            values |= penalty.metrics

        for report_fn in report_fns:
            values |= {name: value.astype(ratio.dtype) for name, value in report_fn(logprobs, entropies, rows).items()}

        # The count is that of the global minibatch, so that metrics of microbatches add up as losses do.
        count = jnp.maximum(rows.token_count, 1)
        metrics = {name: masked_sum(value, mask) / count for name, value in values.items()}
        metrics |= {"loss/policy": policy, "loss/ratio_max": masked_max(ratio, mask)}
        return total, jax.lax.stop_gradient(metrics)

    return Loss(aggregate_fn, loss, select_fn, correct_fn)


def _masked(x: ArrayLike, mask: Array) -> Array:
    return jnp.where(mask, as_float(x), 0)


def _without_garbage(rows: Rows) -> Rows:
    """`rows` as constants but for what is live in the policy's weights, with 0 off the loss mask."""

    mask = jnp.asarray(rows.loss_mask)

    def clean(x: ArrayLike) -> Array:
        # A column of one number per row counts where the row has a loss token.
        kept = mask if jnp.ndim(x) == mask.ndim else jnp.any(mask, axis=-1)
        return jax.lax.stop_gradient(_masked(x, kept))

    columns = {name: clean(value) for name, value in rows.columns.items()}
    if TEACHER_DIVERGENCE in rows.columns:
        columns[TEACHER_DIVERGENCE] = _masked(rows.columns[TEACHER_DIVERGENCE], mask)

    return dataclasses.replace(
        rows,
        loss_weights=clean(rows.loss_weights),
        advantages=clean(rows.advantages),
        behavior_logprobs=clean(rows.behavior_logprobs),
        old_logprobs=clean(rows.old_logprobs),
        ref_logprobs=None if rows.ref_logprobs is None else clean(rows.ref_logprobs),
        uniforms=None if rows.uniforms is None else clean(rows.uniforms),
        columns=columns,
    )
