"""The attention kernels for a GPU (Pallas through Triton).

What a block holds stands in columns, what its loop walks over in rows. bfloat16 heads of 64 and 128 fit in the
registers of an A100 and an H200.

A kernel takes one reference per array, inputs before outputs, and so has as many parameters as it has arrays: Pallas
passes them by position, and a struct around them would have to be taken apart again at once.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from rljax.models.attention_blocks import (
    MASKED,
    Options,
    count_from,
    dot,
    dot_rows,
    is_visible,
    lists,
    padded,
    score_divisor,
    score_gradient,
    softmax_step,
    visible_blocks,
)

BLOCK = 64
"""Queries and keys of a block: what registers hold of the backward pass."""


class _Layout(NamedTuple):
    """The forest padded to whole blocks, as columns `[R, 1, S, 1]` and rows `[R, 1, 1, S]`, and what sees what."""

    size: int
    """`S`, tokens of a row with its padding."""
    window: Array
    visible: Array
    """[R, blocks of queries, blocks of keys]"""
    depth_column: Array
    depth_row: Array
    end_column: Array
    end_row: Array
    block_q: int
    block_k: int
    interpret: bool


def _layout(options: Options, head_dim: int, positions: Array, subtree_end: Array, window: Array) -> _Layout:
    interpret = options.interpret is not None
    block = BLOCK if head_dim <= 128 or interpret else BLOCK // 2
    block_q = options.block_q or block
    block_k = options.block_k or block

    whole = max(block_q, block_k)
    size = -(-positions.shape[1] // whole) * whole
    depth, end = (padded(x.astype(jnp.int32), 1, size) for x in (positions, subtree_end))
    return _Layout(
        size=size,
        window=window.reshape(1, 1),
        visible=visible_blocks(depth, end, window, block_q=block_q, block_k=block_k),
        depth_column=depth[:, None, :, None],
        depth_row=depth[:, None, None, :],
        end_column=end[:, None, :, None],
        end_row=end[:, None, None, :],
        block_q=block_q,
        block_k=block_k,
        interpret=interpret,
    )


def _whole_blocks(x: Float[Array, "R H S hd"], size: int) -> Float[Array, "R H size width"]:
    """Padded to whole blocks, and to a head size that devices can multiply."""
    return padded(padded(x, 2, size), 3, max(pl.next_power_of_2(x.shape[3]), 16))


def _call(at: _Layout, kernel, name: str, visible: Array, *, own, walked, outputs) -> Sequence[Array]:
    """Runs `kernel` on the grid `[R, H, blocks]`. Of an array `[R, N, ., .]` a head gets the one of `N` that it belongs
    to, where `N` is the heads, those of keys and values, or 1 for what all share: the block whose turn it is if the
    array is in `own`, all of it if in `walked`. `outputs` are shapes, split like `own`."""
    rows, heads = outputs[0].shape[:2]
    blocks = visible.shape[1]
    block = at.size // blocks
    count, numbers = lists(visible)

    def spec(x, split: bool):
        group = heads // x.shape[1]
        shape = (None, None, block if split else x.shape[2], x.shape[3])
        return pl.BlockSpec(shape, lambda r, h, i: (r, jax.lax.div(h, group), i if split else 0, 0))

    # What the loop over blocks is steered by, the same for all heads.
    steers = [
        pl.BlockSpec((None, None, 1, 1), lambda r, h, i: (r, i, 0, 0)),
        pl.BlockSpec((None, None, 1, numbers.shape[-1]), lambda r, h, i: (r, i, 0, 0)),
        pl.BlockSpec((1, 1), lambda r, h, i: (0, 0)),
    ]
    return pl.pallas_call(
        kernel,
        name=name,
        grid=(rows, heads, blocks),
        in_specs=steers + [spec(x, True) for x in own] + [spec(x, False) for x in walked],
        out_specs=[spec(x, True) for x in outputs],
        out_shape=outputs,
        compiler_params=None if at.interpret else _compiler_params(walked[0].dtype),
        interpret=at.interpret,
    )(count, numbers, at.window, *own, *walked)


def _compiler_params(dtype: jnp.dtype) -> Any:
    from jax.experimental.pallas import triton  # deprecated, and says so

    # Blocks that are fetched ahead take shared memory, and few warps registers, which float32 has not to spare.
    wide = dtype.itemsize >= 4
    return triton.CompilerParams(num_warps=8 if wide else 4, num_stages=1 if wide else 2)


def forward(options: Options, q, k, v, positions, subtree_end, window) -> tuple[Array, Array]:
    """(out [R, H, S, hd], log normalisers [R, H, S])"""
    length, head_dim = q.shape[2:]
    at = _layout(options, head_dim, positions, subtree_end, window)

    # The scale is that of the true head size; what the blocks are padded with is 0 and adds nothing to a score.
    q, k, v = (_whole_blocks(x, at.size) for x in (q, k, v))
    out, normaliser = _call(
        at,
        functools.partial(_forward_kernel, block_k=at.block_k, scale=1.0 / score_divisor(head_dim)),
        "forest_attention",
        at.visible,
        own=(q, at.depth_column),
        walked=(k, v, at.depth_row, at.end_row),
        outputs=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32)],
    )
    return out[:, :, :length, :head_dim], normaliser[:, :, :length, 0]


def backward(options: Options, q, k, v, positions, subtree_end, window, d_out, normaliser, mean):
    """Gradients of q, k and v. Those of keys and values come per query head and are summed over its group here."""
    _, heads, length, head_dim = q.shape
    at = _layout(options, head_dim, positions, subtree_end, window)
    kv_heads = k.shape[1]
    dtypes = (q.dtype, k.dtype, v.dtype)
    scale = 1.0 / score_divisor(head_dim)
    q, k, v, d_out = (_whole_blocks(x, at.size) for x in (q, k, v, d_out))
    normaliser, mean = (padded(x, 2, at.size) for x in (normaliser, mean))

    # Blocks of queries walk over the keys that they see; blocks of keys over the queries that see them.
    (d_q,) = _call(
        at,
        functools.partial(_query_kernel, block_k=at.block_k, scale=scale),
        "forest_attention_dq",
        at.visible,
        own=(q, d_out, normaliser[..., None], mean[..., None], at.depth_column),
        walked=(k, v, at.depth_row, at.end_row),
        outputs=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
    )

    # In float32, since they are still to be summed over the query heads.
    d_k, d_v = _call(
        at,
        functools.partial(_key_kernel, block_q=at.block_q, scale=scale),
        "forest_attention_dkv",
        at.visible.swapaxes(1, 2),
        own=(k, v, at.depth_column, at.end_column),
        walked=(q, d_out, normaliser[:, :, None], mean[:, :, None], at.depth_row),
        outputs=[jax.ShapeDtypeStruct(q.shape, jnp.float32)] * 2,
    )

    # The query heads of a group share their keys and values.
    d_k, d_v = (jnp.sum(x.reshape(x.shape[0], kv_heads, heads // kv_heads, *x.shape[2:]), axis=2) for x in (d_k, d_v))
    return tuple(x[:, :, :length, :head_dim].astype(dtype) for x, dtype in zip((d_q, d_k, d_v), dtypes, strict=True))


def _forward_kernel(
    count, numbers, window, q, depth, k, v, key_depth, end, out, normaliser, *, block_k: int, scale: float
):
    queries = q[...]
    depth = depth[...]
    window = window[0, 0]
    shape = (queries.shape[0], block_k)
    query = count_from(pl.program_id(2) * shape[0], shape, 0)

    def step(n, carry):
        best, total, acc = carry
        first = pl.multiple_of(numbers[0, n] * block_k, block_k)
        keys = pl.ds(first, block_k)
        visible = is_visible(query, count_from(first, shape, 1), end[:, keys], depth, key_depth[:, keys], window)
        scores = jnp.where(visible, dot_rows(queries, k[keys, :]) * scale, MASKED)
        best, total, weights, shrink = softmax_step(best, total, scores, visible)
        values = v[keys, :]
        return best, total, acc * shrink + dot(weights.astype(values.dtype), values)

    column = jnp.zeros((shape[0], 1), jnp.float32)
    start = (column + MASKED, column, jnp.zeros(queries.shape, jnp.float32))
    best, total, acc = jax.lax.fori_loop(0, count[0, 0], step, start)

    # Padding sees nothing, not even itself: its output is 0, not NaN.
    total = jnp.where(total > 0, total, 1.0)
    out[...] = (acc / total).astype(out.dtype)
    normaliser[...] = best + jnp.log(total)


def _query_kernel(
    count, numbers, window, q, d_out, normaliser, mean, depth, k, v, key_depth, end, d_q, *, block_k, scale
):
    queries = q[...]
    d_outs = d_out[...]
    normaliser = normaliser[...]
    mean = mean[...]
    depth = depth[...]
    window = window[0, 0]
    shape = (queries.shape[0], block_k)
    query = count_from(pl.program_id(2) * shape[0], shape, 0)

    def step(n, acc):
        first = pl.multiple_of(numbers[0, n] * block_k, block_k)
        keys = pl.ds(first, block_k)
        visible = is_visible(query, count_from(first, shape, 1), end[:, keys], depth, key_depth[:, keys], window)
        own = k[keys, :]
        # The softmax is computed anew from its normaliser.
        weights = jnp.where(visible, jnp.exp(dot_rows(queries, own) * scale - normaliser), 0.0)
        d_scores = score_gradient(weights, dot_rows(d_outs, v[keys, :]), mean, scale)
        return acc + dot(d_scores.astype(own.dtype), own)

    acc = jax.lax.fori_loop(0, count[0, 0], step, jnp.zeros(queries.shape, jnp.float32))
    d_q[...] = acc.astype(d_q.dtype)


def _key_kernel(
    count, numbers, window, k, v, depth, end, q, d_out, normaliser, mean, query_depth, d_k, d_v, *, block_q, scale
):
    """Scores stand transposed, keys times queries, so that no product transposes them."""
    keys = k[...]
    values = v[...]
    depth = depth[...]
    end = end[...]
    window = window[0, 0]
    shape = (keys.shape[0], block_q)
    key = count_from(pl.program_id(2) * shape[0], shape, 0)

    def step(n, carry):
        d_keys, d_values = carry
        first = pl.multiple_of(numbers[0, n] * block_q, block_q)
        at = pl.ds(first, block_q)
        visible = is_visible(count_from(first, shape, 1), key, end, query_depth[:, at], depth, window)
        queries = q[at, :]
        d_outs = d_out[at, :]
        # As in `_query_kernel`.
        weights = jnp.where(visible, jnp.exp(dot_rows(keys, queries) * scale - normaliser[:, at]), 0.0)
        d_scores = score_gradient(weights, dot_rows(values, d_outs), mean[:, at], scale)
        d_values = d_values + dot(weights.astype(d_outs.dtype), d_outs)
        return d_keys + dot(d_scores.astype(queries.dtype), queries), d_values

    zeros = jnp.zeros(keys.shape, jnp.float32)
    d_k[...], d_v[...] = jax.lax.fori_loop(0, count[0, 0], step, (zeros, zeros))
