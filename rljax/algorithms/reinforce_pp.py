"""REINFORCE++: PPO's loss with the whole batch as baseline, no critic."""

import dataclasses

from rljax.advantages import group_centered_whitened, kl_in_reward, whitened_returns
from rljax.algorithms.base import Algorithm, Recipe, check_at_least, check_clip, kl_and_entropy
from rljax.losses import Loss, clipped, policy_loss, token_mean, token_ratio


@dataclasses.dataclass
class ReinforcePlusPlus(Recipe):
    """REINFORCE++, arXiv 2501.03262.

        reward[t] = R on the last token - kl_coef * (lp_behavior - lp_ref)
        A = return-to-go of reward (discount gamma), whitened over all tokens of the batch
        loss = mean over all tokens of the minibatch of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    One sample per prompt suffices. Equal rewards all over the batch do not give A = 0 when kl_coef > 0.
    Deviations: the KL term takes the sampler's log-probs; `dual_clip` (off by default) gives PPO's loss as verl has it.
    """

    needs_group = False

    group_size: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    gamma: float = 1.0
    kl_coef: float = 0.001

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 0, "gamma")
        return self.compose(whitened_returns(kl_coef=self.kl_coef, gamma=self.gamma), _loss(self))


@dataclasses.dataclass
class ReinforcePlusPlusBaseline(Recipe):
    """REINFORCE++-baseline, arXiv 2501.03262.

        R' = R - kl_coef * sum_t (lp_behavior - lp_ref)
        A  = R' - mean of R' over the group, whitened over all tokens of the batch
        loss = mean over all tokens of the minibatch of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    A group of equal rewards can receive gradient, since the whitening takes off the batch's mean. The method does not
    fix the group size. Deviation: the KL term is in the reward, as in REINFORCE++.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.001

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        return self.compose(kl_in_reward(group_centered_whitened(), kl_coef=self.kl_coef), _loss(self))


def _loss(recipe: ReinforcePlusPlus | ReinforcePlusPlusBaseline) -> Loss:
    """PPO's, without a KL, which is in the reward."""
    check_clip(recipe)
    surrogate = clipped(clip_low=recipe.clip_low, clip_high=recipe.clip_high, dual_clip=recipe.dual_clip)
    return policy_loss(token_ratio, surrogate, token_mean, penalties=kl_and_entropy(0.0, recipe.entropy_coef))
