"""Group relative policy optimisation."""

import dataclasses

from rljax.advantages import group_normalized
from rljax.algorithms.base import Algorithm, check_at_least, check_clip, check_group, kl_and_entropy
from rljax.losses import clipped, policy_loss, sequence_mean, token_ratio
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class GRPO:
    """GRPO, arXiv 2402.03300.

        A = (R - mean) / (std + epsilon) of the group
        loss = mean_rows mean_tokens [ max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) + kl_coef * k3 ]

    Deviations: std with ddof 1, as the common implementations have it; `clip_low` and `clip_high` may differ, and
    `dual_clip` bounds the loss of tokens with A < 0 (both off in the paper). `kl_coef` 0 needs no reference model.
    """

    group_size: int = 64
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.04
    entropy_coef: float = 0.0
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_group(self)
        check_clip(self)
        check_at_least(self, 0, "kl_coef", "entropy_coef", "epsilon")
        return Algorithm(
            plan=RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0),
            advantage_fn=group_normalized(epsilon=self.epsilon),
            loss=policy_loss(
                ratio_fn=token_ratio,
                surrogate_fn=clipped(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip),
                aggregate_fn=sequence_mean,
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )
