"""Masked reductions. The mask is applied before any other operation, so NaN and infinity in masked places reach neither
the value nor the gradient; an empty mask gives 0."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.types import ArrayLike


def as_float(x: ArrayLike) -> Array:
    """`x` in float32, or wider if it was: sums and exponentials are never taken in half precision."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def masked_sum(
    x: Float[ArrayLike, "*shape"], mask: Bool[ArrayLike, "*shape"], *, axis: int | None = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """Sum of `x` where `mask`, over `axis` (all axes by default)."""
    return jnp.sum(jnp.where(mask, as_float(x), 0), axis=axis, keepdims=keepdims)


def masked_mean(
    x: Float[ArrayLike, "*shape"], mask: Bool[ArrayLike, "*shape"], *, axis: int | None = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """Mean of `x` where `mask`; the denominator is the number of True in `mask` along `axis`, at least 1."""
    count = jnp.sum(jnp.asarray(mask), axis=axis, keepdims=keepdims)
    return masked_sum(x, mask, axis=axis, keepdims=keepdims) / jnp.maximum(count, 1)


def masked_var(
    x: Float[ArrayLike, "*shape"],
    mask: Bool[ArrayLike, "*shape"],
    *,
    axis: int | None = None,
    keepdims: bool = False,
    ddof: int = 0,
) -> Float[Array, "..."]:
    """Variance of `x` where `mask`, divided by `count - ddof`; 0 where `count <= ddof`."""
    mask = jnp.asarray(mask)
    x = jnp.where(mask, as_float(x), 0)
    centered = x - masked_mean(x, mask, axis=axis, keepdims=True)
    count = jnp.sum(mask, axis=axis, keepdims=keepdims)
    squares = masked_sum(jnp.square(centered), mask, axis=axis, keepdims=keepdims)
    return jnp.where(count > ddof, squares / jnp.maximum(count - ddof, 1), 0)


def masked_std(
    x: Float[ArrayLike, "*shape"],
    mask: Bool[ArrayLike, "*shape"],
    *,
    axis: int | None = None,
    keepdims: bool = False,
    ddof: int = 0,
) -> Float[Array, "..."]:
    """Square root of `masked_var`. Its gradient is 0, not NaN, where the variance is 0."""
    variance = masked_var(x, mask, axis=axis, keepdims=keepdims, ddof=ddof)
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def masked_max(
    x: Float[ArrayLike, "*shape"], mask: Bool[ArrayLike, "*shape"], *, axis: int | None = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """Largest `x` where `mask`; 0 for an empty mask."""
    mask = jnp.asarray(mask)
    largest = jnp.max(jnp.where(mask, as_float(x), -jnp.inf), axis=axis, keepdims=keepdims)
    return jnp.where(jnp.any(mask, axis=axis, keepdims=keepdims), largest, 0)


def masked_quantile(
    x: Float[ArrayLike, "*shape"], mask: Bool[ArrayLike, "*shape"], quantile: float
) -> Float[Array, ""]:
    """The `quantile` in [0, 1] of all `x` where `mask`, interpolated linearly as NumPy does; 0 for an empty mask."""
    mask = jnp.asarray(mask)
    ordered = jnp.sort(jnp.where(mask, as_float(x), jnp.inf), axis=None)
    last = jnp.maximum(jnp.sum(mask) - 1, 0)
    place = quantile * last.astype(ordered.dtype)
    below = jnp.minimum(jnp.floor(place).astype(last.dtype), last)
    low = ordered[below]
    high = ordered[jnp.minimum(below + 1, last)]
    return jnp.where(jnp.any(mask), low + (place - below) * (high - low), 0)


def masked_whiten(
    x: Float[ArrayLike, "*shape"], mask: Bool[ArrayLike, "*shape"], *, epsilon: float = 1e-8
) -> Float[Array, "*shape"]:
    """`(x - mean) / sqrt(var + epsilon)` over all places where `mask` (unbiased variance), 0 elsewhere.

    Equal values give exactly 0, and so do fewer than two of them.
    """
    mask = jnp.asarray(mask)
    x = jnp.where(mask, as_float(x), 0)
    # Whitening ignores a shift; taking the largest value off first makes equal values exactly 0 before they are summed.
    x = jnp.where(mask, x - jax.lax.stop_gradient(masked_max(x, mask)), 0)
    centered = x - masked_mean(x, mask)
    whitened = centered * jax.lax.rsqrt(masked_var(x, mask, ddof=1) + epsilon)
    return jnp.where(mask & (jnp.sum(mask) > 1), whitened, 0)
