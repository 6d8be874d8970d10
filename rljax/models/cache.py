"""The decoder's key-value cache: prompts stored once, completions in a ring, and attention over both.

Rows of the decoder form a grid `[P, G]`: `P` prompt slots, `G` samples of each prompt.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.models.attention import MASKED
from rljax.models.config import DecoderConfig
from rljax.parallel import constrain
from rljax.types import struct

PREFIX_AXES = ("batch", "kv_heads", None, None)
SUFFIX_AXES = ("batch", None, "kv_heads", None, None)


@struct
class KVCache:
    """Keys (rotary applied) and values; one array per layer, so that each is updated in place inside a loop.

    `prefix_*[layer]` hold the prompts, all tokens but the last, stored and read once for the `G` samples of a slot.
    `suffix_*[layer]` are rings over what follows: step `t` of the decoder writes column `t mod Ss` of every row. The
    last `n` columns written belong to a row that has run for `n` steps; older ones are its predecessor's. A row may
    therefore start at any step, in any slot, and nothing is moved.
    """

    prefix_k: tuple[Float[Array, "P KV Sp hd"], ...]
    prefix_v: tuple[Float[Array, "P KV Sp hd"], ...]
    suffix_k: tuple[Float[Array, "P G KV Ss hd"], ...]
    suffix_v: tuple[Float[Array, "P G KV Ss hd"], ...]


def init_cache(
    config: DecoderConfig, prompt_slots: int, sample_slots: int, prefix_length: int, suffix_length: int
) -> KVCache:
    """An empty cache in the compute dtype. Call it under `jax.jit`."""
    prefix = (prompt_slots, config.num_kv_heads, prefix_length, config.head_dim)
    suffix = (prompt_slots, sample_slots, config.num_kv_heads, suffix_length, config.head_dim)

    def zeros(shape):
        return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))

    return constrain_cache(
        KVCache(prefix_k=zeros(prefix), prefix_v=zeros(prefix), suffix_k=zeros(suffix), suffix_v=zeros(suffix))
    )


def constrain_cache(cache: KVCache) -> KVCache:
    """Asks the compiler to split prompt slots as a batch and heads over `tensor`; every program returns it so."""

    def split(arrays, axes):
        return tuple(constrain(x, axes) for x in arrays)

    return KVCache(
        prefix_k=split(cache.prefix_k, PREFIX_AXES),
        prefix_v=split(cache.prefix_v, PREFIX_AXES),
        suffix_k=split(cache.suffix_k, SUFFIX_AXES),
        suffix_v=split(cache.suffix_v, SUFFIX_AXES),
    )


def cache_bytes(
    config: DecoderConfig, prompt_slots: int, sample_slots: int, prefix_length: int, suffix_length: int
) -> int:
    """Bytes that such a cache takes over all devices."""
    columns = prompt_slots * (prefix_length + sample_slots * suffix_length)
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * columns * jnp.dtype(config.dtype).itemsize


def cached_attention(
    q: Float[Array, "P G H hd"],
    prefix_k: Float[Array, "P KV Sp hd"],
    prefix_v: Float[Array, "P KV Sp hd"],
    suffix_k: Float[Array, "P G KV Ss hd"],
    suffix_v: Float[Array, "P G KV Ss hd"],
    prefix_length: Int[Array, " P"],
    age: Int[Array, " Ss"],
    steps: Int[Array, "P G"],
    window: int,
) -> Float[Array, "P G H hd"]:
    """One new token a row attends to its prompt and to its own columns of the ring, in one float32 softmax.

    `steps[p, g]` counts the row's columns before this one; `age[c]` is how many steps ago column `c` was written (0
    is this step's). The token's position is `prefix_length + steps`. Keys `window` or more positions back are hidden.
    """
    slots, samples, heads, head_dim = q.shape
    kv_heads = prefix_k.shape[1]
    q = q.reshape(slots, samples, kv_heads, heads // kv_heads, head_dim) / math.sqrt(head_dim)
    column = jnp.arange(prefix_k.shape[2])
    position = prefix_length[:, None] + steps
    in_prefix = (column < prefix_length[:, None, None]) & (position[:, :, None] - column < window)
    in_suffix = (age <= steps[:, :, None]) & (age < window)
    prefix_scores = jnp.einsum("pgkrd,pksd->pgkrs", q, prefix_k, preferred_element_type=jnp.float32)
    suffix_scores = jnp.einsum("pgkrd,pgksd->pgkrs", q, suffix_k, preferred_element_type=jnp.float32)
    prefix_scores = jnp.where(in_prefix[:, :, None, None], prefix_scores, MASKED)
    suffix_scores = jnp.where(in_suffix[:, :, None, None], suffix_scores, MASKED)
    best = jnp.maximum(jnp.max(prefix_scores, -1, keepdims=True), jnp.max(suffix_scores, -1, keepdims=True))
    prefix_weights, suffix_weights = jnp.exp(prefix_scores - best), jnp.exp(suffix_scores - best)
    total = jnp.sum(prefix_weights, -1, keepdims=True) + jnp.sum(suffix_weights, -1, keepdims=True)
    out = jnp.einsum(
        "pgkrs,pksd->pgkrd", prefix_weights.astype(q.dtype), prefix_v, preferred_element_type=jnp.float32
    ) + jnp.einsum("pgkrs,pgksd->pgkrd", suffix_weights.astype(q.dtype), suffix_v, preferred_element_type=jnp.float32)
    return (out / total).reshape(slots, samples, heads, head_dim).astype(q.dtype)


def write_column(ring: Float[Array, "P G KV Ss hd"], new: Float[Array, "P G KV hd"], column: Int[Array, ""]) -> Array:
    """The ring with `new` in one column of every row."""
    return jax.lax.dynamic_update_slice(ring, new[:, :, :, None].astype(ring.dtype), (0, 0, 0, column, 0))
