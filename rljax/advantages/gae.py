"""Generalised advantage estimation over rows with gaps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.advantages.group import AdvantageFn, token_rewards
from rljax.ops import as_float, discounted_sum, masked_whiten, next_unmasked
from rljax.types import ArrayLike, RolloutBatch

LambdaFn = Callable[[ArrayLike], Array]
"""mask [B, T] of a row's action tokens -> its lambda [B, 1]."""


def generalized_advantage_estimation(
    rewards: Float[ArrayLike, "B T"],
    values: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    gamma: float = 1.0,
    lam: float | Float[ArrayLike, "B 1"] = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantages and returns `A + V`, both 0 where masked and constants for differentiation (1506.02438).

    `delta[t] = r[t] + gamma V[next] - V[t]`, `A[t] = delta[t] + gamma lam A[next]`. `next` is the next *unmasked*
    position: tool results and padding inside a row are stepped over, and the value after the last token is 0. `lam` may
    be one for each row.
    """
    rewards, values = (jnp.where(mask, as_float(x), 0) for x in (rewards, values))
    delta = rewards + gamma * next_unmasked(values, mask) - values
    advantages = discounted_sum(delta, mask, discount=gamma * lam)
    returns = jnp.where(mask, advantages + values, 0)
    return jax.lax.stop_gradient(advantages), jax.lax.stop_gradient(returns)


def length_adaptive(alpha: float) -> LambdaFn:
    """`lambda = max(1 - 1 / (alpha l), 0)` for a row of l action tokens: the longer the row, the less the critic is
    trusted (VAPO, 2504.05118, takes alpha 0.05; single rollouts of GLM-5.2 take 1.5). ValueError unless alpha > 0."""
    if not alpha > 0:
        raise ValueError(f"length_adaptive: alpha={alpha} must be above 0; a constant lambda is a number instead")

    def lam(mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B 1"]:
        length = jnp.sum(jnp.asarray(mask), axis=1, keepdims=True)
        return jnp.maximum(1 - 1 / (alpha * jnp.maximum(length, 1)), 0)

    return lam


def gae_advantages(
    *, lam: float | LambdaFn = 0.95, gamma: float = 1.0, kl_coef: float = 0.0, whiten: bool = True
) -> AdvantageFn:
    """`A` of `generalized_advantage_estimation` with `token_rewards` and `batch.values` (PPO, 1707.06347); with
    `whiten` whitened over all action tokens of the batch.

    Raises ValueError when `batch.values` is None, and as `token_rewards`.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        found, _ = _estimate(batch, lam, gamma, kl_coef)
        return masked_whiten(found, _mask(batch)) if whiten else found

    return advantages


def gae_returns(*, lam: float | LambdaFn = 1.0, gamma: float = 1.0, kl_coef: float = 0.0) -> AdvantageFn:
    """What a critic is trained towards: `A + V` [B, T], A not whitened. Its `lam` need not be that of the advantages
    (VC-PPO, 2503.01491): with 1 it is the return itself, whatever the critic says. Errors as `gae_advantages`."""

    def returns(batch: RolloutBatch) -> Float[Array, "B T"]:
        return _estimate(batch, lam, gamma, kl_coef)[1]

    return returns


def _estimate(batch: RolloutBatch, lam: float | LambdaFn, gamma: float, kl_coef: float) -> tuple[Array, Array]:
    if batch.values is None:
        raise ValueError(
            "generalised advantage estimation needs batch.values, which is None; give the plan a critic, or fill it"
        )
    mask = _mask(batch)
    rewards = token_rewards(batch, kl_coef=kl_coef)
    factor = lam(mask) if callable(lam) else lam
    return generalized_advantage_estimation(rewards, batch.values, mask, gamma=gamma, lam=factor)


def _mask(batch: RolloutBatch) -> Array:
    return jnp.asarray(batch.action_mask) & jnp.asarray(batch.is_valid)[:, None]
