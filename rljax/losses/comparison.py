"""Which policies a loss compares the current one with, read off its computation."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import Array

from rljax.losses.policy_loss import Loss
from rljax.types import Rows


class ComparedWith(NamedTuple):
    """Whether the update that a loss gives depends on `Rows.behavior_logprobs`, and on `Rows.old_logprobs`. Metrics do
    not count."""

    behavior: bool
    old: bool


def compared_with(loss: Loss, columns: Mapping[str, bool] | None = None) -> ComparedWith:
    """Traces the gradient of `loss` (and the step factor of its correction) and follows both log-probs through it.

    `columns` are those that the loss reads: by name, whether they have a number for each token, or else one for each
    row. Nothing is compiled or computed. A jitted function within the loss counts as depending, in all it returns, on
    all that it is given.
    """
    shape = (1, 2, 3)  # any minibatch would do
    traced = jax.make_jaxpr(lambda behavior, old: _update(loss, behavior, old, columns or {}))(
        jnp.zeros(shape), jnp.zeros(shape)
    )
    behavior, old = traced.jaxpr.invars
    return ComparedWith(_reaches_end(traced.jaxpr, behavior), _reaches_end(traced.jaxpr, old))


def _update(loss: Loss, behavior: Array, old: Array, columns: Mapping[str, bool]) -> tuple[Array, ...]:
    zeros = jnp.zeros_like(behavior)
    rows = Rows(
        loss_mask=jnp.ones(zeros.shape, bool),
        loss_weights=jnp.ones_like(zeros),
        token_count=jnp.ones(zeros.shape[:1]),
        advantages=jnp.ones_like(zeros),
        behavior_logprobs=behavior,
        old_logprobs=old,
        source=jnp.zeros(zeros.shape[:2], jnp.int32),
        ref_logprobs=zeros,
        uniforms=zeros,
        columns={name: zeros if is_per_token else zeros[..., 0] for name, is_per_token in columns.items()},
    )

    scale = None
    if loss.correct_fn is not None:
        rows, _, scale = loss.correct_fn(rows)

    microbatch = jax.tree.map(lambda x: x[0], rows)
    gradient = jax.grad(lambda logprobs, entropies: loss.loss(logprobs, entropies, microbatch)[0], argnums=(0, 1))
    slopes = gradient(zeros[0], zeros[0])
    return slopes if scale is None else (*slopes, scale)


def _reaches_end(jaxpr: jax.extend.core.Jaxpr, start: jax.extend.core.Var) -> bool:
    """Whether an output of the computation depends on the variable."""
    reached = {start}
    for equation in jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in reached for x in equation.invars):
            reached.update(equation.outvars)
    return any(not isinstance(x, Literal) and x in reached for x in jaxpr.outvars)
