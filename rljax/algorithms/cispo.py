"""Clipped importance sampling policy optimisation."""

import dataclasses

from rljax.advantages import group_normalized
from rljax.algorithms.base import Algorithm, Recipe, check_at_least
from rljax.losses import cispo, policy_loss, token_mean, token_ratio


@dataclasses.dataclass
class CISPO(Recipe):
    """CISPO (MiniMax-M1), arXiv 2506.13585.

        A = (R - mean) / (std + epsilon) of the group
        loss = mean over all tokens of the minibatch of -sg(clip(r, cispo_min_ratio, cispo_max_ratio)) A lp

    The cap is the absolute maximum of the ratio (5 in the scaling study 2510.13786), not a distance from 1. No token
    loses its gradient. The value of the loss is no objective. The method does not fix the group size. Deviation: KL
    penalty (k3) and entropy bonus can be switched on.
    """

    cispo_max_ratio: float = 5.0
    cispo_min_ratio: float = 0.0
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 0, "cispo_min_ratio", "epsilon")
        check_at_least(self, 1, "cispo_max_ratio")
        if self.cispo_min_ratio > 1:
            raise ValueError(f"CISPO: cispo_min_ratio={self.cispo_min_ratio} must be at most 1, the ratio on-policy")
        surrogate = cispo(max_ratio=self.cispo_max_ratio, min_ratio=self.cispo_min_ratio)
        loss = policy_loss(token_ratio, surrogate, token_mean, penalties=self.penalties())
        return self.compose(group_normalized(epsilon=self.epsilon), loss)
