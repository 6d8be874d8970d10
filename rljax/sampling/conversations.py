"""Where the keys and values of conversations lie between their turns: the device side of `rljax.sampling.turns`.

A conversation is linear: what comes later is appended. Its keys and values are kept for all tokens but the last, so a
fork of it at any token is a copy of a part, and a turn after an observation computes the observation alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.models.attention import forest_attention
from rljax.models.attention_blocks import MASKED, score_divisor
from rljax.models.cache import (
    K_COLUMNS,
    PREFIX_AXES,
    SUFFIX_AXES,
    V_COLUMNS,
    KVCache,
    constrain_cache,
    read_entry,
    send_entry,
    write_entry,
)
from rljax.models.config import DecoderConfig
from rljax.models.decoder import apply_layer, embed
from rljax.models.rope import rotary_tables
from rljax.parallel import constrain, on_shards
from rljax.sampling.weights import product
from rljax.types import ArrayLike, Params, struct

QUERY_BLOCK = 128
"""Queries of a conversation that are scored at a time."""


@struct
class Conversations:
    """Keys (rotary applied) and values of `E` conversations of up to `C` tokens, one array per layer."""

    k: tuple[Float[Array, "E KV C hd"], ...]
    v: tuple[Float[Array, "E KV C hd"], ...]


@struct
class Moves:
    """Conversations copied to or from elsewhere: the first `count` entries."""

    conversation: Int[ArrayLike, " J"]
    """The conversation that is written, or read."""
    other: Int[ArrayLike, " J"]
    """A row of the decoder's grid, or a conversation."""
    start: Int[ArrayLike, " J"]
    """The first position that is written."""
    column: Int[ArrayLike, " J"]
    """The ring column of the key that goes there."""
    count: Int[ArrayLike, ""]
    """Entries that count."""


def init_conversations(config: DecoderConfig, conversations: int, length: int) -> Conversations:
    """Empty conversations in the compute dtype. Call it under `jax.jit`."""
    shape = (conversations, config.num_kv_heads, length, config.head_dim)

    def zeros():
        return tuple(constrain(jnp.zeros(shape, config.dtype), PREFIX_AXES) for _ in range(config.num_layers))

    return Conversations(k=zeros(), v=zeros())


def conversations_bytes(config: DecoderConfig, conversations: int, length: int) -> int:
    """Bytes that such conversations take over all devices."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    return per_token * conversations * length


def extend(
    config: DecoderConfig,
    is_fresh: bool,
    params: Params,
    conversations: Conversations,
    tokens: Int[ArrayLike, "N S"],
    index: Int[ArrayLike, " N"],
    start: Int[ArrayLike, " N"],
) -> Conversations:
    """Computes `tokens` (right-padded) behind the first `start` tokens of the conversations `index`, and writes their
    keys and values there. What padding writes is never read, as long as `start + S` is within the conversations'
    length. `is_fresh`: all `start` are 0, and nothing is there to be read. `params` are those of `decode_weights`.

    On a mesh `index` is split as the conversations are: each device extends its own, and -1 extends none.
    """
    tokens = jnp.asarray(tokens)
    index = jnp.asarray(index)
    start = jnp.asarray(start)
    length = tokens.shape[1]
    positions = start[:, None] + jnp.arange(length)
    tables = rotary_tables(config, positions)

    x = constrain(embed(config, params, tokens), ("batch", None, None))
    keys = []
    values = []
    layers = zip(params["layers"], config.windows, config.rotations, strict=True)
    for layer, (layer_params, window, rotation) in enumerate(layers):
        kept_k = conversations.k[layer]
        kept_v = conversations.v[layer]

        def attend(q, k, v, sinks=None, kept_k=kept_k, kept_v=kept_v, window=window):
            new_k = _write(kept_k, k, index, start)
            new_v = _write(kept_v, v, index, start)
            if is_fresh:
                # Nothing lies before: the new keys alone, which need not be gathered from the whole length.
                out = forest_attention(q, k, v, positions, jnp.full(tokens.shape, length), window, sinks=sinks)
            else:
                out = _attend(q, _read(new_k, index), _read(new_v, index), start, window, sinks)
            return out, (new_k, new_v)

        x, (new_k, new_v) = apply_layer(config, layer_params, x, tables[rotation], attend, product)
        keys.append(constrain(new_k, PREFIX_AXES))
        values.append(constrain(new_v, PREFIX_AXES))
    return Conversations(k=tuple(keys), v=tuple(values))


def _write(kept: Array, new: Array, index: Array, start: Array) -> Array:
    """`new` [N, S, KV, hd] into `kept` [E, KV, C, hd] from `start` on."""

    def store(kept, new, index, start, shard):
        def write(i, kept):
            row = jax.lax.dynamic_slice_in_dim(new, i, 1)
            return write_entry(kept, row, index[i], shard, (0, start[i], 0))

        return jax.lax.fori_loop(0, new.shape[0], write, kept)

    run = on_shards(store, (PREFIX_AXES, PREFIX_AXES, ("batch",), ("batch",)), PREFIX_AXES)
    return run(kept, jnp.swapaxes(new, 1, 2).astype(kept.dtype), index, start)


def _read(kept: Array, index: Array) -> Array:
    """The conversations `index` [N] of `kept` [E, KV, C, hd], each on the device that has it."""

    def read(kept, index, shard):
        return kept[jnp.clip(index - shard.number * kept.shape[0], 0, kept.shape[0] - 1)]

    return on_shards(read, (PREFIX_AXES, ("batch",)), PREFIX_AXES)(kept, index)


def _attend(q: Array, k: Array, v: Array, start: Array, window: int, sinks: Array | None) -> Array:
    """Query i of row n [N, S, H, hd] sees the keys [N, KV, C, hd] up to `start[n] + i`; float32 softmax, with one score
    more for nothing where heads have `sinks` [H]."""
    rows, length, heads, head_dim = q.shape
    kv_heads, size = k.shape[1:3]
    groups = heads // kv_heads
    block = min(length, QUERY_BLOCK)
    count = -(-length // block)
    q = jnp.pad(q / score_divisor(head_dim), ((0, 0), (0, count * block - length), (0, 0), (0, 0)))
    # Queries that share a key head lie side by side: [blocks, N, KV, block * G, hd].
    q = q.reshape(rows, count, block, kv_heads, groups, head_dim).transpose(1, 0, 3, 2, 4, 5)
    q = q.reshape(count, rows, kv_heads, block * groups, head_dim)
    column = jnp.arange(size)

    def product(equation: str, a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    def attend(part: tuple[Array, Array]) -> Array:
        queries, first = part
        position = jnp.repeat(start[:, None] + first + jnp.arange(block), groups, axis=1)[..., None]
        visible = (column <= position) & (position - column < window)
        scores = jnp.where(visible[:, None], product("nkqd,nkcd->nkqc", queries, k), MASKED)
        if sinks is None:
            weights = jax.nn.softmax(scores, axis=-1)
        else:
            own = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, groups), (1, block))[..., None]
            own = jnp.broadcast_to(own, (*scores.shape[:-1], 1))
            weights = jax.nn.softmax(jnp.concatenate([scores, own], axis=-1), axis=-1)[..., :-1]
        return product("nkqc,nkcd->nkqd", weights.astype(v.dtype), v)

    # One block after the other, so that scores exist for `block` queries over the whole length, and no more.
    out = jax.lax.map(attend, (q, jnp.arange(count) * block))
    out = out.reshape(count, rows, kv_heads, block, groups, head_dim).transpose(1, 0, 3, 2, 4, 5)
    return out.reshape(rows, count * block, heads, head_dim)[:, :length].astype(k.dtype)


def copy_conversations(conversations: Conversations, near: Moves, far: Moves) -> Conversations:
    """The conversations with `conversation` of each move overwritten by `other`. Moves of `near` stay on one device;
    those of `far` send a conversation to all."""

    def move(kept, shard):
        def copy(i, kept):
            row = read_entry(kept, jnp.asarray(near.other)[i], shard)
            return write_entry(kept, row, jnp.asarray(near.conversation)[i], shard)

        def send(i, kept):
            row = send_entry(kept, jnp.asarray(far.other)[i], shard)
            return write_entry(kept, row, jnp.asarray(far.conversation)[i], shard)

        kept = jax.lax.fori_loop(0, near.count, copy, kept)
        return jax.lax.fori_loop(0, far.count, send, kept)

    run = on_shards(move, (PREFIX_AXES,), PREFIX_AXES)
    return Conversations(k=tuple(map(run, conversations.k)), v=tuple(map(run, conversations.v)))


def lay_conversations(cache: KVCache, conversations: Conversations, moves: Moves) -> KVCache:
    """The decoder's cache with conversations as the prompts of its rows `other`, each on the device of its
    conversation."""

    def move(prefix, kept, shard):
        def one(i, prefix):
            row = read_entry(kept, jnp.asarray(moves.conversation)[i], shard)
            return write_entry(prefix, row, jnp.asarray(moves.other)[i], shard)

        return jax.lax.fori_loop(0, moves.count, one, prefix)

    run = on_shards(move, (PREFIX_AXES, PREFIX_AXES), PREFIX_AXES)
    prefix_k = tuple(map(run, cache.prefix_k, conversations.k))
    prefix_v = tuple(map(run, cache.prefix_v, conversations.v))
    return constrain_cache(dataclasses.replace(cache, prefix_k=prefix_k, prefix_v=prefix_v))


def keep_turns(conversations: Conversations, cache: KVCache, moves: Moves) -> Conversations:
    """The conversations with the ring columns of the rows `other`, each on the device of its conversation, appended: as
    many as the ring has, of which those of the turn come first and the rest is never read."""

    def on_axis(axis: int):
        def move(kept, ring, shard):
            def one(i, kept):
                # The grid of a decoder of turns has one sample a slot.
                row = read_entry(ring, jnp.asarray(moves.other)[i], shard)[:, :, 0]
                row = jnp.roll(row, -jnp.asarray(moves.column)[i], axis - 1)
                # Keys lie transposed in the ring, and not here.
                row = row.swapaxes(2, 3) if axis == K_COLUMNS else row
                start = (0, jnp.asarray(moves.start)[i], 0)
                return write_entry(kept, row, jnp.asarray(moves.conversation)[i], shard, start)

            return jax.lax.fori_loop(0, moves.count, one, kept)

        return on_shards(move, (PREFIX_AXES, SUFFIX_AXES), PREFIX_AXES)

    return Conversations(
        k=tuple(map(on_axis(K_COLUMNS), conversations.k, cache.suffix_k)),
        v=tuple(map(on_axis(V_COLUMNS), conversations.v, cache.suffix_v)),
    )
