"""Policy gradients on the tokens of high entropy alone."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.advantages import AdvantageFn
from rljax.algorithms.base import Algorithm
from rljax.algorithms.dynamic_sampling import DynamicSampling
from rljax.losses import SelectFn, high_entropy, policy_loss, token_mean, token_ratio
from rljax.types import RolloutBatch


@dataclasses.dataclass
class HighEntropy(DynamicSampling):
    """High-entropy minority tokens ("beyond the 80/20 rule"), arXiv 2506.01939.

        selected = H >= the (1 - fraction) quantile of H over all tokens of the minibatch
        loss = sum(selected * DAPO's token loss) / number of all tokens

    H is the entropy of the full softmax of the policy being updated, at temperature 1. The threshold is that of the
    global minibatch, whatever devices and microbatches it is spread over, so each update first runs a forward pass over
    all of it. `from_rollout` saves that pass: the sampler's entropies select, once for the whole rollout. These are of
    the distribution that was sampled from, and stale after the first update. A KL penalty or entropy bonus, if switched
    on, covers all tokens. `fraction` 1 is DAPO.

    Deviations: linear interpolation of the quantile; the global minibatch where the paper speaks of the batch at hand.
    """

    fraction: float = 0.2
    from_rollout: bool = False

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"HighEntropy: fraction={self.fraction} must be above 0 and at most 1")

        select = high_entropy(self.fraction)
        loss = policy_loss(
            token_ratio,
            self.surrogate(self.dual_clip),
            token_mean,
            penalties=self.penalties(),
            select_fn=None if self.from_rollout else select,
        )
        credit = selected(self.credit(), select) if self.from_rollout else self.credit()
        return self.compose(credit, loss)


def selected(advantage_fn: AdvantageFn, select_fn: SelectFn) -> AdvantageFn:
    """`advantage_fn`, 0 on tokens that `select_fn` does not choose by the entropies of the rollout, pooled over it."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        mask = jnp.asarray(batch.action_mask) & jnp.asarray(batch.is_valid)[:, None]
        return jnp.where(select_fn(batch.entropies, mask), advantage_fn(batch), 0)

    return advantages
