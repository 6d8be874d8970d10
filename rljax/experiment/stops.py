"""Signals that ask a run to end: it saves what it has and exits, and the same command goes on from there."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax

from rljax.parallel import gather

EXIT_STATUS = 143
"""Exit status of a run that has saved because it was asked to end; the launch files start such a run again."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Slurm, Kubernetes and cloud machines send the first before they kill, Slurm the second on demand; the third is
Ctrl-C."""


class Stopped(SystemExit):
    """A run was asked to end. No `Exception`, so that a reward or an environment cannot take it for a failure."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class Stops:
    """Takes note of the signals while it is open, as a context manager in the main thread; elsewhere it hears none.

    One process gives up at once what is marked `abandonable`. Several must leave their common program at the same
    place, so they only look at the ends of such work, and all end if one was asked to. A second Ctrl-C is a
    KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested = ""
        self._may_raise = False
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> "Stops":
        self._pid = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """Work that may be given up in the middle, since nothing that is saved changes in it. Raises `Stopped` before,
        in or after it."""
        self.check()
        self._may_raise = jax.process_count() == 1
        try:
            yield
        finally:
            self._may_raise = False
        self.check()

    def check(self) -> None:
        """Raises `Stopped` if this process or another one was asked to end. All processes must come here."""
        if any(gather(bool(self.requested))):
            raise Stopped

    def _take(self, number: int, frame: FrameType | None) -> None:
        # A child that was forked while we listen has nothing to save.
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return

        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return

        self.requested = signal.Signals(number).name
        # A handler may run within a `print` of the program, which must not be entered twice.
        os.write(2, f"\n{self.requested}: saving, then exit with status {EXIT_STATUS}\n".encode())
        if self._may_raise:
            self._may_raise = False
            raise Stopped
