"""What the attention kernels of all devices share: which blocks see which, and the arithmetic within a block."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Options(NamedTuple):
    """How kernels are made."""

    block_q: int | None
    """Queries of a block; None is the device's own choice."""
    block_k: int | None
    """Keys of a block; None is the device's own choice."""
    interpret: str | None
    """Kind of device whose kernels run as plain operations; None compiles them."""


def visible_blocks(
    positions: Int[Array, "R S"],
    subtree_end: Int[Array, "R S"],
    window: Int[Array, ""] | int,
    *,
    block_q: int,
    block_k: int,
) -> Bool[Array, "R N M"]:
    """Which blocks of keys a block of queries may see: some key begins before the queries' end and has its subtree end
    after their beginning, and the deepest key is within `window` of the shallowest query. Never False for a visible
    pair. `N` and `M` are the numbers of blocks; `S` must be a multiple of both block sizes."""
    rows, length = positions.shape
    first_query = jnp.arange(0, length, block_q)[:, None]
    first_key = jnp.arange(0, length, block_k)[None]
    last_end = jnp.max(subtree_end.reshape(rows, 1, -1, block_k), axis=-1)
    deepest_key = jnp.max(positions.reshape(rows, 1, -1, block_k), axis=-1)
    shallowest_query = jnp.min(positions.reshape(rows, -1, block_q), axis=-1)[..., None]
    visible = (first_key < first_query + block_q) & (last_end > first_query)
    return visible & (shallowest_query - deepest_key < window)


def padded(x: Array, axis: int, size: int) -> Array:
    """`x` with zeros behind, `size` long along `axis`."""
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])


def lists(visible: Bool[Array, "R N M"]) -> tuple[Int[Array, "R N 1 1"], Int[Array, "R N 1 M"]]:
    """For each of the `N` blocks, how many of the others it meets, and their numbers in order."""
    others = visible.shape[-1]
    numbers = jnp.sort(jnp.where(visible, jnp.arange(others, dtype=jnp.int32), others), axis=-1)
    count = jnp.sum(visible, axis=-1, dtype=jnp.int32)
    # Entries after the count are not read, but a device may fetch ahead.
    return count[..., None, None], jnp.minimum(numbers, others - 1)[..., None, :]


def dot(a: Array, b: Array) -> Array:
    """[m, n] x [n, d] -> float32 [m, d]"""
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def dot_rows(a: Array, b: Array) -> Array:
    """[m, d] x [n, d] -> float32 [m, n]"""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def is_visible(query: Array, key: Array, end: Array, query_depth: Array, key_depth: Array, window: Array) -> Array:
    """Pairs of a block; one side is a column, the other a row."""
    return (key <= query) & (query < end) & (query_depth - key_depth < window)


def count_from(start, shape: tuple[int, int], axis: int) -> Array:
    """Numbers `start`, `start` + 1 ... along `axis`."""
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
