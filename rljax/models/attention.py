"""Attention over forests: queries see the keys on their own path."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MASKED = -1e30
"""Score of an invisible key: finite, so that a padding query, which sees nothing, yields no NaN."""


def forest_attention(
    q: Float[Array, "R S H hd"],
    k: Float[Array, "R S KV hd"],
    v: Float[Array, "R S KV hd"],
    positions: Int[Array, "R S"],
    subtree_end: Int[Array, "R S"],
    window: Int[Array, ""] | int,
) -> Float[Array, "R S H hd"]:
    """Softmax attention where key `j` is visible to query `i` iff `j <= i < subtree_end[j]` and it lies fewer than
    `window` positions back on the path. Scores and softmax are float32; the result has the dtype of `q`.
    """
    rows, length, heads, head_dim = q.shape
    groups = heads // k.shape[2]
    index = jnp.arange(length)
    visible = (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < subtree_end[:, None, :])
    visible &= positions[:, :, None] - positions[:, None, :] < window
    q = q.reshape(rows, length, heads // groups, groups, head_dim)
    scores = jnp.einsum("rqkgd,rskd->rkgqs", q, k, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("rkgqs,rskd->rqkgd", weights, v).reshape(rows, length, heads, head_dim)
