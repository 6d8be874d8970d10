"""A sign of life within a step: what is under way, for how long, and how far it is."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from rljax.sampling import compile_count, token_count


class Phase(NamedTuple):
    """What is under way, and where the counters stood when it began."""

    name: str
    began: float
    tokens: int
    compiles: int


class Pulse:
    """Shows the phase of a run every so many seconds while it is open, as a context manager.

    `show` takes the line; it is called from a thread. A phase that is shorter than `every_s` is not seen; 0 shows none.
    """

    def __init__(self, show: Callable[[str], None] = lambda line: None, every_s: float = 0.0):
        self._show = show
        self._every_s = every_s
        self._phase: Phase | None = None
        self._changes = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Names what is under way inside, here and in a trace."""
        before = self._phase
        self._phase = Phase(name, time.perf_counter(), token_count(), compile_count())
        self._changes += 1
        try:
            # For `config.log.profile_steps`; it costs nothing where nothing is traced.
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self._phase = before
            self._changes += 1

    @property
    def name(self) -> str:
        """Of what is under way; "" between phases."""
        phase = self._phase
        return "" if phase is None else phase.name

    def progress(self) -> tuple[int, int, int]:
        """Changes whenever something moves: a phase begins or ends, a token is sampled, a program is compiled."""
        return self._changes, token_count(), compile_count()

    def line(self) -> str:
        """The phase, its seconds, and the tokens and programs since it began; "" between phases."""
        phase = self._phase
        if phase is None:
            return ""
        said = [f"{phase.name} {time.perf_counter() - phase.began:.0f} s"]
        if tokens := token_count() - phase.tokens:
            said.append(f"{tokens} tokens")
        if compiles := compile_count() - phase.compiles:
            said.append(f"{compiles} programs compiled")
        return ", ".join(said)

    def __enter__(self) -> "Pulse":
        if self._every_s > 0:
            self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(self._every_s):
            if line := self.line():
                self._show(line)
