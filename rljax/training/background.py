"""Work that the loop does not wait for, such as writing what it has done."""

import collections
from collections.abc import Callable
from concurrent import futures
from typing import Any

_MOST_WAITING = 4
"""Calls that may wait. What they hold stays in memory, so a slow disk slows the loop before it fills it."""


class Background:
    """Calls functions in a thread, one after another in the order given.

    What a call raises is raised by the next use of this object; calls that were handed over in between are not made,
    since they may rely on it. Calls that still wait when the interpreter ends are made before it does; those of a
    killed process are lost.
    """

    def __init__(self) -> None:
        self._thread = futures.ThreadPoolExecutor(1)
        self._waiting: collections.deque[futures.Future] = collections.deque()
        self._has_failed = False

    def __call__(self, function: Callable[..., None], *arguments: Any) -> None:
        """Hands a call over; waits where too many are under way, or to raise what an earlier one raised."""
        while self._waiting and (len(self._waiting) >= _MOST_WAITING or self._waiting[0].done()):
            if self._waiting[0].exception() is not None:
                self.wait()
            self._waiting.popleft()
        self._waiting.append(self._thread.submit(self._call, function, *arguments))

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._has_failed:
            return
        try:
            function(*arguments)
        except BaseException:
            self._has_failed = True
            raise

    def wait(self) -> None:
        """Until nothing is under way, also where it raises what a call raised."""
        waiting = [*self._waiting]
        futures.wait(waiting)
        self._waiting.clear()
        self._has_failed = False
        for call in waiting:
            call.result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
