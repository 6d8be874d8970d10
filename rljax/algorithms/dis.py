"""Double-sided importance sampling, for asynchronous agent RL."""

import dataclasses

from rljax.advantages import group_centered
from rljax.algorithms.base import Algorithm, check_at_least, check_clip, check_group, kl_and_entropy
from rljax.losses import behavior_ratio, double_sided, policy_loss, token_mean
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class DIS:
    """Direct double-sided importance sampling, GLM-5, arXiv 2602.15763.

        A = R - mean of the group
        r = exp(lp - lp_behavior),  f(r) = r where 1 - clip_low < r < 1 + clip_high, else 0
        loss = mean over all tokens of the minibatch of -sg(f(r)) A lp

    The sampler's own log-probs are the anchor, so trajectories may mix versions of the policy and no old log-probs are
    needed. Dropped tokens (`loss/clip_fraction`) stay in the denominator. The value of the loss is no objective.

    Deviations: the paper gives no bounds; these are those that its successor (SAO, 2607.07508) is reported to use for
    coding, (0.3, 5) those for mathematics. Nor does it state the reduction or the group size. KL penalty (k3) and
    entropy bonus can be switched on.
    """

    group_size: int = 8
    clip_low: float = 0.8
    clip_high: float = 3.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_group(self)
        check_clip(self)
        check_at_least(self, 0, "kl_coef", "entropy_coef")
        return Algorithm(
            plan=RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0),
            advantage_fn=group_centered(),
            loss=policy_loss(
                ratio_fn=behavior_ratio,
                surrogate_fn=double_sided(clip_low=self.clip_low, clip_high=self.clip_high),
                aggregate_fn=token_mean,
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )
