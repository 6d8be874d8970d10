"""Ends a run in which nothing moves any more: a process that hangs and is not dead keeps all others for ever."""

import contextlib
import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from rljax.experiment.pulse import Pulse
from rljax.parallel import heard, is_waiting, say_to_all
from rljax.training import AnyPath

STALLED = 75
"""Exit status of a run that was ended because nothing moved: a temporary failure, after which the same command goes on
from the newest checkpoint."""

BEAT_S = 10.0
"""Seconds between two looks at most."""

OVER = "over"
"""What a process says that needs no watching any more."""


class Look(NamedTuple):
    """A process as it was last seen."""

    process: int
    phase: str
    """What it was doing; "" between phases."""
    still_s: float
    """Seconds since anything moved in it, or since it gave a sign."""
    waits: bool
    """Whether it waits for others."""


def stalled(looks: Sequence[Look], limit_s: float) -> list[Look]:
    """Those that hold a run up, the longest first: they have stood still for `limit_s` seconds, and wait for no other.
    Where all stand still and wait, all of them."""
    still = sorted((look for look in looks if look.still_s >= limit_s), key=lambda look: -look.still_s)
    found = [look for look in still if not look.waits]
    return found or (still if len(still) == len(looks) else [])


class Watchdog:
    """Looks, while it is open as a context manager, whether the processes of a run move; ends them if one does not.

    Each tells the others what it does and since when, through the coordination service. Who finds that one has stood
    still for `limit_s` seconds tells the others too; then each writes the stacks of its threads to `folder` and ends
    with status 75, process 0 last, since the others speak through it. A process whose interpreter is held, and which
    cannot look, is ended by a timer of its own, with its stacks on stderr. 0 seconds is never.
    """

    def __init__(self, pulse: Pulse, folder: AnyPath, limit_s: float, end: Callable[[int], Any] = os._exit):
        self._pulse = pulse
        self._folder = folder
        self._limit_s = limit_s
        self._end = end
        self._every_s = min(BEAT_S, limit_s / 4)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

        # Of this process: when it last moved. Of the others: what they last said, and when.
        self._beats = 0
        self._progress: Any = None
        self._moved = 0.0
        self._said: dict[int, tuple[dict[str, Any], float]] = {}

    def __enter__(self) -> "Watchdog":
        if self._limit_s > 0:
            self._begin()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._say({"phase": OVER})

    def _begin(self) -> None:
        """Counts from now."""
        now = time.monotonic()
        self._progress = self._pulse.progress()
        self._moved = now
        self._said = {index: ({"phase": "the start", "still_s": 0.0}, now) for index in range(jax.process_count())}

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self._every_s):
            now = time.monotonic()
            # A process that was suspended has seen nothing move, and may not judge the others by that.
            if now - last > self._every_s + self._limit_s / 2:
                self._begin()
            last = now

            # Re-armed with every look, it goes off only where no look is possible.
            with contextlib.suppress(Exception):
                later = self._limit_s + 3 * self._every_s
                faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__ or sys.stderr)

            # The service may be gone, which JAX itself ends this process for.
            with contextlib.suppress(RuntimeError):
                why = self._look(now)
                if why:
                    self._end_run(why)

    def _look(self, now: float) -> str:
        """Why the run is to be ended; "" if it is not."""
        if self._pulse.progress() != self._progress:
            self._progress = self._pulse.progress()
            self._moved = now

        self._beats += 1
        own = {"phase": self._pulse.name, "still_s": now - self._moved, "waits": is_waiting(), "beat": self._beats}
        self._say(own)
        for index, said in self._hear():
            if self._said[index][0] != said:
                self._said[index] = (said, now)
        self._said[jax.process_index()] = (own, now)

        told = heard("stalled")
        if told:
            return next(iter(told.values()))
        looks = [
            # One that says nothing any more has stood still at least since then.
            Look(index, said["phase"], said["still_s"] + now - when, said.get("waits", False))
            for index, (said, when) in self._said.items()
            if said["phase"] != OVER
        ]
        found = stalled(looks, self._limit_s)
        return self._line(found) if found else ""

    def _line(self, found: Sequence[Look]) -> str:
        where = "; ".join(
            f"process {look.process} in {look.phase or 'between phases'} for {look.still_s:.0f} s" for look in found
        )
        return (
            f"nothing has moved for config.log.stall_s={self._limit_s:g} seconds: {where}; stacks are in "
            f"{self._folder}, and all processes end with status {STALLED}"
        )

    def _end_run(self, why: str) -> None:
        say_to_all("stalled", why)
        print(f"\nerror: {why}", file=sys.stderr, flush=True)
        # A full disk must not keep the process.
        with contextlib.suppress(Exception):
            self._write_stacks()
        # Time for the others to hear of it, and for the timer of one that cannot.
        if jax.process_count() > 1 and jax.process_index() == 0:
            time.sleep(4 * self._every_s)
        self._end(STALLED)

    def _write_stacks(self) -> None:
        # The handler writes to a descriptor, which an address has none of.
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"process_{jax.process_index()}.txt").write_bytes(file.read())

    def _say(self, what: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):
            say_to_all("pulse", json.dumps(what))

    def _hear(self) -> list[tuple[int, dict[str, Any]]]:
        return [(index, json.loads(text)) for index, text in heard("pulse").items()]
