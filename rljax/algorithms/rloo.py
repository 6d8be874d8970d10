"""REINFORCE with a leave-one-out baseline."""

import dataclasses

from rljax.advantages import kl_in_reward, leave_one_out
from rljax.algorithms.base import Algorithm, Recipe, kl_and_entropy
from rljax.losses import policy_loss, sequence_sum, token_ratio, unclipped


@dataclasses.dataclass
class RLOO(Recipe):
    """RLOO, arXiv 2402.14740.

        R' = R - kl_coef * sum_t (lp_behavior - lp_ref)
        A  = R' - mean of R' over the other samples of the prompt
        loss = mean_rows sum_tokens -A r

    The plain policy gradient, meant for one update per rollout, where the ratio r is 1. The method does not fix the
    group size. Deviation: r is there so that further updates account for the move; without clipping keep them few.
    """

    kl_coef: float = 0.03

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        # The KL is in the reward, so the loss has none.
        loss = policy_loss(token_ratio, unclipped(), sequence_sum, penalties=kl_and_entropy(0.0, self.entropy_coef))
        return self.compose(kl_in_reward(leave_one_out(), kl_coef=self.kl_coef), loss)
