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
SUFFIX_AXES = ("batch", "kv_heads", None, None, None)


@struct
class KVCache:
    """Keys (rotary applied) and values; one array per layer, so that each is updated in place inside a loop.

    `prefix_*[layer]` hold the prompts, all tokens but the last, stored and read once for the `G` samples of a slot.
    `suffix_*[layer]` are rings over what follows: step `t` of the decoder writes column `t mod Ss` of every row. The
    last `n` columns written belong to a row that has run for `n` steps; older ones are its predecessor's. A row may
    therefore start at any step, in any slot, and nothing is moved. Keys of the ring lie transposed: the products of a
    step, one query each, run faster so on a CPU.
    """

    prefix_k: tuple[Float[Array, "P KV Sp hd"], ...]
    prefix_v: tuple[Float[Array, "P KV Sp hd"], ...]
    suffix_k: tuple[Float[Array, "P KV G hd Ss"], ...]
    suffix_v: tuple[Float[Array, "P KV G Ss hd"], ...]


def init_cache(
    config: DecoderConfig, prompt_slots: int, sample_slots: int, prefix_length: int, suffix_length: int
) -> KVCache:
    """An empty cache in the compute dtype. Call it under `jax.jit`."""
    prefix = (prompt_slots, config.num_kv_heads, prefix_length, config.head_dim)
    suffix = (prompt_slots, config.num_kv_heads, sample_slots)
    suffix_k = (*suffix, config.head_dim, suffix_length)
    suffix_v = (*suffix, suffix_length, config.head_dim)

    def zeros(shape):
        return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))

    return constrain_cache(
        KVCache(prefix_k=zeros(prefix), prefix_v=zeros(prefix), suffix_k=zeros(suffix_k), suffix_v=zeros(suffix_v))
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
    suffix_k: Float[Array, "P KV G hd Ss"],
    suffix_v: Float[Array, "P KV G Ss hd"],
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
    kv_heads, prefix_size = prefix_k.shape[1:3]
    q = q.reshape(slots, samples, kv_heads, heads // kv_heads, head_dim).swapaxes(1, 2) / math.sqrt(head_dim)
    column = jnp.arange(prefix_size)
    position = prefix_length[:, None] + steps
    in_prefix = (column < prefix_length[:, None, None]) & (position[:, :, None] - column < window)
    in_suffix = (age <= steps[:, :, None]) & (age < window)

    def product(equation, a, b):
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    # All queries of a prompt that share a key head meet its keys in one product.
    shared = (slots, kv_heads, samples * q.shape[3])
    prefix_scores = product("pknd,pksd->pkns", q.reshape(*shared, head_dim), prefix_k)
    prefix_scores = prefix_scores.reshape(*q.shape[:-1], prefix_size)
    prefix_scores = jnp.where(in_prefix[:, None, :, None], prefix_scores, MASKED)
    suffix_scores = jnp.where(in_suffix[:, None, :, None], product("pkgrd,pkgds->pkgrs", q, suffix_k), MASKED)
    best = jnp.maximum(jnp.max(prefix_scores, -1, keepdims=True), jnp.max(suffix_scores, -1, keepdims=True))
    prefix_weights, suffix_weights = jnp.exp(prefix_scores - best), jnp.exp(suffix_scores - best)
    total = jnp.sum(prefix_weights, -1, keepdims=True) + jnp.sum(suffix_weights, -1, keepdims=True)
    prefix_weights = prefix_weights.astype(q.dtype).reshape(*shared, prefix_size)
    out = product("pkns,pksd->pknd", prefix_weights, prefix_v).reshape(q.shape)
    out += product("pkgrs,pkgsd->pkgrd", suffix_weights.astype(q.dtype), suffix_v)
    return (out / total).swapaxes(1, 2).reshape(slots, samples, heads, head_dim).astype(q.dtype)


def write_column(
    suffix_k: Float[Array, "P KV G hd Ss"],
    suffix_v: Float[Array, "P KV G Ss hd"],
    k: Float[Array, "P G KV hd"],
    v: Float[Array, "P G KV hd"],
    column: Int[Array, ""],
) -> tuple[Float[Array, "P KV G hd Ss"], Float[Array, "P KV G Ss hd"]]:
    """The rings of a layer with the new keys and values in one column of every row."""
    k, v = k.swapaxes(1, 2)[..., None].astype(suffix_k.dtype), v.swapaxes(1, 2)[..., None, :].astype(suffix_v.dtype)
    update = jax.lax.dynamic_update_slice
    return update(suffix_k, k, (0, 0, 0, 0, column)), update(suffix_v, v, (0, 0, 0, column, 0))
