"""Where environments live: in this process, or in a worker process that serves them one request at a time.

A worker process is a fresh Python that leads a process group of its own and ends when its socket closes, so none
outlives its parent, however the parent ends.
"""

import contextlib
import copy
import os
import pickle
import select
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rljax.envs.base import (
    CRASHED,
    FAILED,
    MALFORMED,
    RAISED,
    REPLAY,
    TIMEOUT,
    Environment,
    MalformedStep,
    OneAnswer,
    Prompt,
    ReplayMismatch,
    Snapshots,
    Step,
    checked_prompt,
    checked_step,
    replay_same,
)
from rljax.tasks.channel import Channel, Garbled, read_data, write_data
from rljax.tasks.evolving import ASKED
from rljax.tasks.workers import end_child, end_if_forked, has_ended, start_child, told_start

_PATIENCE_S = 1.0  # from the end of the parent to that of a busy worker
_MOST_KILLED = 3  # processes that are killed while they start, one after another


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


def seconds_for(request: Request, step_s: float) -> float:
    """How long a request may take where a reset or step may take `step_s` seconds."""
    return step_s * (len(request.actions) + 1) if isinstance(request, Past) else step_s


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
        self._process = os.getpid()
        self._environments: dict[int, Environment] = {}
        self._snapshots: dict[int, list[Any]] = {}

        self._lock = threading.Lock()
        self._busy: Counter[int] = Counter()  # episodes that a thread is at
        self._forgotten: set[int] = set()  # those of them that nobody wants any more
        self._to_close: list[Any] = []

    def check(self) -> None:
        """Makes an environment and drops it. Raises ValueError if that fails."""
        try:
            environment = self._make()
        except (Exception, SystemExit) as error:
            raise ValueError(f"the factory makes no environment: {type(error).__name__}: {error}") from error
        self._leave(environment)
        self._close_left()

    def forget(self, episode: int) -> bool:
        """Drop an episode, or what a thread is still about to make of it. Whether an environment is left to be closed,
        by serving a `Close`, since that may take its time."""
        with self._lock:
            if self._busy[episode]:
                self._forgotten.add(episode)
                return False
            self._drop(episode)
            return bool(self._to_close)

    def close(self) -> None:
        """Close all environments that no thread is at."""
        for episode in list(self._environments):
            self.forget(episode)
        self._close_left()

    def serve(self, episode: int, request: Request) -> Answer:
        """Never raises for what an environment does."""
        begin = time.monotonic()
        with self._lock:
            self._busy[episode] += 1
        try:
            value = self._serve(episode, request)
        except MalformedStep as error:
            return Answer(None, MALFORMED, str(error), time.monotonic() - begin)
        except ReplayMismatch as error:
            return Answer(None, REPLAY, str(error), time.monotonic() - begin)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            return Answer(None, RAISED, f"{type(error).__name__}: {error}", time.monotonic() - begin)
        finally:
            end_if_forked(self._process)
            self._end_service(episode)
        return Answer(value, seconds=time.monotonic() - begin)

    def _end_service(self, episode: int) -> None:
        with self._lock:
            self._busy[episode] -= 1
            if self._busy[episode]:
                return
            del self._busy[episode]
            if episode not in self._forgotten:
                return
            # it was given up and released while it hung: what came of it must not stay
            self._forgotten.discard(episode)
            self._drop(episode)
        with contextlib.suppress(Exception, SystemExit):
            self._close_left()

    def _serve(self, episode: int, request: Request) -> Any:
        if isinstance(request, Close):
            with self._lock:
                self._drop(episode)
            self._close_left()
            return None

        if isinstance(request, Start):
            environment = self._made_for(request.row)
            with self._left_if_it_fails(environment):
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

    def _made_for(self, row: Mapping[str, Any]) -> Environment:
        return OneAnswer() if row.get(ASKED) else self._make()

    def _keep(self, episode: int, environment: Environment, snapshots: list[Any]) -> None:
        """Snapshot n is that after n turns: one is added to `snapshots` here, where there are any."""
        if isinstance(environment, Snapshots):
            snapshots.append(_snapshot_of(environment))
        self._environments[episode] = environment
        self._snapshots[episode] = snapshots

    def _bring_back(self, episode: int, past: Past) -> None:
        """By snapshot where there is one, else by replay."""
        turn = len(past.actions)
        source = episode if past.parent is None else past.parent
        snapshots = self._snapshots.get(source, [])

        environment = self._made_for(past.row)
        with self._left_if_it_fails(environment):
            if isinstance(environment, Snapshots) and turn < len(snapshots):
                # a copy: what the environment changes from here on must not change the snapshot
                environment.restore(copy.deepcopy(snapshots[turn]))
                kept = snapshots[: turn + 1]
            else:
                kept = []
                player = _Recording(environment, kept) if isinstance(environment, Snapshots) else environment
                replay_same(player, past.row, past.opening, past.actions, past.steps)
        self._environments[episode] = environment
        self._snapshots[episode] = kept

    @contextlib.contextmanager
    def _left_if_it_fails(self, environment: Environment) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._leave(environment)
            raise

    def _drop(self, episode: int) -> None:
        """Under the lock."""
        self._snapshots.pop(episode, None)
        environment = self._environments.pop(episode, None)
        if environment is not None:
            self._leave(environment)

    def _leave(self, environment: Environment) -> None:
        if callable(getattr(environment, "close", None)):
            self._to_close.append(environment)

    def _close_left(self) -> None:
        """What fails to close is told after all have been closed."""
        failed: BaseException | None = None
        while self._to_close:
            try:
                self._to_close.pop().close()
            except IndexError:  # another thread took the last
                break
            except (Exception, SystemExit) as error:
                failed = error
        if failed is not None:
            raise failed


