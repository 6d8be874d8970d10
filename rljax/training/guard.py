"""Stops a run whose updates have all been skipped for a while, and says what was not finite."""

from collections.abc import Mapping
from typing import Any

import jax

_ADVICE = {
    "advantages": "look at the rewards of this rollout, and at the advantage function",
    "logprobs": "the weights, or the activations in this dtype, overflow: lower learning_rate, or use float32",
    "loss": "the log-probs are finite and the loss is not: look at its ratios, weights and penalties",
    "gradient norm": "the loss is finite and its gradient is not: lower learning_rate or max_grad_norm, or use float32",
}


class Guard:
    """Looks at the outcome of an update when the next one is under way, so that the host does not wait."""

    def __init__(self, max_skipped: int):
        if max_skipped < 1:
            raise ValueError(f"max_skipped={max_skipped} must be at least 1")
        self.max_skipped = max_skipped
        self._pending: tuple[Any, Mapping[str, Any]] | None = None

    def observe(self, skipped: Any, finite: Mapping[str, Any]) -> None:
        """Takes the outcome of an update just dispatched, and checks the one before. FloatingPointError as `check`."""
        before = self._pending
        self._pending = (skipped + 0, finite)  # a copy: the state's own is donated
        self._raise(before)

    def check(self) -> None:
        """FloatingPointError if the last update was the `max_skipped`-th skipped in a row."""
        pending = self._pending
        self._pending = None
        self._raise(pending)

    def _raise(self, outcome: tuple[Any, Mapping[str, Any]] | None) -> None:
        if outcome is None:
            return
        skipped, finite = jax.device_get(outcome)
        if int(skipped) < self.max_skipped:
            return

        # In the order in which a number that is not finite spreads: the first is the cause to look at.
        bad = [name for name in _ADVICE if not finite[name]]
        raise FloatingPointError(
            f"{int(skipped)} updates in a row were skipped; in the last one {', '.join(bad)} had NaN or infinite "
            f"values. First cause to look at: {_ADVICE[bad[0]]}"
        )
