"""The rollouts and the clip interval of DAPO, 2503.14476, on which several methods build their own loss."""

import dataclasses

from rljax.algorithms.base import GroupRecipe, check_at_least
from rljax.plans import RolloutPlan, has_signal, soft_overlong_punishment


@dataclasses.dataclass
class DynamicSampling(GroupRecipe):
    """Groups whose *raw* rewards, or values of the reward `signal_reward`, are all equal are replaced, for at most
    `max_sampling_rounds` rounds of prompts; the credit is that of `R' = R + soft overlong punishment`.

    The punishment falls linearly from 0 at `overlong_length - overlong_buffer` tokens to `-overlong_factor` at
    `overlong_length`.
    """

    group_size: int = 16
    clip_high: float = 0.28
    dual_clip: float | None = 10.0
    """Bounds the loss of tokens with A < 0 to -A times this. None is off."""
    overlong_length: int = 20480
    """Tokens of the longest completion."""
    overlong_buffer: int = 4096
    """Tokens before it in which the punishment sets in. 0 switches it off."""
    overlong_factor: float = 1.0
    """The punishment at `overlong_length`."""
    mask_truncated: bool = False
    """Overlong filtering: no gradient for completions cut off by the limit. Best left off while the punishment is on,
    since it hides it."""
    max_sampling_rounds: int = 10
    """Rounds of prompts drawn to fill a batch."""
    signal_reward: str = ""
    """Name of the reward whose values must differ within a group; empty is the weighted sum. Name the reward for the
    right answer where another one, such as for the format, would keep groups that are all wrong."""

    def check(self) -> None:
        super().check()
        check_at_least(self, 0, "overlong_buffer", "overlong_factor")
        check_at_least(self, 1, "max_sampling_rounds")

    def plan(self) -> RolloutPlan:
        """Dynamic sampling, with the punishment in the reward. ValueError for a buffer beyond the length."""
        punishment = None
        if self.overlong_buffer:
            punishment = soft_overlong_punishment(
                max_length=self.overlong_length, buffer=self.overlong_buffer, factor=self.overlong_factor
            )
        plan = super().plan()
        return plan._replace(
            keep_group=has_signal,
            signal_reward=self.signal_reward,
            max_sampling_rounds=self.max_sampling_rounds,
            shape_reward=punishment,
            mask_truncated=self.mask_truncated,
        )
