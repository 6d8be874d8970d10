"""GRPO on several tasks at once, on one scale."""

import dataclasses

from rljax.advantages import group_normalized, task_normalized
from rljax.algorithms.base import Algorithm, check_at_least, check_clip, check_group, kl_and_entropy
from rljax.losses import clipped, policy_loss, token_mean, token_ratio
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class AgentRL:
    """AgentRL's objective, arXiv 2510.04206.

        A' = (R - mean) / (std + epsilon) of the group
        A  = (A' - mean) / (std + epsilon) over all action tokens of a task in the rollout
        loss = mean over all tokens of the minibatch of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),
               at most -A dual_clip where A < 0, + kl_coef * k3

    Groups compare the samples of a prompt; the second step gives tasks of different length and difficulty the same
    scale per token. The data's column `task` says which task a prompt belongs to; without it all are one.

    Deviations: the task's std is the population's (ddof 0; the paper does not say), and a task of ties alone gets 0.
    Cross-policy sampling, which needs a second, older policy in the sampler, is not part of this recipe; what it goes
    by is in `rljax.rollouts.cross_policy`.
    """

    group_size: int = 8
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    kl_coef: float = 1e-4
    entropy_coef: float = 0.0
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_group(self)
        check_clip(self)
        check_at_least(self, 0, "kl_coef", "entropy_coef", "epsilon")
        return Algorithm(
            plan=RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0),
            advantage_fn=task_normalized(group_normalized(epsilon=self.epsilon), epsilon=self.epsilon),
            loss=policy_loss(
                ratio_fn=token_ratio,
                surrogate_fn=clipped(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip),
                aggregate_fn=token_mean,
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )
