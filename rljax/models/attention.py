"""Attention over forests: queries see the keys on their own path.

Who sees whom and the arithmetic of the softmax are in `attention_blocks`. Which blocks meet, and where, is a matter of
the device and the mesh:

- here, plain operations: everywhere, but for the two cases below;
- `attention_kernel`, whose kernels are in `attention_tpu` and `attention_triton`: rows from `KERNEL_LENGTH` on, on a
  TPU or GPU for which `config.update.attention_kernel` takes them;
- `attention_stream`, loops of plain operations: where devices share a sequence (`sequence`), queries begin anywhere in
  it, and there are no kernels.

Here, queries go through in blocks, each against the keys up to its own end, since a later key is never visible. The
backward pass keeps the result and the log-sum-exp of each query, and computes the weights again block by block
(2205.14135), with scores transposed, so that no product transposes an array of the size of the scores.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.models.attention_blocks import (
    MASKED,
    is_visible,
    mean_gradient,
    named,
    score_divisor,
    score_gradient,
    with_sinks,
)
from rljax.models.attention_stream import streamed_attention
from rljax.parallel import platform, split_over

Attention = Callable[..., Array]
"""`attention(q, k, v, positions, subtree_end, window, sinks=) -> out`, arguments and result as those of
`forest_attention`; with `query_start=` where devices share packed sequences."""

MIN_BLOCK = 128
"""Fewest queries of a block."""

MAX_BLOCKS = 8
"""Most blocks of a row: each is unrolled, and compiled by itself."""

KERNEL_LENGTH = 1024
"""Packed rows from which on `kernel_attention` takes the kernels: shorter ones have few blocks to leave out."""

KERNEL_DEVICES = ("TPU", "NVIDIA H100", "NVIDIA H200")
"""How the kinds of device begin whose learners take the kernels unasked. They have been compiled for v5e, v5p, v6e and
H100 (`make test-aot`); an H200 has the cores of an H100. None has been timed."""


def forest_attention(
    q: Float[Array, "R Q H hd"],
    k: Float[Array, "R S KV hd"],
    v: Float[Array, "R S KV hd"],
    positions: Int[Array, "R S"],
    subtree_end: Int[Array, "R S"],
    window: Int[Array, ""] | int,
    *,
    query_start: Int[Array, ""] | int | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "R Q H hd"]:
    """Softmax attention where key `j` is visible to query `i` iff `j <= i < subtree_end[j]` and it lies fewer than
    `window` positions back on the path. Scores and softmax are float32; the result has the dtype of `q`.

    The queries are those of all positions, or of the `Q` from `query_start` on. `sinks` are one score more in every
    softmax of their head, for nothing.
    """
    if query_start is not None:
        return streamed_attention(q, k, v, positions, subtree_end, window, query_start, sinks=sinks)
    rows, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(rows, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 1, 3, 4)
    k = k.transpose(0, 2, 1, 3)
    v = v.transpose(0, 2, 1, 3)
    out, normaliser = _attend(grouped, k, v, positions, subtree_end, jnp.asarray(window, jnp.int32))
    if sinks is not None:
        out = with_sinks(out, normaliser, sinks.reshape(kv_heads, 1, -1))
    return out.transpose(0, 2, 1, 3, 4).reshape(rows, length, heads, head_dim)


def kernel_attention(
    q: Float[Array, "R Q H hd"],
    k: Float[Array, "R S KV hd"],
    v: Float[Array, "R S KV hd"],
    positions: Int[Array, "R S"],
    subtree_end: Int[Array, "R S"],
    window: Int[Array, ""] | int,
    *,
    query_start: Int[Array, ""] | int | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "R Q H hd"]:
    """`forest_attention` by the kernels of `rljax.models.attention_kernel`, on a GPU or TPU and for rows of at least
    `KERNEL_LENGTH`; else as it is. Under a mesh each device runs them on its own rows and heads; with `query_start`,
    which one device's queries have, it is called where they are alone already."""
    arrays = q, k, v, positions, subtree_end, jnp.asarray(window, jnp.int32)
    if not has_kernels(k.shape[1]):
        return forest_attention(*arrays, query_start=query_start, sinks=sinks)
    from rljax.models.attention_kernel import forest_attention_kernel  # Pallas is not needed elsewhere

    if query_start is not None:
        return forest_attention_kernel(*arrays, query_start=query_start, sinks=sinks)
    return on_own_heads(forest_attention_kernel)(*arrays, sinks=sinks)


def has_kernels(length: int) -> bool:
    """Whether `kernel_attention` takes the kernels for packed rows of `length` on the devices in use."""
    return platform() != "cpu" and length >= KERNEL_LENGTH


def on_own_heads(attention: Attention) -> Attention:
    """`attention` on each device's own rows and heads; what a kernel needs, which the compiler cannot split."""
    # Queries go where their keys are.
    heads = ("batch", None, "kv_heads", None)
    row = ("batch", None)
    axes = (heads, heads, heads, row, row, ())

    def attend(*arrays, sinks=None):
        if sinks is None:
            return split_over(attention, axes, heads)(*arrays)
        run = split_over(lambda *own: attention(*own[:-1], sinks=own[-1]), (*axes, ("kv_heads",)), heads)
        return run(*arrays, sinks)

    return attend


