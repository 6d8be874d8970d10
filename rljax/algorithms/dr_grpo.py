"""GRPO without its length and difficulty biases."""

import dataclasses

from rljax.advantages import group_centered
from rljax.algorithms.base import Algorithm, check_at_least, check_clip, check_group, kl_and_entropy
from rljax.losses import clipped, fixed_length, policy_loss, token_ratio
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class DrGRPO:
    """Dr.GRPO, arXiv 2503.20783.

        A = R - mean of the group
        loss = 1 / (rows * horizon) sum_rows sum_tokens max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    `horizon` is the constant that takes the place of row lengths: the limit on completion tokens. The method does not
    fix the group size. Deviations: KL penalty (k3) and entropy bonus can be switched on; the paper has neither.
    """

    group_size: int = 8
    horizon: int = 3000
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_group(self)
        check_clip(self)
        check_at_least(self, 0, "kl_coef", "entropy_coef")
        check_at_least(self, 1, "horizon")
        return Algorithm(
            plan=RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0),
            advantage_fn=group_centered(),
            loss=policy_loss(
                ratio_fn=token_ratio,
                surrogate_fn=clipped(clip_low=self.clip_low, clip_high=self.clip_high),
                aggregate_fn=fixed_length(self.horizon),
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )
