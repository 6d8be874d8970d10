"""Group sequence policy optimisation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rljax.advantages import group_normalized
from rljax.algorithms.base import Algorithm, check_at_least, check_clip, check_group, kl_and_entropy
from rljax.losses import RatioFn, WeightFn, clipped, policy_loss, sequence_mean, sequence_ratio
from rljax.plans import RolloutPlan


@dataclasses.dataclass
class GSPO:
    """GSPO, arXiv 2507.18071.

        A = (R - mean) / (std + epsilon) of the group
        s = exp(mean_tokens (lp - lp_old)), one ratio per row
        loss = mean_rows max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))

    Clipping takes whole rows. The method does not fix the group size; it expects several minibatches per rollout (4 in
    the paper). Deviations: the log of s is at most 10; KL penalty (k3) and entropy bonus can be switched on. For
    advantages that vary within a row compose `policy_loss` with `sequence_token_ratio` (GSPO-token).
    """

    group_size: int = 8
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        return self.compose()

    def compose(
        self,
        *,
        ratio_fn: RatioFn = sequence_ratio,
        weight_fns: Sequence[WeightFn] = (),
        plan: dict[str, Any] | None = None,
        **parts: Any,
    ) -> Algorithm:
        """GSPO, for methods that build on it, with `parts` of `policy_loss` added and fields of its plan changed."""
        check_group(self)
        check_clip(self)
        check_at_least(self, 0, "kl_coef", "entropy_coef", "epsilon")
        return Algorithm(
            plan=RolloutPlan(**{"group_size": self.group_size, "needs_ref": self.kl_coef > 0} | (plan or {})),
            advantage_fn=group_normalized(epsilon=self.epsilon),
            loss=policy_loss(
                ratio_fn=ratio_fn,
                surrogate_fn=clipped(clip_low=self.clip_low, clip_high=self.clip_high),
                aggregate_fn=sequence_mean,
                weight_fns=weight_fns,
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
                **parts,
            ),
        )
