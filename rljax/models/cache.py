"""The decoder's key-value cache: prompts stored once, completions in a ring, finished paths kept for forks, and
attention over the first two; and beside it what layers with a delta rule remember.

Rows of the decoder form a grid `[P, G]`: `P` prompt slots, `G` samples of each prompt.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.models.attention_blocks import MASKED, score_divisor
from rljax.models.config import DecoderConfig
from rljax.models.delta import Recalled
from rljax.parallel import Shard, constrain, on_shards, platform
from rljax.types import ArrayLike, struct

PREFIX_AXES = ("batch", "kv_heads", None, None)
SUFFIX_AXES = ("batch", "kv_heads", None, None, None)
MEMORY_AXES = ("batch", None, None, None)
TAIL_AXES = ("batch", None, None)
ROWS_MEMORY_AXES = ("batch", None, None, None, None)
ROWS_TAIL_AXES = ("batch", None, None, None)
K_COLUMNS = 4
"""Axis of the ring's columns in its keys."""
V_COLUMNS = 3
"""Axis of the ring's columns in its values."""


@struct
class KVCache:
    """Keys (rotary applied) and values; one array per layer, so that each is updated in place inside a loop. A layer
    with a delta rule has a memory instead (`cache_places`).

    The suffix is a ring: step `t` of the decoder writes column `t mod Ss` of every row. The last `n` columns written
    belong to a row that has run for `n` steps; older ones are its predecessor's. A row may therefore start at any step,
    in any slot, and nothing is moved. A step reads the whole ring, which need not be longer than the oldest row:
    `resize_ring` changes its length.
    """

    prefix_k: tuple[Float[Array, "P KV Sp hd"], ...]
    """Keys of the prompts, all tokens but the last, stored and read once for the `G` samples of a slot."""
    prefix_v: tuple[Float[Array, "P KV Sp hd"], ...]
    """Values of the prompts."""
    suffix_k: tuple[Float[Array, "P KV G hd Ss"], ...]
    """Keys of what follows, transposed: the products of a step, one query each, run faster so on a CPU."""
    suffix_v: tuple[Float[Array, "P KV G Ss hd"], ...]
    """Values of what follows."""
    path_k: tuple[Float[Array, "P KV A hd Sa"], ...] = ()
    """Keys of up to `A` samples of a slot's prompt, oldest column first, so that later samples can start from any of
    their tokens. Without paths there are none."""
    path_v: tuple[Float[Array, "P KV A Sa hd"], ...] = ()
    """Values of these samples."""
    prompt_memory: tuple[Recalled, ...] = ()
    """What each layer with a delta rule recalls behind the prompts, all tokens but the last: [P, ..]."""
    row_memory: tuple[Recalled, ...] = ()
    """What it recalls behind the tokens of each row that it has fed: [P, G, ..]. Nothing before the first."""


class LayerCache(NamedTuple):
    """What one layer attends to: its arrays of a `KVCache`, without the paths."""

    prefix_k: Float[Array, "P KV Sp hd"]
    prefix_v: Float[Array, "P KV Sp hd"]
    suffix_k: Float[Array, "P KV G hd Ss"]
    suffix_v: Float[Array, "P KV G Ss hd"]


@struct
class PathMoves:
    """Rows of the ring to keep as paths, or paths to lay into rows: the first `count` entries."""

    slot: Int[ArrayLike, " J"]
    """Prompt slot of row and path."""
    row: Int[ArrayLike, " J"]
    """Row of the slot."""
    path: Int[ArrayLike, " J"]
    """Path of the slot."""
    column: Int[ArrayLike, " J"]
    """Ring column of the path's first key."""
    count: Int[ArrayLike, ""]
    """Entries that count."""


def init_cache(
    config: DecoderConfig,
    prompt_slots: int,
    sample_slots: int,
    prefix_length: int,
    suffix_length: int,
    path_slots: int = 0,
    path_length: int = 0,
) -> KVCache:
    """An empty cache in the compute dtype. Call it under `jax.jit`."""

    head_dim = config.head_dim

    def zeros(*shape):
        return tuple(
            jnp.zeros((prompt_slots, config.num_kv_heads, *shape), config.dtype) for _ in range(config.attending)
        )

    return constrain_cache(
        KVCache(
            prefix_k=zeros(prefix_length, head_dim),
            prefix_v=zeros(prefix_length, head_dim),
            suffix_k=zeros(sample_slots, head_dim, suffix_length),
            suffix_v=zeros(sample_slots, suffix_length, head_dim),
            path_k=zeros(path_slots, head_dim, path_length) if path_slots else (),
            path_v=zeros(path_slots, path_length, head_dim) if path_slots else (),
            prompt_memory=empty_memories(config, prompt_slots),
            row_memory=empty_memories(config, prompt_slots, sample_slots),
        )
    )


def empty_memories(config: DecoderConfig, *rows: int) -> tuple[Recalled, ...]:
    """What each layer with a delta rule recalls of nothing, for each of an array of `rows`."""
    delta = config.delta
    if delta is None:
        return ()
    memory = (*rows, delta.value_heads, delta.key_dim, delta.value_dim)
    tail = (*rows, delta.kernel - 1, sum(delta.widths))
    return tuple(Recalled(jnp.zeros(memory), jnp.zeros(tail, config.dtype)) for _ in range(sum(delta.layers)))


def memory_bytes(config: DecoderConfig) -> int:
    """Bytes of what a row recalls in all layers."""
    delta = config.delta
    if delta is None:
        return 0
    memory = 4 * delta.value_heads * delta.key_dim * delta.value_dim
    tail = jnp.dtype(config.dtype).itemsize * (delta.kernel - 1) * sum(delta.widths)
    return sum(delta.layers) * (memory + tail)


def cache_places(config: DecoderConfig) -> tuple[int, ...]:
    """Where each layer stands among the arrays of a `KVCache`, of its keys or of its memories."""
    kinds = [bool(config.delta and config.delta.layers[layer]) for layer in range(config.num_layers)]
    return tuple(kinds[:layer].count(kind) for layer, kind in enumerate(kinds))


def constrain_cache(cache: KVCache) -> KVCache:
    """Asks the compiler to split prompt slots as a batch and heads over `tensor`; every program returns it so."""

    def split(arrays, axes):
        return tuple(constrain(x, axes) for x in arrays)

    return KVCache(
        prefix_k=split(cache.prefix_k, PREFIX_AXES),
        prefix_v=split(cache.prefix_v, PREFIX_AXES),
        suffix_k=split(cache.suffix_k, SUFFIX_AXES),
        suffix_v=split(cache.suffix_v, SUFFIX_AXES),
        path_k=split(cache.path_k, SUFFIX_AXES),
        path_v=split(cache.path_v, SUFFIX_AXES),
        prompt_memory=tuple(
            Recalled(constrain(x.memory, MEMORY_AXES), constrain(x.tail, TAIL_AXES)) for x in cache.prompt_memory
        ),
        row_memory=tuple(map(constrain_rows, cache.row_memory)),
    )


def constrain_rows(recalled: Recalled) -> Recalled:
    """What rows [P, G, ..] recall, split as a cache is."""
    return Recalled(constrain(recalled.memory, ROWS_MEMORY_AXES), constrain(recalled.tail, ROWS_TAIL_AXES))


def cache_bytes(
    config: DecoderConfig,
    prompt_slots: int,
    sample_slots: int,
    prefix_length: int,
    suffix_length: int,
    path_slots: int = 0,
) -> int:
    """Bytes that such a cache takes over all devices."""
    columns = prompt_slots * (prefix_length + (sample_slots + path_slots) * suffix_length)
    of_column = 2 * config.attending * config.num_kv_heads * config.head_dim
    size = jnp.dtype(config.dtype).itemsize
    return of_column * columns * size + prompt_slots * (1 + sample_slots) * memory_bytes(config)


def keep_paths(cache: KVCache, moves: PathMoves) -> KVCache:
    """The cache with rows of its ring kept as paths."""
    return dataclasses.replace(
        cache,
        path_k=_move(cache.suffix_k, cache.path_k, moves, moves.row, moves.path, moves.column, K_COLUMNS),
        path_v=_move(cache.suffix_v, cache.path_v, moves, moves.row, moves.path, moves.column, V_COLUMNS),
    )


