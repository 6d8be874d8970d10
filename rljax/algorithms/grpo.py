"""Group relative policy optimisation."""

import dataclasses

from rljax.algorithms.base import Algorithm, GroupRecipe
from rljax.losses import policy_loss, sequence_mean, token_ratio


@dataclasses.dataclass
class GRPO(GroupRecipe):
    """GRPO, arXiv 2402.03300.

        A = (R - mean) / (std + epsilon) of the group
        loss = mean_rows mean_tokens [ max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) + kl_coef * k3 ]

    Deviations: std with ddof 1, as the common implementations have it; `clip_low` and `clip_high` may differ, and
    `dual_clip` bounds the loss of tokens with A < 0 (both off in the paper). `kl_coef` 0 needs no reference model.
    """

    group_size: int = 64
    dual_clip: float | None = None
    kl_coef: float = 0.04

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        surrogate = self.surrogate(self.dual_clip)
        loss = policy_loss(token_ratio, surrogate, sequence_mean, penalties=self.penalties())
        return self.compose(self.credit(), loss)
