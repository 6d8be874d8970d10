"""Scans along a row that step over masked positions: these pass the state on unchanged."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.ops.masked import as_float
from rljax.types import ArrayLike


def discounted_sum(
    x: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"], *, discount: float | Float[ArrayLike, "B 1"]
) -> Float[Array, "B T"]:
    """`y[t] = x[t] + discount * y[next]`, `next` being the next *unmasked* position of the row; 0 where masked.
    `discount` may be one for each row."""
    mask = jnp.asarray(mask)
    x = jnp.where(mask, as_float(x), 0)
    factor = jnp.where(mask, jnp.asarray(discount, x.dtype), jnp.ones((), x.dtype))

    def combine(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    _, y = jax.lax.associative_scan(combine, (factor, x), reverse=True, axis=1)
    return jnp.where(mask, y, 0)


def next_unmasked(x: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """`x` at the next unmasked position after t (t itself excluded); 0 after the last one."""
    mask = jnp.asarray(mask)
    x = jnp.where(mask, as_float(x), 0)
    length = x.shape[1]
    index = jax.lax.cummin(jnp.where(mask, jnp.arange(length), length), axis=1, reverse=True)
    index = jnp.pad(index[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    return jnp.take_along_axis(jnp.pad(x, ((0, 0), (0, 1))), index, axis=1)


def future_value(
    log_ratio: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"], *, discount: float
) -> Float[Array, "B T"]:
    """`exp(sum_{k >= t} discount^(k - t) mask[k] log_ratio[k])`, the likelihood gain of the rest of the row from t on,
    t included (APPO, 2606.12384). Distance counts positions, masked ones too; the sum is clamped to +-20."""
    x = jnp.where(mask, as_float(log_ratio), 0)
    total = discounted_sum(x, jnp.ones(x.shape, bool), discount=discount)
    return jnp.exp(jnp.clip(total, -20, 20))