def lay_paths(cache: KVCache, moves: PathMoves) -> KVCache:
    """The cache with paths copied into rows of its ring, whatever their length: what a row sees of them is decided by
    its `steps`."""
    back = -jnp.asarray(moves.column)
    return dataclasses.replace(
        cache,
        suffix_k=_move(cache.path_k, cache.suffix_k, moves, moves.path, moves.row, back, K_COLUMNS),
        suffix_v=_move(cache.path_v, cache.suffix_v, moves, moves.path, moves.row, back, V_COLUMNS),
    )


def _move(sources, targets, moves: PathMoves, source_index, target_index, turn, axis: int) -> tuple[Array, ...]:
    """`target[slot, :, target_index][c] = source[slot, :, source_index][(c + turn) mod columns]`, layer by layer, for
    the columns of the ring, which is as long as a path or shorter."""

    def move(source, target, shard):
        columns = min(source.shape[axis], target.shape[axis])

        def one(i, target):
            slot = moves.slot[i]
            row = jax.lax.dynamic_index_in_dim(read_entry(source, slot, shard), source_index[i], 2)
            row = jax.lax.slice_in_dim(row, 0, columns, axis=axis)
            # A slice of the row written twice is the row rolled by a traced number.
            twice = jnp.concatenate([row, row], axis)
            row = jax.lax.dynamic_slice_in_dim(twice, turn[i] % columns, columns, axis)
            return write_entry(target, row, slot, shard, (0, target_index[i], 0, 0))

        return jax.lax.fori_loop(0, moves.count, one, target)

    run = on_shards(move, (SUFFIX_AXES, SUFFIX_AXES), SUFFIX_AXES)
    return tuple(run(source, target) for source, target in zip(sources, targets, strict=True))


def read_entry(source: Float[Array, "E ..."], index: Int[Array, ""], shard: Shard) -> Float[Array, "1 ..."]:
    """Entry `index` of an array of which this is a device's part (`rljax.parallel.on_shards`). Another device's entry
    gives one that means nothing."""
    own, _ = _own(source, index, shard)
    return jax.lax.dynamic_slice_in_dim(source, own, 1)


def write_entry(
    target: Float[Array, "E ..."],
    entry: Float[Array, "1 ..."],
    index: Int[Array, ""],
    shard: Shard,
    start: Sequence[Int[Array, ""] | int] | None = None,
) -> Float[Array, "E ..."]:
    """The device's part `target` with `entry` at `index` of the whole array and, in the other dimensions, from `start`
    (0) on. Of another device's entry, and of -1 on a mesh, nothing is written."""
    own, here = _own(target, index, shard)
    place = (own, *(start or (0,) * (target.ndim - 1)))
    entry = entry.astype(target.dtype)
    if shard.axes:
        # What lies at the nearest place of this device is written back unchanged.
        entry = jnp.where(here, entry, jax.lax.dynamic_slice(target, place, entry.shape))
    return jax.lax.dynamic_update_slice(target, entry, place)


def read_entries(
    source: Float[Array, "E ..."],
    index: Int[Array, " N"],
    axes: Sequence[str | None],
    mark: Int[Array, " N"] | None = None,
    size: int | None = None,
) -> Float[Array, "N ..."]:
    """Entries `index` of an array of the logical `axes`, each on the device that has it; with `mark` one of the second
    dimension of each, which is gone then; with `size` the first of their third. `index` is split as the entries are."""

    def read(source, index, *rest):
        *mark, shard = rest
        own, _ = _own(source, index, shard)
        # In one gather: a part of the whole array is never made.
        return source[(own, *mark)] if size is None else source[own, :, :size]

    marks = () if mark is None else (mark,)
    of_result = axes if mark is None else (axes[0], *axes[2:])
    return on_shards(read, (axes, ("batch",), *(("batch",) for _ in marks)), of_result)(source, index, *marks)


def write_entries(
    target: Float[Array, "E ..."],
    new: Float[Array, "N ..."],
    index: Int[Array, " N"],
    axes: Sequence[str | None],
    start: Int[Array, " N"] | None = None,
    along: int = 1,
) -> Float[Array, "E ..."]:
    """`target`, of the logical `axes`, with `new` at the entries `index`, each from `start` (0) on in the dimension
    `along`. On a mesh `new` and `index` are split as the entries are, and of -1 nothing is written."""

    def store(target, new, index, *rest):
        *starts, shard = rest

        def write(i, target):
            place: list[Array | int] = [0] * (target.ndim - 1)
            if starts:
                place[along - 1] = starts[0][i]
            return write_entry(target, jax.lax.dynamic_slice_in_dim(new, i, 1), index[i], shard, place)

        return jax.lax.fori_loop(0, new.shape[0], write, target)

    starts = () if start is None else (start,)
    run = on_shards(store, (axes, axes, ("batch",), *(("batch",) for _ in starts)), axes)
    return run(target, new.astype(target.dtype), index, *starts)


