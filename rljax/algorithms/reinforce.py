"""The policy gradient without groups."""

import dataclasses

from rljax.advantages import batch_centered
from rljax.algorithms.base import Algorithm, check_at_least, kl_and_entropy
from rljax.losses import policy_loss, token_mean, token_ratio, unclipped
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class Reinforce:
    """REINFORCE (Williams, 1992) with the mean reward of the batch as baseline.

        A = R - mean over the batch
        loss = mean over all tokens of the minibatch of -A r

    Deviations: r, 1 on the first update of a rollout, accounts for the move of further ones; token mean as aggregation.
    """

    group_size: int = 1
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 1, "group_size")
        check_at_least(self, 0, "kl_coef", "entropy_coef")
        return Algorithm(
            plan=RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0),
            advantage_fn=batch_centered(),
            loss=policy_loss(
                ratio_fn=token_ratio,
                surrogate_fn=unclipped(),
                aggregate_fn=token_mean,
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )
