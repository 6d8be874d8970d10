"""Near-boundary stochastic rescue, over DAPO and over GSPO."""

import dataclasses
from typing import Any

from rljax.algorithms.base import Algorithm
from rljax.algorithms.dapo import DAPO
from rljax.algorithms.gspo import GSPO
from rljax.losses import inward, per_row, rescue, sequence_ratio, token_ratio, two_sided


@dataclasses.dataclass
class NearBoundaryRescue(DAPO):
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
        parts = _noise(self)
        rescued = rescue(token_ratio, clip_low=self.clip_low, clip_high=self.clip_high, **parts)
        return self.compose(
            ratio_fn=rescued.ratio_fn,
            weight_fns=(rescued.raw_execution,) if self.raw_execution else (),
            report_fns=(rescued.report_fn,),
            plan={"needs_uniforms": True},
        )


@dataclasses.dataclass
class NearBoundaryRescueGSPO(GSPO):
    """Near-boundary stochastic rescue over GSPO, arXiv 2605.22703: as `NearBoundaryRescue`, with the ratio of a row,
    one u per row and GSPO's narrow interval.

    Deviations: those of both; `delta` 4e-4, about the clip width, is a choice of this recipe.
    """

    delta: float = 4e-4
    inward_noise: bool = False
    raw_execution: bool = False

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        parts = _noise(self)
        rescued = rescue(sequence_ratio, clip_low=self.clip_low, clip_high=self.clip_high, uniform_fn=per_row, **parts)
        return self.compose(
            ratio_fn=rescued.ratio_fn,
            weight_fns=(rescued.raw_execution,) if self.raw_execution else (),
            report_fns=(rescued.report_fn,),
            plan={"needs_uniforms": True},
        )


def _noise(recipe: Any) -> dict[str, Any]:
    if not 0 <= recipe.delta < 1:
        raise ValueError(f"{type(recipe).__name__}: delta={recipe.delta} must be at least 0 and below 1")
    return {"noise": (inward if recipe.inward_noise else two_sided)(recipe.delta)}
