"""Attention over forests on accelerators: one Pallas kernel forward, two backward, blocks that see nothing left out.

Scores exist for one block of queries times one of keys at a time (2205.14135). What a block holds stands in columns,
what its loop walks over in rows: each kernel loops over a list, made beforehand, of the blocks that its own one sees
or is seen by, so that keys of other trees and branches are neither read nor multiplied. Accumulation is float32.

What has been run: interpret mode on the CPU, nothing else. The tests lower the kernels for TPU (Mosaic) and for GPU
(Triton, which jax deprecates from 0.12 on). The compilers for TPU v4, v5e and v6e and for A100 and H200 take them, on a
machine without such a device; bfloat16 heads of 64 and 128 then fit in a GPU's registers. None has been timed.
`make test-gpu` compares them with the XLA form.

A kernel takes one reference per array, inputs before outputs, and so has as many parameters as it has arrays: Pallas
passes them by position, and a struct around them would have to be taken apart again at once.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from rljax.models.attention import MASKED, named, score_divisor

GPU_BLOCK, TPU_BLOCK = 64, 128
"""Queries and keys of a block: what registers hold of the backward pass; the lanes of a vector register."""


class _Options(NamedTuple):
    block_q: int | None
    block_k: int | None
    interpret: bool


class _Target(NamedTuple):
    """How kernels are made for one kind of device."""

    block_q: int
    block_k: int
    scalars: Any = None  # memory space of the numbers that steer a loop
    params: Any = None  # (arrays that a kernel walks over) -> the compiler's parameters
    interpret: bool = False


def forest_attention_kernel(
    q: Float[Array, "R S H hd"],
    k: Float[Array, "R S KV hd"],
    v: Float[Array, "R S KV hd"],
    positions: Int[Array, "R S"],
    subtree_end: Int[Array, "R S"],
    window: Int[Array, ""] | int,
    *,
    block_q: int | None = None,
    block_k: int | None = None,
    interpret: bool = False,
) -> Float[Array, "R S H hd"]:
    """`forest_attention` as kernels for TPU and GPU. On a CPU, or with `interpret`, they run as plain operations.

    A query that sees no key (padding) yields 0 and passes no gradient on. Blocks are `block_q` queries times `block_k`
    keys, powers of two from 16 (from 128 on a TPU); None is the device's own choice. Any length: rows are padded to
    whole blocks here. A TPU keeps two arrays `[S, hd]` in vector memory: on a v4 (16 MiB) rows end at 8192 tokens in
    bfloat16, 4096 in float32. ValueError for other block sizes, and for query heads that do not divide over key heads.
    """
    for name, size in {"block_q": block_q, "block_k": block_k}.items():
        if size is not None and (size < 16 or size & (size - 1)):
            raise ValueError(f"{name}={size} must be a power of two, at least 16; None is the device's own choice")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide over {k.shape[2]} key heads; give a multiple")
    options = _Options(block_q, block_k, interpret)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    out = _attend(options, q, k, v, positions, subtree_end, jnp.asarray(window, jnp.int32))
    return out.transpose(0, 2, 1, 3)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, q, k, v, positions, subtree_end, window) -> Array:
    """q [R, H, S, hd]; k, v [R, KV, S, hd] -> [R, H, S, hd]."""
    return _attend_forward(options, q, k, v, positions, subtree_end, window)[0]


def _attend_forward(options, q, k, v, positions, subtree_end, window):
    arrays = (q, k, v, positions, subtree_end, window)
    out, normaliser = named(*_on_device(_forward, options, *arrays))
    return out, (*arrays, out, normaliser)


def _attend_backward(options, residuals, d_out):
    *arrays, out, normaliser = residuals
    # sum_s p_s dp_s of each query, from the result itself
    expected = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    grads = _on_device(_backward, options, *arrays, d_out, normaliser, expected)
    return *grads, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _on_device(fn, options: _Options, *arrays):
    interpreted = functools.partial(fn, _with_blocks(_Target(GPU_BLOCK, GPU_BLOCK, interpret=True), options))
    if options.interpret:
        return interpreted(*arrays)
    gpu = functools.partial(fn, _with_blocks(_gpu(head_dim=arrays[0].shape[-1]), options))
    tpu = functools.partial(fn, _with_blocks(_tpu(), options))
    return jax.lax.platform_dependent(*arrays, cpu=interpreted, cuda=gpu, rocm=gpu, tpu=tpu)


def _with_blocks(target: _Target, options: _Options) -> _Target:
    return target._replace(block_q=options.block_q or target.block_q, block_k=options.block_k or target.block_k)


def _tpu() -> _Target:
    from jax.experimental.pallas import tpu

    def params(walked: Sequence[Array]):
        # Double buffers of whole rows, and room for blocks; the compiler's own limit is enough for short rows.
        need = 2 * sum(x.shape[2] * x.shape[3] * x.dtype.itemsize for x in walked) + (8 << 20)
        return tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=None if need <= 16 << 20 else need,
        )

    return _Target(TPU_BLOCK, TPU_BLOCK, scalars=tpu.SMEM, params=params)


def _gpu(head_dim: int) -> _Target:
    from jax.experimental.pallas import triton

    def params(walked: Sequence[Array]):
        # Blocks that are fetched ahead take shared memory, and few warps registers, which float32 has not to spare.
        wide = walked[0].dtype.itemsize >= 4
        return triton.CompilerParams(num_warps=8 if wide else 4, num_stages=1 if wide else 2)

    block = GPU_BLOCK if head_dim <= 128 else GPU_BLOCK // 2
    return _Target(block, block, params=params)


def _padded(x: Array, axis: int, size: int) -> Array:
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])


def _lists(visible: Bool[Array, "R N M"]) -> tuple[Int[Array, "R N 1 1"], Int[Array, "R N 1 M"]]:
    """For each of the `N` blocks, how many of the others it meets, and their numbers in order."""
    others = visible.shape[-1]
    numbers = jnp.sort(jnp.where(visible, jnp.arange(others, dtype=jnp.int32), others), axis=-1)
    count = jnp.sum(visible, axis=-1, dtype=jnp.int32)
    # Entries after the count are not read, but a device may fetch ahead.
    return count[..., None, None], jnp.minimum(numbers, others - 1)[..., None, :]


class _Layout(NamedTuple):
    """The forest padded to whole blocks, as columns `[R, 1, S, 1]` and rows `[R, 1, 1, S]`, and what sees what."""

    size: int
    window: Array
    visible: Array
    depth_column: Array
    depth_row: Array
    end_column: Array
    end_row: Array


def _layout(target: _Target, positions: Array, subtree_end: Array, window: Array) -> _Layout:
    whole = max(target.block_q, target.block_k)
    size = -(-positions.shape[1] // whole) * whole
    depth, end = (_padded(x.astype(jnp.int32), 1, size) for x in (positions, subtree_end))
    return _Layout(
        size=size,
        window=window.reshape(1, 1),
        visible=visible_blocks(depth, end, window, block_q=target.block_q, block_k=target.block_k),
        depth_column=depth[:, None, :, None],
        depth_row=depth[:, None, None, :],
        end_column=end[:, None, :, None],
        end_row=end[:, None, None, :],
    )


def _whole_blocks(x: Float[Array, "R H S hd"], size: int) -> Float[Array, "R H size width"]:
    """Padded to whole blocks, and to a head size that devices can multiply."""
    return _padded(_padded(x, 2, size), 3, max(pl.next_power_of_2(x.shape[3]), 16))


def _call(target: _Target, kernel, name: str, block: int, lists, window, own, walked, outputs) -> Sequence[Array]:
    """Runs `kernel` on the grid `[R, H, blocks]`. Of an array `[R, N, ., .]` a head gets the one of `N` that it belongs
    to: the `block` entries whose turn it is if the array is in `own`, all of them if in `walked`. `outputs` are shapes,
    split like `own`."""
    rows = own[0].shape[0]
    heads = outputs[0].shape[1]
    count, numbers = lists

    # `N` is the heads, the heads of keys and values, or 1 for what all heads share.

    def spec(x, split: bool):
        group = heads // x.shape[1]
        shape = (None, None, block if split else x.shape[2], x.shape[3])
        return pl.BlockSpec(shape, lambda r, h, i: (r, jax.lax.div(h, group), i if split else 0, 0))

    def scalars(shape, index_map):
        where = {} if target.scalars is None else {"memory_space": target.scalars}
        return pl.BlockSpec(shape, index_map, **where)

    # What the loop over blocks is steered by, the same for all heads.
    steering = [
        scalars((None, None, 1, 1), lambda r, h, i: (r, i, 0, 0)),
        scalars((None, None, 1, numbers.shape[-1]), lambda r, h, i: (r, i, 0, 0)),
        scalars((1, 1), lambda r, h, i: (0, 0)),
    ]
    return pl.pallas_call(
        kernel,
        name=name,
        grid=(rows, heads, numbers.shape[1]),
        in_specs=steering + [spec(x, True) for x in own] + [spec(x, False) for x in walked],
        out_specs=[spec(x, True) for x in outputs],
        out_shape=outputs,
        interpret=target.interpret,
        **({} if target.params is None else {"compiler_params": target.params(walked)}),
    )(count, numbers, window, *own, *walked)


def _forward(target: _Target, q, k, v, positions, subtree_end, window) -> tuple[Array, Array]:
    """(out [R, H, S, hd], log normalisers [R, H, S])"""
    at = _layout(target, positions, subtree_end, window)
    length, head_dim = q.shape[2:]

    # The scale is that of the true head size; what the blocks are padded with is 0 and adds nothing to a score.
    q, k, v = (_whole_blocks(x, at.size) for x in (q, k, v))
    out, normaliser = _call(
        target,
        functools.partial(_forward_kernel, block_k=target.block_k, scale=1.0 / score_divisor(head_dim)),
        "forest_attention",
        target.block_q,
        _lists(at.visible),
        at.window,
        own=(q, at.depth_column),
        walked=(k, v, at.depth_row, at.end_row),
        outputs=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32)],
    )
    return out[:, :, :length, :head_dim], normaliser[:, :, :length, 0]


def _backward(target: _Target, q, k, v, positions, subtree_end, window, d_out, normaliser, expected):
    """Gradients of q, k and v. Those of keys and values come per query head and are summed over its group here."""
    at = _layout(target, positions, subtree_end, window)
    _, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    dtypes = (q.dtype, k.dtype, v.dtype)
    scale = 1.0 / score_divisor(head_dim)
    q, k, v, d_out = (_whole_blocks(x, at.size) for x in (q, k, v, d_out))
    normaliser, expected = (_padded(x, 2, at.size) for x in (normaliser, expected))

    # Blocks of queries walk over the keys that they see; blocks of keys over the queries that see them.
    (d_q,) = _call(
        target,
        functools.partial(_query_kernel, block_k=target.block_k, scale=scale),
        "forest_attention_dq",
        target.block_q,
        _lists(at.visible),
        at.window,
        own=(q, d_out, normaliser[..., None], expected[..., None], at.depth_column),
        walked=(k, v, at.depth_row, at.end_row),
        outputs=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
    )

    # In float32, since they are still to be summed over the query heads.
    d_k, d_v = _call(
        target,
        functools.partial(_key_kernel, block_q=target.block_q, scale=scale),
        "forest_attention_dkv",
        target.block_k,
        _lists(at.visible.swapaxes(1, 2)),
        at.window,
        own=(k, v, at.depth_column, at.end_column),
        walked=(q, d_out, normaliser[:, :, None], expected[:, :, None], at.depth_row),
        outputs=[jax.ShapeDtypeStruct(q.shape, jnp.float32)] * 2,
    )

    # The query heads of a group share their keys and values.
    d_k, d_v = (jnp.sum(x.reshape(x.shape[0], kv_heads, heads // kv_heads, *x.shape[2:]), axis=2) for x in (d_k, d_v))
    return tuple(x[:, :, :length, :head_dim].astype(dtype) for x, dtype in zip((d_q, d_k, d_v), dtypes, strict=True))


def _dot(a: Array, b: Array) -> Array:
    """[m, n] x [n, d] -> float32 [m, d]"""
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _dot_rows(a: Array, b: Array) -> Array:
    """[m, d] x [n, d] -> float32 [m, n]"""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _visible(query: Array, key: Array, end: Array, query_depth: Array, key_depth: Array, window: Array) -> Array:
    """Pairs of a block; one side is a column, the other a row."""
    return (key <= query) & (query < end) & (query_depth - key_depth < window)


def _count_from(start, shape: tuple[int, int], axis: int) -> Array:
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _forward_kernel(
    count, numbers, window, q, depth, k, v, key_depth, end, out, normaliser, *, block_k: int, scale: float
):
    queries = q[...]
    depth = depth[...]
    window = window[0, 0]
    shape = (queries.shape[0], block_k)
    query = _count_from(pl.program_id(2) * shape[0], shape, 0)

    # Softmax in one pass: what is summed so far is scaled down whenever a larger score turns up.
    def step(n, carry):
        best, total, acc = carry
        first = pl.multiple_of(numbers[0, n] * block_k, block_k)
        keys = pl.ds(first, block_k)
        visible = _visible(query, _count_from(first, shape, 1), end[:, keys], depth, key_depth[:, keys], window)
        scores = jnp.where(visible, _dot_rows(queries, k[keys, :]) * scale, MASKED)
        new = jnp.maximum(best, jnp.max(scores, axis=1, keepdims=True))

        # Where a query has seen nothing yet, `new` is MASKED and the exponential 1.
        weights = jnp.where(visible, jnp.exp(scores - new), 0.0)
        shrink = jnp.exp(best - new)
        total = total * shrink + jnp.sum(weights, axis=1, keepdims=True)
        values = v[keys, :]
        return new, total, acc * shrink + _dot(weights.astype(values.dtype), values)

    column = jnp.zeros((shape[0], 1), jnp.float32)
    start = (column + MASKED, column, jnp.zeros(queries.shape, jnp.float32))
    best, total, acc = jax.lax.fori_loop(0, count[0, 0], step, start)

    # Padding sees nothing, not even itself: its output is 0, not NaN.
    total = jnp.where(total > 0, total, 1.0)
    out[...] = (acc / total).astype(out.dtype)
    normaliser[...] = best + jnp.log(total)


def _query_kernel(
    count, numbers, window, q, d_out, normaliser, expected, depth, k, v, key_depth, end, d_q, *, block_k, scale
):
    queries = q[...]
    d_outs = d_out[...]
    normaliser = normaliser[...]
    expected = expected[...]
    depth = depth[...]
    window = window[0, 0]
    shape = (queries.shape[0], block_k)
    query = _count_from(pl.program_id(2) * shape[0], shape, 0)

    def step(n, acc):
        first = pl.multiple_of(numbers[0, n] * block_k, block_k)
        keys = pl.ds(first, block_k)
        visible = _visible(query, _count_from(first, shape, 1), end[:, keys], depth, key_depth[:, keys], window)
        own = k[keys, :]
        # The softmax is computed anew from its normaliser. `expected` is the mean of d_weights under it.
        weights = jnp.where(visible, jnp.exp(_dot_rows(queries, own) * scale - normaliser), 0.0)
        d_scores = weights * (_dot_rows(d_outs, v[keys, :]) - expected) * scale
        return acc + _dot(d_scores.astype(own.dtype), own)

    acc = jax.lax.fori_loop(0, count[0, 0], step, jnp.zeros(queries.shape, jnp.float32))
    d_q[...] = acc.astype(d_q.dtype)


def _key_kernel(
    count, numbers, window, k, v, depth, end, q, d_out, normaliser, expected, query_depth, d_k, d_v, *, block_q, scale
):
    """Scores stand transposed, keys times queries, so that no product transposes them."""
    keys = k[...]
    values = v[...]
    depth = depth[...]
    end = end[...]
    window = window[0, 0]
    shape = (keys.shape[0], block_q)
    key = _count_from(pl.program_id(2) * shape[0], shape, 0)

    def step(n, carry):
        d_keys, d_values = carry
        first = pl.multiple_of(numbers[0, n] * block_q, block_q)
        at = pl.ds(first, block_q)
        visible = _visible(_count_from(first, shape, 1), key, end, query_depth[:, at], depth, window)
        queries = q[at, :]
        d_outs = d_out[at, :]
        # As in `_query_kernel`.
        weights = jnp.where(visible, jnp.exp(_dot_rows(keys, queries) * scale - normaliser[:, at]), 0.0)
        d_scores = weights * (_dot_rows(values, d_outs) - expected[:, at]) * scale
        d_values = d_values + _dot(weights.astype(d_outs.dtype), d_outs)
        return d_keys + _dot(d_scores.astype(queries.dtype), queries), d_values

    zeros = jnp.zeros(keys.shape, jnp.float32)
    d_k[...], d_v[...] = jax.lax.fori_loop(0, count[0, 0], step, (zeros, zeros))
