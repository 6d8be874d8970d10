"""Off-policy updates whose step shrinks with the effective sample size."""

import dataclasses

from rljax.advantages import group_centered
from rljax.algorithms.base import Algorithm, Recipe, check_at_least
from rljax.losses import behavior_sequence_ratio, cispo, policy_loss, scale_step_by_sample_size, sequence_mean


@dataclasses.dataclass
class VCPO(Recipe):
    """VCPO, arXiv 2602.17616.

        A = R - mean of the group
        W = exp(sum_t (lp - lp_behavior)) of a row
        loss = mean_rows mean_tokens of -sg(min(W, max_weight)) A lp
        learning rate * sqrt(min(1, ess / ess_base)),  ess = (sum W)^2 / (B sum W^2) over the minibatch

    Nothing else is clipped. On fresh data W, ess and the factor are 1. The value of the loss is no objective. The
    factor multiplies the whole step of the optimizer, weight decay included, as a learning rate does. It needs the old
    log-probs, so one update per rollout costs a forward pass more. Metrics: `loss/effective_sample_size`,
    `loss/step_scale`. `ess_base` is 1, or 0.55 in the authors' multi-turn script.

    Deviations: the group mean as baseline, without the paper's optimal one, which needs a gradient norm per trajectory.
    W of the step factor is that of the policy before the rollout's first update, the same on the first. The reduction
    is not stated. KL penalty (k3) and entropy bonus can be switched on.
    """

    group_size: int = 16
    max_weight: float = 8.0
    ess_base: float = 1.0

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 1, "max_weight")
        if not 0 < self.ess_base <= 1:
            raise ValueError(f"VCPO: ess_base={self.ess_base} must be above 0 and at most 1, the share of fresh data")
        loss = policy_loss(
            behavior_sequence_ratio,
            cispo(max_ratio=self.max_weight),
            sequence_mean,
            penalties=self.penalties(),
            correct_fn=scale_step_by_sample_size(base=self.ess_base),
        )
        return self.compose(group_centered(), loss)
