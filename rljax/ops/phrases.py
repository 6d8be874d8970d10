"""Finding fixed sequences of tokens in rows."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rljax.types import ArrayLike


def find_phrases(
    tokens: Int[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"], phrases: Sequence[Sequence[int]]
) -> Bool[Array, "B T"]:
    """True at the first token of every occurrence of a phrase, all of whose tokens lie where `mask`.

    `phrases` are static sequences of token ids, none of them empty (ValueError); several that begin at one token count
    once.
    """
    tokens = jnp.asarray(tokens)
    mask = jnp.asarray(mask)
    width = tokens.shape[1]
    found = jnp.zeros(mask.shape, bool)
    for phrase in phrases:
        if not len(phrase):
            raise ValueError("a phrase without tokens occurs everywhere; remove it from the phrases")
        here = jnp.ones(mask.shape, bool)
        for i, token in enumerate(phrase):
            equal = (tokens == token) & mask
            here &= jnp.pad(equal[:, i:], ((0, 0), (0, min(i, width))))
        found |= here
    return found
