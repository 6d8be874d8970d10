"""Log-probs and entropies of given tokens: the training side of sampling, and the one place that shifts by one.

The vocabulary head runs on scored tokens alone, a chunk of them at a time, with a gradient of its own: logits are
recomputed chunk by chunk in the backward pass and never exist for more than one chunk.

On a mesh every device goes through chunks of its own rows. The head is gathered once before them and its gradient
reduced once after the last, so that the size of a chunk does not change what is sent.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rljax.models import (
    PLAIN,
    DecoderConfig,
    Forward,
    Shares,
    head_params,
    hidden_states,
    logits,
    logits_gradient,
    sequence_shares,
    values,
)
from rljax.models.config import DOWN, UP
from rljax.parallel import split_axes
from rljax.sampling.logits import (
    MASKED,
    Before,
    SamplingParams,
    adjust_logits,
    bias_logits,
    penalty_slope,
    process_logits,
)
from rljax.types import ArrayLike, Packed, Params


def score_tokens(
    config: DecoderConfig,
    params: Params,
    packed: Packed,
    sampling_params: SamplingParams | None = None,
    *,
    chunk: int = 512,
    forward: Forward = PLAIN,
) -> tuple[Float[Array, "R K"], Float[Array, "R K"]]:
    """Log-probs and entropies (float32, nats) of the tokens that `packed.score_index` lists, each under the
    distribution that its predecessor's hidden state gives. 0 where `score_index` is -1.

    Both are differentiable in `params`. With `sampling_params` the distribution is the tempered and truncated one that
    is sampled from (a scored token that truncation would remove is kept); None is the model's own. On each device
    logits exist for `chunk` tokens at a time (at least one of each of its packed rows).
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 token; 512 suits most machines")
    shares = sequence_shares(*packed.tokens.shape)
    wanted, targets, before = _places(packed)
    context = _context(packed, before, sampling_params)
    if shares is None:
        states = scored_states(config, params, packed, forward=forward)
        return score_hidden(config, params, *states, sampling_params, chunk=chunk, context=context)
    if context is not None:
        raise ValueError("grammars and penalties are not scored where devices share sequences")

    hidden = _hidden_states(config, params, packed, shares, forward)
    # Scored tokens may lie all in one part of a sequence, so its devices take equal numbers of them.
    hidden = shares.states_at(hidden, shares.split(shares.place(before)))
    targets = shares.split(targets)
    wanted = shares.split(wanted)
    logprobs, entropies = score_hidden(config, params, hidden, targets, wanted, sampling_params, chunk=chunk)
    count = before.shape[1]
    return shares.join(logprobs, count), shares.join(entropies, count)


def scored_states(
    config: DecoderConfig,
    params: Params,
    packed: Packed,
    *,
    forward: Forward = PLAIN,
) -> tuple[Float[Array, "R K D"], Int[Array, "R K"], Bool[Array, "R K"]]:
    """The final-normed hidden states that give the distributions of the tokens of `packed.score_index`, these tokens,
    and whether they are wanted: what `score_hidden` takes. Of packed sequences that no devices share."""
    hidden = _hidden_states(config, params, packed, None, forward)
    wanted, targets, before = _places(packed)
    return jnp.take_along_axis(hidden, before[..., None], axis=1), targets, wanted


def score_values(
    config: DecoderConfig,
    params: Params,
    packed: Packed,
    sampling_params: SamplingParams | None = None,
    *,
    chunk: int = 512,
    forward: Forward = PLAIN,
) -> tuple[Float[Array, "R K"], Float[Array, "R K"]]:
    """`score_tokens` of a critic: the value (float32) of the state in which each token of `packed.score_index` was
    chosen, which is what its predecessor's hidden state gives; and zeros. 0 where `score_index` is -1.

    Differentiable in `params`. A value belongs to no distribution and has no logits: `sampling_params` and `chunk`
    change nothing. ValueError when the model has no value head.
    """
    shares = sequence_shares(*packed.tokens.shape)
    hidden = _hidden_states(config, params, packed, shares, forward)
    found = values(config, params, hidden)
    wanted, _, before = _places(packed)
    if shares is not None:
        before = shares.place(before)
    found = jnp.where(wanted, jnp.take_along_axis(found, before, axis=1), 0.0)
    return found, jnp.zeros_like(found)


