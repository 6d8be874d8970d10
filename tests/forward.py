"""The full forward pass that decoders and scorers are held against: one program for rows of every length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rljax.models import hidden_states, logits
from rljax.models.decoder import apply_layer, embed, final_norm, unstack_layers
from rljax.models.rope import rotary_tables

LENGTH = 192
"""Tokens of the longest row."""


def row_logprobs(config, params, ids):
    """The log-prob of each of `ids` [T] after those before it, from one pass over exactly these; 0 for the first.

    The row is padded to one length, so that rows of all lengths share a compiled program.
    """
    row = np.zeros(LENGTH, np.int32)
    row[: len(ids)] = ids
    return np.array(_row_logprobs(config, params, row, len(ids)))[: len(ids)]


@functools.partial(jax.jit, static_argnums=0)
def _row_logprobs(config, params, row, length):
    at = jnp.arange(LENGTH)
    ends = jnp.where(at < length, length, 0)  # nobody sees what stands behind the row
    hidden = hidden_states(config, params, row[None], at[None], ends[None])
    table = jax.nn.log_softmax(logits(config, params, hidden)[0])
    return jnp.concatenate([jnp.zeros(1), table[at[:-1], row[1:]]])


def mixed_logprobs(config, weights, ids):
    """The log-prob of each of `ids` [T] after those before it, 0 for the first, where `weights[t]` read token `t`: its
    keys and values are theirs in every layer, over those of the tokens before, whoever computed them.

    Token by token, with plain attention in float32: what a decoder may make of a cache whose beginning other weights
    have computed.
    """
    shape = (config.num_layers, LENGTH, config.num_kv_heads, config.head_dim)
    kept = (jnp.zeros(shape), jnp.zeros(shape))
    out = np.zeros(len(ids))
    for t, params in enumerate(weights):
        table, kept = _read_token(config, params, kept, jnp.int32(ids[t]), jnp.int32(t))
        if t + 1 < len(ids):
            out[t + 1] = table[ids[t + 1]]
    return out


@functools.partial(jax.jit, static_argnums=0)
def _read_token(config, params, kept, token, t):
    """Log-probs [V] behind a token, and keys and values [layers, LENGTH, KV, hd] with its own."""
    x = embed(config, params, token[None])
    tables = rotary_tables(config, t[None])
    for layer, (layer_params, rotation) in enumerate(
        zip(unstack_layers(config, params)["layers"], config.rotations, strict=True)
    ):

        def attend(q, k, v, layer=layer):
            nonlocal kept
            kept = tuple(old.at[layer, t].set(new[0]) for old, new in zip(kept, (k, v), strict=True))
            groups = config.num_heads // config.num_kv_heads
            keys, values = (jnp.repeat(one[layer], groups, axis=1) for one in kept)
            scores = jnp.einsum("hd,thd->ht", q[0], keys) / np.sqrt(config.head_dim)
            scores = jnp.where(jnp.arange(LENGTH) <= t, scores, -jnp.inf)
            return jnp.einsum("ht,thd->hd", jax.nn.softmax(scores, axis=1), values)[None], None

        x, _ = apply_layer(config, layer_params, x, tables[rotation], attend)
    return jax.nn.log_softmax(logits(config, params, final_norm(config, params, x))[0]), kept
