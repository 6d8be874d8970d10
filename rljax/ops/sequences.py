"""How much of one token sequence is found in another, in order."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.types import ArrayLike

LcsScore = Callable[[Array, Array, Array], Array]
"""(length of the longest common subsequence, length of a, length of b) -> similarity in [0, 1]."""


def lcs_length(
    a: Int[ArrayLike, " A"], b: Int[ArrayLike, " B"], *, a_length: Int[ArrayLike, ""], b_length: Int[ArrayLike, ""]
) -> Int[Array, ""]:
    """Length of the longest common subsequence of the first `a_length` tokens of `a` and `b_length` of `b`; what stands
    behind them is padding. `vmap` it over pairs. One step of a scan for each entry of `a`: let that be the shorter."""
    a, b = jnp.asarray(a), jnp.asarray(b)
    is_b = jnp.arange(b.shape[0]) < b_length

    def next_row(row: Array, token: tuple[Array, Array]) -> tuple[Array, None]:
        equal = (b == token[0]) & is_b & token[1]
        longest = jax.lax.cummax(jnp.maximum(row[1:], row[:-1] + equal))
        return jnp.pad(longest, (1, 0)), None

    start = jnp.zeros(b.shape[0] + 1, jnp.int32)
    row, _ = jax.lax.scan(next_row, start, (a, jnp.arange(a.shape[0]) < a_length))
    return row[-1]


def dice(common: ArrayLike, a_length: ArrayLike, b_length: ArrayLike) -> Float[Array, "*shape"]:
    """`2 LCS / (len a + len b)`."""
    return _ratio(2 * jnp.asarray(common), jnp.asarray(a_length) + jnp.asarray(b_length))


def of_longer(common: ArrayLike, a_length: ArrayLike, b_length: ArrayLike) -> Float[Array, "*shape"]:
    """`LCS / max(len a, len b)`."""
    return _ratio(jnp.asarray(common), jnp.maximum(jnp.asarray(a_length), jnp.asarray(b_length)))


def lcs_similarity(
    a: Int[ArrayLike, " A"],
    b: Int[ArrayLike, " B"],
    *,
    a_length: Int[ArrayLike, ""] | int,
    b_length: Int[ArrayLike, ""] | int,
    score: LcsScore = dice,
) -> Float[Array, ""]:
    """Similarity in [0, 1] of two padded token sequences by their longest common subsequence (Role-Agent, 2606.10917):
    `dice`, or `of_longer`. 0 if either is empty. Not differentiable; `jit` and `vmap` as you like."""
    a_length, b_length = jnp.asarray(a_length), jnp.asarray(b_length)
    common = lcs_length(a, b, a_length=a_length, b_length=b_length)
    return jnp.where((a_length > 0) & (b_length > 0), score(common, a_length, b_length), 0)


def _ratio(part: Array, whole: Array) -> Array:
    return part.astype(jnp.float32) / jnp.maximum(whole, 1)
