"""Surrogates: factories of functions (ratio, advantages, logprobs), all [B, T], -> `Surrogate`. Losses are minimised.

Inputs are finite: `policy_loss` has put 0 in masked places already.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Surrogate(NamedTuple):
    """Token losses, and where clipping took or capped a token's gradient (a metric)."""

    loss: Float[Array, "B T"]
    is_clipped: Bool[Array, "B T"]


SurrogateFn = Callable[[Array, Array, Array], Surrogate]
"""(ratio, advantages, logprobs) -> Surrogate."""


def clipped(*, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None) -> SurrogateFn:
    """`max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))` (PPO, 1707.06347; two widths: DAPO, 2503.14476).

    With `dual_clip` c > 1, where A < 0 also at most `-A c` (1912.09729). The gradient is `-A r` per token, and 0 where
    A > 0 and r > 1 + clip_high, where A < 0 and r < 1 - clip_low, and where A < 0 and r > c.
    """

    def surrogate(
        ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], logprobs: Float[Array, "B T"]
    ) -> Surrogate:
        bounded = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
        loss = jnp.maximum(-advantages * ratio, -advantages * bounded)
        outside = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
        if dual_clip is not None:
            loss = jnp.where(advantages < 0, jnp.minimum(loss, -advantages * dual_clip), loss)
            outside = outside | ((advantages < 0) & (ratio > dual_clip))
        return Surrogate(loss, outside)

    return surrogate


def clip_balanced(*, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 3.0) -> SurrogateFn:
    """`clipped` in value; but where A > 0 and r > 1 + clip_high the gradient is that of r = 1 + clip_high,
    `-(1 + clip_high) A`, in place of none (AEPO, 2510.14545)."""
    plain = clipped(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)

    def surrogate(
        ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], logprobs: Float[Array, "B T"]
    ) -> Surrogate:
        loss, is_clipped = plain(ratio, advantages, logprobs)
        beyond = (advantages > 0) & (ratio > 1 + clip_high)
        scale = (1 + clip_high) / jnp.where(beyond, jax.lax.stop_gradient(ratio), 1)
        return Surrogate(jnp.where(beyond, -advantages * scale * ratio, loss), is_clipped)

    return surrogate


def unclipped() -> SurrogateFn:
    """`-A r`: the plain policy gradient, importance weighted (REINFORCE with an old policy)."""

    def surrogate(
        ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], logprobs: Float[Array, "B T"]
    ) -> Surrogate:
        return Surrogate(-advantages * ratio, jnp.zeros(ratio.shape, bool))

    return surrogate


def cispo(*, max_ratio: float, min_ratio: float = 0.0) -> SurrogateFn:
    """`-sg(clip(r, min_ratio, max_ratio)) A lp` (MiniMax-M1, 2506.13585): every token keeps its gradient
    `-clip(r) A`. The value depends on the level of `lp` and is no objective."""

    def surrogate(
        ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], logprobs: Float[Array, "B T"]
    ) -> Surrogate:
        weight = jax.lax.stop_gradient(jnp.clip(ratio, min_ratio, max_ratio))
        return Surrogate(-weight * advantages * logprobs, (ratio < min_ratio) | (ratio > max_ratio))

    return surrogate


def soft_gate(*, tau_positive: float = 1.0, tau_negative: float = 1.05) -> SurrogateFn:
    """`-A (4 / tau) sigmoid(tau (r - 1))`, tau by the sign of A (SAPO, 2511.20347): instead of a hard interval the
    gradient `-A r` fades by `4 p (1 - p)`, p the sigmoid. Nothing counts as clipped."""

    def surrogate(
        ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], logprobs: Float[Array, "B T"]
    ) -> Surrogate:
        tau = jnp.where(advantages > 0, jnp.asarray(tau_positive, ratio.dtype), jnp.asarray(tau_negative, ratio.dtype))
        gate = 4 / tau * jax.nn.sigmoid(tau * (ratio - 1))
        return Surrogate(-advantages * gate, jnp.zeros(ratio.shape, bool))

    return surrogate


def double_sided(*, clip_low: float = 0.8, clip_high: float = 3.0) -> SurrogateFn:
    """`-sg(f(r)) A lp`, `f(r) = r` where `1 - clip_low < r < 1 + clip_high`, else 0 (GLM-5, 2602.15763).

    Both tails go, whatever the sign of A; PPO drops only the one that would move further away. The gradient is
    `-f(r) A` per token. The value depends on the level of `lp` and is no objective. Meant for `behavior_ratio`, so that
    no old log-probs are needed.
    """

    def surrogate(
        ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], logprobs: Float[Array, "B T"]
    ) -> Surrogate:
        keep = (ratio > 1 - clip_low) & (ratio < 1 + clip_high)
        weight = jax.lax.stop_gradient(jnp.where(keep, ratio, 0))
        return Surrogate(-weight * advantages * logprobs, ~keep)

    return surrogate
