"""Double-sided importance sampling, for asynchronous agent RL."""

import dataclasses

from rljax.advantages import group_centered
from rljax.algorithms.base import Algorithm, Recipe, check_clip
from rljax.losses import behavior_ratio, double_sided, policy_loss, token_mean


@dataclasses.dataclass
class DIS(Recipe):
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

    clip_low: float = 0.8
    clip_high: float = 3.0

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_clip(self)
        surrogate = double_sided(clip_low=self.clip_low, clip_high=self.clip_high)
        loss = policy_loss(behavior_ratio, surrogate, token_mean, penalties=self.penalties())
        return self.compose(group_centered(), loss)
