"""Random numbers that belong to a token, wherever it lies."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rljax.types import ArrayLike


def row_uniforms(key: Key[Array, ""], row_id: Int[ArrayLike, " B"], *, width: int) -> Float[Array, "B {width}"]:
    """Uniform numbers in [0, 1): the one of row b at position t depends on `key`, `row_id[b]` and t alone, so neither
    padding nor the order or split of rows changes it. The key is consumed."""

    def draw(row: Array, position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), position))

    over_positions = jax.vmap(draw, in_axes=(None, 0))
    return jax.vmap(over_positions, in_axes=(0, None))(jnp.asarray(row_id), jnp.arange(width))
