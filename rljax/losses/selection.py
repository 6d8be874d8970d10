"""Which tokens of a whole minibatch carry the policy gradient: factories of functions
(entropies, loss_mask) -> bool, of any common shape.

Unlike a filter, a selection compares tokens of all rows with each other, so it must see the global minibatch: `Loss`
carries it beside `token_weights`, and the trainer applies it before it splits the work into microbatches.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.ops import as_float, masked_quantile
from rljax.types import ArrayLike

SelectFn = Callable[[ArrayLike, ArrayLike], Array]
"""(entropies [*shape] in nats, loss_mask [*shape]) -> selected [*shape], False off the mask."""


def high_entropy(fraction: float = 0.2) -> SelectFn:
    """Selects `H >= q`, q the `1 - fraction` quantile of H over *all* loss tokens, pooled across rows (2506.01939).

    Linear interpolation; ties with the threshold are kept, so equal entropies and `fraction` 1 select everything. An
    empty mask selects nothing. Constant for differentiation. Zeroing the advantages elsewhere is `sum(selected * L) /
    sum(loss_mask)`: the denominator stays the count of all tokens. The meaning is that of the policy's full softmax at
    temperature 1.
    """

    def select(entropies: Float[ArrayLike, "*shape"], loss_mask: Bool[ArrayLike, "*shape"]) -> Bool[Array, "*shape"]:
        entropies = jax.lax.stop_gradient(as_float(entropies))
        return jnp.asarray(loss_mask) & (entropies >= masked_quantile(entropies, loss_mask, 1 - fraction))

    return select
