"""Decoding with two models of one vocabulary: which of them speaks is decided token by token.

Two studies of what RL changes are built on this. Replacing the base's tokens where the policy has turned away from
them, and extrapolating there beyond the policy: 2603.22117. Handing the next token to the other model where the two
distributions diverge: 2603.22446. Which token comes next is a function argument, `ChooseFn`.

This measures and does not serve: nothing is cached, so each token costs a forward pass of both models over the whole
row. `rljax.analysis.study` runs it on the held-out examples of a config.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rljax.models import DecoderConfig, hidden_states, logits
from rljax.ops import row_uniforms
from rljax.sampling.logits import SamplingParams, process_logits, sample_tokens
from rljax.types import ArrayLike, Params, struct

MIN_LOGPROB = -50.0
"""Floor of log-probs before they are extrapolated: -inf in the base alone would give +inf."""

MIN_EXPONENT = -200.0
"""Floor of log-probs in sums over a distribution: its exponential is 0 in float32, and its product with 0 is 0."""


class Choice(NamedTuple):
    """The next token of each row."""

    tokens: Int[Array, " B"]
    """The token that is emitted."""
    intervened: Bool[Array, " B"]
    """Whether the second model, or what is made of both, gave it."""
    changed: Bool[Array, " B"]
    """Whether it differs from the one that the first model alone would have emitted."""


ChooseFn = Callable[[Array, Array, Array, Array], Choice]
"""(first model's logits [B, V], second's [B, V], uniforms [2, B], interventions of the row so far [B]) -> Choice."""

Mix = Callable[[Array, Array], Array]
"""(base logits [*B, V], policy logits [*B, V]) -> logits [*B, V]."""

Criterion = Callable[[Array, Array, Array], Array]
"""(first log-probs [B, V], second log-probs [B, V], uniform [B]) -> bool [B]; log-probs of what is sampled from."""

Level = float | Float[Array, ""]
"""A hyperparameter of a decoding rule. As a traced scalar, another value of it compiles nothing."""


def signed_shift(base_logits: Float[Array, "*B V"], policy_logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """`log p_policy - log p_base` (nats) of every token, log-probs floored at -50 (2603.22117)."""
    return _floored(policy_logits) - _floored(base_logits)


def jensen_shannon(first_logits: Float[Array, "*B V"], second_logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """`(KL(p || m) + KL(q || m)) / 2`, `m = (p + q) / 2`, in nats: 0 to ln 2, which disjoint supports reach.

    Logits of -inf, or masked by truncation, are probability 0.
    """
    p = jnp.maximum(jax.nn.log_softmax(first_logits, axis=-1), MIN_EXPONENT)
    q = jnp.maximum(jax.nn.log_softmax(second_logits, axis=-1), MIN_EXPONENT)
    mix = jnp.logaddexp(p, q) - jnp.log(2.0)
    total = jnp.sum(jnp.exp(p) * (p - mix) + jnp.exp(q) * (q - mix), axis=-1) / 2
    return jnp.maximum(total, 0.0)  # equal distributions may round below 0


def base(base_logits: Float[Array, "*B V"], policy_logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """The base's own logits."""
    return base_logits


