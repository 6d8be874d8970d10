"""Clipped importance sampling policy optimisation."""

import dataclasses

from rljax.advantages import group_normalized
from rljax.algorithms.base import Algorithm, check_at_least, check_group, kl_and_entropy
from rljax.losses import cispo, policy_loss, token_mean, token_ratio
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class CISPO:
    """CISPO (MiniMax-M1), arXiv 2506.13585.

        A = (R - mean) / (std + epsilon) of the group
        loss = mean over all tokens of the minibatch of -sg(clip(r, cispo_min_ratio, cispo_max_ratio)) A lp

    The cap is the absolute maximum of the ratio (5 in the scaling study 2510.13786), not a distance from 1. No token
    loses its gradient. The value of the loss is no objective. The method does not fix the group size. Deviation: KL
    penalty (k3) and entropy bonus can be switched on.
    """

    group_size: int = 8
    cispo_max_ratio: float = 5.0
    cispo_min_ratio: float = 0.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_group(self)
        check_at_least(self, 0, "cispo_min_ratio", "kl_coef", "entropy_coef", "epsilon")
        check_at_least(self, 1, "cispo_max_ratio")
        if self.cispo_min_ratio > 1:
            raise ValueError(f"CISPO: cispo_min_ratio={self.cispo_min_ratio} must be at most 1, the ratio on-policy")
        return Algorithm(
            plan=RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0),
            advantage_fn=group_normalized(epsilon=self.epsilon),
            loss=policy_loss(
                ratio_fn=token_ratio,
                surrogate_fn=cispo(max_ratio=self.cispo_max_ratio, min_ratio=self.cispo_min_ratio),
                aggregate_fn=token_mean,
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )
