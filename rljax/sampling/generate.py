"""The decoder's device side: prefill prompts into the cache, then sample step by step in one `while_loop`.

Rows form a grid `[P, G]` of prompt slots and sample slots (see `rljax.models.cache`). Every function here is pure; the
host side, which fills the slots, is `rljax.sampling.sampler`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from rljax.models.attention import forest_attention
from rljax.models.cache import (
    MEMORY_AXES,
    PREFIX_AXES,
    TAIL_AXES,
    KVCache,
    cache_places,
    cached_attention,
    constrain_cache,
    layer_cache,
    ring_size,
    send_entry,
    write_column,
    write_entries,
    write_entry,
)
from rljax.models.config import DecoderConfig
from rljax.models.decoder import apply_layer, embed, final_norm, has_delta
from rljax.models.delta import Recalled, next_recall, prompt_recall
from rljax.models.experts import Choose, best_experts
from rljax.models.head import logits
from rljax.models.rope import rotary_tables
from rljax.parallel import constrain, on_shards, platform
from rljax.sampling.logits import (
    Before,
    Rules,
    SamplingParams,
    adjust_logits,
    ban_logits,
    best_tokens,
    process_logits,
    sample_tokens,
)
from rljax.sampling.weights import chosen_adapters, product, product_of_few
from rljax.types import ArrayLike, Params, Width, struct


@struct
class DecodeRows:
    """What the host tells the device about the grid of rows when it starts a run of steps."""

    prompt_id: Int[ArrayLike, " P"]
    """Names the random numbers, with the sample id."""
    prefix_length: Int[ArrayLike, " P"]
    """Prompt tokens in the cache: all but the last."""
    sample_id: Int[ArrayLike, "P G"]
    """Names the random numbers, with the prompt id."""
    token: Int[ArrayLike, "P G"]
    """The next one to feed: the prompt's last, then the last one sampled."""
    steps: Int[ArrayLike, "P G"]
    """Tokens of the completion so far, inherited ones too."""
    max_new_tokens: Int[ArrayLike, "P G"]
    """`steps` at which the row ends."""
    active: Bool[ArrayLike, "P G"]
    """Rows that hold an unfinished sample."""
    waiting: Int[ArrayLike, " P"]
    """Samples of the slot's prompt that wait for a row."""
    forced: Int[ArrayLike, "P G F"]
    """Tokens of the completion that are given, not sampled."""
    forced_start: Int[ArrayLike, "P G"]
    """Place of the first given token in the completion."""
    forced_length: Int[ArrayLike, "P G"]
    """How many tokens are given."""
    suppressed: Int[ArrayLike, " N"] | None = None
    """Tokens that may not be sampled at `suppress_at`; None where nothing is ever suppressed."""
    suppress_at: Int[ArrayLike, "P G"] | None = None
    """Place in the completion at which none of `suppressed` may be sampled; -1 for nowhere."""
    allowed: UInt32[ArrayLike, "P G W"] | None = None
    """A bit a token of the vocabulary, the first the lowest: whether it may be sampled in the first step; None where
    all may. A run that has it is of one step."""
    prompt: Int[ArrayLike, "P S"] | None = None
    """Tokens of the prompts, then `NO_TOKEN`; needed with penalties, as the next two."""
    said: Int[ArrayLike, "P G T"] | None = None
    """Tokens of the completions so far, then `NO_TOKEN`."""
    said_sampled: Bool[ArrayLike, "P G T"] | None = None
    """Which of these the policy has sampled."""
    drawn: Int[ArrayLike, "P G"] | None = None
    """Random numbers of a row's ids that were used up before those of `steps`; None for none anywhere."""
    adapter: Int[ArrayLike, " P"] | None = None
    """Which of the adapters side by side each prompt's rows have; None where there is a single one, or none."""
    recorded: Width = Width(0)
    """Experts of a token and layer that are recorded: all that compute for it, or 0."""


@struct
class DecodeRun:
    """What holds for one run of steps as a whole."""

    column: Int[ArrayLike, ""]
    """Ring column of the first step."""
    sampling: SamplingParams
    """The distribution that is sampled from."""
    seed: Int[ArrayLike, ""]
    """Seed of the random numbers."""
    step: Int[ArrayLike, ""]
    """Training step, which enters the random numbers."""
    max_steps: Int[ArrayLike, ""]
    """Most steps of the run, at most the length of the buffer."""
    other_work: Bool[ArrayLike, " P"]
    """Whether a slot whose rows are all idle could be given work of another prompt."""
    refill_rows: Int[ArrayLike, ""]
    """Idle rows that could be given work, at which the run ends."""


@struct
class Emitted:
    """What one run of `K` steps sampled; row (p, g) owns the first entries of `[:, p, g]`, as many as its `steps`
    grew."""

    tokens: Int[Array, "K P G"]
    """Token ids, given ones too."""
    logprobs: Float[Array, "K P G"]
    """Nats, of the distribution sampled from; 0 for a given token and one drawn while others were suppressed."""
    entropies: Float[Array, "K P G"]
    """Nats, likewise."""
    top_tokens: Int[Array, "K P G N"] | None = None
    """The most probable tokens of the distribution sampled from, the best first; None where nobody asks."""
    top_logprobs: Float[Array, "K P G N"] | None = None
    """Their log-probs, nats; below `MASKED / 2` for one that truncation removed."""
    experts: Int[Array, "K P G L k"] | None = None
    """int16: those that each layer chose for the token that was fed, which is the one before; None without a record."""

    def of_row(self, row: tuple[int, int], count: int) -> dict[str, np.ndarray]:
        """What a row emitted in its first `count` steps, by the names in `TOLD` that are there. On the host."""
        arrays = {name: getattr(self, name) for name in TOLD}
        return {name: np.asarray(x)[(slice(count), *row)] for name, x in arrays.items() if x is not None}


TOLD = ("tokens", "logprobs", "entropies", "top_tokens", "top_logprobs", "experts")
"""What a row emits, and a sample has, a token each."""


class Buffer(NamedTuple):
    """What a run of steps has room for. Static."""

    steps: int
    """Most steps."""
    top: int = 0
    """Most probable tokens that are told beside each."""


@struct
class _Loop:
    """What a step hands to the next one."""

    step: Array
    cache: KVCache
    token: Array
    steps: Array
    active: Array
    emitted: Emitted
    before: Before | None = None


def prefill(
    config: DecoderConfig,
    params: Params,
    cache: KVCache,
    tokens: Int[ArrayLike, "N S"],
    slots: Int[ArrayLike, " N"],
    adapter: Int[ArrayLike, " N"] | None = None,
    recorded: int = 0,
    length: Int[ArrayLike, " N"] | None = None,
) -> tuple[KVCache, Int[Array, "N S L k"] | None]:
    """Writes the keys and values of `N` prompts (right-padded; the padding is never read) into prompt slots. `adapter`
    says which of several each prompt has, `length` how many tokens, which a model with a delta rule asks for. Returns
    the experts of each token too, where `recorded` asks for them.

    On a mesh prompts and slots are split alike: each device computes the prompts of its own slots, and slot -1 is of a
    prompt that counts for nothing. `params` are those of `decode_weights`.
    """
    tokens = jnp.asarray(tokens)
    slots = jnp.asarray(slots)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # Each prompt is a tree of one branch: a token sees all before it, and padding, which comes last, is seen by none.
    end = jnp.full(tokens.shape, tokens.shape[1])
    tables = rotary_tables(config, positions)

    multiply = chosen_adapters(product, adapter)
    record = _Record(config, recorded)
    x = constrain(embed(config, params, tokens), ("batch", None, None))
    prefix_k = []
    prefix_v = []
    memories = []
    layers = zip(params["layers"], cache_places(config), config.windows, config.rotations, strict=True)
    for layer_params, place, window, rotation in layers:

        def attend(q, k, v, sinks=None, window=window):
            return forest_attention(q, k, v, positions, end, window, sinks=sinks), (k, v)

        def recall(mixed, kernel, g, beta):
            assert config.delta is not None and length is not None, "a delta rule needs the length of each prompt"
            return prompt_recall(config.delta, mixed, kernel, g, beta, jnp.asarray(length))

        mix = recall if has_delta(layer_params) else attend
        x, new = apply_layer(config, layer_params, x, tables[rotation], mix, multiply, record.choose)
        if has_delta(layer_params):
            memories.append(_remember(cache.prompt_memory[place], new, slots))
        else:
            k, v = new
            prefix_k.append(write_entries(cache.prefix_k[place], jnp.swapaxes(k, 1, 2), slots, PREFIX_AXES))
            prefix_v.append(write_entries(cache.prefix_v[place], jnp.swapaxes(v, 1, 2), slots, PREFIX_AXES))

    # The prompt's last token is fed by the decoder, so no logits are needed here.
    cache = dataclasses.replace(
        cache, prefix_k=tuple(prefix_k), prefix_v=tuple(prefix_v), prompt_memory=tuple(memories)
    )
    experts = record.stacked()
    # The host of every process reads these whole.
    experts = None if experts is None else constrain(experts, (None,) * experts.ndim)
    return constrain_cache(cache), experts


class _Record:
    """The experts that the layers of one pass choose, kept as they are asked, layer by layer."""

    def __init__(self, config: DecoderConfig, recorded: int):
        self._chosen: list[Array] = []
        self._best = best_experts(config.experts) if config.experts is not None and recorded else None

    @property
    def choose(self) -> Choose | None:
        """For `apply_layer`: None where nothing is recorded."""
        return None if self._best is None else self._choose

    def _choose(self, scores: Array) -> Array:
        assert self._best is not None
        self._chosen.append(self._best(scores))
        return self._chosen[-1]

    def stacked(self) -> Int[Array, "*B L k"] | None:
        """Those of all layers that have experts; None where nothing is recorded."""
        return jnp.stack(self._chosen, axis=-2).astype(jnp.int16) if self._chosen else None


def _remember(prompts: Recalled, new: Recalled, slots: Array) -> Recalled:
    return Recalled(
        write_entries(prompts.memory, new.memory, slots, MEMORY_AXES),
        write_entries(prompts.tail, new.tail, slots, TAIL_AXES),
    )


def copy_prompt(cache: KVCache, source: Int[ArrayLike, ""], target: Int[ArrayLike, ""]) -> KVCache:
    """The cache with the prompt of one slot copied into another, which may be another device's."""

    def copy(prefix, shard):
        return write_entry(prefix, send_entry(prefix, jnp.asarray(source), shard), jnp.asarray(target), shard)

    run, of_memory, of_tail = (on_shards(copy, (axes,), axes) for axes in (PREFIX_AXES, MEMORY_AXES, TAIL_AXES))
    prefix_k = tuple(map(run, cache.prefix_k))
    prefix_v = tuple(map(run, cache.prefix_v))
    memories = tuple(Recalled(of_memory(own.memory), of_tail(own.tail)) for own in cache.prompt_memory)
    return constrain_cache(dataclasses.replace(cache, prefix_k=prefix_k, prefix_v=prefix_v, prompt_memory=memories))


