"""Parts of `policy_loss` for data that an older or another policy sampled, by the ratio of the *current* policy to it,
`exp(lp - lp_behavior)`. Weights by `exp(lp_old - lp_behavior)` are in `rljax.losses.weights`; what has to see the whole
minibatch at once is in `rljax.losses.corrections`.

On fresh data every ratio is 1: nothing is dropped, and the gradient is that of the plain policy gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.filters import FilterFn
from rljax.losses.penalties import Penalty, PenaltyFn
from rljax.losses.ratios import behavior_ratio, log_difference
from rljax.losses.surrogates import Surrogate, SurrogateFn
from rljax.ops import as_float, masked_sum
from rljax.types import ArrayLike, Rows

MAX_LOG_PRODUCT = 20.0


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


def behavior_sequence_ratio(logprobs: Float[ArrayLike, "B T"], rows: Rows) -> Float[Array, "B T"]:
    """`W = exp(sum_t (lp - lp_behavior))` of the row, on each of its tokens; the log of the product is clamped to +-20.

    As `sequence_token_ratio`, `sg(W) * exp(lp - sg(lp))`: every token has its own gradient, of size W.
    """
    difference = log_difference(logprobs, rows.behavior_logprobs, rows.loss_mask)
    total = masked_sum(difference, rows.loss_mask, axis=1, keepdims=True)
    weight = jax.lax.stop_gradient(jnp.exp(jnp.clip(total, -MAX_LOG_PRODUCT, MAX_LOG_PRODUCT)))
    return weight * jnp.exp(difference - jax.lax.stop_gradient(difference))


def veto(threshold: float = 1e-4) -> FilterFn:
    """Drops rows in which any token has `exp(lp - lp_behavior) < threshold` (slime; thresholds 1e-6 to 1e-4)."""

    def keep(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Bool[Array, "B T"]:
        ratio = behavior_ratio(logprobs, rows)
        impossible = jnp.asarray(rows.loss_mask) & (ratio < threshold)
        return jnp.broadcast_to(~jnp.any(impossible, axis=1, keepdims=True), ratio.shape)

    return keep


def probability_band(*, low: float = 0.2, high: float = 0.2) -> FilterFn:
    """Drops tokens that have gone far enough by probability: `d = p - p_behavior`, A > 0 and d > high, or A < 0 and
    d < -low (prime-rl; INTELLECT-3, 2512.16144). Rare tokens stay trainable, whatever their ratio."""

    def keep(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Bool[Array, "B T"]:
        new, behavior = (_probability(x, rows) for x in (logprobs, rows.behavior_logprobs))
        advantages, d = jnp.asarray(rows.advantages), new - behavior
        return ~(((advantages > 0) & (d > high)) | ((advantages < 0) & (d < -low)))

    return keep


def squared_log_ratio(coef: float = 1e-3) -> PenaltyFn:
    """`coef (lp - lp_behavior)^2` per token, live in `lp`; 0 with gradient 0 on fresh data (prime-rl). The metric
    `loss/squared_log_ratio` is without the coefficient."""

    def penalty(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Penalty:
        squared = jnp.square(log_difference(logprobs, rows.behavior_logprobs, rows.loss_mask))
        return Penalty(coef * squared, {"loss/squared_log_ratio": squared})

    return penalty


def _probability(logprobs: ArrayLike, rows: Rows) -> Array:
    return jnp.exp(jnp.minimum(jnp.where(rows.loss_mask, as_float(logprobs), 0), 0))
