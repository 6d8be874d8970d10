"""From logits to the distribution that is sampled from, and from one uniform number to a token of it.

Decoder and trainer both call `adjust_logits` and `process_logits`, so the log-prob of a sampled token is that of the
distribution really used, on either side. Temperature and truncation are traced values: changing them compiles nothing.
A program may be told beforehand which of them are on (`Rules`), and then holds no work for the others.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from rljax.parallel import WHOLE, Shard, platform
from rljax.types import ArrayLike, struct

MASKED = -1e30
"""Logit of a token that truncation removed: finite, so that probability times log-prob is 0 and never NaN."""

SMALLEST_TEMPERATURE = 1e-6
"""Above 0: `MASKED` and the logits of any model stay finite when they are divided by it."""

MOST_BIAS = 1e6
"""Largest bias of a logit: beyond any that a model gives, and far from `MASKED`."""

NO_TOKEN = 2**31 - 1
"""Fills up `SamplingParams.bias_tokens`: beyond any vocabulary."""

_UNITS = 2.0**30
_HALF_CELL = 2.0**-24  # uniform numbers are multiples of 2**-23


@struct
class SamplingParams:
    """How to sample: float32 and int32 scalars; build it with `sampling_params`, which checks the values."""

    temperature: Float[ArrayLike, ""]
    """Divisor of the logits; 0 is greedy."""
    top_k: Int[ArrayLike, ""]
    """Tokens that are kept; 0 is off."""
    top_p: Float[ArrayLike, ""]
    """Share of probability that is kept; 1 is off."""
    min_p: Float[ArrayLike, ""]
    """Least probability, relative to the best token's; 0 is off."""
    bias_tokens: Int[ArrayLike, " N"] | None = None
    """Tokens whose logits are changed, each once, and `NO_TOKEN`; None is none."""
    bias: Float[ArrayLike, " N"] | None = None
    """What is added to their logits before these are divided; `MASKED` bans a token."""

    repetition: Float[ArrayLike, ""] | None = None
    """Divisor of the positive logits, and factor of the others, of tokens that stand before (1909.05858, section 4.1);
    None, as the next two, where none of the three is on."""
    presence: Float[ArrayLike, ""] | None = None
    """What is taken from the logits of tokens that the completion has sampled."""
    frequency: Float[ArrayLike, ""] | None = None
    """What is taken from the logit of a token each time that the completion has sampled it."""

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens before. Static."""
        return self.repetition is not None

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before they are divided. Static: parts that are off are None."""
        return self.bias is not None or self.penalises

    def adjusted_as(self, other: "SamplingParams") -> "SamplingParams":
        """The same temperature and truncation, of logits that are changed as those of `other`."""
        names = ("bias_tokens", "bias", "repetition", "presence", "frequency")
        return dataclasses.replace(self, **{name: getattr(other, name) for name in names})


class Penalties(NamedTuple):
    """What is said of tokens that stand before, as in vLLM."""

    repetition: float = 1.0
    """Of tokens of prompt and completion; 1 is off, and more makes them less likely."""
    presence: float = 0.0
    """Of tokens that the completion has sampled; 0 is off."""
    frequency: float = 0.0
    """Likewise, for each time; 0 is off."""

    def checked(self) -> dict[str, np.ndarray]:
        """Fields of `SamplingParams`; none where all are off. ValueError for a value out of range."""
        if not 0.01 <= self.repetition <= 100:
            raise ValueError(f"repetition_penalty={self.repetition} must lie between 0.01 and 100; 1 switches it off")
        for name in ("presence", "frequency"):
            value = getattr(self, name)
            if not abs(value) <= 100:
                raise ValueError(f"{name}_penalty={value} must lie between -100 and 100; 0 switches it off")
        if self == NO_PENALTIES:
            return {}
        return {name: np.asarray(value, np.float32) for name, value in self._asdict().items()}


NO_PENALTIES = Penalties()


@struct
class Before:
    """Of each distribution, which tokens stand before it."""

    seen: Bool[Array, "..."]
    """In the layout of the logits: whether a token stands in prompt or completion."""
    sampled: Int[Array, "..."]
    """How often the completion has sampled it."""


class Rules(NamedTuple):
    """Which parts of a `SamplingParams` are on. Static: there is a program for each."""

    greedy: bool
    """The most probable token is taken; nothing else is on."""
    top_k: bool
    """The count is limited."""
    top_p: bool
    """The share is limited."""
    min_p: bool
    """The ratio to the best is limited."""