def token_uniforms(
    seed: Int[ArrayLike, ""],
    step: Int[ArrayLike, ""],
    prompt_id: Int[ArrayLike, "..."],
    sample_id: Int[ArrayLike, "..."],
    position: Int[ArrayLike, "..."],
) -> Float[Array, "..."]:
    """The uniform number in [0, 1) that decides a token: a function of these five integers alone.

    `position` counts the tokens of the completion from 0. The three arrays broadcast against each other.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)

    def one(prompt_id, sample_id, position):
        of_prompt = jax.random.fold_in(key, prompt_id)
        of_sample = jax.random.fold_in(of_prompt, sample_id)
        return jax.random.uniform(jax.random.fold_in(of_sample, position))

    arrays = jnp.broadcast_arrays(prompt_id, sample_id, position)
    return jax.vmap(one)(*(jnp.ravel(x) for x in arrays)).reshape(arrays[0].shape)


def decode(
    config: DecoderConfig,
    stop_tokens: tuple[int, ...],
    buffer: Buffer,
    params: Params,
    cache: KVCache,
    rows: DecodeRows,
    run: DecodeRun,
    rules: Rules | None = None,
) -> tuple[KVCache, Int[Array, ""], Int[Array, "P G"], Bool[Array, "P G"], Emitted]:
    """Samples up to `run.max_steps <= buffer.steps` tokens for every active row.

    Stops early when no row is active, or when `run.refill_rows` rows could be given new work: idle rows with samples of
    their own prompt waiting, and rows of wholly idle slots that would find other work. Where the cache has room for
    paths, the columns of a row that ends stay as they are until the call returns. `params` are those of
    `decode_weights`; `rules`, static, those of `run.sampling`, or None to find out as the program runs. Returns
    (cache, next column, steps, active, emitted).
    """
    ring = ring_size(cache)
    shape = rows.token.shape
    # Numbers of all steps at once: one draw of many is faster than many of one. A row at step t of the run uses
    # uniforms[t], which belong to the t-th token from its own `steps` on.
    position = jnp.arange(buffer.steps)[:, None, None] + rows.steps
    if rows.drawn is not None:
        position += rows.drawn
    uniforms = token_uniforms(run.seed, run.step, rows.prompt_id[:, None], rows.sample_id, position)
    # A CPU adds up along many columns at once, an accelerator along rows.
    axis = 0 if platform() == "cpu" else -1

    def refillable(active):
        idle = jnp.sum(~active, axis=1)
        own = jnp.minimum(idle, rows.waiting)
        free = (idle == shape[1]) & (rows.waiting == 0) & run.other_work
        return jnp.sum(own) + jnp.sum(free) * shape[1]

    def keeps_going(loop: _Loop):
        full = refillable(loop.active) < run.refill_rows
        return (loop.step < run.max_steps) & jnp.any(loop.active) & full

    def body(loop: _Loop) -> _Loop:
        now = (run.column + loop.step) % ring
        hidden, cache, experts = _forward(config, params, loop.cache, rows, loop.token, loop.steps, now, loop.active)

        raw = logits(config, params, hidden, vocab_first=axis == 0)
        if run.sampling.adjusts or rows.allowed is not None:
            raw = adjust_logits(raw, run.sampling, axis=axis, allowed=rows.allowed, before=loop.before)
        raw = _suppress(rows, loop.steps, raw, axis)
        if buffer.top:
            top = best_tokens(raw, run.sampling, buffer.top, axis=axis, rules=rules)
        token, logprob, entropy = draw(raw, uniforms[loop.step], run.sampling, rules, axis)
        if rows.forced.shape[-1]:
            token, logprob, entropy = _force(rows, loop.steps, token, logprob, entropy)
        if rows.suppressed is not None:
            # Not drawn as the policy would: nothing is known of it that could be trained on.
            logprob, entropy = (jnp.where(_is_suppressing(rows, loop.steps), 0, x) for x in (logprob, entropy))

        before = loop.before
        if before is not None:
            is_own = loop.active & ~_is_forced(rows, loop.steps)
            if rows.suppressed is not None:
                is_own &= ~_is_suppressing(rows, loop.steps)
            before = _with_tokens(before, token[..., None], loop.active[..., None], is_own[..., None], axis)

        steps = loop.steps + loop.active
        stopped = jnp.any(token[..., None] == jnp.asarray(stop_tokens, jnp.int32), axis=-1)
        # A given token never stops a row: what follows it is the sample's own.
        stopped = (stopped & ~_is_forced(rows, loop.steps)) | (steps >= rows.max_new_tokens)

        # Rows that are not active write here too; the host reads as many entries of a row as its `steps` grew.
        told: dict[str, Any] = {"tokens": token, "logprobs": logprob, "entropies": entropy}
        if buffer.top:
            told["top_tokens"], told["top_logprobs"] = top
        if loop.emitted.experts is not None:
            told["experts"] = experts
        emitted = Emitted(**{name: getattr(loop.emitted, name).at[loop.step].set(x) for name, x in told.items()})
        return _Loop(
            step=loop.step + 1,
            cache=cache,
            token=jnp.where(loop.active, token, loop.token),
            steps=steps,
            active=loop.active & ~stopped,
            emitted=emitted,
            before=before,
        )

    empty = jnp.zeros((buffer.steps, *shape))
    no_top = jnp.zeros((buffer.steps, *shape, buffer.top)) if buffer.top else None
    of_layers = (buffer.steps, *shape, config.mixing, rows.recorded)
    no_experts = jnp.zeros(of_layers, jnp.int16) if rows.recorded else None
    start = _Loop(
        step=jnp.int32(0),
        cache=cache,
        token=jnp.asarray(rows.token),
        steps=jnp.asarray(rows.steps),
        active=jnp.asarray(rows.active),
        emitted=Emitted(
            tokens=empty.astype(jnp.int32),
            logprobs=empty,
            entropies=empty,
            top_tokens=None if no_top is None else no_top.astype(jnp.int32),
            top_logprobs=no_top,
            experts=no_experts,
        ),
        before=_before(config, rows, axis) if run.sampling.penalises else None,
    )
    end = jax.lax.while_loop(keeps_going, body, start)

    # The host of every process reads these whole.
    steps, active, emitted = jax.tree.map(
        lambda x: constrain(x, (None,) * x.ndim), (end.steps, end.active, end.emitted)
    )
    next_column = (jnp.asarray(run.column) + end.step) % ring
    return end.cache, next_column, steps, active, emitted


def _before(config: DecoderConfig, rows: DecodeRows, axis: int) -> Before:
    """Which tokens stand before the first step, in the layout of its logits."""
    assert rows.prompt is not None and rows.said is not None, "penalties need the tokens of prompts and completions"
    said = jnp.asarray(rows.said)
    shape = (*said.shape[:2], config.vocab_size)
    shape = (shape[2], *shape[:2]) if axis == 0 else shape
    nothing = Before(seen=jnp.zeros(shape, bool), sampled=jnp.zeros(shape, jnp.int32))
    prompts = jnp.broadcast_to(jnp.asarray(rows.prompt)[:, None], (*said.shape[:2], rows.prompt.shape[1]))
    given = _with_tokens(nothing, prompts, jnp.ones_like(prompts, bool), jnp.zeros_like(prompts, bool), axis)
    return _with_tokens(given, said, jnp.ones_like(said, bool), jnp.asarray(rows.said_sampled), axis)


def _with_tokens(before: Before, tokens: Array, counts: Array, is_own: Array, axis: int) -> Before:
    """With the tokens [P, G, T] that `counts` marks, of which those of `is_own` were sampled; `NO_TOKEN` is none."""
    slots, samples, _ = tokens.shape
    row = jnp.arange(slots)[:, None, None]
    column = jnp.arange(samples)[None, :, None]
    at = (tokens, row, column) if axis == 0 else (row, column, tokens)
    return Before(
        seen=before.seen.at[at].max(counts, mode="drop"),
        sampled=before.sampled.at[at].add(is_own.astype(jnp.int32), mode="drop"),
    )


def draw(
    logits: Float[ArrayLike, "..."],
    uniform: Float[ArrayLike, "P G"],
    sampling: SamplingParams,
    rules: Rules | None,
    axis: int,
) -> tuple[Int[Array, "P G"], Float[Array, "P G"], Float[Array, "P G"]]:
    """(tokens, log-probs in nats, entropies in nats) drawn from logits [V, P, G] or [P, G, V], whose vocabulary is
    `axis`, 0 or -1. On a mesh each device looks at its own part of the vocabulary and of the rows, and the parts
    exchange a few numbers a row."""
    greedy = jnp.asarray(sampling.temperature) <= 0 if rules is None else rules.greedy

    def own(_, logits, uniform, shard):
        processed = process_logits(logits, sampling, axis=axis, rules=rules, shard=shard)
        return sample_tokens(processed, uniform, greedy, axis=axis, shard=shard)

    # The first array says which part of the vocabulary a device has.
    logits = jnp.asarray(logits)
    ids = jnp.arange(logits.shape[axis])
    of_logits = ("vocab", "batch", None) if axis == 0 else ("batch", None, "vocab")
    run = on_shards(own, (("vocab",), of_logits, ("batch", None)), ("batch", None))
    return run(ids, logits, jnp.asarray(uniform))


def _suppress(rows: DecodeRows, steps: Array, logits: Array, axis: int) -> Array:
    """Logits without what may not be sampled now; the vocabulary is `axis`, 0 or -1."""
    if rows.suppressed is None:
        return logits
    return ban_logits(logits, rows.suppressed, _is_suppressing(rows, steps), axis=axis)


def _is_suppressing(rows: DecodeRows, steps: Array) -> Array:
    return jnp.equal(steps, jnp.asarray(rows.suppress_at))


def _is_forced(rows: DecodeRows, steps: Array) -> Array:
    offset = steps - rows.forced_start
    return (offset >= 0) & (offset < rows.forced_length)


def _force(rows: DecodeRows, steps: Array, token: Array, logprob: Array, entropy: Array) -> tuple[Array, Array, Array]:
    """What was sampled, or the given token where there is one."""
    forced = jnp.asarray(rows.forced)
    where = _is_forced(rows, steps)
    offset = jnp.clip(steps - rows.forced_start, 0, forced.shape[-1] - 1)
    given = jnp.take_along_axis(forced, offset[..., None], axis=-1)[..., 0]
    return jnp.where(where, given, token), jnp.where(where, 0, logprob), jnp.where(where, 0, entropy)


def _forward(
    config, params, cache: KVCache, rows: DecodeRows, token, steps, column, active
) -> tuple[Array, KVCache, Array | None]:
    """Final-normed hidden states [P, G, D] of one new token a row, the cache with the keys and values of the `active`
    rows, or of all, and the token's experts where `rows` asks for a record."""
    ring = ring_size(cache)
    # Without paths a row that ended may be written on, since nobody reads its columns again; with them it may not.
    writes = active if cache.path_k else None
    # How many steps ago each column of the ring was written; the column of this step is 0 steps old.
    age = (column - jnp.arange(ring)) % ring
    prefix_length = jnp.asarray(rows.prefix_length)
    tables = rotary_tables(config, prefix_length[:, None] + steps)
    multiply = chosen_adapters(product_of_few, rows.adapter)
    record = _Record(config, rows.recorded)

    x = constrain(embed(config, params, token), ("batch", None, None))
    suffix_k = []
    suffix_v = []
    memories = []
    layers = zip(params["layers"], cache_places(config), config.windows, config.rotations, strict=True)
    for layer_params, place, window, rotation in layers:

        def attend(q, k, v, sinks=None, place=place, window=window):
            # Written before it is read: a token sees itself.
            layer = write_column(layer_cache(cache, place), k, v, column, writes)
            return cached_attention(q, layer, prefix_length, age, steps, window, sinks), layer

        def recall(mixed, kernel, g, beta, place=place):
            assert config.delta is not None
            before = _recalled(cache, place, steps)
            out, new = next_recall(config.delta, mixed, kernel, g, beta, before)
            # A turn that goes on later remembers nothing of what is behind its end.
            return out, jax.tree.map(lambda new, old: jnp.where(_beside(active, new), new, old), new, before)

        mix = recall if has_delta(layer_params) else attend
        x, new = apply_layer(config, layer_params, x, tables[rotation], mix, multiply, record.choose)
        if has_delta(layer_params):
            memories.append(new)
        else:
            suffix_k.append(new.suffix_k)
            suffix_v.append(new.suffix_v)

    cache = dataclasses.replace(cache, suffix_k=tuple(suffix_k), suffix_v=tuple(suffix_v), row_memory=tuple(memories))
    return final_norm(config, params, x), cache, record.stacked()


def _recalled(cache: KVCache, place: int, steps: Int[Array, "P G"]) -> Recalled:
    """What rows of a layer recall: that of their prompt before their first step."""

    def chosen(row, prompt):
        return jnp.where(_beside(steps > 0, row), row, prompt[:, None])

    return jax.tree.map(chosen, cache.row_memory[place], cache.prompt_memory[place])


def _beside(rows: Bool[Array, "P G"], x: Array) -> Array:
    """`rows`, for each of an array [P, G, ...]."""
    return rows.reshape(*rows.shape, *(1,) * (x.ndim - 2))
