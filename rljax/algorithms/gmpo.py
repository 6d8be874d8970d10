"""Geometric-mean policy optimisation."""

import dataclasses

from rljax.advantages import group_normalized
from rljax.algorithms.base import Algorithm, Recipe, check_at_least
from rljax.losses import geometric_ratio, policy_loss, sequence_mean, unclipped


@dataclasses.dataclass
class GMPO(Recipe):
    """GMPO, arXiv 2507.20673.

        A = (R - mean) / (std + epsilon) of the group
        D' = g min(g D, g clip(D, -log_clip, log_clip)),  D = lp - lp_old,  g = sign(A)
        loss = mean_rows -A exp(mean_tokens D')

    Tokens are clipped before the mean (GSPO clips after it), which dampens outliers and permits a wide interval. The
    method does not fix the group size. Deviation: KL penalty (k3) and entropy bonus can be switched on.
    """

    log_clip: float = 0.4
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 0, "log_clip", "epsilon")
        ratio = geometric_ratio(log_clip=self.log_clip)
        loss = policy_loss(ratio, unclipped(), sequence_mean, penalties=self.penalties())
        return self.compose(group_normalized(epsilon=self.epsilon), loss)
