"""What all forms of attention over forests share: who sees whom, and the softmax with its backward pass; and what the
kernels of all devices share, their lists of blocks and products within one."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from rljax.types import ArrayLike

MASKED = -1e30
"""Score of an invisible key: finite, so that a padding query, which sees nothing, yields no NaN."""

SAVED = ("attention", "attention_normaliser")
"""Names by which a remat policy keeps the result and the log-sum-exp, all that a backward pass needs beside q, k, v."""


def score_divisor(head_dim: int) -> float:
    """What products of queries and keys are divided by, before the softmax: the one place that says so (1706.03762)."""
    return math.sqrt(head_dim)


def named(out: Array, normaliser: Array) -> tuple[Array, Array]:
    """The two under the names of `SAVED`. Forward rules call it on what they return as residuals: names that are put
    on afterwards would leave the log-sum-exp to be computed again, and the scores with it."""
    return checkpoint_name(out, SAVED[0]), checkpoint_name(normaliser, SAVED[1])


def is_visible(
    query: Array, key: Array, end: Array, query_depth: Array, key_depth: Array, window: ArrayLike | int
) -> Array:
    """Whether a query sees a key: packed indices of both, the end of the key's subtree, positions of both on their
    paths. Pairs come of arrays that broadcast against each other."""
    return (key <= query) & (query < end) & (query_depth - key_depth < window)


def may_see(
    first_query: Array,
    last_query: Array,
    shallowest_query: Array,
    first_key: Array,
    last_end: Array,
    deepest_key: Array,
    window: ArrayLike | int,
) -> Array:
    """Whether some query of a block may see some key of another, from the bounds of both: some key begins before the
    queries' end and has its subtree end after their beginning, and the deepest key is within `window` of the shallowest
    query. Never False where `is_visible` holds for a pair."""
    return (first_key <= last_query) & (first_query < last_end) & (shallowest_query - deepest_key < window)


def softmax_step(best: Array, total: Array, scores: Array, visible: Array) -> tuple[Array, Array, Array, Array]:
    """One block of keys of a softmax in one pass (2205.14135), for scores `[..., n]`, `MASKED` where not `visible`.

    `best` and `total [..., 1]` are the largest score so far, `MASKED` before the first, and the sum of weights so far.
    Returns both with the block's own, the block's weights, and what everything summed before is to be multiplied by.
    """
    higher = jnp.maximum(best, jnp.max(scores, axis=-1, keepdims=True))
    # Where a query has seen nothing yet, `higher` is MASKED and the exponential 1.
    weights = jnp.where(visible, jnp.exp(scores - higher), 0.0)
    shrink = jnp.exp(best - higher)
    return higher, total * shrink + jnp.sum(weights, axis=-1, keepdims=True), weights, shrink


def with_sinks(
    out: Float[Array, "*B hd"], normaliser: Float[Array, "*B"], sinks: Float[Array, "*#B"]
) -> Float[Array, "*B hd"]:
    """Attention where every softmax has one score more, its head's sink, whose value is zero (2309.17453), of what it
    is without and the log-sum-exp of its scores: keys keep `sum exp(s) / (sum exp(s) + exp(sink))` of the weight.

    So no form of attention knows of sinks. A query that sees no key has a log-sum-exp near `MASKED`, and yields 0.
    """
    kept = jax.nn.sigmoid(normaliser - sinks.astype(jnp.float32))
    return (out.astype(jnp.float32) * kept[..., None]).astype(out.dtype)


def mean_gradient(
    out: Float[Array, "*B hd"], d_out: Float[Array, "*B hd"], d_normaliser: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """What `score_gradient` takes off a query's d_weights, float32: their mean under its weights, which follows from
    its result and that one's gradient alone, since `sum_s p_s (v_s . d_out) = out . d_out`, less the gradient of its
    log-sum-exp, whose own to a score is `p_s`."""
    return jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_normaliser


def score_gradient(weights: Array, d_weights: Array, mean: Array, scale: float) -> Array:
    """The softmax backwards, `p (d_p - sum p d_p)`, to products of queries and keys before they are scaled. `mean` is
    `mean_gradient`."""
    return weights * (d_weights - mean) * scale


class Options(NamedTuple):
    """How kernels are made."""

    block_q: int | None
    """Queries of a block; None is the device's own choice."""
    block_k: int | None
    """Keys of a block; None is the device's own choice."""
    interpret: str | None
    """Kind of device whose kernels run as plain operations; None compiles them."""