def _hidden_states(
    config: DecoderConfig, params: Params, packed: Packed, shares: Shares | None, forward: Forward
) -> Array:
    """Of all positions in order; in the order of shares, where devices share packed sequences."""
    tokens, positions, subtree_end = (jnp.asarray(x) for x in (packed.tokens, packed.positions, packed.subtree_end))
    # A critic has experts of its own: the record is of the policy's.
    experts = None if packed.experts is None or config.value_head else jnp.asarray(packed.experts)
    if shares is not None:
        attention = shares.attention(forward.attention, positions, subtree_end)
        recall = None if config.delta is None else shares.recall(config.delta, subtree_end)
        forward = dataclasses.replace(forward, attention=attention, recall=recall)
        tokens, positions, subtree_end = (shares.in_shares(x) for x in (tokens, positions, subtree_end))
        experts = None if experts is None else shares.in_shares(experts)
    return hidden_states(config, params, tokens, positions, subtree_end, forward=forward, experts=experts)


def _places(packed: Packed) -> tuple[Array, Array, Array]:
    """Which of `score_index` are wanted, the tokens there, and where their predecessors lie, [R, K] each."""
    wanted = jnp.asarray(packed.score_index) >= 0
    index = jnp.maximum(packed.score_index, 0)
    targets = jnp.take_along_axis(jnp.asarray(packed.tokens), index, axis=1)
    before = jnp.take_along_axis(jnp.asarray(packed.predecessor), index, axis=1)
    return wanted, targets, jnp.maximum(before, 0)


class Masks(NamedTuple):
    """Which tokens count where they are scored."""

    allowed: Array
    """uint32 [R, U, W]: masks of each packed row, a bit a token of the vocabulary."""
    which: Array
    """int32 [R, K]: that of each scored token; -1 where all count."""

    def words(self) -> Array:
        """uint32 [R, K, W]."""
        words = jnp.take_along_axis(self.allowed, jnp.maximum(self.which, 0)[..., None], axis=1)
        return jnp.where(self.which[..., None] >= 0, words, jnp.uint32(0xFFFFFFFF))

    def part(self, i: Array, step: int) -> "Masks":
        """Those of a chunk of scored tokens."""
        return self._replace(which=_slice(self.which, i, step))


class History(NamedTuple):
    """Which tokens stand before those that are scored: of each packed row its tokens."""

    tokens: Array
    """int32 [R, S]."""
    subtree_end: Array
    """int32 [R, S]."""
    is_sampled: Array
    """bool [R, S]: those of the policy."""
    before: Array
    """int32 [R, K]: where the token before a scored one lies; -1 for none."""

    def counts(self, vocab: int) -> Before:
        """Of each scored token, [R, K, V]: what stands on its path."""
        rows, length = self.tokens.shape
        last = self.before[..., None]
        on_path = (jnp.arange(length) <= last) & (last < self.subtree_end[:, None])
        row = jnp.arange(rows)[:, None, None]
        place = jnp.arange(self.before.shape[1])[None, :, None]
        at = (row, place, self.tokens[:, None])
        shape = (*self.before.shape, vocab)
        own = (on_path & self.is_sampled[:, None]).astype(jnp.int32)
        return Before(
            seen=jnp.zeros(shape, bool).at[at].max(on_path), sampled=jnp.zeros(shape, jnp.int32).at[at].add(own)
        )

    def part(self, i: Array, step: int) -> "History":
        """That of a chunk of scored tokens."""
        return self._replace(before=_slice(self.before, i, step))


class Context(NamedTuple):
    """What beside the hidden state says which tokens could be sampled, and how likely."""

    masks: Masks | None
    history: History | None

    def part(self, i: Array, step: int) -> "Context":
        """Those of a chunk of scored tokens."""
        masks = None if self.masks is None else self.masks.part(i, step)
        return Context(masks, None if self.history is None else self.history.part(i, step))

    def padded(self, padding: int) -> "Context":
        """With so many scored tokens more, of which nothing is said."""

        def pad(x: Array) -> Array:
            return jnp.pad(x, ((0, 0), (0, padding)), constant_values=-1)

        masks = self.masks
        history = self.history
        return Context(
            None if masks is None else masks._replace(which=pad(masks.which)),
            None if history is None else history._replace(before=pad(history.before)),
        )


