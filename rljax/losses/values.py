"""The critic's loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.ops import as_float
from rljax.types import ArrayLike


def clipped_value_loss(
    values: Float[ArrayLike, "B T"],
    old_values: Float[ArrayLike, "B T"],
    returns: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    clip: float = 0.2,
) -> Float[Array, "B T"]:
    """`max((v - ret)^2, (clip(v, v_old - c, v_old + c) - ret)^2) / 2` per token (1707.06347), 0 where masked.

    Gradient flows through `values` only. `clip` is c.
    """
    v = jnp.where(mask, as_float(values), 0)
    old, target = (jax.lax.stop_gradient(jnp.where(mask, as_float(x), 0)) for x in (old_values, returns))
    bounded = jnp.clip(v, old - clip, old + clip)
    return jnp.maximum(jnp.square(v - target), jnp.square(bounded - target)) / 2
