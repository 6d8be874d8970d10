"""Divergence-weighted advantages, from the study of sparse distributional shifts."""

import dataclasses

from rljax.algorithms.base import Algorithm
from rljax.algorithms.dynamic_sampling import DynamicSampling
from rljax.losses import divergence_weights, policy_loss, token_mean, token_ratio


@dataclasses.dataclass
class DivergenceWeighting(DynamicSampling):
    """Divergence-weighted advantages, arXiv 2603.22446.

        k = exp(D) - 1 - D,  D = lp - lp_old,  w = sg(1 + width (sigmoid(alpha k) - 1/2))
        DAPO's loss with w A for A

    `alpha > 0` raises tokens on which the policy has moved ("high-KL boost"), `alpha < 0` lowers them ("low-KL boost");
    both helped in the paper, which offers them as a diagnosis. On a first minibatch, and with `alpha` 0, it is DAPO; it
    needs several minibatches per rollout. The measures and interventions of the paper are in
    `rljax.analysis.study`, which `rljax study` runs.

    Deviation: the paper's `alpha` and `width` are not known; these defaults give weights within 1 +- 0.18 for ratios
    between 1/2 and 2.
    """

    alpha: float = 10.0
    width: float = 0.4

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        if not 0 <= self.width < 2:
            raise ValueError(
                f"DivergenceWeighting: width={self.width} must be at least 0 and below 2, so that weights are positive"
            )
        loss = policy_loss(
            token_ratio,
            self.surrogate(self.dual_clip),
            token_mean,
            weight_fns=(divergence_weights(self.alpha, width=self.width),),
            penalties=self.penalties(),
        )
        return self.compose(self.credit(), loss)