def policy(base_logits: Float[Array, "*B V"], policy_logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """The policy's own logits."""
    return policy_logits


def extrapolated(gamma: Level) -> Mix:
    """`(1 + gamma) log p_policy - gamma log p_base`, the policy's log-probs moved on along their shift (2603.22117).

    Not normalised; `gamma` 0 gives the policy's log-probs. Both are floored at -50. The paper takes 0.05 to 0.1.
    """

    def mix(base_logits: Float[Array, "*B V"], policy_logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        return (1 + gamma) * _floored(policy_logits) - gamma * _floored(base_logits)

    return mix


def redraw_where_shifted(sampling: SamplingParams, *, tau: Level, redraw: Mix = policy, draft: Mix = base) -> ChooseFn:
    """Draws y from `draft`; where `log p_policy(y) - log p_base(y) <= tau`, discards it and draws from `redraw`.

    First model base, second policy (2603.22117). The draws are independent; the shift is that of the full softmax,
    while temperature and truncation act on what is drawn from, after mixing. With `redraw=extrapolated(gamma)` this is
    the paper's test-time extrapolation (tau -0.3 to -0.4), with the defaults its token replacement.
    """

    def choose(first: Array, second: Array, uniforms: Array, interventions: Array) -> Choice:
        drafted = _draw(draft(first, second), uniforms[0], sampling)
        redrawn = _draw(redraw(first, second), uniforms[1], sampling)
        shift = jnp.take_along_axis(signed_shift(first, second), drafted[:, None], axis=1)[:, 0]
        fires = shift <= tau
        tokens = jnp.where(fires, redrawn, drafted)
        return Choice(tokens, fires, tokens != drafted)

    return choose


def switch_where(criterion: Criterion, sampling: SamplingParams, *, budget: int | None = None) -> ChooseFn:
    """Cross-sampling (2603.22446): the second model's token where `criterion` fires and the row has intervened fewer
    than `budget` times, else the first's.

    Both draws invert their CDFs at the same uniform number, so `Choice.changed` counts effective interventions.
    """

    def choose(first: Array, second: Array, uniforms: Array, interventions: Array) -> Choice:
        # One uniform number for both draws: without a second source of chance, only the models can make them differ.
        own = _draw(first, uniforms[0], sampling)
        other = _draw(second, uniforms[0], sampling)

        of_first = jax.nn.log_softmax(process_logits(first, sampling), axis=-1)
        of_second = jax.nn.log_softmax(process_logits(second, sampling), axis=-1)
        fires = criterion(of_first, of_second, uniforms[1])
        if budget is not None:
            fires = fires & (interventions < budget)
        tokens = jnp.where(fires, other, own)
        return Choice(tokens, fires, tokens != own)

    return choose


def divergence_above(threshold: Level = 0.1) -> Criterion:
    """`JS(first, second) > threshold`. The paper's threshold is not known; 0.1 is its bin of high divergence."""
    return lambda first, second, uniform: jensen_shannon(first, second) > threshold


def entropy_above(threshold: Level) -> Criterion:
    """The first model's entropy (nats) is above `threshold`: a control."""

    def fires(first: Array, second: Array, uniform: Array) -> Array:
        entropy = -jnp.sum(jnp.exp(first) * jnp.maximum(first, MIN_EXPONENT), axis=-1)
        return entropy > threshold

    return fires


def at_random(share: Level) -> Criterion:
    """A `share` of positions, whatever the models say: a control."""
    return lambda first, second, uniform: uniform < share


@dataclasses.dataclass(frozen=True)
class TwoModelSpec:
    """What decoding with two models is told once: what a program is compiled for."""

    config: DecoderConfig
    """Of both models."""
    max_new_tokens: int
    """Most tokens of a completion."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end a completion, themselves included in it."""
    vocab_size: int | None = None
    """Tokens that may be emitted, the first ones; it leaves the padding of a vocabulary out. None is all."""


@struct
class Prompts:
    """Rows to continue, padded on the right; each has at least one token."""

    tokens: Int[ArrayLike, "B W"]
    """Token ids."""
    lengths: Int[ArrayLike, " B"]
    """Tokens of each prompt."""
    ids: Int[ArrayLike, " B"]
    """Names of the rows: a row's random numbers depend on its id and the key alone, wherever it lies."""


@struct
class TwoModelSamples:
    """Completions, padded on the right with 0. Flags are False beyond the end."""

    tokens: Int[ArrayLike, "B N"]
    """Token ids; `tokens[b, :lengths[b]]`, the stop token included."""
    lengths: Int[ArrayLike, " B"]
    """Tokens of each completion."""
    intervened: Bool[ArrayLike, "B N"]
    """As in `Choice`."""
    changed: Bool[ArrayLike, "B N"]
    """As in `Choice`."""


def generate_with_two(
    spec: TwoModelSpec, first: Params, second: Params, prompts: Prompts, choose: ChooseFn, key: Key[Array, ""]
) -> TwoModelSamples:
    """Continues `prompts` with tokens that `choose` picks from both models' logits; both go on from the token emitted.

    The key is consumed: a number belongs to the id of a row and the index of its token. Pure, so `jax.jit` applies.
    """
    count, prompt_width = prompts.tokens.shape
    width = prompt_width + spec.max_new_tokens
    draws = [row_uniforms(jax.random.fold_in(key, draw), prompts.ids, width=spec.max_new_tokens) for draw in (0, 1)]
    uniforms = jnp.stack(draws)  # [2, B, N]
    positions = jnp.broadcast_to(jnp.arange(width), (count, width))
    end = jnp.full((count, width), width)
    rows = jnp.arange(count)
    stops = jnp.asarray(spec.stop_tokens, jnp.int32)

    def next_logits(params: Params, tokens: Array, lengths: Array) -> Array:
        # The pass covers the padding too: it lies behind the last token, which does not see it.
        hidden = hidden_states(spec.config, params, tokens, positions, end)
        return logits(spec.config, params, hidden[rows, lengths - 1])[:, : spec.vocab_size]

    def step(carry):
        index, tokens, lengths, active, flags = carry
        of_first = next_logits(first, tokens, lengths)
        of_second = next_logits(second, tokens, lengths)
        choice = choose(of_first, of_second, uniforms[:, :, index], jnp.sum(flags[0], axis=1))

        # A row that has ended writes back what stands there, so that shapes stay fixed and nothing of it changes.
        emitted = jnp.where(active, choice.tokens.astype(jnp.int32), tokens[rows, lengths])
        tokens = tokens.at[rows, lengths].set(emitted)
        flags = flags.at[:, :, index].set(active & jnp.stack([choice.intervened, choice.changed]))
        lengths = lengths + active
        return index + 1, tokens, lengths, active & ~jnp.isin(emitted, stops), flags

    def goes_on(carry):
        index, _, _, active, _ = carry
        return (index < spec.max_new_tokens) & jnp.any(active)

    start = jnp.asarray(prompts.lengths, jnp.int32)
    tokens = jnp.pad(jnp.asarray(prompts.tokens, jnp.int32), ((0, 0), (0, spec.max_new_tokens)))
    flags = jnp.zeros((2, count, spec.max_new_tokens), bool)
    carry = (jnp.int32(0), tokens, start, jnp.ones(count, bool), flags)
    _, tokens, lengths, _, flags = jax.lax.while_loop(goes_on, step, carry)

    # Prompts differ in length, so completions begin at different columns.
    places = start[:, None] + jnp.arange(spec.max_new_tokens)
    kept = places < lengths[:, None]
    completion = jnp.where(kept, jnp.take_along_axis(tokens, jnp.minimum(places, width - 1), axis=1), 0)
    return TwoModelSamples(tokens=completion, lengths=lengths - start, intervened=flags[0], changed=flags[1])


def _draw(x: Array, uniform: Array, sampling: SamplingParams) -> Array:
    """A token of each row of logits [B, V], by its uniform number [B]."""
    return sample_tokens(process_logits(x, sampling).T, uniform, jnp.asarray(sampling.temperature <= 0))[0]


def _floored(x: Array) -> Array:
    """Log-probs of logits, at least `MIN_LOGPROB`, in float32 or better."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.maximum(jax.nn.log_softmax(wide, axis=-1), MIN_LOGPROB)
