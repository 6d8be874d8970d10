"""Divergences between two distributions over cells (tokens, or tokens and the rest), with their slopes.

`p` is the teacher's distribution, `q` the student's; both sum to 1. The slope of a cell is `dD/dq_c`, to which any
constant may be added; the gradient by a student's logit is then `q_v (slope_v - sum_c q_c slope_c)`. Given so rather
than by differentiation, value and gradient are exactly 0 where both are equal, whatever a softmax rounds to.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

MAX_GAP = 80.0
"""Largest `|log p - log q|` that counts, in nats: its exponential is a float32."""


class Divergence(NamedTuple):
    """The value (nats), the slopes of its cells, and their mean under `q`."""

    value: Float[Array, "*B"]
    slopes: Float[Array, "*B C"]
    mean_slope: Float[Array, "*B"]


DivergenceFn = Callable[[Array, Array], Divergence]
"""(log p [*B, C], log q [*B, C]) -> Divergence."""


def reverse_kl() -> DivergenceFn:
    """`KL(q || p) = sum q (log q - log p)`: the student keeps to what the teacher finds likely."""

    def divergence(log_p: Float[Array, "*B C"], log_q: Float[Array, "*B C"]) -> Divergence:
        slopes = -_gap(log_p, log_q)
        value = jnp.sum(jnp.exp(log_q) * slopes, axis=-1)
        return Divergence(value, slopes, value)

    return divergence


def forward_kl() -> DivergenceFn:
    """`KL(p || q) = sum p (log p - log q)`: the student covers all that the teacher finds likely."""

    def divergence(log_p: Float[Array, "*B C"], log_q: Float[Array, "*B C"]) -> Divergence:
        gap = _gap(log_p, log_q)
        value = jnp.sum(jnp.exp(log_p) * gap, axis=-1)
        return Divergence(value, -jnp.exp(gap), -jnp.ones_like(value))

    return divergence


def jensen_shannon(beta: float = 0.5) -> DivergenceFn:
    """`beta KL(p || m) + (1 - beta) KL(q || m)`, `m = beta p + (1 - beta) q` (GKD, 2306.13649, eq. 1).

    Divided by `beta` it tends to the forward KL for `beta` -> 0, by `1 - beta` to the reverse one for 1. ValueError
    unless 0 < beta < 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} must be between 0 and 1; forward_kl and reverse_kl are what its ends stand for")

    def divergence(log_p: Float[Array, "*B C"], log_q: Float[Array, "*B C"]) -> Divergence:
        gap = _gap(log_p, log_q)
        # log q/m and log p/m, exactly 0 where p = q.
        q_over_m = -jnp.log1p(beta * jnp.expm1(gap))
        p_over_m = -jnp.log1p((1 - beta) * jnp.expm1(-gap))

        slopes = (1 - beta) * q_over_m
        mean_slope = jnp.sum(jnp.exp(log_q) * slopes, axis=-1)
        value = beta * jnp.sum(jnp.exp(log_p) * p_over_m, axis=-1) + mean_slope
        return Divergence(value, slopes, mean_slope)

    return divergence


def _gap(log_p: Array, log_q: Array) -> Array:
    # A cell that neither gives anything is no difference, rather than one of two infinities.
    is_empty = jnp.isneginf(log_p) & jnp.isneginf(log_q)
    return jnp.where(is_empty, 0.0, jnp.clip(log_p - log_q, -MAX_GAP, MAX_GAP))
