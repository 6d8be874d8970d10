"""Soft adaptive policy optimisation."""

import dataclasses

from rljax.advantages import group_normalized
from rljax.algorithms.base import Algorithm, check_at_least, check_group, kl_and_entropy
from rljax.losses import policy_loss, sequence_mean, soft_gate, token_ratio
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class SAPO:
    """SAPO, arXiv 2511.20347.

        A = (R - mean) / (std + epsilon) of the group
        loss = mean_rows mean_tokens -A (4 / tau) sigmoid(tau (r - 1)),  tau by the sign of A

    A smooth gate in place of the clip interval; off-policy tokens of negative advantage fade faster. The method does
    not fix the group size. Deviation: KL penalty (k3) and entropy bonus can be switched on.
    """

    group_size: int = 8
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_group(self)
        check_at_least(self, 0, "kl_coef", "entropy_coef", "epsilon")
        check_at_least(self, 1e-6, "tau_positive", "tau_negative")
        return Algorithm(
            plan=RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0),
            advantage_fn=group_normalized(epsilon=self.epsilon),
            loss=policy_loss(
                ratio_fn=token_ratio,
                surrogate_fn=soft_gate(tau_positive=self.tau_positive, tau_negative=self.tau_negative),
                aggregate_fn=sequence_mean,
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )
