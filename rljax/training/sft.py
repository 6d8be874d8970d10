"""The supervised loss: the learner trains on given completions with it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.types import ArrayLike, Rows


@dataclasses.dataclass(frozen=True)
class SupervisedLoss:
    """Negative log-likelihood, averaged over the loss tokens of the minibatch. Advantages are not looked at."""

    select_fn: None = None
    """Nothing is left out by looking at the whole minibatch."""
    correct_fn: None = None
    """Nor is anything corrected by it."""

    @staticmethod
    def token_weights(loss_mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
        mask = jnp.asarray(loss_mask, jnp.float32)
        return mask / jnp.maximum(jnp.sum(mask), 1.0)

    @staticmethod
    def loss(
        logprobs: Float[Array, "B T"], entropies: Float[Array, "B T"], rows: Rows
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        nll = -jnp.sum(rows.loss_weights * jnp.where(rows.loss_mask, logprobs, 0.0))
        entropy = jnp.sum(jnp.where(rows.loss_mask, entropies, 0.0)) / rows.token_count
        return nll, jax.lax.stop_gradient({"loss/nll": nll, "loss/entropy": entropy})


def sft_loss() -> SupervisedLoss:
    """Next-token loss for `Learner`: give it advantages of any value, say zeros."""
    return SupervisedLoss()
