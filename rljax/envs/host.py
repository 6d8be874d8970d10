"""Where environments live: in this process, or in a worker process that serves them one request at a time.

A worker is a fresh Python process that leads a process group of its own and ends when its socket closes, so none
outlives its parent, however the parent ends.
"""

import contextlib
import copy
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from rljax.envs.base import (
    CRASHED,
    NONSENSE,
    RAISED,
    REPLAY,
    TIMEOUT,
    Environment,
    Nonsense,
    Prompt,
    ReplayMismatch,
    Snapshots,
    Step,
    checked_prompt,
    checked_step,
    replay_same,
)

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from rljax.envs.host import serve; serve(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class Start:
    """Open an episode."""

    row: Mapping[str, Any]


@dataclass(frozen=True)
class Act:
    """Take one step. `past` brings the episode back first where it is not known any more."""

    action: str
    past: "Past"


@dataclass(frozen=True)
class Past:
    """What an episode has seen, and, for a fork, whose it was."""

    row: Mapping[str, Any]
    opening: Prompt
    actions: Sequence[str]
    steps: Sequence[Step]
    parent: int | None = None


@dataclass(frozen=True)
class Close:
    """Forget an episode."""


Request = Start | Act | Past | Close


@dataclass(frozen=True)
class Answer:
    """`value`: the opening, a step, or None. Or the reason and text of a failure."""

    value: Any = None
    reason: str | None = None
    error: str = ""
    seconds: float = 0.0


class Host:
    """Environments by episode. Different episodes may be served by different threads at a time."""

    def __init__(self, make: Callable[[], Environment]):
        self._make = make
        self._environments: dict[int, Environment] = {}
        self._snapshots: dict[int, list[Any]] = {}

    def serve(self, episode: int, request: Request) -> Answer:
        """Never raises for what an environment does."""
        begin = time.monotonic()
        try:
            value = self._serve(episode, request)
        except Nonsense as error:
            return Answer(None, NONSENSE, str(error), time.monotonic() - begin)
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
        self._environments[episode] = environment
        self._snapshots[episode] = snapshots
        if isinstance(environment, Snapshots):
            snapshots.append(environment.snapshot())

    def _bring_back(self, episode: int, past: Past) -> None:
        """By snapshot where there is one, else by replay."""
        environment, turn = self._make(), len(past.actions)
        snapshots = self._snapshots.get(past.parent if past.parent is not None else episode, [])
        if isinstance(environment, Snapshots) and turn < len(snapshots):
            environment.restore(copy.deepcopy(snapshots[turn]))
            self._environments[episode], self._snapshots[episode] = environment, snapshots[: turn + 1]
            return
        kept: list[Any] = []
        if isinstance(environment, Snapshots):
            environment = _Recording(environment, kept)
        replay_same(environment, past.row, past.opening, past.actions, past.steps)
        self._environments[episode] = environment.inner if isinstance(environment, _Recording) else environment
        self._snapshots[episode] = kept


class _Recording:
    """Takes the snapshots of a replay."""

    def __init__(self, inner: Any, kept: list[Any]):
        self.inner, self._kept = inner, kept

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        opening = self.inner.reset(row)
        self._kept.append(self.inner.snapshot())
        return opening

    def step(self, action: str) -> Step:
        step = self.inner.step(action)
        self._kept.append(self.inner.snapshot())
        return step


class HostProcess:
    """A `Host` in a process of its own; one caller at a time. Raises ValueError if `make` cannot be loaded there."""

    def __init__(self, make: bytes, start_timeout_s: float):
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [sys.executable, "-c", _CHILD, str(theirs.fileno()), json.dumps(sys.path)]
            # results must not depend on the hash seed of a process, and no worker may take the accelerator
            env = {**os.environ, "PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"}
            self.process = subprocess.Popen(
                arguments, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True, env=env
            )
        self.connection = Connection(ours.detach())
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
            code = self.process.returncode
            if answer.reason == CRASHED:
                answer = Answer(None, CRASHED, f"the worker process ended with exit code {code}", answer.seconds)
        return answer

    def _exchange(self, message: bytes, timeout_s: float) -> Answer:
        begin = time.monotonic()
        try:
            self.connection.send_bytes(message)
            if not self.connection.poll(timeout_s):
                return Answer(None, TIMEOUT, f"it took longer than {timeout_s:g} s", time.monotonic() - begin)
            answer = pickle.loads(self.connection.recv_bytes())
            return answer if isinstance(answer, Answer) else Answer(None, NONSENSE, f"{answer!r:.100}")
        except (EOFError, OSError, pickle.UnpicklingError):
            return Answer(None, CRASHED, "", time.monotonic() - begin)

    def kill(self) -> None:
        """End the process and all that it started."""
        self.connection.close()
        if self.process.returncode is None:  # not yet reaped, so its id still names its group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def serve(descriptor: int) -> None:
    """The life of a worker process."""
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    try:
        host = Host(pickle.loads(connection.recv_bytes()))
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
        try:
            message = pickle.dumps(answer)
        except Exception as error:
            message = pickle.dumps(Answer(None, NONSENSE, f"the answer cannot be sent ({error})"))
        try:
            connection.send_bytes(message)
        except OSError:
            return


def _end_with_parent(descriptor: int) -> None:
    """A busy worker must not outlive its parent."""
    import select

    poller = select.poll()
    poller.register(descriptor, 0)  # hang-ups only
    poller.poll()
    time.sleep(1.0)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
