"""GRPO that drops tokens on which sampler and trainer disagree."""

import dataclasses

from rljax.algorithms.base import Algorithm, GroupRecipe, check_at_least
from rljax.losses import masked_is, policy_loss, sequence_mean, token_ratio


@dataclasses.dataclass
class IcePop(GroupRecipe):
    """IcePop as in GLM-5's reasoning RL, arXiv 2602.15763.

        A = (R - mean) / (std + epsilon) of the group
        rho = exp(lp_old - lp_behavior),  w = rho where 1 / mismatch <= rho <= mismatch, else 0
        loss = mean_rows mean_tokens of w max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    Truncated importance sampling caps such tokens, this drops them. Where sampler and trainer agree it is GRPO.
    Deviations: std with ddof 1, as in our GRPO; KL penalty (k3) and entropy bonus can be switched on.
    """

    group_size: int = 32
    mismatch: float = 2.0
    clip_high: float = 0.28

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 1, "mismatch")
        agrees = masked_is(1 / self.mismatch, self.mismatch)
        loss = policy_loss(
            token_ratio, self.surrogate(), sequence_mean, weight_fns=(agrees,), penalties=self.penalties()
        )
        return self.compose(self.credit(), loss)
