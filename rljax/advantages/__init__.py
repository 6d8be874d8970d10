"""Advantages: functions from a rollout batch, or from rewards and values, to credit per token."""

from rljax.advantages.gae import generalized_advantage_estimation
from rljax.advantages.group import (
    AdvantageFn,
    batch_centered,
    group_centered,
    group_centered_whitened,
    group_normalized,
    kl_in_reward,
    leave_one_out,
    token_rewards,
    whitened_returns,
)

__all__ = [
    "AdvantageFn",
    "batch_centered",
    "generalized_advantage_estimation",
    "group_centered",
    "group_centered_whitened",
    "group_normalized",
    "kl_in_reward",
    "leave_one_out",
    "token_rewards",
    "whitened_returns",
]
