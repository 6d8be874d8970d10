"""Advantages: functions from a rollout batch, or from rewards and values, to credit per token."""

from rljax.advantages.branch import dual_group, entropy_scaled, procedure_weights, root_tokens, shared_branch_credit
from rljax.advantages.contrastive import (
    summary_bonus_released,
    summary_contrast,
    summary_counts,
    summary_own_group,
    summary_reward,
)
from rljax.advantages.gae import (
    LambdaFn,
    gae_advantages,
    gae_returns,
    generalized_advantage_estimation,
    length_adaptive,
)
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
from rljax.advantages.passk import pass_at_k_normalized, pass_at_k_unbiased
from rljax.advantages.segments import (
    ancestor_centered,
    below_probability,
    depth_normalized,
    prefix_baseline,
    sibling_normalized,
    surprisal_weighted,
    trie_difference,
    value_gain,
    vine_gain,
    whitened,
)
from rljax.advantages.task_normalized import task_normalized
from rljax.advantages.tree import (
    global_and_local,
    global_and_local_released,
    intra_and_inter_tree,
    prefix_weighted,
    shared_mean,
)

__all__ = [
    "AdvantageFn",
    "LambdaFn",
    "ancestor_centered",
    "batch_centered",
    "below_probability",
    "depth_normalized",
    "dual_group",
    "entropy_scaled",
    "gae_advantages",
    "gae_returns",
    "generalized_advantage_estimation",
    "global_and_local",
    "global_and_local_released",
    "group_centered",
    "group_centered_whitened",
    "group_normalized",
    "intra_and_inter_tree",
    "kl_in_reward",
    "leave_one_out",
    "length_adaptive",
    "pass_at_k_normalized",
    "pass_at_k_unbiased",
    "prefix_baseline",
    "prefix_weighted",
    "procedure_weights",
    "root_tokens",
    "shared_branch_credit",
    "shared_mean",
    "sibling_normalized",
    "summary_bonus_released",
    "summary_contrast",
    "summary_counts",
    "summary_own_group",
    "summary_reward",
    "surprisal_weighted",
    "task_normalized",
    "token_rewards",
    "trie_difference",
    "value_gain",
    "vine_gain",
    "whitened",
    "whitened_returns",
]
