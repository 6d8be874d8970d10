"""Weights that grow with the likelihood gain of the rest of the row: APPO, 2606.12384."""

from collections.abc import Callable
from operator import attrgetter

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.losses.signatures import WeightFn
from rljax.ops import as_float, future_value
from rljax.types import ArrayLike, Rows


def procedure_weights(
    *,
    discount: float = 2 ** (-1 / 32),
    scale: float = 0.5,
    low: float = 1.0,
    high: float = 1.2,
    anchor: Callable[[Rows], ArrayLike] = attrgetter("old_logprobs"),
) -> WeightFn:
    """Token weights `1 + scale * clip(Omega, low, high)` for `policy_loss` (APPO, 2606.12384, Eq. 7): the factor of the
    advantage that grows with the likelihood gain of the rest of the row under the current policy.

    Omega is `rljax.ops.future_value` of `lp - anchor(rows)` over the loss tokens, by default of `lp - lp_old`. A
    positive factor of the advantage is one of the clipped surrogate, so a weight serves; it is constant for
    differentiation.
    """

    def weights(logprobs: Float[Array, "B T"], entropies: Float[Array, "B T"], rows: Rows) -> Float[Array, "B T"]:
        log_ratio = as_float(logprobs) - as_float(anchor(rows))
        omega = future_value(log_ratio, rows.loss_mask, discount=discount)
        return jax.lax.stop_gradient(1 + scale * jnp.clip(omega, low, high))

    return weights