def _context(packed: Packed, before: Array, sampling: SamplingParams | None) -> Context | None:
    """None where there is nothing to be said."""
    masks = None
    history = None
    if packed.allowed is not None:
        masks = Masks(jnp.asarray(packed.allowed), jnp.asarray(packed.allowed_index))
    if sampling is not None and sampling.penalises:
        if packed.drawn is not None:
            is_sampled = jnp.asarray(packed.drawn)
        else:
            length = packed.tokens.shape[1]
            scored = jnp.where(jnp.asarray(packed.score_index) >= 0, packed.score_index, length)
            is_sampled = jax.vmap(lambda at: jnp.zeros(length, bool).at[at].set(True, mode="drop"))(scored)
        history = History(jnp.asarray(packed.tokens), jnp.asarray(packed.subtree_end), is_sampled, before)
    return None if masks is None and history is None else Context(masks, history)


def score_hidden(
    config: DecoderConfig,
    params: Params,
    hidden: Float[Array, "R K D"],
    targets: Int[ArrayLike, "R K"],
    wanted: Bool[ArrayLike, "R K"],
    sampling_params: SamplingParams | None = None,
    *,
    chunk: int,
    context: Context | None = None,
) -> tuple[Float[Array, "R K"], Float[Array, "R K"]]:
    """Log-probs of `targets` and entropies under the softmax of `models.logits` of `hidden`; 0 where `wanted [R, K]` is
    False. Of `params` it reads `models.head_params`. `context` is what else the distribution depends on.

    `chunk` counts the tokens of one device. Rows that do not divide over the batch axes of the mesh in use are chunked
    as those of one device. Chunks that hold no wanted token are skipped. Differentiable in `params` and `hidden`.
    """
    rows, length, width = hidden.shape
    targets = jnp.asarray(targets)
    wanted = jnp.asarray(wanted)
    layout = _Layout.of(config, rows, width)
    step, padding = _chunked(length, max(chunk // layout.own_rows(rows), 1))
    if padding:
        hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
        targets, wanted = (jnp.pad(x, ((0, 0), (0, padding))) for x in (targets, wanted))
        context = None if context is None else context.padded(padding)

    head = head_params(config, params)
    asked = _Asked(targets, wanted, sampling_params, context)
    logprobs, entropies = _head(config, step, layout, head, hidden, asked)
    return logprobs[:, :length], entropies[:, :length]


def _chunked(length: int, most: int) -> tuple[int, int]:
    """(size of a chunk, padding) of `length` positions in chunks of one size, `most` at most; a multiple of 8 where
    there is room, so that little of the last is padding."""
    most = min(most, length)
    chunks = -(-length // most)
    step = min(8 * -(-length // (8 * chunks)), most)
    return step, -length % step


def _is_target(targets: Array, vocab: int) -> Array:
    return targets[..., None] == jnp.arange(vocab, dtype=targets.dtype)


def _processed(
    config: DecoderConfig, head: Params, hidden: Array, targets: Array, sampling, context: Context | None
) -> tuple[Array, Array | None]:
    """Logits of the distribution that is scored, float32 [R, C, V], and their derivative by those of the model, before
    they are divided; None where it is 1."""
    own = logits(config, head, hidden)
    if sampling is None and context is None:
        return own, None
    adjusts = context is not None or sampling.adjusts
    adjusted = own
    slope = None
    if adjusts:
        masks, history = (None, None) if context is None else context
        words = None if masks is None else masks.words()
        before = None if history is None else history.counts(own.shape[-1])
        adjusted = adjust_logits(own, sampling, allowed=words, before=before)
        if before is not None:
            slope = penalty_slope(bias_logits(own, sampling), sampling, before)
    # A token that truncation would remove now was sampled when it would not have, and one that is banned was given:
    # it keeps its logit.
    kept = _is_target(targets, own.shape[-1])
    possible = jnp.where(adjusted > MASKED / 2, adjusted, own) if adjusts else own
    processed = adjusted if sampling is None else process_logits(adjusted, sampling)
    return jnp.where(kept, possible / _temperature(sampling), processed), slope


def _temperature(sampling: SamplingParams | None) -> Array:
    """The divisor of the logits; greedy (0) scores under the model's own distribution."""
    if sampling is None:
        return jnp.float32(1.0)
    return jnp.where(sampling.temperature > 0, sampling.temperature, 1.0).astype(jnp.float32)


def _measure(processed: Array, targets: Array) -> tuple[Array, Array, Array]:
    """(logprobs, entropies, log normalisers) of a chunk of processed logits."""
    best = jnp.max(processed, axis=-1, keepdims=True)
    shifted = processed - best
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    log_total = jnp.log(total)
    # A sum over a one-hot mask, not a gather: it needs no copy of the logits, and fuses with the sums beside it.
    chosen = jnp.sum(jnp.where(_is_target(targets, processed.shape[-1]), shifted, 0.0), axis=-1)
    entropy = log_total - jnp.sum(weights * shifted, axis=-1) / total
    return chosen - log_total, entropy, best[..., 0] + log_total


def _processed_gradient(processed, targets, normaliser, entropy, d_logprob, d_entropy) -> Array:
    """d lp = onehot - p and d H = -p (log p + H), per processed logit."""
    log_p = processed - normaliser[..., None]
    p = jnp.exp(log_p)
    own = jnp.where(_is_target(targets, processed.shape[-1]), d_logprob[..., None], 0.0)
    return own - p * (d_logprob[..., None] + d_entropy[..., None] * (log_p + entropy[..., None]))


def _own_gradient(made: tuple[Array, Array | None], targets: Array, at) -> Array:
    """Per logit of the model, but for the division by the temperature."""
    processed, slope = made
    gradient = _processed_gradient(processed, targets, *at)
    return gradient if slope is None else gradient * slope


class _Layout(NamedTuple):
    """Mesh axes that split the rows, and those that split the head's vocabulary and its width."""

    rows: tuple[str, ...]
    vocab: tuple[str, ...]
    width: tuple[str, ...]

    @classmethod
    def of(cls, config: DecoderConfig, rows: int, width: int) -> "_Layout":
        """Of `rows` rows of states of `width`, on the mesh in use."""
        return cls(
            rows=split_axes("shares", rows) or split_axes("batch", rows),
            vocab=split_axes("vocab", config.vocab_size),
            width=split_axes("embed", width),
        )

    def own_rows(self, rows: int) -> int:
        """How many of `rows` one device has."""
        sizes = jax.sharding.get_abstract_mesh().shape
        return rows // math.prod(sizes[name] for name in self.rows)

    def on_rows(self, part: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`part` of each device's own rows. The vocabulary is left to the compiler, which reduces over its devices what
        a sum over it has come to."""
        if not self.rows:
            return part
        return jax.shard_map(part, in_specs=in_specs, out_specs=out_specs, axis_names={*self.rows}, check_vma=False)

    def gather(self, head: Params, dtype: Any) -> dict[str, Array]:
        """The weights of a head as the products of one device need them, sent in their dtype."""
        return {name: self._gather(name, weight.astype(dtype)) for name, weight in head.items()}

    def _gather(self, name: str, weight: Array) -> Array:
        split = self._split(name)
        if not self.rows or not self.width or self.width not in split:
            return weight
        at = split.index(self.width)

        def part(own):
            return jax.lax.all_gather(own, self.width, axis=at, tiled=True)

        whole = PartitionSpec(*(() if place == at else axes for place, axes in enumerate(split)))
        return jax.shard_map(part, in_specs=PartitionSpec(*split), out_specs=whole, check_vma=False)(weight)

    def reduce(self, gradients: Params, head: Params) -> dict[str, Array]:
        """The sums of the gradients [1, ..] of the weights of `head` on each device, split and typed as these are."""
        return {name: self._reduce(name, gradients[name]).astype(weight.dtype) for name, weight in head.items()}

    def _reduce(self, name: str, gradient: Array) -> Array:
        if not self.rows:
            return gradient[0]
        split = self._split(name)
        scattered = self.width if self.width and self.width in split else ()

        def part(own):
            total = own[0]
            if scattered:
                total = jax.lax.psum_scatter(total, scattered, scatter_dimension=split.index(scattered), tiled=True)
            return jax.lax.psum(total, tuple(axis for axis in self.rows if axis not in scattered))

        own = (() if axes == scattered else axes for axes in split)
        return jax.shard_map(
            part, in_specs=PartitionSpec(self.rows, *own), out_specs=PartitionSpec(*split), check_vma=False
        )(gradient)

    def _split(self, name: str) -> tuple[tuple[str, ...], ...]:
        """The mesh axes that split the two dimensions of a weight of the head: [V, D], of its adapter [D, rank] and
        [rank, V]."""
        if name.endswith(DOWN):
            return self.width, ()
        return ((), self.vocab) if name.endswith(UP) else (self.vocab, self.width)


class _Asked(NamedTuple):
    """Which tokens are scored, and what their distributions depend on beside the hidden states."""

    targets: Array
    """int32 [R, K]."""
    wanted: Array
    """bool [R, K]."""
    sampling: SamplingParams | None
    context: Context | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _head(
    config: DecoderConfig, step: int, layout: _Layout, head: Params, hidden: Array, asked: _Asked
) -> tuple[Array, Array]:
    """`score_hidden` of chunks of `step` tokens of each row; `head` are the `head_params`."""
    (logprobs, entropies), _ = _head_forward(config, step, layout, head, hidden, asked)
    return logprobs, entropies


def _live_chunks(step: int, wanted: Array) -> Array:
    """How many chunks there are up to the last wanted token of any row: devices that share a sum over the vocabulary
    must go through as many."""
    last = jnp.max(jnp.where(wanted, jnp.arange(wanted.shape[1]) + 1, 0))
    return (last + step - 1) // step


def _slice(x: Array, i: Array, step: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * step, step, axis=1)


def _write(x: Array, part: Array, i: Array, step: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), i * step, axis=1)


def _head_forward(config, step: int, layout: _Layout, head, hidden, asked: _Asked):
    def measure(whole, hidden, targets, context, sampling, live):
        if step == hidden.shape[1]:
            # One chunk: its logits are few enough to be kept for the backward pass.
            kept = _processed(config, whole, hidden, targets, sampling, context)
            return kept, _measure(kept[0], targets)

        def chunk(i, carry):
            h = _slice(hidden, i, step)
            y = _slice(targets, i, step)
            part_of = None if context is None else context.part(i, step)
            parts = _measure(_processed(config, whole, h, y, sampling, part_of)[0], y)
            return tuple(_write(x, part, i, step) for x, part in zip(carry, parts, strict=True))

        empty = jnp.zeros(targets.shape, jnp.float32)
        return None, jax.lax.fori_loop(0, live, chunk, (empty,) * 3)

    # The gathered head lasts until the backward pass, which comes next: gathering it anew would send it twice.
    whole = layout.gather(head, hidden.dtype)
    every = PartitionSpec()
    own = PartitionSpec(layout.rows)
    run = layout.on_rows(measure, (every, own, own, own, every, every), own)
    live = _live_chunks(step, asked.wanted)
    kept, measured = run(whole, hidden, asked.targets, asked.context, asked.sampling, live)

    logprobs, entropies, normalisers = measured
    out = jnp.where(asked.wanted, logprobs, 0.0), jnp.where(asked.wanted, entropies, 0.0)
    return out, (head, whole, hidden, asked, normalisers, entropies, kept)


def _head_backward(config, step: int, layout: _Layout, residuals, cotangents):
    head, whole, hidden, asked, normalisers, entropies, kept = residuals
    d_logprobs, d_entropies = (jnp.where(asked.wanted, d, 0.0) for d in cotangents)

    def gradients(whole, kept, hidden, targets, context, at, sampling, live):
        # Of a logit that truncation removed the probability is 0, so that the division by the temperature is all that
        # lies between a logit and its processed one.
        scale = 1.0 / _temperature(sampling)
        if kept is not None:
            d_logits = _own_gradient(kept, targets, at) * scale
            d_hidden, d_head = logits_gradient(config, whole, hidden, d_logits)
        else:

            def chunk(i, carry):
                d_hidden, d_head = carry
                h, y, *there = (_slice(x, i, step) for x in (hidden, targets, *at))
                part_of = None if context is None else context.part(i, step)
                d_logits = _own_gradient(_processed(config, whole, h, y, sampling, part_of), y, there) * scale
                d_h, d_part = logits_gradient(config, whole, h, d_logits)
                return _write(d_hidden, d_h, i, step), jax.tree.map(jnp.add, d_head, d_part)

            start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (hidden, whole))
            d_hidden, d_head = jax.lax.fori_loop(0, live, chunk, start)
        return d_hidden.astype(hidden.dtype), jax.tree.map(lambda d: d[None], d_head)

    every = PartitionSpec()
    own = PartitionSpec(layout.rows)
    run = layout.on_rows(gradients, (every, own, own, own, own, own, every, every), own)
    at = (normalisers, entropies, d_logprobs, d_entropies)
    live = _live_chunks(step, asked.wanted)
    d_hidden, d_head = run(whole, kept, hidden, asked.targets, asked.context, at, asked.sampling, live)

    return layout.reduce(d_head, head), d_hidden, None


_head.defvjp(_head_forward, _head_backward)
