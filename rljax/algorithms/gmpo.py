"""Geometric-mean policy optimisation."""

import dataclasses

from rljax.advantages import group_normalized
from rljax.algorithms.base import Algorithm, check_at_least, check_group, kl_and_entropy
from rljax.losses import geometric_ratio, policy_loss, sequence_mean, unclipped
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class GMPO:
    """GMPO, arXiv 2507.20673.

        A = (R - mean) / (std + epsilon) of the group
        D' = g min(g D, g clip(D, -log_clip, log_clip)),  D = lp - lp_old,  g = sign(A)
        loss = mean_rows -A exp(mean_tokens D')

    Tokens are clipped before the mean (GSPO clips after it), which dampens outliers and permits a wide interval. The
    method does not fix the group size. Deviation: KL penalty (k3) and entropy bonus can be switched on.
    """

    group_size: int = 8
    log_clip: float = 0.4
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_group(self)
        check_at_least(self, 0, "log_clip", "kl_coef", "entropy_coef", "epsilon")
        return Algorithm(
            plan=RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0),
            advantage_fn=group_normalized(epsilon=self.epsilon),
            loss=policy_loss(
                ratio_fn=geometric_ratio(log_clip=self.log_clip),
                surrogate_fn=unclipped(),
                aggregate_fn=sequence_mean,
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )
