"""Counts the programs that XLA compiled in this process, so that a surprise compile shows in the metrics."""

import threading

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_lock = threading.Lock()
_compiles = 0
_here = threading.local()


def _listen(event: str, duration_secs: float, **_) -> None:
    global _compiles
    if event == _EVENT:
        with _lock:
            _compiles += 1
        _here.count = compile_count_here() + 1


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_count() -> int:
    """Programs compiled (or read from the persistent cache) by this process since `rljax.sampling` was imported."""
    return _compiles


def compile_count_here() -> int:
    """Those of them that the calling thread asked for."""
    return getattr(_here, "count", 0)
