"""GRPO without its length and difficulty biases."""

import dataclasses

from rljax.advantages import group_centered
from rljax.algorithms.base import Algorithm, Recipe, check_at_least, check_clip
from rljax.losses import clipped, fixed_length, policy_loss, token_ratio


@dataclasses.dataclass
class DrGRPO(Recipe):
    """Dr.GRPO, arXiv 2503.20783.

        A = R - mean of the group
        loss = 1 / (rows * horizon) sum_rows sum_tokens max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    `horizon` is the constant that takes the place of row lengths: the limit on completion tokens. The method does not
    fix the group size. Deviations: KL penalty (k3) and entropy bonus can be switched on; the paper has neither.
    """

    horizon: int = 3000
    clip_low: float = 0.2
    clip_high: float = 0.2

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_clip(self)
        check_at_least(self, 1, "horizon")
        surrogate = clipped(clip_low=self.clip_low, clip_high=self.clip_high)
        loss = policy_loss(token_ratio, surrogate, fixed_length(self.horizon), penalties=self.penalties())
        return self.compose(group_centered(), loss)
