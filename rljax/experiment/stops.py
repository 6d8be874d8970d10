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

_COMPILATION = "/jax/core/compile/backend_compile_duration"
"""What JAX's monitoring calls a compilation: a scalar when one begins, a duration when it is over."""


class Stopped(SystemExit):
    """A run was asked to end. No `Exception`, so that a reward or an environment cannot take it for a failure."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class Stops:
    """Takes note of the signals while it is open, as a context manager in the main thread; elsewhere it hears none.

    One process gives up at once what is marked `abandonable`, but for a compilation, which goes to its end. Several
    must leave their common program at the same place, so they only look at the ends of such work, and all end if one
    was asked to. A second Ctrl-C is a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested = ""
        self._may_raise = False
        self._is_compiling = False
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> "Stops":
        self._pid = os.getpid()
        if threading.current_thread() is threading.main_thread():
            jax.monitoring.register_scalar_listener(self._compilation_begins)
            jax.monitoring.register_event_duration_secs_listener(self._compilation_ends)
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        jax.monitoring.unregister_scalar_listener(self._compilation_begins)
        jax.monitoring.unregister_event_duration_listener(self._compilation_ends)

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
        self._break_off()

    def _break_off(self) -> None:
        # XLA compiles in a thread of its own, which an exception out of the wait for it leaves running: it crashes when
        # the process takes down what it uses, and the exit status is that of the crash. A compilation that is waited
        # for is also in the persistent cache, so that the next start does without it.
        if self.requested and self._may_raise and not self._is_compiling:
            self._may_raise = False
            raise Stopped

    def _compilation_begins(self, event: str, value: float | int, **_: str | int) -> None:
        if event == _COMPILATION and threading.current_thread() is threading.main_thread():
            self._is_compiling = True

    def _compilation_ends(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILATION and threading.current_thread() is threading.main_thread():
            self._is_compiling = False
            self._break_off()
