"""What layers with a delta rule recall where a sample forks from another.

Keys and values of a path are kept, and a fork takes those of its part; a memory cannot be taken apart so. It is
computed anew from that of the prompt, over all tokens of the part at once.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rljax.models.cache import (
    MEMORY_AXES,
    PREFIX_AXES,
    TAIL_AXES,
    KVCache,
    cache_places,
    constrain_rows,
    read_entries,
)
from rljax.models.config import DecoderConfig
from rljax.models.decoder import apply_layer, embed, has_delta
from rljax.models.delta import Recalled, prompt_recall
from rljax.models.rope import rotary_tables
from rljax.parallel import constrain
from rljax.sampling.conversations import attend_behind, write_recalled
from rljax.sampling.weights import chosen_adapters, product
from rljax.types import ArrayLike, Params, struct


@struct
class PathTokens:
    """What `N` rows have been fed before their next token."""

    tokens: Int[ArrayLike, "N S"]
    """Right-padded: the prompt's last, and then those of the completion but the last."""
    length: Int[ArrayLike, " N"]
    """How many count."""
    slot: Int[ArrayLike, " N"]
    """Prompt slot of the row; -1 on a mesh for one that counts for nothing."""
    row: Int[ArrayLike, " N"]
    """Row of the slot."""
    prefix_length: Int[ArrayLike, " N"]
    """Tokens of the slot's prompt in the cache."""
    adapter: Int[ArrayLike, " N"] | None = None
    """Which of several each has."""


def recall_paths(config: DecoderConfig, params: Params, cache: KVCache, paths: PathTokens) -> KVCache:
    """The cache with what these rows recall, behind what their prompts do. Of the cache neither ring nor paths are
    read. `params` are those of `decode_weights`; on a mesh rows are split as slots are."""
    tokens, slot, row, start = map(jnp.asarray, (paths.tokens, paths.slot, paths.row, paths.prefix_length))
    tables = rotary_tables(config, start[:, None] + jnp.arange(tokens.shape[1]))
    multiply = chosen_adapters(product, paths.adapter)

    x = constrain(embed(config, params, tokens), ("batch", None, None))
    memories = []
    layers = zip(params["layers"], cache_places(config), config.windows, config.rotations, strict=True)
    for layer_params, place, window, rotation in layers:

        def attend(q, k, v, sinks=None, place=place, window=window):
            keys = _with_new(read_entries(cache.prefix_k[place], slot, PREFIX_AXES), k, start)
            values = _with_new(read_entries(cache.prefix_v[place], slot, PREFIX_AXES), v, start)
            return attend_behind(q, keys, values, start, window, sinks), None

        def recall(mixed, kernel, g, beta, place=place):
            assert config.delta is not None
            memory, tail = cache.prompt_memory[place]
            before = Recalled(read_entries(memory, slot, MEMORY_AXES), read_entries(tail, slot, TAIL_AXES))
            out, new = prompt_recall(config.delta, mixed, kernel, g, beta, jnp.asarray(paths.length), before)
            return out, constrain_rows(write_recalled(cache.row_memory[place], new, slot, row))

        mix = recall if has_delta(layer_params) else attend
        x, new = apply_layer(config, layer_params, x, tables[rotation], mix, multiply)
        if has_delta(layer_params):
            memories.append(new)
    return dataclasses.replace(cache, row_memory=tuple(memories))


def _with_new(prefix: Array, new: Array, start: Array) -> Array:
    """Keys or values [N, KV, Sp, hd] of prompts, and from `start` [N] on `new` ones, [N, S, KV, hd]."""
    room = jnp.pad(prefix, ((0, 0), (0, 0), (0, new.shape[1]), (0, 0)))
    new = jnp.swapaxes(new, 1, 2).astype(prefix.dtype)
    return jax.vmap(lambda row, own, at: jax.lax.dynamic_update_slice_in_dim(row, own, at, 1))(room, new, start)