def _blocks(length: int) -> list[tuple[int, int]]:
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _visible(start: int, stop: int, positions, subtree_end, window) -> Array:
    """[R, queries start..stop, keys 0..stop]"""
    query = jnp.arange(start, stop)[None, :, None]
    key = jnp.arange(stop)[None, None, :]
    query_depth = positions[:, start:stop, None]
    key_depth = positions[:, None, :stop]
    return is_visible(query, key, subtree_end[:, None, :stop], query_depth, key_depth, window)


def _flat(x: Array, start: int, stop: int) -> Array:
    """Queries of a block, those of one key head side by side: [R, KV, n * G, hd]."""
    rows, kv_heads, _, groups, head_dim = x.shape
    return x[:, :, start:stop].reshape(rows, kv_heads, (stop - start) * groups, head_dim)


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attend(q, k, v, positions, subtree_end, window) -> tuple[Array, Array]:
    """q [R, KV, S, G, hd]; k, v [R, KV, S, hd] -> (out [R, KV, S, G, hd], log-sum-exps [R, KV, S, G])."""
    return _attend_forward(q, k, v, positions, subtree_end, window)[0]


def _attend_forward(q, k, v, positions, subtree_end, window):
    rows, kv_heads, length, groups, head_dim = q.shape
    scale = 1.0 / score_divisor(head_dim)
    outs = []
    normalisers = []
    for start, stop in _blocks(length):
        # Keys behind the block's end are never visible: no product is made with them.
        scores = _product("rkqd,rksd->rkqs", _flat(q, start, stop), k[:, :, :stop]) * scale
        scores = scores.reshape(rows, kv_heads, stop - start, groups, stop)
        visible = _visible(start, stop, positions, subtree_end, window)
        scores = jnp.where(visible[:, None, :, None, :], scores, MASKED)

        # Weights are normalised after the product, which is smaller than they are.
        best = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - best)
        total = jnp.sum(weights, axis=-1)
        flat_weights = weights.reshape(rows, kv_heads, -1, stop).astype(v.dtype)
        out = _product("rkqs,rksd->rkqd", flat_weights, v[:, :, :stop])
        out = out.reshape(rows, kv_heads, stop - start, groups, head_dim) / total[..., None]
        outs.append(out.astype(q.dtype))
        normalisers.append(best[..., 0] + jnp.log(total))

    out, normaliser = named(jnp.concatenate(outs, axis=2), jnp.concatenate(normalisers, axis=2))
    return (out, normaliser), (q, k, v, positions, subtree_end, window, out, normaliser)


def _attend_backward(residuals, cotangents):
    d_out, d_normaliser = cotangents
    q, k, v, positions, subtree_end, window, out, normalisers = residuals
    rows, kv_heads, length, groups, head_dim = q.shape
    scale = 1.0 / score_divisor(head_dim)
    means = mean_gradient(out, d_out, d_normaliser)

    d_q: list[Array] = []
    d_k = jnp.zeros(k.shape, jnp.float32)
    d_v = d_k
    for start, stop in _blocks(length):
        block = functools.partial(_flat, start=start, stop=stop)

        # The weights again, with scores transposed: [R, KV, keys, queries]. The mask is made once, so that the loops
        # over scores run along all queries of the block at a stretch.
        visible = jnp.repeat(_visible(start, stop, positions, subtree_end, window).swapaxes(1, 2), groups, axis=2)
        visible = jax.lax.optimization_barrier(visible)[:, None]
        scores = _product("rksd,rkqd->rksq", k[:, :, :stop], block(q)) * scale
        normaliser, mean = (
            x[:, :, start:stop].reshape(rows, kv_heads, 1, (stop - start) * groups) for x in (normalisers, means)
        )
        weights = jnp.exp(jnp.where(visible, scores, MASKED) - normaliser)

        d_weights = _product("rksd,rkqd->rksq", v[:, :, :stop], block(d_out))
        d_scores = score_gradient(weights, d_weights, mean, scale).astype(q.dtype)
        weights = weights.astype(d_out.dtype)

        # Keys and values of a block are those of all blocks before it too: their gradients add up.
        rest = ((0, 0), (0, 0), (0, length - stop), (0, 0))
        d_v = d_v + jnp.pad(_product("rksq,rkqd->rksd", weights, block(d_out)), rest)
        d_k = d_k + jnp.pad(_product("rksq,rkqd->rksd", d_scores, block(q)), rest)
        part = jax.lax.optimization_barrier(_product("rksd,rksq->rkdq", k[:, :, :stop], d_scores))
        d_q.append(part.swapaxes(2, 3).reshape(rows, kv_heads, stop - start, groups, head_dim))

    return jnp.concatenate(d_q, axis=2).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)
