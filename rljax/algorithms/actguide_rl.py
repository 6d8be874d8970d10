"""GRPO on rollouts some of which had guidance that the trained policy does not see."""

import dataclasses

from rljax.advantages import group_normalized
from rljax.algorithms.base import Algorithm, check_at_least, check_clip, check_group, kl_and_entropy
from rljax.losses import behavior_ratio, clipped, policy_loss, shaped_guidance, token_mean, unguided_ratio
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class ActGuideRL:
    """ActGuide-RL's mixed objective, arXiv 2605.12004.

        A = (R - mean) / (std + epsilon) of the group
        r = exp(lp - lp_behavior), lp under the plain prompt, lp_behavior under the prompt that was used
        loss = mean over all tokens of the minibatch of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),
               at most -A dual_clip where A < 0, + kl_coef * k3

    `rljax.rollouts.guided.collect_guided` makes the rollouts: where all plain ones fail, ones with the shortest prefix
    of a reference plan that helps. Rollouts without guidance are GRPO's with a token mean.

    Deviations: the log-ratio is at most 20. `shaping`, off in paper and release, makes the weight of a guided token
    `r / (r + shaping)`, constant for differentiation, in place of the clipped ratio.
    """

    group_size: int = 8
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    kl_coef: float = 1e-3
    entropy_coef: float = 0.0
    epsilon: float = 1e-6
    shaping: float = 0.0

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_group(self)
        check_clip(self)
        check_at_least(self, 0, "kl_coef", "entropy_coef", "epsilon", "shaping")
        return Algorithm(
            plan=RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0),
            advantage_fn=group_normalized(epsilon=self.epsilon),
            loss=policy_loss(
                ratio_fn=unguided_ratio if self.shaping else behavior_ratio,
                surrogate_fn=clipped(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip),
                aggregate_fn=token_mean,
                weight_fns=(shaped_guidance(self.shaping),) if self.shaping else (),
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )
