"""Near-boundary stochastic rescue, over DAPO and over GSPO."""

import dataclasses
from typing import Any

from rljax.algorithms.base import Algorithm, GroupRecipe
from rljax.algorithms.dynamic_sampling import DynamicSampling
from rljax.losses import (
    Noise,
    inward,
    per_row,
    policy_loss,
    rescue,
    sequence_mean,
    sequence_ratio,
    token_mean,
    token_ratio,
    two_sided,
)


@dataclasses.dataclass
class NearBoundaryRescue(DynamicSampling):
    """Near-boundary stochastic rescue over DAPO, arXiv 2605.22703.

        active = (A > 0 and r > 1 + clip_high) or (A < 0 and r < 1 - clip_low)
        rescued = active and 1 - clip_low <= u r <= 1 + clip_high,  u ~ U(1 - delta, 1 + delta) per token and update
        DAPO's loss, with u r for r where rescued

    In expectation a soft clip that decays with the inverse square of the ratio beyond the interval. On a first
    minibatch r = 1 and it is DAPO, as it is with `delta` 0; it needs several minibatches per rollout. `inward_noise`
    draws u towards the interval only, so that tokens at its edge are always rescued; `raw_execution` executes a rescued
    token with r instead of u r.

    Deviations: the noise's support, its width, and which ratio is executed are not known from the paper; they are
    choices of this recipe. The dual clip is disjoint from the active tokens.
    """

    delta: float = 0.2
    inward_noise: bool = False
    raw_execution: bool = False

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        noise = _noise(self.delta, self.inward_noise, self)
        rescued = rescue(token_ratio, clip_low=self.clip_low, clip_high=self.clip_high, noise=noise)
        loss = policy_loss(
            rescued.ratio_fn,
            self.surrogate(self.dual_clip),
            token_mean,
            weight_fns=(rescued.raw_execution,) if self.raw_execution else (),
            penalties=self.penalties(),
            report_fns=(rescued.report_fn,),
        )
        return self.compose(self.credit(), loss, self.plan()._replace(needs_uniforms=True))


@dataclasses.dataclass
class NearBoundaryRescueGSPO(GroupRecipe):
    """Near-boundary stochastic rescue over GSPO, arXiv 2605.22703: as `NearBoundaryRescue`, with the ratio of a row,
    one u per row and GSPO's narrow interval.

    Deviations: those of both; `delta` 4e-4, about the clip width, is a choice of this recipe.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    delta: float = 4e-4
    inward_noise: bool = False
    raw_execution: bool = False

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        noise = _noise(self.delta, self.inward_noise, self)
        rescued = rescue(
            sequence_ratio, clip_low=self.clip_low, clip_high=self.clip_high, noise=noise, uniform_fn=per_row
        )
        loss = policy_loss(
            rescued.ratio_fn,
            self.surrogate(),
            sequence_mean,
            weight_fns=(rescued.raw_execution,) if self.raw_execution else (),
            penalties=self.penalties(),
            report_fns=(rescued.report_fn,),
        )
        return self.compose(self.credit(), loss, self.plan()._replace(needs_uniforms=True))


def _noise(delta: float, is_inward: bool, recipe: Any) -> Noise:
    if not 0 <= delta < 1:
        raise ValueError(f"{type(recipe).__name__}: delta={delta} must be at least 0 and below 1")
    return inward(delta) if is_inward else two_sided(delta)
