"""Training for the best of k samples."""

import dataclasses

from rljax.advantages import pass_at_k_normalized, pass_at_k_unbiased
from rljax.algorithms.base import Algorithm, GroupRecipe
from rljax.losses import Loss, policy_loss, token_mean, token_ratio


@dataclasses.dataclass
class PassAtK(GroupRecipe):
    """Pass@k Training, arXiv 2508.10751, in its analytical form.

        A = (M(i) - M) / (std + epsilon): the mean largest reward over all sets of k samples of the group that hold
            sample i, less that over all sets, by the std over all sets
        loss = mean over all tokens of the minibatch of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    Hard prompts weigh more and solved ones less: with c right answers of n the advantages fade once a set of k nearly
    always holds one. `k` 1 is GRPO with ddof 0. Rewards may be any numbers.

    Deviations: the paper studies several bases and group sizes; clip, reduction, `k` and group size here are choices.
    KL penalty (k3) and entropy bonus can be switched on.
    """

    k: int = 2
    clip_high: float = 0.28

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        self.check()
        return self.compose(pass_at_k_normalized(self.k, epsilon=self.epsilon), self.loss())

    def check(self) -> None:
        super().check()
        if not 1 <= self.k < self.group_size:
            raise ValueError(
                f"{type(self).__name__}: k={self.k} must be at least 1 and below group_size={self.group_size}; with "
                "all samples in one set there is nothing to compare"
            )

    def loss(self) -> Loss:
        """The clipped surrogate, as the mean over all tokens."""
        return policy_loss(token_ratio, self.surrogate(), token_mean, penalties=self.penalties())


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
        self.check()
        return self.compose(pass_at_k_unbiased(self.k, baseline=self.baseline), self.loss())
