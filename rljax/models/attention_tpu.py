"""The attention kernels for a TPU (Pallas through Mosaic): keys stream through vector memory, a block at a time.

The grid is (rows, heads, own blocks, steps), with as many steps as the longest list of `lists` has entries. A step
brings in the block that stands next in the list of its own one; after the end of a list the same block stays, which
moves nothing, and nothing is computed. What adds up over the steps lies in scratch memory. So vector memory holds a few
blocks whatever the length of a row, and what grows are the lists, four bytes a pair of blocks in scalar memory.

jax's own splash attention has this form, but a mask is fixed there when the program is traced, or is an array of all
pairs, or compares segment ids; `query < subtree_end[key]` of data is none of these.

Numbers of tokens (depth, end, log-sum-exp) lie in memory as rows `[1, S]`: as a column each would take the 128 lanes of
a vector register. A block's own ones are turned once, in its first step.

A kernel takes one reference per array, inputs before outputs before scratch, because Pallas passes them by position.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from rljax.models.attention_blocks import (
    MASKED,
    Layout,
    Options,
    count_from,
    dot,
    dot_rows,
    is_visible,
    layout,
    lists,
    padded,
    padded_normaliser,
    score_divisor,
    score_gradient,
    softmax_step,
)
from rljax.types import ArrayLike

LANES = 128
"""Numbers side by side in a vector register: blocks are multiples of it."""

BLOCK = 512
"""Queries and keys of a block: large enough to keep the matrix unit busy while the next block comes in."""

LISTS = 256 << 10
"""Bytes of scalar memory (1 MiB on every TPU so far) that lists may take; rows go one by one where theirs take more."""


def forward(options: Options, q, k, v, positions, subtree_end, window, start) -> tuple[Array, Array]:
    """q [R, Q, H, hd]; k, v [R, S, KV, hd] -> (out [R, Q, H, hd], log normalisers [R, H, Q]). The first query has the
    packed index `start`."""

    def of_rows(q, k, v, positions, subtree_end):
        at = _layout(options, q, positions, subtree_end, window, start)
        length, head_dim = q.shape[2:]
        q = padded(q, 2, at.queries)
        k, v = (padded(x, 2, at.keys) for x in (k, v))
        normaliser = jax.ShapeDtypeStruct((*q.shape[:2], 1, at.queries), jnp.float32)
        out, normaliser = _call(
            at,
            functools.partial(_forward_kernel, scale=1.0 / score_divisor(head_dim)),
            "forest_attention",
            at.visible,
            own=(q, _shared(at.query_depth)),
            walked=(k, v, _shared(at.depth), _shared(at.end)),
            outputs=(jax.ShapeDtypeStruct(q.shape, q.dtype), normaliser),
            scratch=[(at.block_q, 1)] * 3 + [(at.block_q, head_dim)],
        )
        return out[:, :, :length], normaliser[:, :, 0, :length]

    out, normaliser = _few_rows(options, of_rows, *map(_turned, (q, k, v)), positions, subtree_end)
    return _turned(out), normaliser


def backward(options: Options, q, k, v, positions, subtree_end, window, start, d_out, normaliser, mean):
    """Gradients of q, k and v."""

    def of_rows(q, k, v, positions, subtree_end, d_out, normaliser, mean):
        at = _layout(options, q, positions, subtree_end, window, start)
        shapes = (q.shape, k.shape, v.shape)
        head_dim = q.shape[3]
        scale = 1.0 / score_divisor(head_dim)
        q, d_out = (padded(x, 2, at.queries) for x in (q, d_out))
        k, v = (padded(x, 2, at.keys) for x in (k, v))
        mean = padded(mean, 2, at.queries)[:, :, None]
        normaliser = padded_normaliser(normaliser, at.queries)[:, :, None]

        # Blocks of queries walk over the keys that they see; blocks of keys over the queries that see them.
        (d_q,) = _call(
            at,
            functools.partial(_query_kernel, scale=scale),
            "forest_attention_dq",
            at.visible,
            own=(q, d_out, normaliser, mean, _shared(at.query_depth)),
            walked=(k, v, _shared(at.depth), _shared(at.end)),
            outputs=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
            scratch=[(at.block_q, 1)] * 3 + [(at.block_q, head_dim)],
        )
        d_k, d_v = _call(
            at,
            functools.partial(_key_kernel, scale=scale),
            "forest_attention_dkv",
            at.visible.swapaxes(1, 2),
            own=(k, v, _shared(at.depth), _shared(at.end)),
            walked=(q, d_out, normaliser, mean, _shared(at.query_depth)),
            outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
            scratch=[(at.block_k, 1)] * 2 + [(at.block_k, head_dim)] * 2,
        )
        return tuple(x[:, :, : shape[2]] for x, shape in zip((d_q, d_k, d_v), shapes, strict=True))

    q, k, v, d_out = map(_turned, (q, k, v, d_out))
    found = _few_rows(options, of_rows, q, k, v, positions, subtree_end, d_out, normaliser, mean)
    return tuple(map(_turned, found))


def _turned(x: Float[Array, "R n N hd"]) -> Float[Array, "R N n hd"]:
    """Heads before tokens, or back: a tile of vector memory is one of tokens and `hd`."""
    return x.swapaxes(1, 2)


def _shared(x: Int[Array, "R N"]) -> Int[Array, "R 1 1 N"]:
    """Numbers of tokens that all heads share, as a row."""
    return x[:, None, None]


def _blocks(options: Options, queries: int, keys: int, head_dim: int) -> tuple[int, int]:
    # A wide head leaves room for smaller blocks only; a short row needs no larger one than itself.
    largest = BLOCK if head_dim <= 128 else BLOCK // 2
    block_q, block_k = (min(largest, max(LANES, pl.next_power_of_2(length))) for length in (queries, keys))
    return options.block_q or block_q, options.block_k or block_k


def _few_rows(options: Options, of_rows, *arrays):
    """`of_rows` on all rows at once, or on one at a time if their lists together overflow scalar memory."""
    rows, _, queries, head_dim = arrays[0].shape
    keys = arrays[1].shape[2]
    block_q, block_k = _blocks(options, queries, keys, head_dim)
    if rows == 1 or 4 * rows * -(-queries // block_q) * -(-keys // block_k) <= LISTS:
        return of_rows(*arrays)
    one_by_one = jax.lax.map(lambda row: of_rows(*(x[None] for x in row)), arrays)
    return jax.tree.map(lambda x: x[:, 0], one_by_one)


def _layout(
    options: Options, q: Array, positions: Array, subtree_end: Array, window: ArrayLike, start: ArrayLike
) -> Layout:
    queries, head_dim = q.shape[2:]
    blocks = _blocks(options, queries, positions.shape[1], head_dim)
    return layout(options, blocks, queries, positions, subtree_end, window, start)


def _call(at: Layout, kernel, name: str, visible: Array, *, own, walked, outputs, scratch) -> Any:
    """Runs `kernel` for each block of `own` and each step of its list. Of an array `[R, N, ., .]` a head gets the one
    of `N` that it belongs to. Where heads of `own` are fewer than those of `walked`, the last part of the grid is
    (heads of a group, steps) and otherwise (1, steps)."""
    rows, heads = own[0].shape[:2]
    count, numbers = lists(visible)
    blocks, others = visible.shape[1:]
    own_block, other_block = (own[0].shape[2] // blocks, walked[0].shape[2] // others)
    group = max(1, walked[0].shape[1] // heads)

    def spec(x, block: int, index_of):
        is_row = x.shape[2] == 1
        shape = (None, None, 1, block) if is_row else (None, None, block, x.shape[3])
        # How many of the grid's heads, group members counted, share one of `x`.
        share = heads * group // x.shape[1]

        def index_map(r, h, i, g, j, count, numbers, scalars):
            at_block = index_of(r, i, j, count, numbers)
            head = jax.lax.div(h * group + g, share)
            return (r, head, 0, at_block) if is_row else (r, head, at_block, 0)

        return pl.BlockSpec(shape, index_map)

    def itself(r, i, j, count, numbers):
        return i

    def listed(r, i, j, count, numbers):
        mine = r * blocks + i
        last = jnp.maximum(count[mine] - 1, 0)
        return numbers[mine * others + jnp.minimum(j, last)]

    # At least one step, since the first and the last one also begin and end a block that sees nothing.
    steps = jnp.maximum(jnp.max(count), 1)
    return pl.pallas_call(
        kernel,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows, heads, blocks, group, steps),
            in_specs=[spec(x, own_block, itself) for x in own] + [spec(x, other_block, listed) for x in walked],
            out_specs=[spec(x, own_block, itself) for x in outputs],
            # Integers of tokens, when turned, lie with the log-sum-exp in float32: exact up to 16 million.
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=list(outputs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=at.interpret,
    )(count.reshape(-1), numbers.reshape(-1), at.scalars, *own, *walked)


class _Step(NamedTuple):
    """Where in the grid a kernel is."""

    own: Array
    """Number of the own block."""
    other: Array
    """Number of the block that it meets."""
    is_first: Array
    is_last: Array
    meets: Array
    """Whether the list has not ended."""

    def indices(self, shape: tuple[int, int]) -> tuple[Array, Array]:
        """Numbers of pairs `shape`, from the first query or key on: the own block's, which go down, and the other's,
        across."""
        return count_from(self.own * shape[0], shape, 0), count_from(self.other * shape[1], shape, 1)


def _step(count, numbers) -> _Step:
    row, _, own, member, step = (pl.program_id(axis) for axis in range(5))
    blocks = pl.num_programs(2)
    mine = row * blocks + own
    others = numbers.shape[0] // count.shape[0]
    return _Step(
        own=own,
        other=numbers[mine * others + jnp.minimum(step, jnp.maximum(count[mine] - 1, 0))],
        is_first=(member == 0) & (step == 0),
        is_last=(member == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1),
        meets=step < count[mine],
    )


def _column(row: Array) -> Array:
    """[1, n] -> float32 [n, 1]"""
    return jnp.broadcast_to(row.astype(jnp.float32), (LANES, row.shape[1])).T[:, :1]


def _row(column: Array) -> Array:
    """[n, 1] -> [1, n]"""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _forward_kernel(
    count, numbers, scalars, q, depth, k, v, key_depth, end, out, normaliser, own_depth, best, total, acc, *, scale
):
    step = _step(count, numbers)
    shape = (q.shape[0], k.shape[0])

    @pl.when(step.is_first)
    def _():
        own_depth[...] = _column(depth[...])
        best[...] = jnp.full(best.shape, MASKED)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    @pl.when(step.meets)
    def _():
        query, key = step.indices(shape)
        depths = own_depth[...].astype(jnp.int32)
        visible = is_visible(scalars[1] + query, key, end[...], depths, key_depth[...], scalars[0])
        scores = jnp.where(visible, dot_rows(q[...], k[...]) * scale, MASKED)
        best[...], total[...], weights, shrink = softmax_step(best[...], total[...], scores, visible)
        acc[...] = acc[...] * shrink + dot(weights.astype(v.dtype), v[...])

    @pl.when(step.is_last)
    def _():
        # Padding sees nothing, not even itself: its output is 0, not NaN.
        sums = jnp.where(total[...] > 0, total[...], 1.0)
        out[...] = (acc[...] / sums).astype(out.dtype)
        normaliser[...] = _row(best[...] + jnp.log(sums))


def _query_kernel(
    count, numbers, scalars, q, d_out, normaliser, mean, depth, k, v, key_depth, end, d_q, *scratch, scale
):
    own_normaliser, own_mean, own_depth, acc = scratch
    step = _step(count, numbers)
    shape = (q.shape[0], k.shape[0])

    @pl.when(step.is_first)
    def _():
        own_normaliser[...] = _column(normaliser[...])
        own_mean[...] = _column(mean[...])
        own_depth[...] = _column(depth[...])
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    @pl.when(step.meets)
    def _():
        query, key = step.indices(shape)
        depths = own_depth[...].astype(jnp.int32)
        visible = is_visible(scalars[1] + query, key, end[...], depths, key_depth[...], scalars[0])

        # The softmax is computed anew from its normaliser.
        weights = jnp.where(visible, jnp.exp(dot_rows(q[...], k[...]) * scale - own_normaliser[...]), 0.0)
        d_scores = score_gradient(weights, dot_rows(d_out[...], v[...]), own_mean[...], scale)
        acc[...] += dot(d_scores.astype(k.dtype), k[...])

    @pl.when(step.is_last)
    def _():
        d_q[...] = acc[...].astype(d_q.dtype)


def _key_kernel(
    count, numbers, scalars, k, v, depth, end, q, d_out, normaliser, mean, query_depth, d_k, d_v, *scratch, scale
):
    """Scores stand transposed, keys times queries, so that no product transposes them. The query heads of a group
    follow each other in the grid, and their gradients add up here."""
    own_depth, own_end, d_keys, d_values = scratch
    step = _step(count, numbers)
    shape = (k.shape[0], q.shape[0])

    @pl.when(step.is_first)
    def _():
        own_depth[...] = _column(depth[...])
        own_end[...] = _column(end[...])
        d_keys[...] = jnp.zeros(d_keys.shape, jnp.float32)
        d_values[...] = jnp.zeros(d_values.shape, jnp.float32)

    @pl.when(step.meets)
    def _():
        key, query = step.indices(shape)
        depths = own_depth[...].astype(jnp.int32)
        ends = own_end[...].astype(jnp.int32)
        visible = is_visible(scalars[1] + query, key, ends, query_depth[...], depths, scalars[0])

        # As in `_query_kernel`.
        weights = jnp.where(visible, jnp.exp(dot_rows(k[...], q[...]) * scale - normaliser[...]), 0.0)
        d_scores = score_gradient(weights, dot_rows(v[...], d_out[...]), mean[...], scale)
        d_values[...] += dot(weights.astype(d_out.dtype), d_out[...])
        d_keys[...] += dot(d_scores.astype(q.dtype), q[...])

    @pl.when(step.is_last)
    def _():
        d_k[...] = d_keys[...].astype(d_k.dtype)
        d_v[...] = d_values[...].astype(d_v.dtype)
