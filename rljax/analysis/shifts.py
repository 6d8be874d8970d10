"""How far a policy has moved from its base at every token of given rows: what 2603.22117 and 2603.22446 measure."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rljax.analysis.two_models import jensen_shannon, signed_shift
from rljax.models import DecoderConfig, hidden_states, logits
from rljax.sampling.logits import SamplingParams, process_logits
from rljax.types import ArrayLike, Params, struct

RARE = 0.01
"""Below this probability a token counts as rare (2603.22446)."""

TAILS = (0.05, 0.5, 0.95)
"""Quantiles of the signed shift that a summary gives: both tails (2603.22117 finds two of them) and the middle."""


@struct
class Shifts:
    """Two models at every token. Index t describes token t, given those before it; the first token, which nothing
    precedes, has 0 in every field."""

    signed: Float[ArrayLike, "B T"]
    """`log p_policy - log p_base` of the token, nats."""
    divergence: Float[ArrayLike, "B T"]
    """Jensen-Shannon divergence of the two distributions, nats."""
    base_rank: Int[ArrayLike, "B T"]
    """How many tokens the base prefers to the policy's most probable one."""
    base_logprob: Float[ArrayLike, "B T"]
    """The base's log-prob of the policy's most probable token, nats."""


@dataclasses.dataclass(frozen=True)
class ShiftSummary:
    """Shifts in a few numbers, over the tokens of responses. A share of nothing is 0."""

    tokens: int
    """Tokens that were measured."""
    divergence_mean: float
    """Mean Jensen-Shannon divergence, nats."""
    high_share: float
    """Share of tokens whose divergence is above the threshold. The next three are shares of these tokens."""
    same_favourite: float
    """The policy's most probable token is the base's too."""
    in_base_top3: float
    """It is among the base's first three."""
    rare_in_base: float
    """The base gives it a probability below 0.01."""
    signed_mean: float
    """Mean of `log p_policy - log p_base`, nats. On the policy's own tokens it estimates KL(policy || base), so only
    noise makes it negative."""
    signed_quantiles: tuple[float, ...]
    """Its quantiles at `TAILS`, nats."""
    profile: tuple[float | None, ...]
    """Mean divergence by place in the response, in equal parts from its start to its end, nats. None where no token
    lies: responses may be shorter than there are parts."""


def token_shifts(
    config: DecoderConfig,
    base: Params,
    policy: Params,
    tokens: Int[ArrayLike, "B T"],
    sampling: SamplingParams | None = None,
    *,
    chunk: int = 64,
    vocab_size: int | None = None,
) -> Shifts:
    """Runs both models over `tokens` (right-padded; what stands in the padding is meaningless).

    With `sampling` the divergence is that of the tempered and truncated distributions, as in 2603.22446, which can be
    much larger than that of the models' own; all else is the models' own. `chunk` positions have logits at a time,
    `vocab_size` leaves the padding of a vocabulary out. Pure, so `jax.jit` applies.
    """
    tokens = jnp.asarray(tokens)
    count, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    end = jnp.full(tokens.shape, width)

    # The state before token t predicts it, so the last state is of no use and the first token has no state.
    states = [hidden_states(config, params, tokens, positions, end)[:, :-1] for params in (base, policy)]
    targets = tokens[:, 1:]
    predicted = width - 1
    chunk = min(chunk, max(predicted, 1))
    chunks = -(-predicted // chunk)
    pad = chunks * chunk - predicted

    def split(x: Array) -> Array:
        """[B, T - 1, ...] -> [chunks, B, chunk, ...]."""
        padded = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(count, chunks, chunk, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        """[chunks, B, chunk] -> [B, T], 0 at the first token."""
        flat = jnp.moveaxis(x, 0, 1).reshape(count, chunks * chunk)[:, :predicted]
        return jnp.pad(flat, ((0, 0), (1, 0)))

    def measure(part):
        base_states, policy_states, part_targets = part
        of_base = logits(config, base, base_states)[..., :vocab_size]
        of_policy = logits(config, policy, policy_states)[..., :vocab_size]
        signed = jnp.take_along_axis(signed_shift(of_base, of_policy), part_targets[..., None], axis=-1)[..., 0]

        if sampling is None:
            divergence = jensen_shannon(of_base, of_policy)
        else:
            divergence = jensen_shannon(process_logits(of_base, sampling), process_logits(of_policy, sampling))

        favourite = jnp.argmax(of_policy, axis=-1)[..., None]
        base_logit = jnp.take_along_axis(of_base, favourite, axis=-1)
        rank = jnp.sum(of_base > base_logit, axis=-1).astype(jnp.int32)
        return signed, divergence, rank, base_logit[..., 0] - jax.nn.logsumexp(of_base, axis=-1)

    parts = jax.lax.map(measure, tuple(split(x) for x in (*states, targets)))
    signed, divergence, rank, logprob = (join(x) for x in parts)
    return Shifts(signed=signed, divergence=divergence, base_rank=rank, base_logprob=logprob)


def summarize_shifts(
    shifts: Shifts, mask: Bool[ArrayLike, "B T"], *, threshold: float = 0.1, bins: int = 10
) -> ShiftSummary:
    """Statistics over the tokens in `mask`, the responses alone: tokens off it do not count as 0. Host.

    A token counts as high when its divergence is above `threshold` (nats); `bins` is the length of the profile.
    """
    mask = np.asarray(mask, bool)
    signed = np.asarray(shifts.signed)
    divergence = np.asarray(shifts.divergence)
    rank = np.asarray(shifts.base_rank)
    logprob = np.asarray(shifts.base_logprob)
    high = mask & (divergence > threshold)

    # Responses differ in length, so a token's place is the part of its own response that it lies in.
    place = np.cumsum(mask, axis=1) - 1
    lengths = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    part = np.minimum(place * bins // lengths, bins - 1)

    return ShiftSummary(
        tokens=int(mask.sum()),
        divergence_mean=_mean(divergence, mask),
        high_share=_mean(high, mask),
        same_favourite=_mean(rank == 0, high),
        in_base_top3=_mean(rank < 3, high),
        rare_in_base=_mean(logprob < np.log(RARE), high),
        signed_mean=_mean(signed, mask),
        signed_quantiles=tuple(np.quantile(signed[mask], TAILS).tolist()) if mask.any() else (0.0,) * len(TAILS),
        profile=tuple(_mean(divergence, mask & (part == i)) if (part == i)[mask].any() else None for i in range(bins)),
    )


def _mean(values: np.ndarray, mask: np.ndarray) -> float:
    return float(values[mask].mean()) if mask.any() else 0.0
