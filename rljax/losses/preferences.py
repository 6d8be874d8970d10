"""Losses of preferences: which of two completions of a prompt is better, or whether one is good.

Rows say in two columns of a number each what they are. `SIDE` is 1 for what is preferred, -1 for what is not, 0 for a
row that is only measured. `PAIR` numbers the pairs of a minibatch; the rows of a pair stand in one microbatch. A row is
worth one number, its *score*, and every loss is a function of scores.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.aggregation import sequence_sum
from rljax.losses.corrections import Correction
from rljax.losses.policy_loss import Loss
from rljax.ops import as_float, masked_max, masked_mean, masked_sum
from rljax.types import ArrayLike, Rows

SIDE = "preference_side"
"""Column of a row: 1 preferred, -1 not, 0 neither."""

PAIR = "preference_pair"
"""Column of a row: the number of its pair, exact in float32 below 2**24."""

RowScoreFn = Callable[[Array, Rows], Array]
"""(logprobs [B, T], rows) -> scores [B]; 0 for a row without loss tokens."""

PairLossFn = Callable[[ArrayLike, ArrayLike], Array]
"""(scores of the preferred, scores of the others), of one shape -> losses of that shape."""


def logistic(margin: Float[ArrayLike, "*B"], *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Array, "*B"]:
    """`-(1 - s) log sigmoid(beta m) - s log sigmoid(-beta m)`: DPO (2305.18290, equation 7) of the difference `m` of
    two log-ratios in nats. `label_smoothing` s is how often a label is taken to be wrong."""
    z = beta * as_float(margin)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def squared(margin: Float[ArrayLike, "*B"], *, beta: float = 0.1) -> Float[Array, "*B"]:
    """`(m - 1 / (2 beta))^2`: IPO (2310.12036, equation 17), whose regularisation tau is `beta`."""
    return jnp.square(as_float(margin) - 1 / (2 * beta))


def margin_of(of_margin: Callable[[Array], Array], *, less: float = 0.0) -> PairLossFn:
    """The pair loss that is `of_margin` of the difference of scores, less a margin that is asked for."""

    def pair_loss(preferred: Float[ArrayLike, "*B"], other: Float[ArrayLike, "*B"]) -> Float[Array, "*B"]:
        return of_margin(as_float(preferred) - as_float(other) - less)

    return pair_loss


def centered(pair_loss: PairLossFn, weight: float) -> PairLossFn:
    """`pair_loss` and `weight (preferred + other)^2`, which draws the level of scores to 0 (2312.09244)."""

    def with_center(preferred: Float[ArrayLike, "*B"], other: Float[ArrayLike, "*B"]) -> Float[Array, "*B"]:
        return pair_loss(preferred, other) + weight * jnp.square(as_float(preferred) + as_float(other))

    return with_center


def prospect(
    log_ratio: Float[ArrayLike, "*B"],
    baseline: Float[ArrayLike, "*B"],
    side: Float[ArrayLike, "*B"],
    *,
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Float[Array, "*B"]:
    """`w (1 - sigmoid(side beta (r - z)))`: KTO (2402.01306, equation 8) of log-ratios r and the `baseline` z, both in
    nats, with w of the row's side."""
    side = as_float(side)
    weight = jnp.where(side > 0, desirable, undesirable)
    return weight * (1 - jax.nn.sigmoid(side * beta * (as_float(log_ratio) - baseline)))


def total(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, " B"]:
    """The sum over loss tokens: the log-prob of a completion, or the reward that stands on a single token."""
    return masked_sum(logprobs, rows.loss_mask, axis=1)


def mean_logprob(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, " B"]:
    """The mean over loss tokens: SimPO's (2405.14734, equation 3)."""
    return masked_mean(logprobs, rows.loss_mask, axis=1)


def log_ratio(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, " B"]:
    """`log pi(y | x) - log pi_ref(y | x)` of whole completions."""
    return masked_sum(_differences(logprobs, rows), rows.loss_mask, axis=1)


def mean_log_ratio(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, " B"]:
    """`log_ratio` over the number of tokens."""
    return masked_mean(_differences(logprobs, rows), rows.loss_mask, axis=1)


def pairwise_loss(pair_loss: PairLossFn, *, score: RowScoreFn, scale: float = 1.0) -> Loss:
    """The mean over pairs of `pair_loss(preferred, other)` of their scores.

    A pair without one row on each side is NaN, which the trainer's guard stops at. Metrics, means over pairs:
    `preference/accuracy` (how often the preferred row has the larger score), `preference/margin`,
    `preference/chosen` and `preference/rejected`: scores times `scale`.
    """

    def loss(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        scores = score(as_float(logprobs), rows)
        pairs = _pairs(scores, rows)
        losses = jnp.where(pairs.is_first, pair_loss(scores, pairs.partner), 0)
        value = jnp.sum(pairs.weight * jnp.where(pairs.is_whole, losses, jnp.nan))

        margin = scores - pairs.partner
        reported = {
            "preference/accuracy": (margin > 0).astype(scores.dtype),
            "preference/margin": scale * margin,
            "preference/chosen": scale * scores,
            "preference/rejected": scale * pairs.partner,
        }
        metrics = {name: jnp.sum(pairs.weight * jnp.where(pairs.is_first, x, 0)) for name, x in reported.items()}
        return value, jax.lax.stop_gradient(metrics | {"preference/loss": value})

    return Loss(sequence_sum, loss, select_fn=None, correct_fn=None)


def prospect_loss(*, beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0) -> Loss:
    """The mean over labelled rows of `prospect`. z is the mean `log_ratio` of the minibatch's rows of side 0,
    completions of other prompts, at least 0; it is taken before the update, which costs a forward pass, so that it is
    the same however the minibatch is split. Rows of side 0 have weight 0.

    Metrics: `preference/accuracy` (labelled rows on their side of z), `preference/baseline` (z, nats), and means over
    labelled rows of `preference/chosen` and `preference/rejected`: `beta log_ratio`, 0 on the other side.
    """

    def correct(rows: Rows) -> Correction:
        ratios = masked_sum(_differences(rows.old_logprobs, rows), rows.loss_mask, axis=-1)
        is_other = (rows.columns[SIDE] == 0) & jnp.any(rows.loss_mask, axis=-1)
        baseline = jnp.maximum(masked_mean(ratios, is_other), 0)
        # Advantages are what every row of every microbatch can be told.
        spread = jnp.broadcast_to(baseline, jnp.shape(rows.advantages))
        told = rows.replace(advantages=spread)  # type: ignore[attr-defined]
        return Correction(told, {"preference/baseline": baseline})

    def loss(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        side = jnp.asarray(rows.columns[SIDE])
        ratios = log_ratio(as_float(logprobs), rows)
        baseline = jax.lax.stop_gradient(masked_max(rows.advantages, rows.loss_mask, axis=1))
        losses = prospect(ratios, baseline, side, beta=beta, desirable=desirable, undesirable=undesirable)
        weight = jnp.where(side != 0, _row_weights(rows), 0)
        value = jnp.sum(weight * losses)

        reported = {
            "preference/accuracy": (side * (ratios - baseline) > 0).astype(ratios.dtype),
            "preference/chosen": jnp.where(side > 0, beta * ratios, 0),
            "preference/rejected": jnp.where(side < 0, beta * ratios, 0),
        }
        metrics = {name: jnp.sum(weight * x) for name, x in reported.items()}
        return value, jax.lax.stop_gradient(metrics | {"preference/loss": value})

    return Loss(sequence_sum, loss, select_fn=None, correct_fn=correct)


class _Pairs(NamedTuple):
    """Of every row [B]: the score of the row on the other side of its pair, whether it is the preferred one of a pair,
    whether its pair is whole, and what it counts (0 unless preferred)."""

    partner: Float[Array, " B"]
    is_first: Bool[Array, " B"]
    is_whole: Bool[Array, " B"]
    weight: Float[Array, " B"]


def _pairs(scores: Array, rows: Rows) -> _Pairs:
    side = jnp.asarray(rows.columns[SIDE])
    pair = jnp.asarray(rows.columns[PAIR])
    is_row = jnp.any(rows.loss_mask, axis=1)
    is_first = is_row & (side > 0)

    # Rows of a microbatch are few beside its tokens, so all are compared with all: no order of rows is relied on.
    facing = (pair[:, None] == pair[None, :]) & (side[:, None] * side[None, :] < 0) & is_row[None, :]
    partner = jnp.sum(jnp.where(facing, scores[None, :], 0), axis=1)
    is_whole = ~is_row | (jnp.sum(facing, axis=1) == 1)

    # Two rows of a pair have half a pair's weight each; the preferred one carries both.
    return _Pairs(partner, is_first, is_whole, 2 * jnp.where(is_first, _row_weights(rows), 0))


def _row_weights(rows: Rows) -> Float[Array, " B"]:
    """`1 / B'` in proportion: every loss token of a row has its weight."""
    return masked_max(rows.loss_weights, rows.loss_mask, axis=1)


def _differences(logprobs: ArrayLike, rows: Rows) -> Array:
    """Policy against reference, per token; 0 off the loss mask."""
    mask = rows.loss_mask
    if rows.ref_logprobs is None:
        raise ValueError("the rows have no log-probs of a reference; build the learner with LossNeeds(reference=True)")
    reference = jax.lax.stop_gradient(jnp.where(mask, as_float(rows.ref_logprobs), 0))
    return jnp.where(mask, as_float(logprobs), 0) - reference
