"""PPO whose trust region is not around the policy that sampled."""

import dataclasses

from rljax.algorithms.base import Algorithm, GroupRecipe, check_at_least
from rljax.losses import masked_is, policy_loss, token_mean, token_ratio, truncated_is


@dataclasses.dataclass
class DecoupledPPO(GroupRecipe):
    """Decoupled PPO, arXiv 2110.00641, as AReaL (2505.24298) uses it for stale rollouts.

        A = (R - mean) / (std + epsilon) of the group
        w = sg(exp(lp_old - lp_behavior)),  r = exp(lp - lp_old)
        loss = mean over all tokens of the minibatch of w max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    `lp_old`, the centre of the trust region, is the policy before the rollout's first update, whatever sampled. Tokens
    with w above `max_weight` are dropped, or capped there with `cap_weights`; they stay in the denominator. On fresh
    data w is 1, which is PPO.

    Deviations: groups serve as the baseline, where the papers have a critic or a mean of the batch; KL penalty (k3) and
    entropy bonus can be switched on.
    """

    group_size: int = 16
    max_weight: float = 5.0
    cap_weights: bool = False

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 1, "max_weight")
        weight = truncated_is(self.max_weight) if self.cap_weights else masked_is(0.0, self.max_weight)
        loss = policy_loss(token_ratio, self.surrogate(), token_mean, weight_fns=(weight,), penalties=self.penalties())
        return self.compose(self.credit(), loss)