def _snapshot_of(environment: Snapshots) -> Any:
    """A copy of its own: an environment that goes on in what it returned must not change it."""
    return copy.deepcopy(environment.snapshot())


class _Recording:
    """Takes the snapshots of a replay."""

    def __init__(self, inner: Any, kept: list[Any]):
        self._inner = inner
        self._kept = kept

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        opening = self._inner.reset(row)
        self._kept.append(_snapshot_of(self._inner))
        return opening

    def step(self, action: str) -> Step:
        step = self._inner.step(action)
        self._kept.append(_snapshot_of(self._inner))
        return step


class _KilledAtStart(ValueError):
    """By a signal that seldom is the process's own doing."""


class HostProcess:
    """A `Host` in a process of its own; one caller at a time. Raises ValueError, in one line, if the process does not
    start, `make` cannot be loaded there, or makes no environment.

    Requests go out as pickle and carry a number; answers come back as plain data with the number of their request.
    """

    def __init__(self, make: bytes, start_timeout_s: float):
        try:
            self.process, self.channel = start_child("rljax.envs.host:serve")
        except OSError as error:
            raise ValueError(f"a worker process for environments does not start: {told_start(error)}") from error
        self._number = 0
        self.was_killed = False
        """Whether SIGKILL ended it while it was asked; one that says what is no answer, or nothing, is not meant."""
        answer = self._exchange(Close(), make, start_timeout_s)
        if answer.reason is not None:
            self._end_behind(answer)
            why = " ".join(answer.error.split())[:300] or f"it ended with exit code {self.process.returncode}"
            raise (_KilledAtStart if self.was_killed else ValueError)(
                f"a worker process cannot make environments ({why}); the factory must be a "
                "function or object of a module that imports on its own"
            )

    @property
    def is_sound(self) -> bool:
        """Whether it can be given a request: it stands, and has said nothing that nobody asked for."""
        return self.process.returncode is None and not self.channel.has_input()

    def serve(self, episode: int, request: Request, timeout_s: float) -> Answer:
        """The process is dead after CRASHED and TIMEOUT."""
        self._number += 1
        message = packed(self._number, episode, request)
        if isinstance(message, Answer):
            return message

        answer = self._exchange(request, message, timeout_s)
        if answer.reason in (CRASHED, TIMEOUT):
            self._end_behind(answer)
            if answer.reason == CRASHED and not answer.error:
                code = self.process.returncode
                answer = Answer(None, CRASHED, f"the worker process ended with exit code {code}", answer.seconds)
        return answer

    def _end_behind(self, answer: Answer) -> None:
        self.kill()
        is_gone = answer.reason == CRASHED and not answer.error
        self.was_killed = is_gone and self.process.returncode == -signal.SIGKILL

    def _exchange(self, request: Request, message: bytes, timeout_s: float) -> Answer:
        begin = time.monotonic()
        try:
            self.channel.send(message, timeout_s)
            reply = self.channel.receive(timeout_s)
            if reply is not None:
                return read_answer(reply, self._number, request)
        except Garbled as error:
            says = f"the worker process sent what is no answer ({error})"
            return Answer(None, CRASHED, says, time.monotonic() - begin)
        except TimeoutError:
            pass
        except (EOFError, OSError):
            return Answer(None, CRASHED, "", time.monotonic() - begin)
        return Answer(None, TIMEOUT, f"it took longer than {timeout_s:g} s", time.monotonic() - begin)

    def let_go(self) -> None:
        """Tell the process that nothing more comes: once idle, it closes its environments and ends by itself."""
        self.channel.end()

    def has_ended(self) -> bool:
        """Whether it ended by itself; leaves it to `kill` to reap it."""
        return has_ended(self.process)

    def kill(self) -> None:
        """End the process and all that it started."""
        end_child(self.process, self.channel)


class Worker:
    """A `HostProcess` that is replaced when it dies. What lived there comes back by replay, as its next requests bring
    their past along. One caller at a time, but for `kill`. Raises as `HostProcess`.

    SIGKILL may have come from outside: from a kernel short of memory, or an operator. What was under way is then asked
    once more of the next process."""

    def __init__(self, make: bytes, start_timeout_s: float):
        self._make = make
        self._start_timeout_s = start_timeout_s
        self._known: set[int] = set()  # episodes that live in the process
        self._lock = threading.Lock()
        self._is_over = False
        self.process = self._new_process()

    def serve(self, episode: int, request: Request, step_s: float) -> Answer:
        """What came of a request, of which a reset or step may take `step_s` seconds."""
        answer, was_killed = self._serve_once(episode, request, step_s)
        if was_killed and not self._is_over and not isinstance(request, Close):
            answer, _ = self._serve_once(episode, request, step_s)
        return answer

    def _serve_once(self, episode: int, request: Request, step_s: float) -> tuple[Answer, bool]:
        """What came of it, and whether the process was killed meanwhile."""
        # it died while idle, or what ran in it before left something behind: not the fault of this episode
        problem = "" if self.process.is_sound else self._restart()
        if problem:
            return Answer(None, CRASHED, problem), False

        timeout_s = seconds_for(request, step_s)
        if isinstance(request, Act) and episode not in self._known:  # all of it is played again
            timeout_s += seconds_for(request.past, step_s)
        if isinstance(request, Close):
            self._known.discard(episode)
        else:
            self._known.add(episode)
        asked = self.process
        answer = asked.serve(episode, request, timeout_s)

        # at once, so that the next request does not wait for it
        if not self.process.is_sound:
            problem = self._restart()
            if problem and answer.reason is not None:
                answer = Answer(None, answer.reason, f"{answer.error}; and {problem}", answer.seconds)
        return answer, asked.was_killed

    def _new_process(self) -> HostProcess:
        for _ in range(_MOST_KILLED - 1):
            with contextlib.suppress(_KilledAtStart):
                return HostProcess(self._make, self._start_timeout_s)
        return HostProcess(self._make, self._start_timeout_s)

    def _restart(self) -> str:
        """A new process; why there is none, if there is none."""
        self.process.kill()
        self._known.clear()
        if self._is_over:
            return ""
        try:
            process = self._new_process()
        except (ValueError, OSError) as error:  # the next request tries again
            return f"no new worker started: {error}"
        with self._lock:
            self.process = process
            if self._is_over:  # it was ended in between
                process.kill()
        return ""

    def let_go(self) -> None:
        """Tell the process that nothing more comes: once idle, it closes its environments and ends by itself."""
        self.process.let_go()

    def has_ended(self) -> bool:
        """Whether it ended by itself; leaves it to `kill` to reap it."""
        return self.process.has_ended()

    def kill(self) -> None:
        """End the process and all that it started; no other takes its place."""
        with self._lock:
            self._is_over = True
            self.process.kill()


