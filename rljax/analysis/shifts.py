"""How far a policy has moved from its base at every token of given rows: what 2603.22117 and 2603.22446 measure."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.analysis.two_models import jensen_shannon, signed_shift
from rljax.models import DecoderConfig, hidden_states, logits
from rljax.sampling.logits import SamplingParams, process_logits
from rljax.types import ArrayLike, Params, struct


@struct
class Shifts:
    """Index t describes token t, given those before it; the first token, which nothing precedes, has 0.

    `signed` is `log p_policy - log p_base` of the token, `divergence` the Jensen-Shannon divergence of the two
    distributions (nats). `base_rank` is how many tokens the base prefers to the policy's favourite, `base_logprob` the
    base's log-prob of that favourite.
    """

    signed: Float[ArrayLike, "B T"]
    divergence: Float[ArrayLike, "B T"]
    base_rank: Int[ArrayLike, "B T"]
    base_logprob: Float[ArrayLike, "B T"]


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
    states = [hidden_states(config, params, tokens, positions, end)[:, :-1] for params in (base, policy)]
    chunk = min(chunk, max(width - 1, 1))
    chunks = -(-(width - 1) // chunk)
    pad = chunks * chunk - (width - 1)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(count, chunks, chunk, *x.shape[2:]), 1, 0)

    def measure(part):
        base_states, policy_states, targets = part
        first = logits(config, base, base_states)[..., :vocab_size]
        second = logits(config, policy, policy_states)[..., :vocab_size]
        signed = jnp.take_along_axis(signed_shift(first, second), targets[..., None], axis=-1)[..., 0]
        if sampling is None:
            divergence = jensen_shannon(first, second)
        else:
            divergence = jensen_shannon(process_logits(first, sampling), process_logits(second, sampling))
        favourite = jnp.argmax(second, axis=-1)[..., None]
        own = jnp.take_along_axis(first, favourite, axis=-1)
        rank = jnp.sum(first > own, axis=-1).astype(jnp.int32)
        return signed, divergence, rank, own[..., 0] - jax.nn.logsumexp(first, axis=-1)

    def join(x: Array) -> Array:
        flat = jnp.moveaxis(x, 0, 1).reshape(count, chunks * chunk)[:, : width - 1]
        return jnp.pad(flat, ((0, 0), (1, 0)))

    parts = jax.lax.map(measure, tuple(split(x) for x in (*states, tokens[:, 1:])))
    signed, divergence, rank, logprob = (join(x) for x in parts)
    return Shifts(signed=signed, divergence=divergence, base_rank=rank, base_logprob=logprob)
