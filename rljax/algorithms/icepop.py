"""GRPO that drops tokens on which sampler and trainer disagree."""

import dataclasses

from rljax.advantages import group_normalized
from rljax.algorithms.base import Algorithm, check_at_least, check_clip, check_group, kl_and_entropy
from rljax.losses import clipped, masked_is, policy_loss, sequence_mean, token_ratio
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class IcePop:
    """IcePop as in GLM-5's reasoning RL, arXiv 2602.15763.

        A = (R - mean) / (std + epsilon) of the group
        rho = exp(lp_old - lp_behavior),  w = rho where 1 / mismatch <= rho <= mismatch, else 0
        loss = mean_rows mean_tokens of w max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    Truncated importance sampling caps such tokens, this drops them. Where sampler and trainer agree it is GRPO.
    Deviations: std with ddof 1, as in our GRPO; KL penalty (k3) and entropy bonus can be switched on.
    """

    group_size: int = 32
    mismatch: float = 2.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_group(self)
        check_clip(self)
        check_at_least(self, 1, "mismatch")
        check_at_least(self, 0, "kl_coef", "entropy_coef", "epsilon")
        return Algorithm(
            plan=RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0),
            advantage_fn=group_normalized(epsilon=self.epsilon),
            loss=policy_loss(
                ratio_fn=token_ratio,
                surrogate_fn=clipped(clip_low=self.clip_low, clip_high=self.clip_high),
                aggregate_fn=sequence_mean,
                weight_fns=(masked_is(1 / self.mismatch, self.mismatch),),
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )
