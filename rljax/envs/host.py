"""Where environments live: in this process, or in a worker process that serves them one request at a time.

A worker is a fresh Python process that leads a process group of its own and ends when its socket closes, so none
outlives its parent, however the parent ends.
"""

import contextlib
import copy
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from rljax.envs.base import (
    CRASHED,
    MALFORMED,
    RAISED,
    REPLAY,
    TIMEOUT,
    Environment,
    MalformedStep,
    Prompt,
    ReplayMismatch,
    Snapshots,
    Step,
    checked_prompt,
    checked_step,
    replay_same,
)
from rljax.tasks.workers import end_child, start_child

_PATIENCE_S = 1.0  # from the end of the parent to that of a busy worker


@dataclass(frozen=True)
class Start:
    """Open an episode."""

    row: Mapping[str, Any]


@dataclass(frozen=True)
class Act:
    """Take one step."""

    action: str
    past: "Past"
    """Brings the episode back first, where it is not known any more."""


@dataclass(frozen=True)
class Past:
    """Bring an episode to where it stood."""

    row: Mapping[str, Any]
    opening: Prompt
    actions: Sequence[str]
    steps: Sequence[Step]
    """What each action led to; a replay must lead to the same."""
    parent: int | None = None
    """The episode that a fork leaves; None where the episode itself comes back."""


@dataclass(frozen=True)
class Close:
    """Forget an episode."""


Request = Start | Act | Past | Close


@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    value: Any = None
    """The opening, a step, or None."""
    reason: str | None = None
    """One of `FAILED` if it failed."""
    error: str = ""
    """What happened then, for a person."""
    seconds: float = 0.0
    """How long it took."""


class Host:
    """Environments by episode. Different episodes may be served by different threads at a time."""

    def __init__(self, make: Callable[[], Environment]):
        self._make = make
        self._environments: dict[int, Environment] = {}
        self._snapshots: dict[int, list[Any]] = {}

    def check(self) -> None:
        """Makes an environment and drops it. Raises ValueError if that fails."""
        try:
            self._make()
        except (Exception, SystemExit) as error:
            raise ValueError(f"the factory makes no environment: {type(error).__name__}: {error}") from error

    def serve(self, episode: int, request: Request) -> Answer:
        """Never raises for what an environment does."""
        begin = time.monotonic()
        try:
            value = self._serve(episode, request)
        except MalformedStep as error:
            return Answer(None, MALFORMED, str(error), time.monotonic() - begin)
        except ReplayMismatch as error:
            return Answer(None, REPLAY, str(error), time.monotonic() - begin)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            return Answer(None, RAISED, f"{type(error).__name__}: {error}", time.monotonic() - begin)
        return Answer(value, seconds=time.monotonic() - begin)

    def _serve(self, episode: int, request: Request) -> Any:
        if isinstance(request, Close):
            self._environments.pop(episode, None)
            self._snapshots.pop(episode, None)
            return None

        if isinstance(request, Start):
            environment = self._make()
            opening = checked_prompt(environment.reset(request.row))
            self._keep(episode, environment, [])
            return opening

        if isinstance(request, Past):
            self._bring_back(episode, request)
            return None

        if episode not in self._environments:
            self._bring_back(episode, request.past)
        environment = self._environments[episode]
        step = checked_step(environment.step(request.action))
        self._keep(episode, environment, self._snapshots[episode])
        return step

    def _keep(self, episode: int, environment: Environment, snapshots: list[Any]) -> None:
        """Snapshot n is that after n turns: one is added to `snapshots` here, where there are any."""
        self._environments[episode] = environment
        self._snapshots[episode] = snapshots
        if isinstance(environment, Snapshots):
            snapshots.append(environment.snapshot())

    def _bring_back(self, episode: int, past: Past) -> None:
        """By snapshot where there is one, else by replay."""
        environment = self._make()
        turn = len(past.actions)
        source = episode if past.parent is None else past.parent
        snapshots = self._snapshots.get(source, [])

        if isinstance(environment, Snapshots) and turn < len(snapshots):
            # a copy: what the environment changes from here on must not change the snapshot
            environment.restore(copy.deepcopy(snapshots[turn]))
            self._environments[episode] = environment
            self._snapshots[episode] = snapshots[: turn + 1]
            return

        kept: list[Any] = []
        player = _Recording(environment, kept) if isinstance(environment, Snapshots) else environment
        replay_same(player, past.row, past.opening, past.actions, past.steps)
        self._environments[episode] = environment
        self._snapshots[episode] = kept


class _Recording:
    """Takes the snapshots of a replay."""

    def __init__(self, inner: Any, kept: list[Any]):
        self._inner = inner
        self._kept = kept

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        opening = self._inner.reset(row)
        self._kept.append(self._inner.snapshot())
        return opening

    def step(self, action: str) -> Step:
        step = self._inner.step(action)
        self._kept.append(self._inner.snapshot())
        return step


class HostProcess:
    """A `Host` in a process of its own; one caller at a time. Raises ValueError if `make` cannot be loaded there, or
    makes no environment."""

    def __init__(self, make: bytes, start_timeout_s: float):
        self.process, self.connection = start_child("rljax.envs.host:serve")
        answer = self._exchange(make, start_timeout_s)
        if answer.reason is not None:
            self.kill()
            raise ValueError(
                f"a worker process cannot make environments ({answer.error or 'no answer'}); the factory must be a "
                "function or object of a module that imports on its own"
            )

    def serve(self, episode: int, request: Request, timeout_s: float) -> Answer:
        """The process is dead after CRASHED and TIMEOUT."""
        try:
            message = pickle.dumps((episode, request))
        except Exception as error:
            return Answer(None, RAISED, f"the row cannot be sent to a worker process ({error})")

        answer = self._exchange(message, timeout_s)
        if answer.reason in (CRASHED, TIMEOUT):
            self.kill()
            if answer.reason == CRASHED:
                code = self.process.returncode
                answer = Answer(None, CRASHED, f"the worker process ended with exit code {code}", answer.seconds)
        return answer

    def _exchange(self, message: bytes, timeout_s: float) -> Answer:
        begin = time.monotonic()
        try:
            self.connection.send_bytes(message)
            if not self.connection.poll(timeout_s):
                return Answer(None, TIMEOUT, f"it took longer than {timeout_s:g} s", time.monotonic() - begin)
            answer = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError, pickle.UnpicklingError):
            return Answer(None, CRASHED, "", time.monotonic() - begin)
        # an environment may write to the descriptor itself
        return answer if isinstance(answer, Answer) else Answer(None, MALFORMED, f"{answer!r:.100}")

    def kill(self) -> None:
        """End the process and all that it started."""
        end_child(self.process, self.connection)


def serve(descriptor: int) -> None:
    """The life of a worker process: load the factory, then serve requests until the socket closes."""
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    try:
        host = Host(pickle.loads(connection.recv_bytes()))
        host.check()
        connection.send_bytes(pickle.dumps(Answer()))
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send_bytes(pickle.dumps(Answer(None, RAISED, f"{type(error).__name__}: {error}")))
        return

    threading.Thread(target=_end_with_parent, args=(connection.fileno(),), daemon=True).start()

    while True:
        try:
            episode, request = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        answer = host.serve(episode, request)

        # text of a class of its own cannot always be sent
        try:
            message = pickle.dumps(answer)
        except Exception as error:
            message = pickle.dumps(Answer(None, MALFORMED, f"the answer cannot be sent ({error})"))
        try:
            connection.send_bytes(message)
        except OSError:
            return


def _end_with_parent(descriptor: int) -> None:
    """A busy worker must not outlive its parent."""
    poller = select.poll()
    poller.register(descriptor, 0)  # hang-ups only
    poller.poll()
    time.sleep(_PATIENCE_S)
    if os.getpgrp() == os.getpid():  # the group is the worker's own, so nobody else's processes end with it
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