def rules_of(params: SamplingParams) -> Rules:
    """What is on in `params`, which must not be traced."""
    greedy = bool(params.temperature <= 0)
    return Rules(
        greedy=greedy,
        top_k=not greedy and bool(params.top_k > 0),
        top_p=not greedy and bool(params.top_p < 1),
        min_p=not greedy and bool(params.min_p > 0),
    )


def sampling_params(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    logit_bias: Mapping[int, float] | None = None,
    banned: Collection[int] = (),
    penalties: Penalties = NO_PENALTIES,
) -> SamplingParams:
    """Checked `SamplingParams`. Temperature 0 is greedy and ignores `top_k`, `top_p` and `min_p`.

    `logit_bias` is added to the logits of these tokens, and those of `banned` are never sampled; both hold for greedy
    too, and so do `penalties`. The number of tokens that are named, rounded up to a power of two, is a part of a
    program's shape; values are not.

    Otherwise the logits are divided by the temperature and truncated: `top_k` keeps the k most probable tokens
    (0 = all), `top_p` the fewest most probable ones whose share of what top-k left reaches p (1 = all; 1904.09751),
    `min_p` those at least `min_p` times as probable as the best (0 = all; 2407.01082). Tokens tied with the last one
    kept are kept too. Raises ValueError for a value out of range.
    """
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be finite and at least 0; 0 is greedy, 1 the model's own")
    if 0.0 < temperature < SMALLEST_TEMPERATURE:
        raise ValueError(
            f"temperature={temperature} must be 0, which is greedy, or at least {SMALLEST_TEMPERATURE:g}: logits "
            "divided by less overflow"
        )
    if int(top_k) != top_k or top_k < 0:
        raise ValueError(f"top_k={top_k} must be a whole number of tokens, 0 to switch it off")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; 1 switches it off")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p={min_p} must be between 0 and 1; 0 switches it off")
    bias_tokens, bias = _checked_bias(logit_bias or {}, banned)
    return SamplingParams(
        temperature=np.asarray(temperature, np.float32),
        top_k=np.asarray(top_k, np.int32),
        top_p=np.asarray(top_p, np.float32),
        min_p=np.asarray(min_p, np.float32),
        bias_tokens=bias_tokens,
        bias=bias,
        **penalties.checked(),
    )


