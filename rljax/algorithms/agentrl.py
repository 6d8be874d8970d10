"""GRPO on several tasks at once, on one scale."""

import dataclasses

from rljax.advantages import task_normalized
from rljax.algorithms.base import Algorithm, GroupRecipe
from rljax.losses import behavior_ratio, policy_loss, token_mean


@dataclasses.dataclass
class AgentRL(GroupRecipe):
    """AgentRL's objective, arXiv 2510.04206.

        A' = (R - mean) / (std + epsilon) of the group
        A  = (A' - mean) / (std + epsilon) over all action tokens of a task in the rollout
        r  = exp(lp - lp_behavior)
        loss = mean over all tokens of the minibatch of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),
               at most -A dual_clip where A < 0, + kl_coef * k3

    Groups compare the samples of a prompt; the second step gives tasks of different length and difficulty the same
    scale per token. `lp_behavior` is the log-prob that was recorded when the token was sampled, by whichever weights
    spoke: turns of an older policy are corrected for, and clipped where the policy has left them. The data's column
    `task` says which task a prompt belongs to; without it all are one.

    Deviations: the task's std is the population's (ddof 0; the paper does not say), and a task of ties alone gets 0.
    Cross-policy sampling and the reward of episodes that do not finish belong to the actor, as `stale_share`,
    `stale_every` and `unfinished_reward` of `MultiTurn`.
    """

    dual_clip: float | None = 3.0
    kl_coef: float = 1e-4

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        surrogate = self.surrogate(self.dual_clip)
        loss = policy_loss(behavior_ratio, surrogate, token_mean, penalties=self.penalties())
        return self.compose(task_normalized(self.credit(), epsilon=self.epsilon), loss)
