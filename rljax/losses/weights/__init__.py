"""Constant multipliers of the token loss: factories of functions (logprobs, entropies, rows) -> [B, T].

`policy_loss` stops their gradient. A positive weight on the token loss is the same weight on its advantage, for every
surrogate of A that is clipped by the ratio alone. The denominator of the aggregation stays the original token count, so
that rejecting data does not raise the step size of the rest.
"""

from rljax.losses.weights.behavior import (
    batch_normalized,
    behavior_weights,
    masked_is,
    sequence_behavior_weights,
    sequence_masked_is,
    sequence_truncated_is,
    truncated_is,
)
from rljax.losses.weights.future_kl import future_kl_report, future_kl_weights, future_log_ratio
from rljax.losses.weights.guided import shaped_guidance, shift_stats
from rljax.losses.weights.one_way import (
    current_deviation,
    exponential_gate,
    is_reversed,
    linear_gate,
    old_deviation,
    one_way_report,
    one_way_weights,
    sigmoid_gate,
)
from rljax.losses.weights.procedure import procedure_weights
from rljax.losses.weights.reweighting import divergence_weights, rare_token_weights

__all__ = [
    "batch_normalized",
    "behavior_weights",
    "current_deviation",
    "divergence_weights",
    "exponential_gate",
    "future_kl_report",
    "future_kl_weights",
    "future_log_ratio",
    "is_reversed",
    "linear_gate",
    "masked_is",
    "old_deviation",
    "one_way_report",
    "one_way_weights",
    "procedure_weights",
    "rare_token_weights",
    "sequence_behavior_weights",
    "sequence_masked_is",
    "sequence_truncated_is",
    "shaped_guidance",
    "shift_stats",
    "sigmoid_gate",
    "truncated_is",
]
