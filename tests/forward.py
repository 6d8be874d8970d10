"""The full forward pass that decoders and scorers are held against: one program for rows of every length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rljax.models import hidden_states, logits

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
