"""What parts of `policy_loss` are given: log-probs of the current policy, entropies and rows; 0 off the loss mask."""

from collections.abc import Callable

from jaxtyping import Array

from rljax.types import Rows

WeightFn = Callable[[Array, Array, Rows], Array]
"""(logprobs [B, T], entropies [B, T] in nats, rows) -> weights [B, T], not differentiated."""

FilterFn = Callable[[Array, Array, Rows], Array]
"""(logprobs [B, T], entropies [B, T] in nats, rows) -> keep [B, T]."""

ReportFn = Callable[[Array, Array, Rows], dict[str, Array]]
"""(logprobs [B, T], entropies [B, T] in nats, rows) -> metrics: token values [B, T], whose mean over loss tokens is
reported."""
