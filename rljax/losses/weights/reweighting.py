"""Weights on advantages by what a token is to the policy. Factories of weight functions, constant for differentiation.

A positive weight on the token loss is the same weight on its advantage, for every surrogate of A that is clipped by
the ratio alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.losses.ratios import log_difference
from rljax.losses.signatures import WeightFn
from rljax.ops import as_float
from rljax.types import ArrayLike, Rows


def rare_token_weights(alpha: float = 0.2) -> WeightFn:
    """`1 + alpha (1 - p_old)`, `p_old = exp(lp_old)` at most 1: in [1, 1 + alpha], for either sign of A (2603.22117).

    Constant through all updates of a rollout. The weights are not normalised to mean 1, so the step grows by up to
    `alpha`; `loss/weight_mean` tells by how much. `alpha` 0 gives 1.
    """

    def weights(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> Float[Array, "B T"]:
        old = jnp.where(rows.loss_mask, as_float(rows.old_logprobs), 0)
        return 1 + alpha * (1 - jnp.exp(jnp.minimum(old, 0)))

    return weights


def divergence_weights(alpha: float = 10.0, *, width: float = 0.4) -> WeightFn:
    """`1 + width (sigmoid(alpha k) - 1/2)`, `k = exp(D) - 1 - D >= 0`, `D = lp - lp_old` clamped to +-20: k3, an
    estimate of KL(old || current) from the old policy's samples (2603.22446).

    `alpha > 0` raises tokens that moved, to below `1 + width / 2`; `alpha < 0` lowers them, to above `1 - width / 2`;
    0, or `lp == lp_old`, gives exactly 1. The paper's values are not known; sweep |alpha| in 1, 10, 100.
    """

    def weights(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> Float[Array, "B T"]:
        difference = log_difference(logprobs, rows.old_logprobs, rows.loss_mask)
        k = jnp.expm1(difference) - difference
        return 1 + width * (jax.nn.sigmoid(alpha * k) - 0.5)

    return weights
