"""Statistics per group of rows. `group_id` [B] is below B, so B segments always suffice and shapes stay static; every
result is [B], one entry per *segment* (empty ones are 0): `result[group_id]` lays it out on the rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.ops.masked import as_float
from rljax.types import ArrayLike


def segment_count(group_id: Int[ArrayLike, " B"], mask: Bool[ArrayLike, " B"]) -> Int[Array, " B"]:
    """Rows of each segment where `mask`."""
    return _sum(jnp.asarray(mask).astype(jnp.int32), group_id)


def segment_sum(
    x: Float[ArrayLike, " B"], group_id: Int[ArrayLike, " B"], mask: Bool[ArrayLike, " B"]
) -> Float[Array, " B"]:
    """Sum of each segment's `x` where `mask`; NaN in masked rows does not count."""
    return _sum(jnp.where(mask, as_float(x), 0), group_id)


def segment_mean(
    x: Float[ArrayLike, " B"], group_id: Int[ArrayLike, " B"], mask: Bool[ArrayLike, " B"]
) -> Float[Array, " B"]:
    """Mean of each segment's `x` where `mask`. The mean of equal values is exactly that value."""
    x = as_float(x)
    group_id = jnp.asarray(group_id)
    count = segment_count(group_id, mask)
    largest = jax.ops.segment_max(jnp.where(mask, x, -jnp.inf), group_id, num_segments=x.shape[0])
    # Summing distances from the largest value keeps a segment of equal values free of rounding.
    largest = jax.lax.stop_gradient(jnp.where(count > 0, largest, 0))
    return largest + segment_sum(x - largest[group_id], group_id, mask) / jnp.maximum(count, 1)


def segment_std(
    x: Float[ArrayLike, " B"], group_id: Int[ArrayLike, " B"], mask: Bool[ArrayLike, " B"], *, ddof: int = 1
) -> Float[Array, " B"]:
    """Standard deviation of each segment's `x` where `mask`, divided by `count - ddof`; 0 where `count <= ddof`."""
    x = as_float(x)
    group_id = jnp.asarray(group_id)
    count = segment_count(group_id, mask)
    centered = x - segment_mean(x, group_id, mask)[group_id]
    squares = segment_sum(jnp.square(centered), group_id, mask)
    return jnp.where(count > ddof, jnp.sqrt(squares / jnp.maximum(count - ddof, 1)), 0)


def segment_zscore(
    x: Float[ArrayLike, " B"],
    group_id: Int[ArrayLike, " B"],
    mask: Bool[ArrayLike, " B"],
    *,
    ddof: int = 1,
    epsilon: float = 1e-6,
    floor: float = 1e-6,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """`(x - mean) / (std + epsilon)` of *every* row, mean and std being those of its segment's rows where `mask`; and
    whether that says anything. Unlike the others, the results are laid out on the rows.

    It says nothing, and the score is 0, where the segment has fewer than two such rows, or is flat: a std of at most
    `floor * max(1, |mean|)` is rounding.
    """
    x = as_float(x)
    group_id = jnp.asarray(group_id)
    count = segment_count(group_id, mask)
    mean = segment_mean(x, group_id, mask)
    std = segment_std(x, group_id, mask, ddof=ddof)
    is_usable = ((count > 1) & (std > floor * jnp.maximum(1, jnp.abs(mean))))[group_id]
    return jnp.where(is_usable, (x - mean[group_id]) / (std[group_id] + epsilon), 0), is_usable


def segment_whiten(
    x: Float[ArrayLike, " B"],
    group_id: Int[ArrayLike, " B"],
    mask: Bool[ArrayLike, " B"],
    *,
    ddof: int = 1,
    epsilon: float = 1e-6,
) -> Float[Array, " B"]:
    """`segment_zscore` of the rows where `mask`, 0 for the others."""
    score, _ = segment_zscore(x, group_id, mask, ddof=ddof, epsilon=epsilon)
    return jnp.where(mask, score, 0)


def _sum(x: Array, group_id: ArrayLike) -> Array:
    return jax.ops.segment_sum(x, jnp.asarray(group_id), num_segments=x.shape[0])
