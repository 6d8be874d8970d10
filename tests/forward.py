"""The full forward pass that decoders and scorers are held against: one program for rows of every length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rljax.models import hidden_states, logits
from rljax.models.decoder import apply_layer, embed, final_norm, unstack_layers
from rljax.models.rope import rotary_table

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

    Token by token, with plain attention in float32 over lists that grow: what a decoder may make of a cache whose
    beginning other weights have computed.
    """
    keys = [[] for _ in range(config.num_layers)]
    values = [[] for _ in range(config.num_layers)]
    out = np.zeros(len(ids))
    for t, (params, token) in enumerate(zip(weights, ids, strict=True)):
        x = embed(config, params, jnp.array([token]))
        rotary = rotary_table(config, jnp.array([t]))
        for layer, layer_params in enumerate(unstack_layers(params)["layers"]):

            def attend(q, k, v, layer=layer):
                keys[layer].append(np.asarray(k[0]))
                values[layer].append(np.asarray(v[0]))
                return _attend(np.asarray(q[0]), np.stack(keys[layer]), np.stack(values[layer]))[None], None

            x, _ = apply_layer(config, layer_params, x, rotary, attend)
        if t + 1 < len(ids):
            table = jax.nn.log_softmax(logits(config, params, final_norm(config, params, x))[0])
            out[t + 1] = table[ids[t + 1]]
    return out


def _attend(q, k, v):
    """One query [H, hd] over keys and values [T, KV, hd]."""
    groups = q.shape[0] // k.shape[1]
    k, v = (np.repeat(x, groups, axis=1) for x in (k, v))
    scores = np.einsum("hd,thd->ht", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return jnp.asarray(np.einsum("ht,thd->hd", weights / weights.sum(axis=1, keepdims=True), v))
