"""PPO whose trust region is not around the policy that sampled."""

import dataclasses

from rljax.advantages import group_normalized
from rljax.algorithms.base import Algorithm, check_at_least, check_clip, check_group, kl_and_entropy
from rljax.losses import clipped, masked_is, policy_loss, token_mean, token_ratio, truncated_is
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class DecoupledPPO:
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
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_group(self)
        check_clip(self)
        check_at_least(self, 1, "max_weight")
        check_at_least(self, 0, "kl_coef", "entropy_coef", "epsilon")
        weight = truncated_is(self.max_weight) if self.cap_weights else masked_is(0.0, self.max_weight)
        return Algorithm(
            plan=RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0),
            advantage_fn=group_normalized(epsilon=self.epsilon),
            loss=policy_loss(
                ratio_fn=token_ratio,
                surrogate_fn=clipped(clip_low=self.clip_low, clip_high=self.clip_high),
                aggregate_fn=token_mean,
                weight_fns=(weight,),
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )
