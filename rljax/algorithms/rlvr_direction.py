"""Reweighting of rare tokens, from the study of the direction of RLVR updates."""

import dataclasses

from rljax.algorithms.base import Algorithm, check_at_least
from rljax.algorithms.dynamic_sampling import DynamicSampling
from rljax.losses import policy_loss, rare_token_weights, token_mean, token_ratio


@dataclasses.dataclass
class DirectionReweighting(DynamicSampling):
    """Reweighting of low-probability tokens, arXiv 2603.22117.

        DAPO's loss with (1 + alpha (1 - p_old)) A for A,  p_old = exp(lp_old), for either sign of A

    A token of probability p moves the logits by `2 |r A| (1 - p)` in sum, so confident ones hardly learn; the weight, a
    constant of the rollout within [1, 1 + alpha], leans further towards the rare ones. `alpha` 0.2 (7B) or 0.1 (8B).
    It raises the average step too: `loss/weight_mean` says by how much, for a control run with a scaled learning rate.
    The paper's other half, extrapolation while decoding, is a study: `rljax study`.

    Deviation: p_old is that of the distribution that is sampled from; sample with temperature 1 and without truncation,
    as the paper does, to have the model's own.
    """

    alpha: float = 0.2

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 0, "alpha")
        loss = policy_loss(
            token_ratio,
            self.surrogate(self.dual_clip),
            token_mean,
            weight_fns=(rare_token_weights(self.alpha),),
            penalties=self.penalties(),
        )
        return self.compose(self.credit(), loss)
