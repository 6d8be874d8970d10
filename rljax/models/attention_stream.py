"""Attention over forests for queries that begin anywhere in a packed sequence, in loops over blocks of keys.

Scores exist for one block of queries times one of keys at a time, forward and backward (2205.14135), and blocks that
see nothing are left out. Neither memory nor the size of the program grows with the square of the length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.models.attention_blocks import (
    MASKED,
    is_visible,
    may_see,
    mean_gradient,
    named,
    score_divisor,
    score_gradient,
    softmax_step,
    with_sinks,
)
from rljax.types import ArrayLike

BLOCK = 512
"""Most queries, and most keys, of a block."""

TINY = 1e-30
"""Stands for the sum of weights of a query that sees no key: its result is then 0, and so is its gradient."""


def streamed_attention(
    q: Float[Array, "R Q H hd"],
    k: Float[Array, "R S KV hd"],
    v: Float[Array, "R S KV hd"],
    positions: Int[Array, "R S"],
    subtree_end: Int[Array, "R S"],
    window: Int[Array, ""] | int,
    query_start: Int[Array, ""] | int,
    *,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "R Q H hd"]:
    """`forest_attention` of the `Q` queries at the packed positions from `query_start` on, against all keys.

    Sums are float32 and go block by block. A query that sees no key (padding) yields 0 and passes no gradient on.
    """
    rows, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(rows, queries, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 1, 3, 4)
    k = k.transpose(0, 2, 1, 3)
    v = v.transpose(0, 2, 1, 3)
    start = jnp.asarray(query_start, jnp.int32)
    out, normaliser = _attend(grouped, k, v, positions, subtree_end, jnp.asarray(window, jnp.int32), start)
    if sinks is not None:
        out = with_sinks(out, normaliser, sinks.reshape(kv_heads, 1, -1))
    return out.transpose(0, 2, 1, 3, 4).reshape(rows, queries, heads, head_dim)


class _Blocks(NamedTuple):
    """Who sees whom, with queries and keys cut into blocks: `N` of `bq` queries, `M` of `bk` keys."""

    query_index: Array
    """Packed index of each query [N, bq]."""
    query_depth: Array
    """Position of each query on its path [N, R, bq]."""
    key_index: Array
    """[M, bk]"""
    key_depth: Array
    """[M, R, bk]"""
    key_end: Array
    """`subtree_end` of each key [M, R, bk]."""
    window: ArrayLike
    order: Array
    """For each block of queries, the blocks of keys of which it may see some, and then the others [N, M]."""
    needed: Array
    """How many those first ones are [N]."""

    def visible(self, i: Array, j: Array) -> Array:
        """[R, 1, bq, 1, bk] of block `i` of queries and block `j` of keys."""
        query = self.query_index[i][None, :, None]
        key = self.key_index[j][None, None]
        query_depth = self.query_depth[i][..., None]
        key_depth = self.key_depth[j][:, None]
        sees = is_visible(query, key, self.key_end[j][:, None], query_depth, key_depth, self.window)
        return sees[:, None, :, None]


def _cut(x: Array, axis: int) -> Array:
    """`x` in blocks along `axis`, on a new leading axis; the last is padded with zeros."""
    length = x.shape[axis]
    size = min(BLOCK, length)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -length % size)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _joined(blocks: Array, length: int, axis: int) -> Array:
    """The first `length` entries along `axis` of what `_cut` cut there."""
    x = jnp.moveaxis(blocks, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def _blocks(queries: int, positions: Array, subtree_end: Array, window: ArrayLike, start: ArrayLike) -> _Blocks:
    depth = _cut(jax.lax.dynamic_slice_in_dim(positions, start, queries, axis=1), 1)
    key_depth = _cut(positions, 1)
    # The keys that pad have the end 0: nobody sees them.
    key_end = _cut(subtree_end, 1)

    # Padding may lie behind the sequence: it sees what it likes, and is cut off.
    index = jnp.asarray(start) + jnp.arange(depth.shape[0] * depth.shape[2]).reshape(depth.shape[0], -1)
    key_index = jnp.arange(key_depth.shape[0] * key_depth.shape[2]).reshape(key_depth.shape[0], -1)

    # Of rows side by side, what one of them needs is done for all.
    needed = jnp.any(
        may_see(
            first_query=index[:, None, :1],
            last_query=index[:, None, -1:],
            shallowest_query=jnp.min(depth, axis=-1)[:, None],
            first_key=key_index[None, :, :1],
            last_end=jnp.max(key_end, axis=-1)[None],
            deepest_key=jnp.max(key_depth, axis=-1)[None],
            window=window,
        ),
        axis=-1,
    )
    return _Blocks(
        query_index=index,
        query_depth=depth,
        key_index=key_index,
        key_depth=key_depth,
        key_end=key_end,
        window=window,
        order=jnp.argsort(~needed, axis=1, stable=True),
        needed=jnp.sum(needed, axis=1),
    )


def _scores(q: Array, k: Array) -> Array:
    """[R, KV, bq, G, bk] of q [R, KV, bq, G, hd] and k [R, KV, bk, hd]."""
    return _product("rkqgd,rksd->rkqgs", q, k) / score_divisor(q.shape[-1])


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attend(q, k, v, positions, subtree_end, window, start) -> tuple[Array, Array]:
    """q [R, KV, Q, G, hd]; k, v [R, KV, S, hd] -> (out [R, KV, Q, G, hd], log-sum-exps [R, KV, Q, G])."""
    return _attend_forward(q, k, v, positions, subtree_end, window, start)[0]


def _attend_forward(q, k, v, positions, subtree_end, window, start):
    queries = q.shape[2]
    blocks = _blocks(queries, positions, subtree_end, window, start)
    k_blocks = _cut(k, 2)
    v_blocks = _cut(v, 2)

    def of_queries(inputs):
        i, own = inputs

        def look(t, carry):
            best, total, out = carry
            j = blocks.order[i, t]
            visible = blocks.visible(i, j)
            scores = jnp.where(visible, _scores(own, k_blocks[j]), MASKED)

            best, total, weights, shrink = softmax_step(best, total, scores, visible)
            part = _product("rkqgs,rksd->rkqgd", weights.astype(v.dtype), v_blocks[j])
            return best, total, out * shrink + part

        column = jnp.zeros((*own.shape[:-1], 1), jnp.float32)
        first = (column + MASKED, column, jnp.zeros(own.shape, jnp.float32))
        best, total, out = jax.lax.fori_loop(0, blocks.needed[i], look, first)
        total = jnp.maximum(total, TINY)
        return (out / total).astype(q.dtype), (best + jnp.log(total))[..., 0]

    q_blocks = _cut(q, 2)
    outs, normalisers = jax.lax.map(of_queries, (jnp.arange(len(q_blocks)), q_blocks))
    out, normaliser = named(_joined(outs, queries, 2), _joined(normalisers, queries, 2))
    return (out, normaliser), (q, k, v, positions, subtree_end, window, start, out, normaliser)


def _attend_backward(residuals, cotangents):
    d_out, d_normaliser = cotangents
    q, k, v, positions, subtree_end, window, start, out, normaliser = residuals
    queries = q.shape[2]
    scale = 1.0 / score_divisor(q.shape[-1])
    blocks = _blocks(queries, positions, subtree_end, window, start)
    k_blocks = _cut(k, 2)
    v_blocks = _cut(v, 2)

    def of_queries(carry, inputs):
        i, own, d_own, own_normaliser, mean = inputs

        def look(t, carry):
            d_q, d_k, d_v = carry
            j = blocks.order[i, t]
            weights = jnp.exp(_scores(own, k_blocks[j]) - own_normaliser[..., None])
            weights = jnp.where(blocks.visible(i, j), weights, 0.0)

            d_weights = _product("rkqgd,rksd->rkqgs", d_own, v_blocks[j])
            d_scores = score_gradient(weights, d_weights, mean[..., None], scale).astype(q.dtype)
            d_v = d_v.at[j].add(_product("rkqgs,rkqgd->rksd", weights.astype(d_out.dtype), d_own))
            d_k = d_k.at[j].add(_product("rkqgs,rkqgd->rksd", d_scores, own))
            return d_q + _product("rkqgs,rksd->rkqgd", d_scores, k_blocks[j]), d_k, d_v

        d_q, d_k, d_v = jax.lax.fori_loop(0, blocks.needed[i], look, (jnp.zeros(own.shape, jnp.float32), *carry))
        return (d_k, d_v), d_q.astype(q.dtype)

    of_blocks = [_cut(x, 2) for x in (q, d_out, normaliser, mean_gradient(out, d_out, d_normaliser))]
    zeros = jnp.zeros(k_blocks.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(of_queries, (zeros, zeros), (jnp.arange(len(of_blocks[0])), *of_blocks))
    length = k.shape[2]
    d_k = _joined(d_k, length, 2).astype(k.dtype)
    d_v = _joined(d_v, length, 2).astype(v.dtype)
    return _joined(d_q, queries, 2), d_k, d_v, None, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)
