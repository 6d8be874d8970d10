"""Work that the loop does not wait for, such as writing what it has done."""

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_MOST_WAITING = 4
"""Calls that may wait. What they hold stays in memory, so a slow disk slows the loop before it fills it."""


class Background:
    """Calls functions in a thread, one after another in the order given.

    What a call raises is raised by the next use of this object. Calls that still wait when the interpreter ends are
    made before it does; those of a killed process are lost.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._waiting: collections.deque[Future] = collections.deque()

    def __call__(self, function: Callable[..., None], *arguments: Any) -> None:
        """Hands a call over; waits where too many are under way, or to raise what an earlier one raised."""
        while self._waiting and (len(self._waiting) >= _MOST_WAITING or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(function, *arguments))

    def wait(self) -> None:
        """Until everything is done."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