def send_entry(source: Float[Array, "E ..."], index: Int[Array, ""], shard: Shard) -> Float[Array, "1 ..."]:
    """Entry `index` of the whole array, on every device; the one that has it sends it."""
    if not shard.axes:
        return read_entry(source, index, shard)
    _, here = _own(source, index, shard)
    # A sum with zeros is exact.
    return shard.sum(jnp.where(here, read_entry(source, index, shard), 0))


def _own(x: Array, index: Array, shard: Shard) -> tuple[Array, Array]:
    """The nearest place of this part to entry `index` of the whole array, and whether it is that entry's."""
    own = index - shard.number * x.shape[0]
    return jnp.clip(own, 0, x.shape[0] - 1), (own >= 0) & (own < x.shape[0])


def resize_ring(
    size: int, k: Float[Array, "P KV G hd Ss"], v: Float[Array, "P KV G Ss hd"], column: Int[ArrayLike, ""]
) -> tuple[Float[Array, "P KV G hd Sn"], Float[Array, "P KV G Sn hd"]]:
    """A layer's ring with `size` columns, of which the last written are those of the old one, as many as both have.

    `column` is the next one to be written in the old ring, and `resized_column` that in the new one. No row may be
    older than either ring is long.
    """
    old = k.shape[K_COLUMNS]
    last = (jnp.asarray(column) - 1) % old
    # The column of the same age; of an age that the old ring does not have, one that no row sees.
    age = (last - jnp.arange(size)) % size
    source = (last - age) % old
    new_k = jnp.take(k, source, axis=K_COLUMNS)
    new_v = jnp.take(v, source, axis=V_COLUMNS)
    return constrain(new_k, SUFFIX_AXES), constrain(new_v, SUFFIX_AXES)


def resize_prompts(size: int, kept: Float[Array, "P KV Sp hd"]) -> Float[Array, "P KV Sn hd"]:
    """A layer's keys or values of prompts with room for `size` tokens each, of which no prompt has more."""
    old = kept.shape[2]
    if size > old:
        kept = jnp.pad(kept, ((0, 0), (0, 0), (0, size - old), (0, 0)))
    return constrain(kept[:, :, :size], PREFIX_AXES)


def prompts_size(cache: KVCache) -> int:
    """Tokens for which a prompt has room."""
    return cache.prefix_k[0].shape[2]


def without_prompts(cache: KVCache) -> KVCache:
    """Ring, paths and what rows recall alone. A program is compiled for what it sees, so one that does not read prompts
    is given this, and is one program whatever their room."""
    return dataclasses.replace(cache, prefix_k=(), prefix_v=(), prompt_memory=())


def ring_size(cache: KVCache) -> int:
    """Columns of the ring."""
    return cache.suffix_v[0].shape[V_COLUMNS]


def resized_column(column: int, old: int, size: int) -> int:
    """The next column to be written in a ring that `resize_ring` has brought from `old` to `size` columns."""
    return ((column - 1) % old + 1) % size


def layer_cache(cache: KVCache, index: int) -> LayerCache:
    """The arrays of layer `index`."""
    return LayerCache(
        prefix_k=cache.prefix_k[index],
        prefix_v=cache.prefix_v[index],
        suffix_k=cache.suffix_k[index],
        suffix_v=cache.suffix_v[index],
    )


