"""Soft adaptive policy optimisation."""

import dataclasses

from rljax.advantages import group_normalized
from rljax.algorithms.base import Algorithm, Recipe, check_at_least
from rljax.losses import policy_loss, sequence_mean, soft_gate, token_ratio


@dataclasses.dataclass
class SAPO(Recipe):
    """SAPO, arXiv 2511.20347.

        A = (R - mean) / (std + epsilon) of the group
        loss = mean_rows mean_tokens -A (4 / tau) sigmoid(tau (r - 1)),  tau by the sign of A

    A smooth gate in place of the clip interval; off-policy tokens of negative advantage fade faster. The method does
    not fix the group size. Deviation: KL penalty (k3) and entropy bonus can be switched on.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 0, "epsilon")
        check_at_least(self, 1e-6, "tau_positive", "tau_negative")
        gate = soft_gate(tau_positive=self.tau_positive, tau_negative=self.tau_negative)
        loss = policy_loss(token_ratio, gate, sequence_mean, penalties=self.penalties())
        return self.compose(group_normalized(epsilon=self.epsilon), loss)
