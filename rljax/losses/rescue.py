"""Near-boundary stochastic rescue, 2605.22703: tokens that clipping would drop come back at random when they are only
slightly outside. (Abbreviated NSR there, which elsewhere means negative sample reinforcement.)

    active = (A > 0 and r > hi) or (A < 0 and r < lo),   lo = 1 - clip_low, hi = 1 + clip_high
    rescued = active and lo <= u r <= hi,                u = noise(uniform) constant, near 1

A rescued token is executed with the perturbed ratio `u r`, whose gradient is `-A u r`; or, with `raw_execution` among
the weights, with `-A r`. Every other token is the host's. Of the paper the rule and the inverse-square decay of the
expected gradient are known; the noise's support and the executed ratio are not, and are arguments here.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.losses.ratios import RatioFn
from rljax.losses.signatures import ReportFn, WeightFn
from rljax.ops import as_float
from rljax.types import ArrayLike, Rows

Noise = Callable[[Array, Array], Array]
"""(uniforms in [0, 1), whether r lies above the interval) -> factors u, of the same shape."""

UniformFn = Callable[[Rows], Array]
"""rows -> uniforms [B, T]."""


def two_sided(delta: float = 0.2) -> Noise:
    """`u ~ U(1 - delta, 1 + delta)`, `0 <= delta < 1`. For `hi < r < hi / (1 - delta)`

        P(rescued) = (hi / r - (1 - delta)) / (2 delta),   E[u rescued] = ((hi / r)^2 - (1 - delta)^2) / (4 delta)

    and likewise below. `delta` 0 rescues nothing."""
    return lambda uniforms, above: 1 - delta + 2 * delta * uniforms


def inward(delta: float = 0.2) -> Noise:
    """`u ~ U(1 - delta, 1)` above the interval, `U(1, 1 + delta)` below it: tokens at its edge are always rescued."""
    return lambda uniforms, above: jnp.where(above, 1 - delta + delta * uniforms, 1 + delta * uniforms)


def per_token(rows: Rows) -> Float[Array, "B T"]:
    """A number per token. Raises ValueError for rows without uniforms."""
    if rows.uniforms is None:
        raise ValueError("the rescue needs rows.uniforms, which is None; have them drawn (RolloutPlan.needs_uniforms)")
    return as_float(rows.uniforms)


def per_row(rows: Rows) -> Float[Array, "B T"]:
    """A number per row, that of its first loss token, on all of its tokens: for ratios of whole rows. Raises as
    `per_token`."""
    first = jnp.argmax(jnp.asarray(rows.loss_mask), axis=1)[:, None]
    uniforms = per_token(rows)
    return jnp.broadcast_to(jnp.take_along_axis(uniforms, first, axis=1), uniforms.shape)


class Rescue(NamedTuple):
    """Parts of `policy_loss`. `ratio_fn` replaces the host's ratio, `u r` where rescued, so that metrics of the ratio
    show the executed one. `raw_execution` is a weight to add if wanted, `1 / u` where rescued: it takes the noise out
    of what is executed and leaves the decision. `report_fn` gives the shares `loss/clip_active`, what the host would
    have clipped (dual clip aside), and `loss/rescued`; `loss/clip_fraction` is what stays clipped."""

    ratio_fn: RatioFn
    raw_execution: WeightFn
    report_fn: ReportFn


def rescue(
    ratio_fn: RatioFn, *, clip_low: float, clip_high: float, noise: Noise, uniform_fn: UniformFn = per_token
) -> Rescue:
    """The rescue around a host's ratio and its clip interval. Where r = 1, on a first minibatch, it is the host."""
    low = 1 - clip_low
    high = 1 + clip_high

    def decide(logprobs: ArrayLike, rows: Rows) -> tuple[Array, Array, Array, Array]:
        """(ratio, active, rescued, u); all but the ratio are constants."""
        ratio = ratio_fn(jnp.asarray(logprobs), rows)
        advantages = jnp.asarray(rows.advantages)

        # Whether a token is rescued is no function to differentiate: only the executed ratio is.
        value = jax.lax.stop_gradient(ratio)
        above = value > high
        active = ((advantages > 0) & above) | ((advantages < 0) & (value < low))

        u = noise(uniform_fn(rows), above).astype(ratio.dtype)
        return ratio, active, active & (u * value >= low) & (u * value <= high), u

    def executed_ratio(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, "B T"]:
        ratio, _, rescued, u = decide(logprobs, rows)
        return jnp.where(rescued, u * ratio, ratio)

    def raw_execution(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> Float[Array, "B T"]:
        _, _, rescued, u = decide(logprobs, rows)
        return jnp.where(rescued, 1 / u, 1)

    def report(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> dict[str, Array]:
        _, active, rescued, _ = decide(logprobs, rows)
        return {"loss/clip_active": active, "loss/rescued": rescued}

    return Rescue(executed_ratio, raw_execution, report)
