"""Generalised advantage estimation over rows with gaps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.ops import as_float, discounted_sum, next_unmasked
from rljax.types import ArrayLike


def generalized_advantage_estimation(
    rewards: Float[ArrayLike, "B T"],
    values: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantages and returns `A + V`, both 0 where masked and constants for differentiation (1506.02438).

    `delta[t] = r[t] + gamma V[next] - V[t]`, `A[t] = delta[t] + gamma lam A[next]`. `next` is the next *unmasked*
    position: tool results and padding inside a row are stepped over, and the value after the last token is 0.
    """
    rewards, values = (jnp.where(mask, as_float(x), 0) for x in (rewards, values))
    delta = rewards + gamma * next_unmasked(values, mask) - values
    advantages = discounted_sum(delta, mask, discount=gamma * lam)
    returns = jnp.where(mask, advantages + values, 0)
    return jax.lax.stop_gradient(advantages), jax.lax.stop_gradient(returns)
