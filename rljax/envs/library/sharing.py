"""What all episodes of a process share: made once, however many threads ask for it at the same time."""

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def made_once(function: Callable[P, R]) -> Callable[P, R]:
    """`functools.cache` that calls the function once for each choice of arguments, which must be hashable, even when
    threads ask at the same time; a call that raised is made again. The results live as long as the process."""
    cached = functools.cache(function)
    lock = threading.RLock()  # what is made may itself ask for something that is made once

    @functools.wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with lock:
            return cached(*args, **kwargs)  # type: ignore[arg-type]

    return locked
