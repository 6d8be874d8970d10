"""Group sequence policy optimisation."""

import dataclasses

from rljax.algorithms.base import Algorithm, GroupRecipe
from rljax.losses import policy_loss, sequence_mean, sequence_ratio


@dataclasses.dataclass
class GSPO(GroupRecipe):
    """GSPO, arXiv 2507.18071.

        A = (R - mean) / (std + epsilon) of the group
        s = exp(mean_tokens (lp - lp_old)), one ratio per row
        loss = mean_rows max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))

    Clipping takes whole rows. The method does not fix the group size; it expects several minibatches per rollout (4 in
    the paper). Deviations: the log of s is at most 10; KL penalty (k3) and entropy bonus can be switched on. For
    advantages that vary within a row compose `policy_loss` with `sequence_token_ratio` (GSPO-token).
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        loss = policy_loss(sequence_ratio, self.surrogate(), sequence_mean, penalties=self.penalties())
        return self.compose(self.credit(), loss)
