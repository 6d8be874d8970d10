"""Where the keys and values of conversations lie between their turns: the device side of `rljax.sampling.turns`.

A conversation is linear: what comes later is appended. Its keys and values are kept for all tokens but the last, so a
fork of it at any token is a copy of a part, and a turn after an observation computes the observation alone. What a
layer with a delta rule remembers cannot be taken apart so: it is kept behind a few tokens, and conversations go on from
these alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.models.attention import forest_attention
from rljax.models.attention_blocks import MASKED, score_divisor
from rljax.models.cache import (
    K_COLUMNS,
    MEMORY_AXES,
    PREFIX_AXES,
    ROWS_MEMORY_AXES,
    ROWS_TAIL_AXES,
    SUFFIX_AXES,
    TAIL_AXES,
    V_COLUMNS,
    KVCache,
    cache_places,
    constrain_cache,
    constrain_rows,
    empty_memories,
    memory_bytes,
    read_entries,
    read_entry,
    send_entry,
    write_entries,
    write_entry,
)
from rljax.models.config import DecoderConfig
from rljax.models.decoder import apply_layer, embed, has_delta
from rljax.models.delta import Recalled, prompt_recall
from rljax.models.rope import rotary_tables
from rljax.parallel import constrain, on_shards
from rljax.sampling.weights import product
from rljax.types import ArrayLike, Params, struct

QUERY_BLOCK = 128
"""Queries of a conversation that are scored at a time."""


@struct
class Conversations:
    """Keys (rotary applied) and values of `E` conversations of up to `C` tokens, one array per layer that attends."""

    k: tuple[Float[Array, "E KV C hd"], ...]
    v: tuple[Float[Array, "E KV C hd"], ...]
    recalled: tuple[Recalled, ...] = ()
    """What each layer with a delta rule recalls behind up to `M` tokens of each: [E, M, ..]. The host knows which."""


@struct
class Marks:
    """Which of the `M` memories of their conversations a program reads and writes."""

    source: Int[ArrayLike, " N"]
    """The one that is gone on from; of a conversation's first tokens none, whatever it says."""
    target: Int[ArrayLike, " N"]
    """The one that is written."""
    length: Int[ArrayLike, " N"]
    """Tokens that are new, without padding."""


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
    mark: Int[ArrayLike, " J"]
    """The memory of the conversation that is written, or read; -1 for an empty one, and of no account in a model
    without."""
    count: Int[ArrayLike, ""]
    """Entries that count."""


def init_conversations(config: DecoderConfig, conversations: int, length: int, marks: int) -> Conversations:
    """Empty conversations in the compute dtype, with `marks` memories each where the model has any. Call it under
    `jax.jit`."""
    shape = (conversations, config.num_kv_heads, length, config.head_dim)

    def zeros():
        return tuple(constrain(jnp.zeros(shape, config.dtype), PREFIX_AXES) for _ in range(config.attending))

    recalled = tuple(map(constrain_rows, empty_memories(config, conversations, marks)))
    return Conversations(k=zeros(), v=zeros(), recalled=recalled)


def conversations_bytes(config: DecoderConfig, conversations: int, length: int, marks: int) -> int:
    """Bytes that such conversations take over all devices."""
    per_token = 2 * config.attending * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    return conversations * (per_token * length + marks * memory_bytes(config))


def extend(
    config: DecoderConfig,
    sizes: tuple[int, ...],
    params: Params,
    conversations: Conversations,
    tokens: Int[ArrayLike, "N S"],
    index: Int[ArrayLike, " N"],
    start: Int[ArrayLike, " N"],
    marks: Marks | None = None,
) -> Conversations:
    """Computes `tokens` (right-padded) behind the first `start` tokens of the conversations `index`, and writes their
    keys and values there. What padding writes is never read, as long as `start + S` is within the conversations'
    length. `params` are those of `decode_weights`.

    As many tokens of each conversation are read as the first of `sizes` that holds what any of them has; the last of
    them is the conversations' length. Without `sizes` all `start` are 0, and nothing is read. `marks` say where what a
    delta rule recalls behind those tokens lies, and where it goes; a model with none asks for none.

    On a mesh `index` is split as the conversations are: each device extends its own, and -1 extends none.
    """
    tokens = jnp.asarray(tokens)
    index = jnp.asarray(index)
    start = jnp.asarray(start)
    length = tokens.shape[1]
    positions = start[:, None] + jnp.arange(length)
    tables = rotary_tables(config, positions)
    size = jnp.searchsorted(jnp.array(sizes[:-1], jnp.int32), jnp.max(start) + length)

    x = constrain(embed(config, params, tokens), ("batch", None, None))
    keys = []
    values = []
    memories = []
    layers = zip(params["layers"], cache_places(config), config.windows, config.rotations, strict=True)
    for layer_params, place, window, rotation in layers:

        def attend(q, k, v, sinks=None, place=place, window=window):
            new_k = write_entries(conversations.k[place], jnp.swapaxes(k, 1, 2), index, PREFIX_AXES, start, 2)
            new_v = write_entries(conversations.v[place], jnp.swapaxes(v, 1, 2), index, PREFIX_AXES, start, 2)
            if not sizes:
                # Nothing lies before: the new keys alone, which need not be gathered from the whole length.
                out = forest_attention(q, k, v, positions, jnp.full(tokens.shape, length), window, sinks=sinks)
            else:

                def behind(of_size: int) -> Array:
                    seen_k, seen_v = (read_entries(x, index, PREFIX_AXES, size=of_size) for x in (new_k, new_v))
                    return attend_behind(q, seen_k, seen_v, start, window, sinks)

                out = jax.lax.switch(size, [functools.partial(behind, of_size) for of_size in sizes])
            return out, (new_k, new_v)

        def recall(mixed, kernel, g, beta, place=place):
            assert config.delta is not None and marks is not None, "a delta rule needs to know what comes before"
            kept = conversations.recalled[place]
            before = None
            if sizes:
                source = jnp.asarray(marks.source)
                axes = (ROWS_MEMORY_AXES, ROWS_TAIL_AXES)
                before = Recalled(*(read_entries(x, index, own, source) for x, own in zip(kept, axes, strict=True)))
            out, new = prompt_recall(config.delta, mixed, kernel, g, beta, jnp.asarray(marks.length), before)
            return out, write_recalled(kept, new, index, jnp.asarray(marks.target))

        mix = recall if has_delta(layer_params) else attend
        x, new = apply_layer(config, layer_params, x, tables[rotation], mix, product)
        if has_delta(layer_params):
            memories.append(constrain_rows(new))
        else:
            keys.append(constrain(new[0], PREFIX_AXES))
            values.append(constrain(new[1], PREFIX_AXES))
    return Conversations(k=tuple(keys), v=tuple(values), recalled=tuple(memories))


def write_recalled(kept: Recalled, new: Recalled, index: Array, mark: Array) -> Recalled:
    """`new` [N, ..] into `kept` [E, M, ..] at the places (`index`, `mark`), [N] each, as `write_entries` does."""

    def run(kept, new, axes):
        return write_entries(kept, new[:, None], index, axes, mark)

    return Recalled(run(kept.memory, new.memory, ROWS_MEMORY_AXES), run(kept.tail, new.tail, ROWS_TAIL_AXES))


def attend_behind(q: Array, k: Array, v: Array, start: Array, window: int, sinks: Array | None) -> Array:
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

    run, of_memory, of_tail = (
        on_shards(move, (axes,), axes) for axes in (PREFIX_AXES, ROWS_MEMORY_AXES, ROWS_TAIL_AXES)
    )
    return Conversations(
        k=tuple(map(run, conversations.k)),
        v=tuple(map(run, conversations.v)),
        recalled=tuple(Recalled(of_memory(own.memory), of_tail(own.tail)) for own in conversations.recalled),
    )


def lay_conversations(cache: KVCache, conversations: Conversations, moves: Moves) -> KVCache:
    """The decoder's cache with conversations as the prompts of its rows `other`, each on the device of its
    conversation, and with their memories `mark`."""

    def move(prefix, kept, shard):
        def one(i, prefix):
            row = read_entry(kept, jnp.asarray(moves.conversation)[i], shard)
            # Rows have room for what is there, and maybe for no more.
            return write_entry(prefix, row[:, :, : prefix.shape[2]], jnp.asarray(moves.other)[i], shard)

        return jax.lax.fori_loop(0, moves.count, one, prefix)

    def recall(own, kept, shard):
        def one(i, own):
            row = read_entry(kept, jnp.asarray(moves.conversation)[i], shard)
            mark = jnp.asarray(moves.mark)[i]
            row = jax.lax.dynamic_index_in_dim(row, jnp.maximum(mark, 0), 1, keepdims=False)
            # Behind nothing nothing is recalled.
            row = jnp.where(mark < 0, 0, row)
            return write_entry(own, row, jnp.asarray(moves.other)[i], shard)

        return jax.lax.fori_loop(0, moves.count, one, own)

    of_memory = on_shards(recall, (MEMORY_AXES, ROWS_MEMORY_AXES), MEMORY_AXES)
    of_tail = on_shards(recall, (TAIL_AXES, ROWS_TAIL_AXES), TAIL_AXES)

    def lay(own: Recalled, kept: Recalled) -> Recalled:
        return Recalled(of_memory(own.memory, kept.memory), of_tail(own.tail, kept.tail))

    run = on_shards(move, (PREFIX_AXES, PREFIX_AXES), PREFIX_AXES)
    prefix_k = tuple(map(run, cache.prefix_k, conversations.k))
    prefix_v = tuple(map(run, cache.prefix_v, conversations.v))
    memories = tuple(map(lay, cache.prompt_memory, conversations.recalled))
    return constrain_cache(dataclasses.replace(cache, prefix_k=prefix_k, prefix_v=prefix_v, prompt_memory=memories))


def keep_turns(conversations: Conversations, cache: KVCache, moves: Moves) -> Conversations:
    """The conversations with the ring columns of the rows `other`, each on the device of its conversation, appended: as
    many as the ring has, of which those of the turn come first and the rest is never read. What rows recall becomes
    their memories `mark`."""

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

    def recall(kept, own, shard):
        def one(i, kept):
            # Of the one sample of a slot; the axis of samples is that of memories then.
            row = read_entry(own, jnp.asarray(moves.other)[i], shard)
            start = (jnp.asarray(moves.mark)[i], *(0,) * (kept.ndim - 2))
            return write_entry(kept, row, jnp.asarray(moves.conversation)[i], shard, start)

        return jax.lax.fori_loop(0, moves.count, one, kept)

    of_memory, of_tail = (on_shards(recall, (axes, axes), axes) for axes in (ROWS_MEMORY_AXES, ROWS_TAIL_AXES))
    return Conversations(
        k=tuple(map(on_axis(K_COLUMNS), conversations.k, cache.suffix_k)),
        v=tuple(map(on_axis(V_COLUMNS), conversations.v, cache.suffix_v)),
        recalled=tuple(
            Recalled(of_memory(kept.memory, own.memory), of_tail(kept.tail, own.tail))
            for kept, own in zip(conversations.recalled, cache.row_memory, strict=True)
        ),
    )
