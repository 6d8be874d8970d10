"""Decoupled clip and dynamic sampling policy optimisation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rljax.advantages import group_normalized
from rljax.algorithms.base import Algorithm, check_at_least, check_clip, check_group, kl_and_entropy
from rljax.losses import RatioFn, WeightFn, clipped, policy_loss, token_mean, token_ratio
from rljax.plans import RolloutPlan, has_signal, soft_overlong_punishment


@dataclasses.dataclass
class DAPO:
    """DAPO, arXiv 2503.14476.

        A = (R' - mean) / (std + epsilon) of the group,  R' = R + soft overlong punishment
        loss = mean over all tokens of the minibatch of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),
               at most -A dual_clip where A < 0

    Dynamic sampling: groups whose *raw* rewards are all equal are replaced, for at most `max_sampling_rounds` rounds of
    prompts. The punishment falls linearly from 0 at `overlong_length - overlong_buffer` tokens to `-overlong_factor` at
    `overlong_length`; a buffer of 0 switches it off. `mask_truncated` is overlong filtering, best left off while the
    punishment is on, since it hides it. Deviation: `dual_clip` 10, as the released recipe has it; the paper has none.
    """

    group_size: int = 16
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 10.0
    overlong_length: int = 20480
    overlong_buffer: int = 4096
    overlong_factor: float = 1.0
    mask_truncated: bool = False
    max_sampling_rounds: int = 10
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        return self.compose()

    def compose(
        self,
        *,
        ratio_fn: RatioFn = token_ratio,
        weight_fns: Sequence[WeightFn] = (),
        plan: dict[str, Any] | None = None,
        **parts: Any,
    ) -> Algorithm:
        """DAPO, for methods that build on it, with `parts` of `policy_loss` added and fields of its plan changed."""
        check_group(self)
        check_clip(self)
        check_at_least(self, 0, "overlong_buffer", "overlong_factor", "kl_coef", "entropy_coef", "epsilon")
        check_at_least(self, 1, "max_sampling_rounds")
        punishment = None
        if self.overlong_buffer:
            punishment = soft_overlong_punishment(
                max_length=self.overlong_length, buffer=self.overlong_buffer, factor=self.overlong_factor
            )
        return Algorithm(
            plan=RolloutPlan(
                group_size=self.group_size,
                keep_group=has_signal,
                max_sampling_rounds=self.max_sampling_rounds,
                shape_reward=punishment,
                mask_truncated=self.mask_truncated,
                **{"needs_ref": self.kl_coef > 0} | (plan or {}),
            ),
            advantage_fn=group_normalized(epsilon=self.epsilon),
            loss=policy_loss(
                ratio_fn=ratio_fn,
                surrogate_fn=clipped(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip),
                aggregate_fn=token_mean,
                weight_fns=weight_fns,
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
                **parts,
            ),
        )
