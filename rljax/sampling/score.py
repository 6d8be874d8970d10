"""Log-probs and entropies of given tokens: the training side of sampling, and the one place that shifts by one.

The vocabulary head runs on scored tokens alone, a chunk of them at a time, with a gradient of its own: logits are
recomputed chunk by chunk in the backward pass and never exist for more than one chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.models import Attention, DecoderConfig, forest_attention, hidden_states, output_projection, values
from rljax.sampling.logits import SamplingParams, process_logits
from rljax.types import ArrayLike, Packed, Params


def score_tokens(
    config: DecoderConfig,
    params: Params,
    packed: Packed,
    sampling_params: SamplingParams | None = None,
    *,
    chunk: int = 512,
    remat: bool = False,
    scan: bool = True,
    attention: Attention = forest_attention,
) -> tuple[Float[Array, "R K"], Float[Array, "R K"]]:
    """Log-probs and entropies (float32, nats) of the tokens that `packed.score_index` lists, each under the
    distribution that its predecessor's hidden state gives. 0 where `score_index` is -1.

    Both are differentiable in `params`. With `sampling_params` the distribution is the tempered and truncated one that
    is sampled from (a scored token that truncation would remove is kept); None is the model's own. Logits exist for
    `chunk` tokens at a time (at least one per packed row). `remat`, `scan` and `attention` are those of
    `hidden_states`.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 token; 512 suits most machines")
    tokens, positions, subtree_end = (jnp.asarray(x) for x in (packed.tokens, packed.positions, packed.subtree_end))
    how: dict[str, Any] = dict(remat=remat, scan=scan, attention=attention)
    hidden = hidden_states(config, params, tokens, positions, subtree_end, **how)
    wanted, targets, before = _places(packed)
    hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)
    return score_hidden(hidden, output_projection(config, params), targets, wanted, sampling_params, chunk=chunk)


def score_values(
    config: DecoderConfig,
    params: Params,
    packed: Packed,
    sampling_params: SamplingParams | None = None,
    *,
    chunk: int = 512,
    remat: bool = False,
    scan: bool = True,
    attention: Attention = forest_attention,
) -> tuple[Float[Array, "R K"], Float[Array, "R K"]]:
    """`score_tokens` of a critic: the value (float32) of the state in which each token of `packed.score_index` was
    chosen, which is what its predecessor's hidden state gives; and zeros. 0 where `score_index` is -1.

    Differentiable in `params`. A value belongs to no distribution and has no logits: `sampling_params` and `chunk`
    change nothing. ValueError when the model has no value head.
    """
    tokens, positions, subtree_end = (jnp.asarray(x) for x in (packed.tokens, packed.positions, packed.subtree_end))
    how: dict[str, Any] = dict(remat=remat, scan=scan, attention=attention)
    found = values(config, params, hidden_states(config, params, tokens, positions, subtree_end, **how))
    wanted, _, before = _places(packed)
    found = jnp.where(wanted, jnp.take_along_axis(found, before, axis=1), 0.0)
    return found, jnp.zeros_like(found)


def _places(packed: Packed) -> tuple[Array, Array, Array]:
    """Which of `score_index` are wanted, the tokens there, and where their predecessors lie, [R, K] each."""
    wanted = jnp.asarray(packed.score_index) >= 0
    index = jnp.maximum(packed.score_index, 0)
    targets = jnp.take_along_axis(jnp.asarray(packed.tokens), index, axis=1)
    return wanted, targets, jnp.maximum(jnp.take_along_axis(jnp.asarray(packed.predecessor), index, axis=1), 0)


