"""Log-probs of prompts by the weights that a decoder holds: what given tokens would have been said with."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.models.attention import forest_attention
from rljax.models.config import DecoderConfig
from rljax.models.decoder import apply_layer, embed, final_norm, has_delta, recall_of
from rljax.models.head import logits
from rljax.models.rope import rotary_tables
from rljax.parallel import constrain
from rljax.sampling.weights import product
from rljax.types import ArrayLike, Params

_CHUNK = 128  # places of each row whose logits exist at a time


class PromptScores(NamedTuple):
    """Of the tokens of a prompt, from its second on, by the model as it is: temperature 1, nothing cut off."""

    logprobs: Float[ArrayLike, "*B T"]
    """Nats."""
    ranks: Int[ArrayLike, "*B T"]
    """1 for the most probable token of its place; equal ones share the best rank."""
    ids: Int[ArrayLike, "*B T K"]
    """The K most probable tokens, best first."""
    top: Float[ArrayLike, "*B T K"]
    """Their log-probs."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def score_prompts(config: DecoderConfig, count: int, params: Params, tokens: Int[ArrayLike, "N S"]) -> PromptScores:
    """What right-padded prompts are scored with, arrays [N, S - 1], of which what lies behind a prompt's end means
    nothing. `params` are those of `decode_weights`, `count` is K. On a mesh its devices share the rows.
    """
    tokens = jnp.asarray(tokens)
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    # A token sees those before it alone, so that padding at the end changes nothing.
    ends = jnp.full(tokens.shape, length)
    tables = rotary_tables(config, positions)
    recall = recall_of(config, ends)

    x = constrain(embed(config, params, tokens), ("batch", None, None))
    for layer, window, rotation in zip(params["layers"], config.windows, config.rotations, strict=True):

        def attend(q, k, v, sinks=None, window=window):
            return forest_attention(q, k, v, positions, ends, window, sinks=sinks), None

        mix = recall if recall is not None and has_delta(layer) else attend
        x, _ = apply_layer(config, layer, x, tables[rotation], mix, product)
    hidden = final_norm(config, params, x)[:, :-1]

    step = min(_CHUNK, length - 1)
    padding = -(length - 1) % step
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, padding)))

    def one(start: Array) -> PromptScores:
        part = jax.lax.dynamic_slice_in_dim(hidden, start, step, axis=1)
        target = jax.lax.dynamic_slice_in_dim(targets, start, step, axis=1)
        log_p = jax.nn.log_softmax(logits(config, params, part), axis=-1)
        own = jnp.take_along_axis(log_p, target[..., None], axis=-1)
        top, ids = jax.lax.top_k(log_p, count)
        return PromptScores(own[..., 0], 1 + jnp.sum(log_p > own, axis=-1), ids, top)

    parts = jax.lax.map(one, jnp.arange(0, length - 1 + padding, step))

    def joined(x: Array) -> Array:
        # [chunks, N, step, ...] to [N, S - 1, ...].
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(rows, x.shape[1] * x.shape[2], *x.shape[3:])[:, : length - 1]

    return jax.tree.map(joined, parts)
