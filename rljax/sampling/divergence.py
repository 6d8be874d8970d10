"""What a teacher says of whole distributions, and a student's divergence from it: one vocabulary head, or two.

Logits of either model exist for a chunk of tokens at a time, forward and backward. A teacher is told of by its most
likely tokens (`TopTokens`: a few numbers a token, from any teacher) or, exactly, by the last hidden states that its own
head goes through beside the student's (`States`).

On a mesh every device goes through chunks of its own rows, as in `rljax.sampling.score`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rljax.models import DecoderConfig, head_params, logits, logits_gradient
from rljax.sampling.logits import SamplingParams
from rljax.sampling.score import _chunked, _Layout, _live_chunks, _slice, _temperature, _write
from rljax.types import ArrayLike, Params


class TopTokens(NamedTuple):
    """The most likely tokens of a teacher's distribution, and the log of all that is left."""

    ids: Int[ArrayLike, "*B K"]
    logprobs: Float[ArrayLike, "*B K"]
    tail: Float[ArrayLike, "*B"]


class States(NamedTuple):
    """A teacher's last hidden states, final-normed, and its `head_params`."""

    hidden: Float[ArrayLike, "*B D"]
    head: Params


def what_was_said(arrays: Mapping[str, Any], head: Params | None) -> TopTokens | States:
    """What a batch carries of a teacher (`RolloutBatch.teacher`, the fields by name), and its head, put together."""
    if "hidden" in arrays:
        assert head is not None, "hidden states need the head that they go through"
        return States(arrays["hidden"], head)
    return TopTokens(arrays["ids"], arrays["logprobs"], arrays["tail"][..., 0])


class DivergenceHead(NamedTuple):
    """What a divergence is and how it is computed; part of a program, not of its data.

    Attributes:
        divergence: one of `rljax.losses`: (log p [*B, C], log q [*B, C]) -> (value, slopes, mean slope).
        teacher: whose head `States` go through; None for `TopTokens`.
        chunk: tokens of one device whose logits exist at a time.
    """

    divergence: Callable[[Array, Array], Any]
    teacher: DecoderConfig | None
    chunk: int


def existing_logits(config: DecoderConfig, head: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B N"]:
    """Of the ids that exist, float32: without what pads the vocabulary, which may differ between two models."""
    return logits(config, head, hidden)[..., : config.num_ids]


def tempered(own: Float[Array, "*B N"], sampling: SamplingParams | None) -> Float[Array, "*B N"]:
    """Log-probs of logits at the temperature that is sampled with. Truncation plays no part."""
    return jax.nn.log_softmax(own / _temperature(sampling), axis=-1)


def top_tokens(
    config: DecoderConfig,
    params: Params,
    hidden: Float[Array, "R C D"],
    sampling: SamplingParams | None,
    *,
    count: int,
    chunk: int,
) -> TopTokens:
    """The `count` most likely tokens after each of `hidden`, a chunk at a time. ValueError unless `count` is below the
    number of ids: then the whole distribution is what is wanted."""
    if not 0 < count < config.num_ids:
        raise ValueError(f"support={count} must be above 0 and below the {config.num_ids} tokens of the vocabulary")
    head = head_params(config, params)
    rows, length, _ = hidden.shape
    step, padding = _chunked(length, max(chunk // rows, 1))
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))

    def one(i: Array) -> TopTokens:
        log_p = tempered(existing_logits(config, head, _slice(hidden, i, step)), sampling)
        best, ids = jax.lax.top_k(log_p, count)
        return TopTokens(ids, best, _outside(log_p, ids))

    parts = jax.lax.map(one, jnp.arange((length + padding) // step))

    def joined(x: Array) -> Array:
        # [chunks, R, step, ...] to [R, C, ...].
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(rows, length + padding, *x.shape[3:])[:, :length]

    return TopTokens(*map(joined, parts))


def divergence_hidden(
    config: DecoderConfig,
    params: Params,
    hidden: Float[Array, "R C D"],
    said: TopTokens | States,
    wanted: Bool[ArrayLike, "R C"],
    sampling: SamplingParams | None,
    *,
    how: DivergenceHead,
) -> Float[Array, "R C"]:
    """The divergence (nats) between what a teacher `said` and the student's distribution after each of `hidden`, both
    tempered by `sampling`; 0 where `wanted` is False. Differentiable in `params` (of which it reads `head_params`) and
    `hidden`, not in what the teacher said."""
    rows, length, width = hidden.shape
    layout = _Layout.of(config, rows, width)
    step, padding = _chunked(length, max(how.chunk // layout.own_rows(rows), 1))

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))

    # The head of the teacher belongs to no row; all else of what was said does.
    teacher_head = said.head if isinstance(said, States) else {}
    of_rows = (said.hidden,) if isinstance(said, States) else tuple(said)
    of_rows = jax.lax.stop_gradient(jax.tree.map(lambda x: padded(jnp.asarray(x)), of_rows))
    teacher_head = jax.lax.stop_gradient(teacher_head)

    program = (config, step, layout, how)
    head = head_params(config, params)
    values = _divergence(program, head, padded(hidden), teacher_head, of_rows, padded(jnp.asarray(wanted)), sampling)
    return values[:, :length]


def _cells(how: DivergenceHead, own: Array, teacher_head: Params, of_rows: Any, sampling: Any):
    """(log-probs of a chunk of the student's logits, its divergence, the slope of each id)."""
    if how.teacher is not None:
        log_p = tempered(existing_logits(how.teacher, teacher_head, of_rows[0]), sampling)
        log_q = tempered(own, sampling)
        found = how.divergence(log_p, log_q)
        return log_q, found, found.slopes

    log_q = tempered(own, sampling)
    ids, logprobs, tail = of_rows
    log_p = jnp.concatenate([logprobs, tail[..., None]], axis=-1)
    own = jnp.take_along_axis(log_q, ids, axis=-1)
    found = how.divergence(log_p, jnp.concatenate([own, _outside(log_q, ids)[..., None]], axis=-1))
    # An id outside has the slope of the rest, which it is a part of.
    slopes = jnp.broadcast_to(found.slopes[..., -1:], log_q.shape)
    slopes = jnp.put_along_axis(slopes, ids, found.slopes[..., :-1], axis=-1, inplace=False)
    return log_q, found, slopes


def _outside(log_p: Array, ids: Array) -> Array:
    """The log of the probability of all other tokens than `ids`."""
    masked = jnp.put_along_axis(log_p, ids, -jnp.inf, axis=-1, inplace=False)
    return jax.nn.logsumexp(masked, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(program, head, hidden, teacher_head, of_rows, wanted, sampling) -> Array:
    values, _ = _forward(program, head, hidden, teacher_head, of_rows, wanted, sampling)
    return values


def _forward(program, head, hidden, teacher_head, of_rows, wanted, sampling):
    config, step, layout, how = program
    whole = layout.gather(head, hidden.dtype)
    teacher_whole = layout.gather(teacher_head, hidden.dtype)

    def measure(whole, teacher_whole, hidden, of_rows, sampling, live):
        def chunk(i, values):
            h, *said = (_slice(x, i, step) for x in (hidden, *of_rows))
            _, found, _ = _cells(how, existing_logits(config, whole, h), teacher_whole, said, sampling)
            return _write(values, found.value, i, step)

        return jax.lax.fori_loop(0, live, chunk, jnp.zeros(hidden.shape[:2], jnp.float32))

    every = PartitionSpec()
    own = PartitionSpec(layout.rows)
    run = layout.on_rows(measure, (every, every, own, own, every, every), own)
    values = run(whole, teacher_whole, hidden, of_rows, sampling, _live_chunks(step, wanted))
    return jnp.where(wanted, values, 0.0), (head, whole, teacher_whole, hidden, of_rows, wanted, sampling)


def _backward(program, residuals, cotangent):
    config, step, layout, how = program
    head, whole, teacher_whole, hidden, of_rows, wanted, sampling = residuals
    cotangent = jnp.where(wanted, cotangent, 0.0)
    scale = 1.0 / _temperature(sampling)

    def gradients(whole, teacher_whole, hidden, of_rows, cotangent, sampling, scale, live):
        def chunk(i, carry):
            d_hidden, d_head = carry
            h, d, *said = (_slice(x, i, step) for x in (hidden, cotangent, *of_rows))
            log_q, found, slopes = _cells(how, existing_logits(config, whole, h), teacher_whole, said, sampling)
            d_logits = jnp.exp(log_q) * (slopes - found.mean_slope[..., None]) * (d * scale)[..., None]
            d_logits = jnp.pad(d_logits, ((0, 0), (0, 0), (0, config.vocab_size - config.num_ids)))
            d_h, d_part = logits_gradient(config, whole, h, d_logits)
            return _write(d_hidden, d_h, i, step), jax.tree.map(jnp.add, d_head, d_part)

        start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (hidden, whole))
        d_hidden, d_head = jax.lax.fori_loop(0, live, chunk, start)
        return d_hidden.astype(hidden.dtype), jax.tree.map(lambda d: d[None], d_head)

    every = PartitionSpec()
    own = PartitionSpec(layout.rows)
    run = layout.on_rows(gradients, (every, every, own, own, own, every, every, every), own)
    live = _live_chunks(step, wanted)
    d_hidden, d_head = run(whole, teacher_whole, hidden, of_rows, cotangent, sampling, scale, live)
    return layout.reduce(d_head, head), d_hidden, None, None, None, None


_divergence.defvjp(_forward, _backward)
