"""Decoupled clip and dynamic sampling policy optimisation."""

import dataclasses

from rljax.algorithms.base import Algorithm
from rljax.algorithms.dynamic_sampling import DynamicSampling
from rljax.losses import policy_loss, token_mean, token_ratio


@dataclasses.dataclass
class DAPO(DynamicSampling):
    """DAPO, arXiv 2503.14476.

        A = (R' - mean) / (std + epsilon) of the group,  R' = R + soft overlong punishment
        loss = mean over all tokens of the minibatch of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),
               at most -A dual_clip where A < 0

    Dynamic sampling and the punishment are told in `DynamicSampling`. Deviation: `dual_clip` 10, as the released recipe
    has it; the paper has none.
    """

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        surrogate = self.surrogate(self.dual_clip)
        loss = policy_loss(token_ratio, surrogate, token_mean, penalties=self.penalties())
        return self.compose(self.credit(), loss)
