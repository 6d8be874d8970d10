"""GRPO on rollouts some of which had guidance that the trained policy does not see."""

import dataclasses

from rljax.algorithms.base import Algorithm, GroupRecipe, check_at_least
from rljax.losses import behavior_ratio, policy_loss, shaped_guidance, token_mean, unguided_ratio


@dataclasses.dataclass
class ActGuideRL(GroupRecipe):
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

    dual_clip: float | None = 3.0
    kl_coef: float = 1e-3
    shaping: float = 0.0

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 0, "shaping")
        loss = policy_loss(
            unguided_ratio if self.shaping else behavior_ratio,
            self.surrogate(self.dual_clip),
            token_mean,
            weight_fns=(shaped_guidance(self.shaping),) if self.shaping else (),
            penalties=self.penalties(),
        )
        return self.compose(self.credit(), loss)
