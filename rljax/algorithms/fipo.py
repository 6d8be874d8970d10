"""Future-KL influenced policy optimisation."""

import dataclasses
from typing import Any

from rljax.algorithms.base import Algorithm, check_at_least
from rljax.algorithms.dynamic_sampling import DynamicSampling
from rljax.losses import (
    FilterFn,
    future_kl_report,
    future_kl_weights,
    max_dual_clipped,
    policy_loss,
    token_mean,
    token_ratio,
)


@dataclasses.dataclass
class FIPO(DynamicSampling):
    """FIPO, arXiv 2603.19835: DAPO with dense credit from how far the policy has moved on the rest of the answer.

        F[t] = M[t] D[t] + 2^(-1 / half_life) F[t + 1],  D = lp - lp_old,  M = 1 where exp(D) <= participation_ratio
        f = sg(clip(exp(F), influence_low, influence_high)),  clip(f, 0.8, 1) where A < 0 and exp(D) > safety_ratio
        DAPO's loss with A f for A

    The published ranges: `influence_low` 1.0, `influence_high` 1.2, `safety_ratio` 10 (32B, the defaults), and 0.8,
    1.2, 3 (7B, with `group_size` 32). The first minibatch of a rollout is DAPO's; the method needs several per rollout
    (8 in the paper), and old log-probs of the trainer, since a sampler's rounding adds up in F. Rows with more than
    `max_dual_clipped` tokens capped by the dual clip are dropped; None keeps them.

    Deviation: dropped rows stay in the denominator, which is fixed before the backward pass; in the released code it
    shrinks. The safety is the released code's; the paper resets f to 1, the same where `influence_low` is 1.
    """

    half_life: float = 32.0
    influence_low: float = 1.0
    influence_high: float = 1.2
    participation_ratio: float = 10.0
    safety_ratio: float | None = 10.0
    max_dual_clipped: int | None = 1

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        if not 0 < self.influence_low <= 1 <= self.influence_high:
            raise ValueError(
                f"FIPO: influence_low={self.influence_low} and influence_high={self.influence_high} must enclose 1 and "
                "be positive, such as 1.0 and 1.2, or 0.8 and 1.2"
            )
        check_at_least(self, 1e-3, "half_life")
        check_at_least(self, 1, "participation_ratio")

        # Without a dual clip no token is capped, so there is nothing to count.
        filters: tuple[FilterFn, ...] = ()
        if self.max_dual_clipped is not None and self.dual_clip is not None:
            check_at_least(self, 0, "max_dual_clipped")
            filters = (max_dual_clipped(self.max_dual_clipped, dual_clip=self.dual_clip),)

        if self.safety_ratio is not None:
            check_at_least(self, 1, "safety_ratio")

        # The report shows what the weight saw, so both are made from the same numbers.
        influence: dict[str, Any] = {
            "low": self.influence_low,
            "high": self.influence_high,
            "half_life": self.half_life,
            "max_ratio": self.participation_ratio,
            "safety_ratio": self.safety_ratio,
        }

        loss = policy_loss(
            token_ratio,
            self.surrogate(self.dual_clip),
            token_mean,
            weight_fns=(future_kl_weights(**influence),),
            filter_fns=filters,
            penalties=self.penalties(),
            report_fns=(future_kl_report(**influence),),
        )
        return self.compose(self.credit(), loss)