def score_hidden(
    hidden: Float[Array, "R K D"],
    head: Float[Array, "V D"],
    targets: Int[ArrayLike, "R K"],
    wanted: Bool[ArrayLike, "R K"],
    sampling_params: SamplingParams | None = None,
    *,
    chunk: int,
) -> tuple[Float[Array, "R K"], Float[Array, "R K"]]:
    """Log-probs of `targets` and entropies under `softmax(hidden @ head.T)`; 0 where `wanted [R, K]` is False.

    Chunks that hold no wanted token are skipped. Differentiable in `hidden` and `head`.
    """
    rows, length, _ = hidden.shape
    targets, wanted = jnp.asarray(targets), jnp.asarray(wanted)
    most = min(max(chunk // rows, 1), length)
    chunks = -(-length // most)
    step = min(8 * -(-length // (8 * chunks)), most)  # of one size, so that little of the last is padding
    padding = -length % step
    if padding:
        hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
        targets, wanted = (jnp.pad(x, ((0, 0), (0, padding))) for x in (targets, wanted))
    logprobs, entropies = _head(step, hidden, head, targets, wanted, sampling_params)
    return logprobs[:, :length], entropies[:, :length]


def _logits(hidden: Array, head: Array) -> Array:
    return jnp.einsum("rcd,vd->rcv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _is_target(targets: Array, vocab: int) -> Array:
    return targets[..., None] == jnp.arange(vocab, dtype=targets.dtype)


def _processed(hidden: Array, head: Array, targets: Array, sampling: SamplingParams | None) -> Array:
    logits = _logits(hidden, head)
    if sampling is None:
        return logits
    kept = _is_target(targets, logits.shape[-1])
    return jnp.where(kept, logits / _temperature(sampling), process_logits(logits, sampling))


def _temperature(sampling: SamplingParams | None) -> Array:
    """The divisor of the logits; greedy (0) scores under the model's own distribution."""
    if sampling is None:
        return jnp.float32(1.0)
    return jnp.where(sampling.temperature > 0, sampling.temperature, 1.0).astype(jnp.float32)


def _measure(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """(logprobs, entropies, log normalisers) of a chunk of processed logits."""
    best = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - best
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    log_total = jnp.log(total)
    chosen = jnp.sum(jnp.where(_is_target(targets, logits.shape[-1]), shifted, 0.0), axis=-1)
    entropy = log_total - jnp.sum(weights * shifted, axis=-1) / total
    return chosen - log_total, entropy, best[..., 0] + log_total


def _logit_gradient(logits, targets, normaliser, entropy, d_logprob, d_entropy) -> Array:
    """d lp = onehot - p and d H = -p (log p + H), per processed logit."""
    log_p = logits - normaliser[..., None]
    p = jnp.exp(log_p)
    own = jnp.where(_is_target(targets, logits.shape[-1]), d_logprob[..., None], 0.0)
    return own - p * (d_logprob[..., None] + d_entropy[..., None] * (log_p + entropy[..., None]))


def _hidden_gradient(d_logits: Array, head: Array, dtype: Any) -> Array:
    return jnp.einsum("rcv,vd->rcd", d_logits.astype(dtype), head.astype(dtype), preferred_element_type=jnp.float32)


def _head_gradient(d_logits: Array, hidden: Array) -> Array:
    return jnp.einsum("rcv,rcd->vd", d_logits.astype(hidden.dtype), hidden, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head(step: int, hidden, head, targets, wanted, sampling) -> tuple[Array, Array]:
    (logprobs, entropies), _ = _head_forward(step, hidden, head, targets, wanted, sampling)
    return logprobs, entropies


def _live_chunks(step: int, wanted: Array) -> Array:
    last = jnp.max(jnp.where(wanted, jnp.arange(wanted.shape[1]) + 1, 0))
    return (last + step - 1) // step


def _slice(x: Array, i: Array, step: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * step, step, axis=1)


def _write(x: Array, part: Array, i: Array, step: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), i * step, axis=1)


def _head_forward(step: int, hidden, head, targets, wanted, sampling):
    if step == hidden.shape[1]:
        logits = _processed(hidden, head, targets, sampling)
        logprobs, entropies, normalisers = _measure(logits, targets)
    else:
        logits = None

        def chunk(i, carry):
            h, y = _slice(hidden, i, step), _slice(targets, i, step)
            parts = _measure(_processed(h, head, y, sampling), y)
            return tuple(_write(x, part, i, step) for x, part in zip(carry, parts, strict=True))

        empty = jnp.zeros(targets.shape, jnp.float32)
        logprobs, entropies, normalisers = jax.lax.fori_loop(0, _live_chunks(step, wanted), chunk, (empty,) * 3)
    out = jnp.where(wanted, logprobs, 0.0), jnp.where(wanted, entropies, 0.0)
    return out, (hidden, head, targets, wanted, sampling, normalisers, entropies, logits)


def _head_backward(step: int, residuals, cotangents):
    hidden, head, targets, wanted, sampling, normalisers, entropies, logits = residuals
    d_logprobs, d_entropies = (jnp.where(wanted, d, 0.0) for d in cotangents)
    scale = 1.0 / _temperature(sampling)

    def gradient(logits, *at):
        return _logit_gradient(logits, *at) * scale

    if logits is not None:
        d_logits = gradient(logits, targets, normalisers, entropies, d_logprobs, d_entropies)
        d_hidden = _hidden_gradient(d_logits, head, hidden.dtype)
        d_head = _head_gradient(d_logits, hidden)
    else:

        def chunk(i, carry):
            d_hidden, d_head = carry
            h, y, *at = (_slice(x, i, step) for x in (hidden, targets, normalisers, entropies, d_logprobs, d_entropies))
            d_logits = gradient(_processed(h, head, y, sampling), y, *at)
            d_head = d_head + _head_gradient(d_logits, h)
            return _write(d_hidden, _hidden_gradient(d_logits, head, h.dtype), i, step), d_head

        start = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32)
        d_hidden, d_head = jax.lax.fori_loop(0, _live_chunks(step, wanted), chunk, start)
    return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype), None, None, None


_head.defvjp(_head_forward, _head_backward)
