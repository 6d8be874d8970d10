"""What a rollout is to collect, as plain data and host functions; no jax here."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
    """How the rollout of an algorithm is collected.

    Attributes:
        group_size: samples per prompt.
        keep_group: dynamic sampling: told the raw rewards (float64, valid samples only) of a group, says whether the
            group is kept; None keeps all.
        max_sampling_rounds: rounds of prompts drawn to fill a batch under `keep_group` before giving up.
        shape_reward: (raw reward, completion length in tokens) -> the reward that advantages see; None leaves it.
        mask_truncated: overlong filtering: completions cut off by the length limit count in the statistics of their
            group, but receive no gradient (their `action_mask` is False).
        needs_ref: log-probs of the reference model are needed, in the reward or in the loss.
        needs_uniforms: the loss wants a uniform random number per token (`Rows.uniforms`).
        refresh_every: steps after which the reference becomes a copy of the policy; 0 is never. A run's own
            `reference_refresh` goes before it.
        refresh_gate: told the held-out scores per problem now and at the last refresh (the start counts as one), says
            whether a refresh that is due takes place; None always lets it.
    """

    group_size: int
    keep_group: Callable[[np.ndarray], bool] | None = None
    max_sampling_rounds: int = 10
    shape_reward: Callable[[float, int], float] | None = None
    mask_truncated: bool = False
    needs_ref: bool = False
    needs_uniforms: bool = False
    refresh_every: int = 0
    refresh_gate: Callable[[np.ndarray, np.ndarray], bool] | None = None


def has_signal(rewards: np.ndarray) -> bool:
    """Whether the raw rewards of a group differ (DAPO's dynamic sampling, 2503.14476)."""
    rewards = np.asarray(rewards, np.float64)
    return bool(rewards.size and rewards.max() > rewards.min())


def not_worse(now: np.ndarray, before: np.ndarray) -> bool:
    """Whether the mean of scores per problem [N] has fallen by no more than one standard error of the paired difference
    (ddof 1; 0 for a single problem)."""
    difference = np.asarray(now, np.float64) - np.asarray(before, np.float64)
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return bool(difference.mean() >= -error)


def soft_overlong_punishment(*, max_length: int, buffer: int, factor: float = 1.0) -> Callable[[float, int], float]:
    """`R + min(-(length - (max_length - buffer)) / buffer * factor, 0)`, lengths in tokens (DAPO, 2503.14476).

    Raises ValueError unless `0 < buffer <= max_length`.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"overlong buffer {buffer} must be positive and at most the maximal length {max_length}")

    def shape(reward: float, length: int) -> float:
        return reward + min(-(length - (max_length - buffer)) / buffer * factor, 0.0)

    return shape