def visible_blocks(
    query_depth: Int[Array, "R Q"],
    key_depth: Int[Array, "R S"],
    subtree_end: Int[Array, "R S"],
    window: Int[ArrayLike, ""] | int,
    query_start: Int[ArrayLike, ""] | int = 0,
    *,
    block_q: int,
    block_k: int,
) -> Bool[Array, "R N M"]:
    """`may_see` of `N` blocks of the `Q` queries from the packed index `query_start` on, and `M` blocks of keys. Depths
    are positions on paths. `Q` must be a multiple of `block_q` and `S` of `block_k`."""
    rows, queries = query_depth.shape
    first_query = jnp.asarray(query_start) + jnp.arange(0, queries, block_q)[:, None]
    first_key = jnp.arange(0, key_depth.shape[1], block_k)[None]
    last_end = jnp.max(subtree_end.reshape(rows, 1, -1, block_k), axis=-1)
    deepest_key = jnp.max(key_depth.reshape(rows, 1, -1, block_k), axis=-1)
    shallowest_query = jnp.min(query_depth.reshape(rows, -1, block_q), axis=-1)[..., None]
    last_query = first_query + (block_q - 1)
    return may_see(first_query, last_query, shallowest_query, first_key, last_end, deepest_key, window)


class Layout(NamedTuple):
    """A forest padded to whole blocks, `Q` queries and `S` keys, and what sees what."""

    query_depth: Int[Array, "R Q"]
    """Position of each query on its path."""
    depth: Int[Array, "R S"]
    """Position of each key on its path."""
    end: Int[Array, "R S"]
    """End of each key's subtree. Keys that pad have 0: nobody sees them."""
    scalars: Int[Array, "2"]
    """The window, and the packed index of the first query."""
    visible: Bool[Array, "R N M"]
    """Which of `N` blocks of queries may see some of which of `M` blocks of keys."""
    block_q: int
    block_k: int
    interpret: bool

    @property
    def queries(self) -> int:
        """Queries of a row with their padding."""
        return self.query_depth.shape[1]

    @property
    def keys(self) -> int:
        """Keys of a row with their padding."""
        return self.depth.shape[1]


def layout(
    options: Options,
    blocks: tuple[int, int],
    queries: int,
    positions: Int[Array, "R n"],
    subtree_end: Int[Array, "R n"],
    window: Int[ArrayLike, ""],
    start: Int[ArrayLike, ""],
) -> Layout:
    """The layout of `queries` from the packed index `start` on, in `blocks` of so many queries and so many keys."""
    block_q, block_k = blocks
    size_q = whole_blocks(queries, block_q)
    size_k = whole_blocks(positions.shape[1], block_k)

    depth = positions.astype(jnp.int32)
    query_depth = padded(jax.lax.dynamic_slice_in_dim(depth, start, queries, axis=1), 1, size_q)
    depth = padded(depth, 1, size_k)
    end = padded(subtree_end.astype(jnp.int32), 1, size_k)
    return Layout(
        query_depth=query_depth,
        depth=depth,
        end=end,
        scalars=jnp.stack([jnp.asarray(window), jnp.asarray(start)]),
        visible=visible_blocks(query_depth, depth, end, window, start, block_q=block_q, block_k=block_k),
        block_q=block_q,
        block_k=block_k,
        interpret=options.interpret is not None,
    )


def padded(x: Array, axis: int, size: int, fill: float = 0) -> Array:
    """`x` with `fill` behind, `size` long along `axis`."""
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=fill)


def whole_blocks(count: int, block: int) -> int:
    """`count` rounded up to a multiple of `block`."""
    return -(-count // block) * block


def padded_normaliser(normaliser: Float[Array, "R H Q"], size: int) -> Float[Array, "R H size"]:
    """With padding whose weights are 0, whatever it sees: queries from the middle of a sequence have others behind
    them, and what pads them lies in their places."""
    return padded(normaliser, 2, size, -MASKED)


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


def count_from(start, shape: tuple[int, int], axis: int) -> Array:
    """Numbers `start`, `start` + 1 ... along `axis`."""
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
