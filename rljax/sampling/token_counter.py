"""Counts the tokens that this process samples, while a rollout is under way."""

import threading

_lock = threading.Lock()
_tokens = 0


def count_tokens(new: int) -> None:
    """Takes note of `new` tokens that were sampled just now."""
    global _tokens
    with _lock:
        _tokens += new


def token_count() -> int:
    """Tokens sampled by this process so far, those of evaluations included."""
    return _tokens
