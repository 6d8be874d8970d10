"""Terms added to the policy loss: KL to the reference model, and the entropy bonus.

A penalty is a function (logprobs, entropies, rows) -> `Penalty`. It is aggregated like the policy loss, but not touched
by its weights and filters.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.losses.ratios import log_difference, token_ratio
from rljax.ops import as_float
from rljax.types import ArrayLike, Rows

MAX_K3 = 10.0
"""Largest value of `k3`, in nats; what would exceed it has no gradient."""

KlEstimator = Callable[[Array], Array]
"""l = lp - lp_ref -> values of the same shape whose expectation under the policy estimates KL(policy || ref)."""


class Penalty(NamedTuple):
    """Token losses, and token values [B, T] to report as metrics (their mean over loss tokens)."""

    loss: Float[Array, "B T"]
    metrics: dict[str, Array]


PenaltyFn = Callable[[Array, Array, Rows], Penalty]
"""(logprobs [B, T], entropies [B, T], rows) -> Penalty."""


def k1(l: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """`l`: unbiased, may be negative. As a loss on-policy its expected gradient is 0; use it in the reward."""
    return as_float(l)


def k2(l: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """`l^2 / 2`: biased value, whose on-policy gradient is that of the reverse KL(policy || ref)."""
    return jnp.square(as_float(l)) / 2


def k3(l: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """`exp(-l) + l - 1`, at most 10: unbiased and not negative; its on-policy gradient is that of KL(ref || policy).

    Where it is at its bound, for `l` below about -2.61 and above about 11, the gradient is 0: tokens that the policy
    has made 14 times less likely than the reference are not pulled back. `k2`, and `k3_plus`, pull at any `l`.
    """
    l = as_float(l)
    return jnp.minimum(jnp.exp(-l) + l - 1, MAX_K3)


def k3_plus(l: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """The value of `k3` with the gradient of `k2` (straight-through)."""
    gradient = k2(l)
    return gradient + jax.lax.stop_gradient(k3(l) - gradient)


def kl_penalty(kl_coef: float, estimator: KlEstimator = k3) -> PenaltyFn:
    """`kl_coef * estimator(lp - lp_ref)` per token; the metric is `loss/kl_ref`, without the coefficient.

    `lp - lp_ref` is clamped to +-20 nats, beyond which no estimator has a gradient; `k3` has its own, nearer bound.
    """

    def penalty(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Penalty:
        kl = estimator(_log_ratio_to_ref(logprobs, rows))
        return Penalty(kl_coef * kl, {"loss/kl_ref": kl})

    return penalty


def importance_corrected_kl(kl_coef: float, estimator: KlEstimator = k3) -> PenaltyFn:
    """`kl_coef * r * estimator(lp - lp_ref)`, `r = exp(lp - lp_old)` live (DeepSeek-V3.2, 2512.02556).

    With `k3` value and gradient are unbiased for the reverse KL, off-policy too, within the bounds of `kl_penalty`.
    """

    def penalty(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Penalty:
        kl = token_ratio(logprobs, rows) * estimator(_log_ratio_to_ref(logprobs, rows))
        return Penalty(kl_coef * kl, {"loss/kl_ref": kl})

    return penalty


def entropy_bonus(entropy_coef: float) -> PenaltyFn:
    """`-entropy_coef * H` per token, H the entropy (nats) of the next-token distribution."""

    def penalty(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Penalty:
        return Penalty(-entropy_coef * jnp.where(rows.loss_mask, jnp.asarray(entropies), 0), {})

    return penalty


def squared_log_ratio(coef: float = 1e-3) -> PenaltyFn:
    """`coef (lp - lp_behavior)^2` per token, live in `lp`; 0 with gradient 0 on fresh data (prime-rl). The metric
    `loss/squared_log_ratio` is without the coefficient."""

    def penalty(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Penalty:
        squared = jnp.square(log_difference(logprobs, rows.behavior_logprobs, rows.loss_mask))
        return Penalty(coef * squared, {"loss/squared_log_ratio": squared})

    return penalty


def _log_ratio_to_ref(logprobs: ArrayLike, rows: Rows) -> Array:
    if rows.ref_logprobs is None:
        raise ValueError(
            "the KL penalty needs rows.ref_logprobs, which is None; build the algorithm with kl_coef=0, or score the "
            "rows with a reference model (RolloutPlan.needs_ref)"
        )
    return log_difference(logprobs, rows.ref_logprobs, rows.loss_mask)