def packed(*message: Any) -> bytes | Answer:
    """What is sent to where environments live; the answer instead where a row cannot be sent."""
    try:
        return pickle.dumps(message)
    except Exception as error:
        return Answer(None, RAISED, f"the row cannot be sent to a worker process ({error})")


def write_answer(number: int, answer: Answer) -> bytes:
    """An answer to the request of this number, as plain data."""
    value = answer.value
    if isinstance(value, Step):
        value = [value.observation, value.reward, value.done, dict(value.counts)]
    try:
        return write_data(number, value, answer.reason, answer.error, answer.seconds)
    except (TypeError, ValueError, RecursionError) as error:
        return write_data(number, None, MALFORMED, f"the answer cannot be sent ({error})", answer.seconds)


def read_answer(message: bytes, number: int, request: Request) -> Answer:
    """Raises `Garbled` for what is no answer to the request of this number: an environment may write to the descriptor
    itself."""
    fields = read_data(message)
    if len(fields) != 5 or fields[0] != number:
        raise Garbled(f"it answers the request {fields[0] if fields else None!r:.20}, not {number}")

    _, value, reason, error, seconds = fields
    is_time = type(seconds) is float and 0 <= seconds < float("inf")
    if reason not in (None, *FAILED) or not isinstance(error, str) or not is_time:
        raise Garbled(f"it says {fields[2:]!r:.100}")
    if reason is not None:
        return Answer(None, reason, error, seconds)

    try:
        if isinstance(request, Start):
            return Answer(checked_prompt(value), seconds=seconds)
        if isinstance(request, Act):
            return Answer(checked_step(Step(*value)), seconds=seconds)
    except (MalformedStep, TypeError) as problem:
        raise Garbled(str(problem)) from None
    return Answer(seconds=seconds)


def serve(descriptor: int) -> None:
    """The life of a worker process: load the factory, then serve requests until the socket closes."""
    os.set_inheritable(descriptor, False)
    worker = os.getpid()
    channel = Channel(socket.socket(fileno=descriptor), most_bytes=None)

    # The first message brings the factory. Also SystemExit and KeyboardInterrupt are answered: code that is imported
    # may raise anything, and the parent is to know why there is no worker.
    try:
        host = Host(pickle.loads(_next(channel)))
        host.check()
        answer = Answer()
    except BaseException as error:
        answer = Answer(None, RAISED, f"{type(error).__name__}: {error}")

    # A process that the factory has forked comes here too, and must not answer for this one.
    end_if_forked(worker)
    with contextlib.suppress(OSError):
        channel.send(write_answer(0, answer))
    if answer.reason is not None:
        return

    threading.Thread(target=_end_with_parent, args=(channel.fileno(),), daemon=True).start()

    while True:
        try:
            number, episode, request = pickle.loads(_next(channel))
        except (EOFError, OSError):
            with contextlib.suppress(Exception, SystemExit):
                host.close()
            return
        answer = host.serve(episode, request)
        try:
            channel.send(write_answer(number, answer))
        except OSError:
            return


def _next(channel: Channel) -> bytes:
    message = channel.receive()
    assert message is not None  # it waits for as long as it takes
    return message


def _end_with_parent(descriptor: int) -> None:
    """A busy worker must not outlive its parent."""
    poller = select.poll()
    poller.register(descriptor, 0)  # hang-ups only
    poller.poll()
    time.sleep(_PATIENCE_S)
    if os.getpgrp() == os.getpid():  # the group is the worker's own, so nobody else's processes end with it
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
