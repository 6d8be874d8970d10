"""The attention kernels for a GPU (Pallas through Triton).

What a block holds stands in columns, what its loop walks over in rows. bfloat16 heads of 64 and 128 fit in the
registers of an A100 and an H200.

A kernel takes one reference per array, inputs before outputs, and so has as many parameters as it has arrays: Pallas
passes them by position, and a struct around them would have to be taken apart again at once.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

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

BLOCK = 64
"""Queries and keys of a block: what registers hold of the backward pass."""


def _layout(
    options: Options, q: Array, positions: Array, subtree_end: Array, window: ArrayLike, start: ArrayLike
) -> Layout:
    _, queries, _, head_dim = q.shape
    block = BLOCK if head_dim <= 128 or options.interpret is not None else BLOCK // 2
    blocks = (options.block_q or block, options.block_k or block)
    return layout(options, blocks, queries, positions, subtree_end, window, start)


def _whole_blocks(x: Float[Array, "R n H hd"], size: int) -> Float[Array, "R size H width"]:
    """Padded to whole blocks, and to a head size that devices can multiply."""
    return padded(padded(x, 1, size), 3, max(pl.next_power_of_2(x.shape[3]), 16))


def _call(at: Layout, kernel, name: str, visible: Array, *, own, walked, outputs) -> Sequence[Array]:
    """Runs `kernel` on the grid `[R, N, blocks]`, where `N` are the heads of `own[0]`. Arrays are vectors of tokens
    `[R, tokens, heads, hd]`, numbers of tokens `[R, heads, tokens]`, or numbers that all heads share `[R, tokens]`.

    Of one in `own`, and of `outputs`, which are shapes, a kernel gets the block and the head whose turn it is: vectors
    `[block, hd]`, numbers `[block, 1]`. Of one in `walked` it gets all tokens, of the head that its own one looks at or
    of the group that looks at it: vectors `[tokens, group, hd]`, numbers `[group, 1, tokens]`, shared ones
    `[1, tokens]`.
    """
    rows, size, heads, _ = own[0].shape
    block = size // visible.shape[1]
    count, numbers = lists(visible)

    def own_spec(x):
        if len(x.shape) == 4:
            return pl.BlockSpec((None, block, None, x.shape[3]), lambda r, h, i: (r, i, h, 0))
        if len(x.shape) == 3:
            return pl.BlockSpec((None, None, block, 1), lambda r, h, i: (r, h, i, 0))
        return pl.BlockSpec((None, block, 1), lambda r, h, i: (r, i, 0))

    def walked_spec(x):
        if len(x.shape) == 2:
            return pl.BlockSpec((None, 1, x.shape[1]), lambda r, h, i: (r, 0, 0))
        others = x.shape[2] if len(x.shape) == 4 else x.shape[1]
        group = max(1, others // heads)
        share = max(1, heads // others)
        if len(x.shape) == 4:
            return pl.BlockSpec((None, x.shape[1], group, x.shape[3]), lambda r, h, i: (r, 0, jax.lax.div(h, share), 0))
        return pl.BlockSpec((None, group, 1, x.shape[2]), lambda r, h, i: (r, jax.lax.div(h, share), 0, 0))

    def in_columns(x):
        return x if len(x.shape) == 4 else x[..., None]

    def in_rows(x):
        return x if len(x.shape) == 4 else x[..., None, :]

    # What the loop over blocks is steered by, the same for all heads.
    steers = [
        pl.BlockSpec((None, None, 1, 1), lambda r, h, i: (r, i, 0, 0)),
        pl.BlockSpec((None, None, 1, numbers.shape[-1]), lambda r, h, i: (r, i, 0, 0)),
        pl.BlockSpec((1, at.scalars.shape[0]), lambda r, h, i: (0, 0)),
    ]
    found = pl.pallas_call(
        kernel,
        name=name,
        grid=(rows, heads, visible.shape[1]),
        in_specs=steers + [own_spec(x) for x in own] + [walked_spec(x) for x in walked],
        out_specs=[own_spec(x) for x in outputs],
        out_shape=[x if len(x.shape) == 4 else x.update(shape=(*x.shape, 1)) for x in outputs],
        compiler_params=None if at.interpret else _compiler_params(walked[0].dtype),
        interpret=at.interpret,
    )(count, numbers, at.scalars[None], *map(in_columns, own), *map(in_rows, walked))
    return [x.reshape(like.shape) for x, like in zip(found, outputs, strict=True)]


def _compiler_params(dtype: jnp.dtype) -> Any:
    from jax.experimental.pallas import triton  # deprecated, and says so

    # Blocks that are fetched ahead take shared memory, and few warps registers, which float32 has not to spare.
    wide = dtype.itemsize >= 4
    return triton.CompilerParams(num_warps=8 if wide else 4, num_stages=1 if wide else 2)


def forward(options: Options, q, k, v, positions, subtree_end, window, start) -> tuple[Array, Array]:
    """q [R, Q, H, hd]; k, v [R, S, KV, hd] -> (out [R, Q, H, hd], log normalisers [R, H, Q]). The first query has the
    packed index `start`."""
    rows, queries, heads, head_dim = q.shape
    at = _layout(options, q, positions, subtree_end, window, start)

    # The scale is that of the true head size; what the blocks are padded with is 0 and adds nothing to a score.
    q = _whole_blocks(q, at.queries)
    k, v = (_whole_blocks(x, at.keys) for x in (k, v))
    of_queries = jax.ShapeDtypeStruct((rows, heads, at.queries), jnp.float32)
    out, normaliser = _call(
        at,
        functools.partial(_forward_kernel, block_k=at.block_k, scale=1.0 / score_divisor(head_dim)),
        "forest_attention",
        at.visible,
        own=(q, at.query_depth),
        walked=(k, v, at.depth, at.end),
        outputs=[jax.ShapeDtypeStruct(q.shape, q.dtype), of_queries],
    )
    return out[:, :queries, :, :head_dim], normaliser[:, :, :queries]


def backward(options: Options, q, k, v, positions, subtree_end, window, start, d_out, normaliser, mean):
    """Gradients of q, k and v."""
    at = _layout(options, q, positions, subtree_end, window, start)
    shapes = (q.shape, k.shape, v.shape)
    scale = 1.0 / score_divisor(q.shape[3])
    q, d_out = (_whole_blocks(x, at.queries) for x in (q, d_out))
    k, v = (_whole_blocks(x, at.keys) for x in (k, v))
    mean = padded(mean, 2, at.queries)
    normaliser = padded_normaliser(normaliser, at.queries)

    # Blocks of queries walk over the keys that they see; blocks of keys over the queries that see them.
    (d_q,) = _call(
        at,
        functools.partial(_query_kernel, block_k=at.block_k, scale=scale),
        "forest_attention_dq",
        at.visible,
        own=(q, d_out, normaliser, mean, at.query_depth),
        walked=(k, v, at.depth, at.end),
        outputs=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
    )
    d_k, d_v = _call(
        at,
        functools.partial(_key_kernel, block_q=at.block_q, scale=scale),
        "forest_attention_dkv",
        at.visible.swapaxes(1, 2),
        own=(k, v, at.depth, at.end),
        walked=(q, d_out, normaliser, mean, at.query_depth),
        outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
    )
    found = zip((d_q, d_k, d_v), shapes, strict=True)
    return tuple(x[:, :tokens, :, :head_dim] for x, (_, tokens, _, head_dim) in found)


def _forward_kernel(
    count, numbers, scalars, q, depth, k, v, key_depth, end, out, normaliser, *, block_k: int, scale: float
):
    queries = q[...]
    depth = depth[...]
    window = scalars[0, 0]
    shape = (queries.shape[0], block_k)
    query = count_from(scalars[0, 1] + pl.program_id(2) * shape[0], shape, 0)

    def step(n, carry):
        best, total, acc = carry
        first = pl.multiple_of(numbers[0, n] * block_k, block_k)
        keys = pl.ds(first, block_k)
        visible = is_visible(query, count_from(first, shape, 1), end[:, keys], depth, key_depth[:, keys], window)
        scores = jnp.where(visible, dot_rows(queries, k[keys, 0, :]) * scale, MASKED)
        best, total, weights, shrink = softmax_step(best, total, scores, visible)
        values = v[keys, 0, :]
        return best, total, acc * shrink + dot(weights.astype(values.dtype), values)

    column = jnp.zeros((shape[0], 1), jnp.float32)
    start = (column + MASKED, column, jnp.zeros(queries.shape, jnp.float32))
    best, total, acc = jax.lax.fori_loop(0, count[0, 0], step, start)

    # Padding sees nothing, not even itself: its output is 0, not NaN.
    total = jnp.where(total > 0, total, 1.0)
    out[...] = (acc / total).astype(out.dtype)
    normaliser[...] = best + jnp.log(total)


def _query_kernel(
    count, numbers, scalars, q, d_out, normaliser, mean, depth, k, v, key_depth, end, d_q, *, block_k, scale
):
    queries = q[...]
    d_outs = d_out[...]
    normaliser = normaliser[...]
    mean = mean[...]
    depth = depth[...]
    window = scalars[0, 0]
    shape = (queries.shape[0], block_k)
    query = count_from(scalars[0, 1] + pl.program_id(2) * shape[0], shape, 0)

    def step(n, acc):
        first = pl.multiple_of(numbers[0, n] * block_k, block_k)
        keys = pl.ds(first, block_k)
        visible = is_visible(query, count_from(first, shape, 1), end[:, keys], depth, key_depth[:, keys], window)
        own = k[keys, 0, :]
        # The softmax is computed anew from its normaliser.
        weights = jnp.where(visible, jnp.exp(dot_rows(queries, own) * scale - normaliser), 0.0)
        d_scores = score_gradient(weights, dot_rows(d_outs, v[keys, 0, :]), mean, scale)
        return acc + dot(d_scores.astype(own.dtype), own)

    acc = jax.lax.fori_loop(0, count[0, 0], step, jnp.zeros(queries.shape, jnp.float32))
    d_q[...] = acc.astype(d_q.dtype)


def _key_kernel(
    count, numbers, scalars, k, v, depth, end, q, d_out, normaliser, mean, query_depth, d_k, d_v, *, block_q, scale
):
    """Scores stand transposed, keys times queries, so that no product transposes them. The gradients of the query heads
    of a group, one after another, add up."""
    keys = k[...]
    values = v[...]
    depth = depth[...]
    end = end[...]
    window = scalars[0, 0]
    shape = (keys.shape[0], block_q)
    key = count_from(pl.program_id(2) * shape[0], shape, 0)

    def of_member(g, carry):
        def step(n, carry):
            d_keys, d_values = carry
            first = pl.multiple_of(numbers[0, n] * block_q, block_q)
            at = pl.ds(first, block_q)
            query = count_from(scalars[0, 1] + first, shape, 1)
            visible = is_visible(query, key, end, query_depth[:, at], depth, window)
            queries = q[at, g, :]
            d_outs = d_out[at, g, :]
            # As in `_query_kernel`.
            weights = jnp.where(visible, jnp.exp(dot_rows(keys, queries) * scale - normaliser[g, :, at]), 0.0)
            d_scores = score_gradient(weights, dot_rows(values, d_outs), mean[g, :, at], scale)
            d_values = d_values + dot(weights.astype(d_outs.dtype), d_outs)
            return d_keys + dot(d_scores.astype(queries.dtype), queries), d_values

        return jax.lax.fori_loop(0, count[0, 0], step, carry)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    d_keys, d_values = jax.lax.fori_loop(0, q.shape[1], of_member, (zeros, zeros))
    d_k[...] = d_keys.astype(d_k.dtype)
    d_v[...] = d_values.astype(d_v.dtype)