def _checked_bias(
    logit_bias: Mapping[int, float], banned: Collection[int]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Both as ids and what is added to their logits; None for nothing."""
    for name, tokens in (("logit_bias", logit_bias), ("banned", banned)):
        if wrong := [token for token in tokens if int(token) != token or not 0 <= token < NO_TOKEN]:
            raise ValueError(f"{name}={wrong[0]} is no token id; give whole numbers from 0")
    beyond = [value for value in logit_bias.values() if not abs(value) <= MOST_BIAS and value != MASKED]
    if beyond:
        raise ValueError(
            f"logit_bias={beyond[0]} must lie between {-MOST_BIAS:g} and {MOST_BIAS:g}; banned keeps a token out"
        )

    added = {int(token): float(value) for token, value in logit_bias.items()} | dict.fromkeys(map(int, banned), MASKED)
    if not added:
        return None, None
    # Of few sizes, so that few programs serve requests that name any number; the rest is no token.
    size = max(4, 1 << (len(added) - 1).bit_length())
    tokens = np.full(size, NO_TOKEN, np.int32)
    bias = np.zeros(size, np.float32)
    tokens[: len(added)] = list(added)
    bias[: len(added)] = list(added.values())
    return tokens, bias


def logit_biases(params: SamplingParams) -> dict[int, float]:
    """What is added to the logits of tokens, `MASKED` for those that are banned. `params` must not be traced."""
    if params.bias is None:
        return {}
    pairs = zip(np.asarray(params.bias_tokens).tolist(), np.asarray(params.bias, np.float32), strict=True)
    # Shortest decimals of float32, so that who reads them gets the very value.
    return {token: float(str(value)) for token, value in pairs if token != NO_TOKEN}


def adjust_logits(
    logits: Float[Array, "..."],
    params: SamplingParams | None,
    *,
    axis: int = -1,
    allowed: UInt32[ArrayLike, "..."] | None = None,
    before: Before | None = None,
) -> Float[Array, "..."]:
    """Float32 logits with what `params` adds to them, before they are divided and truncated: the first step, and the
    same for sampler and trainer. What is banned gets `MASKED`, and so does what is not `allowed [*B, W]`: of those of
    the vocabulary, token `v` is bit `v % 32` of word `v // 32`. `before` is needed with penalties. `axis`, 0 or -1, is
    the whole vocabulary."""
    wide = logits.astype(jnp.float32)
    vocab = logits.shape[axis]
    if allowed is not None:
        words = jnp.asarray(allowed)
        bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        bits = bits.reshape(*words.shape[:-1], -1)[..., :vocab] == 1
        wide = jnp.where(jnp.moveaxis(bits, -1, 0) if axis == 0 else bits, wide, MASKED)
    if params is None:
        return wide
    biased = bias_logits(wide, params, axis=axis)
    if before is None:
        assert not params.penalises, "penalties need the tokens before"
        return biased
    scaled = biased * penalty_slope(biased, params, before)
    taken = jnp.asarray(params.frequency) * before.sampled + jnp.asarray(params.presence) * (before.sampled > 0)
    # What does not count stays so, whatever it is multiplied with.
    return jnp.where(biased > MASKED / 2, scaled - taken, MASKED)


def ban_logits(
    logits: Float[Array, "..."], tokens: Int[ArrayLike, " N"], where: Bool[Array, "*B"], *, axis: int = -1
) -> Float[Array, "..."]:
    """Logits, `MASKED` for `tokens` in the distributions `where`. `axis`, 0 or -1, is the whole vocabulary."""
    named = jnp.any(jnp.arange(logits.shape[axis])[:, None] == jnp.asarray(tokens), axis=1)
    named = named.reshape(-1, *(1,) * where.ndim) if axis == 0 else named
    return jnp.where(named & jnp.expand_dims(where, axis), MASKED, logits)


def penalty_slope(biased: Float[Array, "..."], params: SamplingParams, before: Before) -> Float[Array, "..."]:
    """What the repetition penalty multiplies logits with, which is the derivative of `adjust_logits` by them too."""
    rate = jnp.asarray(params.repetition)
    return jnp.where(before.seen, jnp.where(biased > 0, 1 / rate, rate), 1.0)


def bias_logits(logits: Float[Array, "..."], params: SamplingParams, *, axis: int = -1) -> Float[Array, "..."]:
    """Float32 logits with the bias of `params` alone; `MASKED` for banned tokens."""
    wide = logits.astype(jnp.float32)
    if params.bias is None:
        return wide
    vocab = logits.shape[axis]
    # Added, not set: an id beyond the vocabulary would otherwise be the last one.
    added = jnp.zeros(vocab, jnp.float32).at[jnp.asarray(params.bias_tokens)].add(jnp.asarray(params.bias), mode="drop")
    added = added.reshape(-1, *(1,) * (wide.ndim - 1)) if axis == 0 else added
    # A sum with `MASKED` is what a head has masked, or is banned, and nothing in between.
    return jnp.where(added > MASKED / 2, wide + added, MASKED)


def process_logits(
    logits: Float[Array, "..."],
    params: SamplingParams,
    *,
    axis: int = -1,
    rules: Rules | None = None,
    shard: Shard = WHOLE,
) -> Float[Array, "..."]:
    """Tempered, truncated float32 logits: their softmax over `axis` is the distribution that is sampled from.

    Removed tokens get `MASKED`. Gradients flow through the logits of kept tokens; which tokens are kept counts as
    constant. No truncation work runs for what is off. Greedy (temperature 0) samples a point mass, whose log-probs
    would all be 0; the logits are then returned unchanged, so that log-prob and entropy are the model's own at
    temperature 1. `rules` must be those of `params`; with None it is found out as the program runs.

    `shard` says which part of the vocabulary the logits are (`rljax.parallel.on_shards`). Parts exchange a few numbers
    a distribution; of these a sum of probabilities is rounded otherwise than that of a whole.
    """
    wide = logits.astype(jnp.float32)
    # What the head has masked stays so, whatever it is divided by.
    exists = logits > MASKED / 2
    if rules is not None and rules.greedy:
        return jnp.where(exists, wide, MASKED)

    greedy = params.temperature <= 0
    scaled = wide / (jnp.where(greedy, 1.0, params.temperature) if rules is None else params.temperature)
    detached = jax.lax.stop_gradient(scaled)
    truncates = ~greedy & ((params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0))
    threshold = _when(
        None if rules is None else any(rules),
        truncates,
        lambda: _threshold(detached, params, axis, rules, shard),
        jnp.full_like(jax.lax.slice_in_dim(detached, 0, 1, axis=axis), -jnp.inf),
    )
    return jnp.where((detached >= threshold) & exists, scaled, MASKED)


def _when(
    known: bool | None, traced: Bool[ArrayLike, ""] | np.bool_, compute: Callable[[], Array], otherwise: Array
) -> Array:
    """`compute()` or `otherwise`: as `known` says, and where that is None, as `traced` says when the program runs.

    `traced` comes of the parameters alone, which all parts of a vocabulary share: they go the same way, and
    `compute` may exchange numbers."""
    if known is None:
        return jax.lax.cond(traced, compute, lambda: otherwise)
    return compute() if known else otherwise


def _threshold(x: Array, params: SamplingParams, axis: int, rules: Rules | None, shard: Shard) -> Array:
    """The smallest logit that is kept; `axis` has length 1.

    Every rule keeps `x >= t` for the largest `t` at which some decreasing function of `t` (a count, a mass) reaches
    its goal. A search over the 2**32 float32 values in their order finds that `t` exactly, without a sort.
    """
    # With the best of all parts, and sums over all of them, each part finds the same threshold.
    best = shard.max(jnp.max(x, axis=axis, keepdims=True))
    nothing = jnp.full_like(best, -jnp.inf)

    k = jnp.minimum(params.top_k, x.shape[axis] * shard.parts)
    by_count = _when(
        None if rules is None else rules.top_k,
        params.top_k > 0,
        lambda: _largest(x, jnp.ones_like, jnp.full_like(best, k), best, axis, shard),
        nothing,
    )

    def mass(x):
        return jnp.exp(x - best)

    def share():
        # top-p is a share of the mass that top-k left.
        stores = platform() == "gpu"
        masses = jax.lax.optimization_barrier(mass(x)) if stores else mass(x)
        left = shard.sum(jnp.sum(jnp.where(x >= by_count, masses, 0.0), axis=axis, keepdims=True))
        goal = jnp.asarray(params.top_p) * left
        if not stores:
            return _largest(x, mass, goal, best, axis, shard)

        # XLA for GPUs may store masses in every pass of a search among logits, so they are stored once and searched
        # themselves. They have the order of the logits; logits whose masses round to the same are tied.
        least = _largest(masses, lambda x: x, goal, jnp.ones_like(best), axis, shard)
        return -shard.max(jnp.max(jnp.where(masses >= least, -x, -jnp.inf), axis=axis, keepdims=True))

    by_mass = _when(None if rules is None else rules.top_p, params.top_p < 1, share, nothing)
    by_ratio = jnp.where(params.min_p > 0, best + jnp.log(params.min_p), -jnp.inf)
    # Rounding of best + log(1) or of a mass must never remove the most probable token.
    return jnp.minimum(best, jnp.maximum(jnp.maximum(by_count, by_mass), by_ratio))


def _largest(x: Array, weigh: Callable[[Array], Array], goal: Array, best: Array, axis: int, shard: Shard) -> Array:
    """The largest float32 `t <= best` at which the weight of all `x >= t` reaches `goal`, or the smallest float.

    Each pass over `x` tries places of equal distance: 15 of them, which settles four bits of the order of `t`, where
    reading and weighing `x` is what costs, and one on a CPU, where adding up is.
    """
    on_cpu = platform() == "cpu"
    bits = 1 if on_cpu else 4
    weighed = weigh(x)

    def to_float(order):  # uint32 in the order of the floats -> float32
        bits = jnp.where(order >> 31, order ^ jnp.uint32(1 << 31), ~order)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def to_order(value):
        bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
        return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))

    first = to_order(jnp.full_like(best, -jnp.inf))
    # Orders are counted from the first, so that no sum of two overflows.
    last = to_order(best) - first

    def narrow(i, low):
        distance = jnp.uint32(1) << jnp.asarray(32 - bits * (i + 1)).astype(jnp.uint32)
        places = [low + distance * jnp.uint32(j) for j in range(1, 2**bits)]
        values, weights = x, weighed
        if not on_cpu:
            # Tied to the pass, so that weights are computed where they are added up, not stored and read again.
            values, _ = jax.lax.optimization_barrier((x, low))
            weights = weigh(values)

        totals = shard.sum(_sums([jnp.where(values >= to_float(first + at), weights, 0.0) for at in places], axis))
        fits = [(at <= last) & (total >= goal) for at, total in zip(places, totals, strict=True)]
        return low + distance * sum(one.astype(jnp.uint32) for one in fits)

    start = jnp.zeros_like(first)
    return to_float(first + jax.lax.fori_loop(0, 32 // bits, narrow, start, unroll=not on_cpu))


def _sums(arrays: list[Array], axis: int) -> Array:
    """The sum of each array along `axis`, which stays, stacked. One reduction, so that an accelerator reads what they
    are made of once."""
    if len(arrays) == 1:
        return jnp.sum(arrays[0], axis=axis, keepdims=True)[None]
    zeros = (jnp.float32(0),) * len(arrays)
    totals = jax.lax.reduce(tuple(arrays), zeros, lambda a, b: tuple(map(jnp.add, a, b)), (axis % arrays[0].ndim,))
    return jnp.expand_dims(jnp.stack(totals), axis if axis < 0 else axis + 1)


def best_tokens(
    logits: Float[Array, "..."],
    params: SamplingParams,
    count: int,
    *,
    axis: int = -1,
    rules: Rules | None = None,
) -> tuple[Int[Array, "*B N"], Float[Array, "*B N"]]:
    """The `count` most probable tokens of the distribution that is sampled from, the best first, and their log-probs
    (nats); below `MASKED / 2` for those that are not sampled at all. Arguments as in `process_logits`."""
    processed = process_logits(logits, params, axis=axis, rules=rules)
    logprobs, tokens = jax.lax.top_k(jnp.moveaxis(jax.nn.log_softmax(processed, axis=axis), axis, -1), count)
    return tokens, logprobs


def sample_tokens(
    processed: Float[Array, "..."],
    uniform: Float[Array, "*B"],
    greedy: Bool[Array, ""] | bool,
    *,
    axis: int = 0,
    shard: Shard = WHOLE,
) -> tuple[Int[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"]]:
    """One token a distribution by inverting the CDF at `uniform` in [0, 1), or the most probable one where `greedy`, of
    which a Python value leaves the other way out of the program.

    `processed` is [V, *B], so that a CPU runs sums over the vocabulary along many columns at once, or [*B, V] where
    `axis` is -1. `shard` says which part of the vocabulary it is: the parts exchange a few numbers a distribution, and
    the normaliser, entropy and share of a block are rounded otherwise than those of a whole.

    Returns (tokens int32, log-probs, entropies), the latter two of the softmax of `processed`, in nats. Sums are taken
    in blocks: the uniform number picks a block, then a token in it. A token of probability 0 is never chosen. Uniforms
    of 23 random bits resolve probabilities down to 2**-23, and a token's chance differs from its probability by about
    as much.
    """
    vocab = processed.shape[axis]
    batch = processed.shape[1:] if axis == 0 else processed.shape[:-1]
    # A part that consists of the blocks of the whole sums these up as the whole does.
    size = block_size(vocab * shard.parts)
    size = block_size(vocab) if vocab % size else size
    count = -(-vocab // size)

    # Blocks [C, S, N] or [N, C, S]: tokens come behind their blocks, and either before or behind what is sampled.
    of_block = 0 if axis == 0 else 1
    in_block = of_block + 1
    padding = [(0, 0)] * processed.ndim
    padding[axis] = (0, count * size - vocab)
    padded = jnp.pad(processed, padding, constant_values=MASKED)
    blocks = padded.reshape((count, size, -1) if axis == 0 else (-1, count, size))
    tokens_apart = blocks.reshape((count * size, -1) if axis == 0 else (-1, count * size))

    # Weights and their moments, block by block: probabilities, normaliser and entropy all come from these.
    best = shard.max(jnp.max(blocks, axis=(of_block, in_block)))
    shifted = blocks - jnp.expand_dims(best, (of_block, in_block))
    weights = jnp.exp(shifted)
    block_weight = jnp.sum(weights, axis=in_block)
    block_moment = jnp.sum(weights * shifted, axis=in_block)
    total = shard.sum(jnp.sum(block_weight, axis=of_block))

    def invert():
        # A block by the CDF of the blocks, then a token by the CDF inside it. A uniform number stands for the cell of
        # the line that begins there; its middle is no place where a probability of few bits ends.
        block, rest, is_here = _invert(block_weight, jnp.ravel(uniform) + _HALF_CELL, of_block, shard)
        at = jnp.expand_dims(block, (of_block, in_block))
        inside = jnp.take_along_axis(blocks, at, axis=of_block).squeeze(of_block)
        index, *_ = _invert(jnp.exp(inside - jnp.expand_dims(best, of_block)), rest, of_block, WHOLE)
        return block * size + index, is_here

    def most_probable():
        index = jnp.argmax(tokens_apart, axis=of_block).astype(jnp.int32)
        return index, _is_first(_at(tokens_apart, index, of_block) == best, shard)

    if isinstance(greedy, bool):
        index, is_here = most_probable() if greedy else invert()
    else:
        index, is_here = jax.lax.cond(greedy, most_probable, invert)

    # Exactly one part has the token, and the others add 0.
    chosen = shard.sum(jnp.where(is_here, _at(tokens_apart, index, of_block), 0.0)) - best
    tokens = shard.sum(jnp.where(is_here, index + shard.number * vocab, 0))
    log_total = jnp.log(total)
    entropies = log_total - shard.sum(jnp.sum(block_moment, axis=of_block)) / total
    return tokens.reshape(batch), (chosen - log_total).reshape(batch), entropies.reshape(batch)


def block_size(vocab: int) -> int:
    """Block length of the two-level CDF: a divisor of `vocab` near 256 where there is one, so nothing is padded."""
    if vocab <= 512:
        return vocab
    divisors = [size for size in range(128, 513) if vocab % size == 0]
    return min(divisors, key=lambda size: abs(size - 256)) if divisors else 256


def _invert(weights: Array, share: Array, axis: int, shard: Shard) -> tuple[Array, Array, Array | bool]:
    """The index along `axis` in which the share `share` of all weight ends, the share of its own that lies below, and
    whether it is in this part of the whole; in another the first two mean nothing.

    Weights count in whole units, some 2**30 in all. Sums of integers are exact in whatever order they are taken, so an
    index owns exactly its units of the line, and one of less than half a unit owns nothing. Float sums would give
    places of rounding to their neighbours, however improbable.
    """
    total = jnp.expand_dims(shard.sum(jnp.sum(weights, axis=axis)), axis)
    units = jnp.round(weights * (_UNITS / total)).astype(jnp.int32)
    ends = jnp.cumsum(units, axis=axis)
    own_end = jax.lax.index_in_dim(ends, -1, axis, keepdims=False)
    before, all_units = shard.running(own_end)
    target = (share * all_units.astype(jnp.float32)).astype(jnp.int32) - before
    found = jnp.sum(ends <= jnp.expand_dims(target, axis), axis=axis)

    # A product may round up to the very end, where nobody is: the sliver goes to the heaviest, whose share it hardly
    # changes.
    heaviest = jnp.argmax(units, axis=axis)
    is_inside = target < all_units - before
    index = jnp.where(is_inside, found, heaviest).astype(jnp.int32)
    is_here: Array | bool = True
    if shard.axes:
        # Exactly one part says yes: units are integers, so that where one ends the next begins, and of parts that are
        # equally heavy the first is taken, as in a whole.
        most = _at(units, heaviest, axis)
        is_heaviest = _is_first(most == shard.max(most), shard)
        is_here = jnp.where(is_inside, (target >= 0) & (target < own_end), is_heaviest)
        index = jnp.minimum(index, units.shape[axis] - 1)

    own = _at(units, index, axis)
    start = _at(ends, index, axis) - own
    return index, (target - start + 0.5) / jnp.maximum(own, 1), is_here


def _at(x: Array, index: Array, axis: int) -> Array:
    """The entry of `x` at `index` of `axis`, which goes."""
    return jnp.take_along_axis(x, jnp.expand_dims(index, axis), axis=axis).squeeze(axis)


def _is_first(holds: Array, shard: Shard) -> Array | bool:
    """Whether this part is the first that `holds`, of which some part does."""
    if not shard.axes:
        return True
    return holds & (shard.running(holds.astype(jnp.int32))[0] == 0)
