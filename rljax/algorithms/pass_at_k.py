"""Training for the best of k samples."""

import dataclasses

from rljax.advantages import AdvantageFn, pass_at_k_normalized, pass_at_k_unbiased
from rljax.algorithms.base import Algorithm, check_at_least, check_clip, check_group, kl_and_entropy
from rljax.losses import clipped, policy_loss, token_mean, token_ratio
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class PassAtK:
    """Pass@k Training, arXiv 2508.10751, in its analytical form.

        A = (M(i) - M) / (std + epsilon): the mean largest reward over all sets of k samples of the group that hold
            sample i, less that over all sets, by the std over all sets
        loss = mean over all tokens of the minibatch of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    Hard prompts weigh more and solved ones less: with c right answers of n the advantages fade once a set of k nearly
    always holds one. `k` 1 is GRPO with ddof 0. Rewards may be any numbers.

    Deviations: the paper studies several bases and group sizes; clip, reduction, `k` and group size here are choices.
    KL penalty (k3) and entropy bonus can be switched on.
    """

    group_size: int = 8
    k: int = 2
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        return self.compose(lambda: pass_at_k_normalized(self.k, epsilon=self.epsilon))

    def compose(self, make_advantages) -> Algorithm:
        """The recipe with other advantages, made after the checks."""
        check_group(self)
        check_clip(self)
        check_at_least(self, 0, "kl_coef", "entropy_coef", "epsilon")
        name = type(self).__name__
        if not 1 <= self.k < self.group_size:
            raise ValueError(
                f"{name}: k={self.k} must be at least 1 and below group_size={self.group_size}; with all samples in "
                "one set there is nothing to compare"
            )
        advantage_fn: AdvantageFn = make_advantages()
        return Algorithm(
            plan=RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0),
            advantage_fn=advantage_fn,
            loss=policy_loss(
                ratio_fn=token_ratio,
                surrogate_fn=clipped(clip_low=self.clip_low, clip_high=self.clip_high),
                aggregate_fn=token_mean,
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )


@dataclasses.dataclass
class PKPO(PassAtK):
    """PKPO, arXiv 2505.15201: an unbiased policy gradient of the expected best of k.

        A = k (M(i) - L(i)): the mean largest reward over all sets of k samples of the group that hold sample i, less
            that over all sets of `baseline` others
        the loss of `PassAtK`

    `baseline` is k (leave-one-out; with `k` 1 this is RLOO) or k - 1, of lower variance, where a sample is credited
    with what it adds to the others. Deviations: those of `PassAtK`.
    """

    baseline: int | None = None

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        return self.compose(lambda: pass_at_k_unbiased(self.k, baseline=self.baseline))
