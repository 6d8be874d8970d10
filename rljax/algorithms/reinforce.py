"""The policy gradient without groups."""

import dataclasses

from rljax.advantages import batch_centered
from rljax.algorithms.base import Algorithm, Recipe
from rljax.losses import policy_loss, token_mean, token_ratio, unclipped


@dataclasses.dataclass
class Reinforce(Recipe):
    """REINFORCE (Williams, 1992) with the mean reward of the batch as baseline.

        A = R - mean over the batch
        loss = mean over all tokens of the minibatch of -A r

    Deviations: r, 1 on the first update of a rollout, accounts for the move of further ones; token mean as aggregation.
    """

    needs_group = False

    group_size: int = 1

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        loss = policy_loss(token_ratio, unclipped(), token_mean, penalties=self.penalties())
        return self.compose(batch_centered(), loss)
