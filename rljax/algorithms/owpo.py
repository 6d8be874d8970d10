"""One-way policy optimisation."""

import dataclasses
from typing import Literal

from rljax.algorithms.base import Algorithm, check_at_least
from rljax.algorithms.dynamic_sampling import DynamicSampling
from rljax.losses import (
    current_deviation,
    exponential_gate,
    old_deviation,
    one_way_report,
    one_way_weights,
    policy_loss,
    token_mean,
    token_ratio,
)
from rljax.plans import not_worse


@dataclasses.dataclass
class OWPO(DynamicSampling):
    """OWPO-style, arXiv 2605.22156: the verifier gives the direction, a reference only the size of a step.

        d = sign(A) (lp - lp_ref),  w = sg(clip(exp(-beta d), 1 - lock, 1 + accelerate))
        DAPO's loss with A w for A; every `refresh_every` steps the reference becomes a copy of the policy

    Where the policy lags the reference (d < 0) the step grows, where it is ahead it shrinks, and it never turns round.
    After a refresh w = 1, which is DAPO. With `gated_refresh` a copy that is due is made only if held-out avg@k has not
    fallen by more than a standard error since the last one; it costs an evaluation each time. `deviation_from` takes lp
    of the policy being updated (`current`) or of the one before the rollout's first update (`old`).

    Deviations: a reconstruction. The paper's weight function, bounds, temperature, interval and gate are not known; all
    of them are choices of this recipe, exposed as fields. It has no KL term; `kl_coef` can switch one on.
    """

    beta: float = 1.0
    lock: float = 0.2
    accelerate: float = 0.2
    deviation_from: Literal["current", "old"] = "current"
    refresh_every: int = 50
    gated_refresh: bool = True

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 0, "beta", "lock", "accelerate", "refresh_every")
        if self.lock >= 1:
            raise ValueError(f"OWPO: lock={self.lock} must be below 1, so that no step vanishes or turns round")

        deviations = {"current": current_deviation, "old": old_deviation}
        if self.deviation_from not in deviations:
            raise ValueError(f"OWPO: deviation_from={self.deviation_from!r} must be one of {', '.join(deviations)}")

        # The report is of the same deviation as the weight.
        deviation = deviations[self.deviation_from]
        gate = exponential_gate(beta=self.beta, lock=self.lock, accelerate=self.accelerate)

        loss = policy_loss(
            token_ratio,
            self.surrogate(self.dual_clip),
            token_mean,
            weight_fns=(one_way_weights(gate, deviation),),
            penalties=self.penalties(),
            report_fns=(one_way_report(deviation),),
        )

        # The reference is needed whatever `kl_coef` is: the weights compare with it.
        plan = self.plan()._replace(
            needs_ref=True,
            refresh_every=self.refresh_every,
            refresh_gate=not_worse if self.gated_refresh else None,
        )
        return self.compose(self.credit(), loss, plan)
