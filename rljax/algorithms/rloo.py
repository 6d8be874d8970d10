"""REINFORCE with a leave-one-out baseline."""

import dataclasses

from rljax.advantages import kl_in_reward, leave_one_out
from rljax.algorithms.base import Algorithm, check_at_least, check_group, kl_and_entropy
from rljax.losses import policy_loss, sequence_sum, token_ratio, unclipped
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class RLOO:
    """RLOO, arXiv 2402.14740.

        R' = R - kl_coef * sum_t (lp_behavior - lp_ref)
        A  = R' - mean of R' over the other samples of the prompt
        loss = mean_rows sum_tokens -A r

    The plain policy gradient, meant for one update per rollout, where the ratio r is 1. The method does not fix the
    group size. Deviation: r is there so that further updates account for the move; without clipping keep them few.
    """

    group_size: int = 8
    kl_coef: float = 0.03
    entropy_coef: float = 0.0

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_group(self)
        check_at_least(self, 0, "kl_coef", "entropy_coef")
        return Algorithm(
            plan=RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0),
            advantage_fn=kl_in_reward(leave_one_out(), kl_coef=self.kl_coef),
            loss=policy_loss(
                ratio_fn=token_ratio,
                surrogate_fn=unclipped(),
                aggregate_fn=sequence_sum,
                penalties=kl_and_entropy(0.0, self.entropy_coef),
            ),
        )
