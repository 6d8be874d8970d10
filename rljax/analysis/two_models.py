"""Decoding with two models of one vocabulary: which of them speaks is decided token by token.

Two studies of what RL changes are built on this. Replacing the base's tokens where the policy has turned away from
them, and extrapolating there beyond the policy: 2603.22117. Handing the next token to the other model where the two
distributions diverge: 2603.22446. Which token comes next is a function argument, `ChooseFn`.

A tool for measuring, not for serving: each token costs a forward pass of both models over the whole row, since nothing
is cached.
"""

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


class Choice(NamedTuple):
    """The next token of each row; whether the second model (or what is made of both) gave it; and whether it differs
    from the one that the first alone would have emitted."""

    tokens: Int[Array, " B"]
    intervened: Bool[Array, " B"]
    changed: Bool[Array, " B"]


ChooseFn = Callable[[Array, Array, Array, Array], Choice]
"""(first model's logits [B, V], second's [B, V], uniforms [2, B], interventions of the row so far [B]) -> Choice."""

Mix = Callable[[Array, Array], Array]
"""(base logits [*B, V], policy logits [*B, V]) -> logits [*B, V]."""

Criterion = Callable[[Array, Array, Array], Array]
"""(first log-probs [B, V], second log-probs [B, V], uniform [B]) -> bool [B]; log-probs of what is sampled from."""


def signed_shift(base_logits: Float[Array, "*B V"], policy_logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """`log p_policy - log p_base` (nats) of every token, log-probs floored at -50 (2603.22117)."""
    return _floored(policy_logits) - _floored(base_logits)


def jensen_shannon(first_logits: Float[Array, "*B V"], second_logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """`(KL(p || m) + KL(q || m)) / 2`, `m = (p + q) / 2`, in nats: 0 to ln 2, which disjoint supports reach.

    Logits of -inf, or masked by truncation, are probability 0.
    """
    p, q = (jnp.maximum(jax.nn.log_softmax(x, axis=-1), -200.0) for x in (first_logits, second_logits))
    mix = jnp.logaddexp(p, q) - jnp.log(2.0)
    total = jnp.sum(jnp.exp(p) * (p - mix) + jnp.exp(q) * (q - mix), axis=-1) / 2
    return jnp.maximum(total, 0.0)


def base(base_logits: Float[Array, "*B V"], policy_logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """The base's own logits."""
    return base_logits


def policy(base_logits: Float[Array, "*B V"], policy_logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """The policy's own logits."""
    return policy_logits


def extrapolated(gamma: float) -> Mix:
    """`(1 + gamma) log p_policy - gamma log p_base`, the policy's log-probs moved on along their shift (2603.22117).

    Not normalised; `gamma` 0 gives the policy's log-probs. Both are floored at -50. The paper takes 0.05 to 0.1.
    """

    def mix(base_logits: Float[Array, "*B V"], policy_logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        return (1 + gamma) * _floored(policy_logits) - gamma * _floored(base_logits)

    return mix


def redraw_where_shifted(sampling: SamplingParams, *, tau: float, redraw: Mix = policy, draft: Mix = base) -> ChooseFn:
    """Draws y from `draft`; where `log p_policy(y) - log p_base(y) <= tau`, discards it and draws from `redraw`.

    First model base, second policy (2603.22117). The draws are independent; the shift is that of the full softmax,
    while temperature and truncation act on what is drawn from, after mixing. With `redraw=extrapolated(gamma)` this is
    the paper's test-time extrapolation (tau -0.3 to -0.4), with the defaults its token replacement.
    """

    def choose(first: Array, second: Array, uniforms: Array, interventions: Array) -> Choice:
        drafted = _draw(draft(first, second), uniforms[0], sampling)
        shift = jnp.take_along_axis(signed_shift(first, second), drafted[:, None], axis=1)[:, 0]
        redrawn = _draw(redraw(first, second), uniforms[1], sampling)
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
        own, other = (_draw(x, uniforms[0], sampling) for x in (first, second))
        of_first, of_second = (jax.nn.log_softmax(process_logits(x, sampling), axis=-1) for x in (first, second))
        fires = criterion(of_first, of_second, uniforms[1])
        if budget is not None:
            fires = fires & (interventions < budget)
        tokens = jnp.where(fires, other, own)
        return Choice(tokens, fires, tokens != own)

    return choose


def divergence_above(threshold: float = 0.1) -> Criterion:
    """`JS(first, second) > threshold`. The paper's threshold is not known; 0.1 is its bin of high divergence."""
    return lambda first, second, uniform: jensen_shannon(first, second) > threshold


def entropy_above(threshold: float) -> Criterion:
    """The first model's entropy (nats) is above `threshold`: a control."""
    return lambda first, second, uniform: -jnp.sum(jnp.exp(first) * jnp.maximum(first, -200.0), axis=-1) > threshold


def at_random(share: float) -> Criterion:
    """A `share` of positions, whatever the models say: a control."""
    return lambda first, second, uniform: uniform < share


@struct
class TwoModelSamples:
    """Completions, padded on the right: `tokens[b, :lengths[b]]`, the stop token included; flags are False beyond."""

    tokens: Int[ArrayLike, "B N"]
    lengths: Int[ArrayLike, " B"]
    intervened: Bool[ArrayLike, "B N"]
    changed: Bool[ArrayLike, "B N"]


def generate_with_two(
    config: DecoderConfig,
    first: Params,
    second: Params,
    prompts: Int[ArrayLike, "B W"],
    prompt_lengths: Int[ArrayLike, " B"],
    choose: ChooseFn,
    key: Key[Array, ""],
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
    vocab_size: int | None = None,
) -> TwoModelSamples:
    """Continues `prompts` (right-padded, at least one token each) with tokens that `choose` picks from both models'
    logits; both go on from the token emitted.

    The key is consumed: a number belongs to a row and the index of its token. `vocab_size` leaves the padding of a
    vocabulary out. Pure, so `jax.jit` applies.
    """
    prompts = jnp.asarray(prompts)
    count, width = prompts[:, 0].shape[0], prompts.shape[1] + max_new_tokens
    uniforms = jnp.stack(
        [row_uniforms(jax.random.fold_in(key, draw), jnp.arange(count), width=max_new_tokens) for draw in (0, 1)]
    )
    positions = jnp.broadcast_to(jnp.arange(width), (count, width))
    end = jnp.full((count, width), width)
    rows, stops = jnp.arange(count), jnp.asarray(stop_tokens, jnp.int32)

    def next_logits(params: Params, tokens: Array, lengths: Array) -> Array:
        hidden = hidden_states(config, params, tokens, positions, end)
        return logits(config, params, hidden[rows, lengths - 1])[:, :vocab_size]

    def step(carry):
        index, tokens, lengths, active, flags = carry
        of_first, of_second = (next_logits(params, tokens, lengths) for params in (first, second))
        choice = choose(of_first, of_second, uniforms[:, :, index], jnp.sum(flags[0], axis=1))
        emitted = jnp.where(active, choice.tokens.astype(jnp.int32), tokens[rows, lengths])
        tokens = tokens.at[rows, lengths].set(emitted)
        flags = flags.at[:, :, index].set(active & jnp.stack([choice.intervened, choice.changed]))
        lengths = lengths + active
        return index + 1, tokens, lengths, active & ~jnp.isin(emitted, stops), flags

    def goes_on(carry):
        return (carry[0] < max_new_tokens) & jnp.any(carry[3])

    start = jnp.asarray(prompt_lengths, jnp.int32)
    # One column more than is ever read takes the writes of rows that are full.
    tokens = jnp.pad(prompts.astype(jnp.int32), ((0, 0), (0, max_new_tokens)))
    flags = jnp.zeros((2, count, max_new_tokens), bool)
    carry = (jnp.int32(0), tokens, start, jnp.ones(count, bool), flags)
    _, tokens, lengths, _, flags = jax.lax.while_loop(goes_on, step, carry)
    places = start[:, None] + jnp.arange(max_new_tokens)
    kept = places < lengths[:, None]
    completion = jnp.where(kept, jnp.take_along_axis(tokens, jnp.minimum(places, width - 1), axis=1), 0)
    return TwoModelSamples(tokens=completion, lengths=lengths - start, intervened=flags[0], changed=flags[1])


def _draw(x: Array, uniform: Array, sampling: SamplingParams) -> Array:
    return sample_tokens(process_logits(x, sampling).T, uniform, jnp.asarray(sampling.temperature <= 0))[0]


def _floored(x: Array) -> Array:
    return jnp.maximum(jax.nn.log_softmax(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=-1), MIN_LOGPROB)