def cached_attention(
    q: Float[Array, "P G H hd"],
    layer: LayerCache,
    prefix_length: Int[Array, " P"],
    age: Int[Array, " Ss"],
    steps: Int[Array, "P G"],
    window: int,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "P G H hd"]:
    """One new token a row attends to its prompt and to its own columns of the ring, in one float32 softmax.

    `steps[p, g]` counts the row's columns before this one; `age[c]` is how many steps ago column `c` was written (0
    is this step's). The token's position is `prefix_length + steps`. Keys `window` or more positions back are hidden.
    `sinks` are one score more in every softmax of their head, for nothing.
    """
    slots, samples, heads, head_dim = q.shape
    kv_heads, prefix_size = layer.prefix_k.shape[1:3]
    q = q.reshape(slots, samples, kv_heads, heads // kv_heads, head_dim).swapaxes(1, 2) / score_divisor(head_dim)

    column = jnp.arange(prefix_size)
    position = prefix_length[:, None] + steps
    in_prefix = (column < prefix_length[:, None, None]) & (position[:, :, None] - column < window)
    # Columns older than the row itself are its predecessor's.
    in_suffix = (age <= steps[:, :, None]) & (age < window)

    def product(equation, a, b):
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    # All queries of a prompt that share a key head meet its keys in one product.
    shared = (slots, kv_heads, samples * q.shape[3])
    prefix_scores = _scores(q.reshape(*shared, head_dim), layer.prefix_k)
    prefix_scores = prefix_scores.reshape(*q.shape[:-1], prefix_size)
    prefix_scores = jnp.where(in_prefix[:, None, :, None], prefix_scores, MASKED)
    suffix_scores = product("pkgrd,pkgds->pkgrs", q, layer.suffix_k)
    suffix_scores = jnp.where(in_suffix[:, None, :, None], suffix_scores, MASKED)

    # One softmax over both parts: the same maximum, and one total. The row's own new column is always visible.
    best = jnp.maximum(jnp.max(prefix_scores, -1, keepdims=True), jnp.max(suffix_scores, -1, keepdims=True))
    if sinks is not None:
        # [KV, 1, R, 1] beside scores [P, KV, G, R, columns].
        sinks = sinks.astype(jnp.float32).reshape(kv_heads, 1, -1, 1)
        best = jnp.maximum(best, sinks)
    prefix_weights = jnp.exp(prefix_scores - best)
    suffix_weights = jnp.exp(suffix_scores - best)
    total = jnp.sum(prefix_weights, -1, keepdims=True) + jnp.sum(suffix_weights, -1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - best)

    prefix_weights = prefix_weights.astype(q.dtype).reshape(*shared, prefix_size)
    out = product("pkns,pksd->pknd", prefix_weights, layer.prefix_v).reshape(q.shape)
    out += product("pkgrs,pkgsd->pkgrd", suffix_weights.astype(q.dtype), layer.suffix_v)
    return (out / total).swapaxes(1, 2).reshape(slots, samples, heads, head_dim).astype(q.dtype)


def _scores(q: Float[Array, "P KV N hd"], k: Float[Array, "P KV Sp hd"]) -> Float[Array, "P KV N Sp"]:
    """Products of queries and keys in float32. A CPU multiplies two or three rows with a transposed matrix ten times
    slower than one or four, so they go one by one."""
    if platform() == "cpu" and q.shape[2] in (2, 3):
        rows = [
            jnp.einsum("pkd,pksd->pks", q[:, :, i], k, preferred_element_type=jnp.float32) for i in range(q.shape[2])
        ]
        return jnp.stack(rows, axis=2)
    return jnp.einsum("pknd,pksd->pkns", q, k, preferred_element_type=jnp.float32)


def write_column(
    layer: LayerCache,
    k: Float[Array, "P G KV hd"],
    v: Float[Array, "P G KV hd"],
    column: Int[Array, ""],
    active: Bool[Array, "P G"] | None = None,
) -> LayerCache:
    """The layer with the new keys and values in one ring column of every row, or of the `active` ones."""
    k = k.swapaxes(1, 2)[..., None].astype(layer.suffix_k.dtype)
    v = v.swapaxes(1, 2)[..., None, :].astype(layer.suffix_v.dtype)
    if active is not None:
        here = active[:, None, :, None, None]
        k = jnp.where(here, k, jax.lax.dynamic_slice_in_dim(layer.suffix_k, column, 1, K_COLUMNS))
        v = jnp.where(here, v, jax.lax.dynamic_slice_in_dim(layer.suffix_v, column, 1, V_COLUMNS))

    update = jax.lax.dynamic_update_slice
    return layer._replace(
        suffix_k=update(layer.suffix_k, k, (0, 0, 0, 0, column)),
        suffix_v=update(layer.suffix_v, v, (0, 0, 0, column, 0)),
    )
