"""Weights that let a reference change the size of a step and never its direction: OWPO-style, 2605.22156.

A reconstruction: the paper's abstract fixes that the sign comes from the verifier alone, that the weight is positive,
constant and asymmetric, above 1 where the policy lags the reference and below 1 where it is ahead. Weight function,
bounds and the log-probs that enter are not known, so they are arguments here.

    d = sign(A) (lp - lp_ref)      d < 0: inferior to the reference, d > 0: superior
    w = gate(d),                   gate positive, decreasing, 1 at 0

`lp` and `lp_ref` are constants in w; `lp - lp_ref` is clamped to +-20, which also takes a reference log-prob of -inf.
A = 0 gives w = 1, and so does `lp == lp_ref`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.ratios import log_difference
from rljax.losses.signatures import ReportFn, WeightFn
from rljax.ops import as_float
from rljax.types import ArrayLike, Rows

Gate = Callable[[Array], Array]
"""Deviation d [B, T] -> weight [B, T]."""

Deviation = Callable[[ArrayLike, Rows], Array]
"""(logprobs [B, T], rows) -> d [B, T]."""


def exponential_gate(*, beta: float = 1.0, lock: float = 0.2, accelerate: float = 0.2) -> Gate:
    """`clip(exp(-beta d), 1 - lock, 1 + accelerate)`, `0 <= lock < 1`. With `beta` 1 and A > 0 the clipped ratio
    `pi_ref / pi`, with A < 0 `pi / pi_ref`. `lock` 0 only accelerates, `accelerate` 0 only locks."""

    def gate(d: Float[Array, "B T"]) -> Float[Array, "B T"]:
        bounded = jnp.clip(-beta * d, math.log1p(-lock) - 1, math.log1p(accelerate) + 1)
        return jnp.clip(jnp.exp(bounded), 1 - lock, 1 + accelerate)

    return gate


def sigmoid_gate(*, beta: float = 1.0) -> Gate:
    """`2 sigmoid(-beta d)`: smooth, within (0, 2)."""
    return lambda d: 2 * jax.nn.sigmoid(-beta * d)


def linear_gate(*, beta: float = 1.0, lock: float = 0.2, accelerate: float = 0.2) -> Gate:
    """`clip(1 - beta d, 1 - lock, 1 + accelerate)`, `0 <= lock < 1`."""
    return lambda d: jnp.clip(1 - beta * d, 1 - lock, 1 + accelerate)


def current_deviation(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, "B T"]:
    """`d` of the policy being updated: locks as soon as it overtakes the reference, within one rollout too."""
    return _signed(logprobs, rows)


def old_deviation(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, "B T"]:
    """`d` of the policy before the first update of the rollout: the same weight in all of them."""
    return _signed(rows.old_logprobs, rows)


def one_way_weights(gate: Gate, deviation: Deviation = current_deviation) -> WeightFn:
    """`gate(deviation(logprobs, rows))`. Raises ValueError where the rows carry no reference log-probs."""

    def weights(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> Float[Array, "B T"]:
        return gate(deviation(logprobs, rows))

    return weights


def is_reversed(logprobs: Float[ArrayLike, "B T"], rows: Rows, *, kl_coef: float) -> Bool[Array, "B T"]:
    """Where a symmetric pull would turn the verifier's direction round: `A` and `A - kl_coef (lp - lp_ref)` differ in
    sign, that is `d > |A| / kl_coef`."""
    return kl_coef * _signed(logprobs, rows) > jnp.abs(as_float(rows.advantages))


def one_way_report(deviation: Deviation = current_deviation, *, kl_coef: float = 1.0) -> ReportFn:
    """Shares of tokens: `loss/inferior`, `loss/superior`, and `loss/force_reversal`, those that a KL penalty of
    coefficient `kl_coef` in the reward would have pushed against the verifier."""

    def report(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> dict[str, Array]:
        d = deviation(logprobs, rows)
        reversed_ = is_reversed(logprobs, rows, kl_coef=kl_coef)
        return {"loss/inferior": d < 0, "loss/superior": d > 0, "loss/force_reversal": reversed_}

    return report


def _signed(logprobs: ArrayLike, rows: Rows) -> Array:
    if rows.ref_logprobs is None:
        raise ValueError(
            "one-way weights need rows.ref_logprobs, which is None; score the rows with a reference model "
            "(RolloutPlan.needs_ref)"
        )
    sign = jnp.sign(jnp.where(rows.loss_mask, as_float(rows.advantages), 0))
    return sign * log_difference(logprobs, rows.ref_logprobs, rows.loss_mask)
