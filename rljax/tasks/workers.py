"""A small pool of processes for code that may hang or crash: a hung or dead worker is killed and replaced.

`concurrent.futures` cannot end a job that hangs. Here every worker is a fresh Python process (not a fork of one that
holds a device) that leads a process group of its own, talks over one socket pair and does one job at a time. A worker
ends when that socket closes, so none outlives its parent, however the parent ends. It never runs the parent's main
module, so a training script's imports cost it nothing.

Jobs go out as pickle and carry a number; answers come back as plain data (`rljax.tasks.channel`) with the number of
their job. A worker that sends anything else is replaced, and what it sent is never run.
"""

import contextlib
import errno
import faulthandler
import itertools
import json
import os
import pickle
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from rljax.tasks.channel import Channel, Garbled, read_data, write_data

DONE, RAISED, TIMEOUT, CRASHED = "done", "raised", "timeout", "crashed"

_KILLED = "killed"  # by a signal that only others send: told as CRASHED when it happens again
_STARTED = "started"
_GRACE_S = 2.0  # from the end of the parent to that of a busy worker
_BACKSTOP_S = 10.0  # beyond the timeout; for a worker whose parent is gone and whose job never lets go of the GIL
_MAX_FAILED_STARTS = 5
_FORK_PAUSE_S = 0.2  # until another try where the system gave no process
_LOADING = 0  # the number of the first message to a worker
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from {0} import {1}; {1}(int(sys.argv[1]))"


class WorkersFailed(RuntimeError):
    """No worker process starts any more, so that what needs one cannot go on."""


class _InWorker(Exception):
    """The cause of an error: the traceback of the worker process, as its text."""


def start_child(serve: str) -> tuple[subprocess.Popen, Channel]:
    """A fresh Python process that leads a process group of its own, and our end of the socket pair to it.

    `serve` names the `module:function` that it runs, with the descriptor of its end. The process never runs this one's
    main module. Raises OSError where the system gives none.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        code = _CHILD.format(*serve.split(":"))
        arguments = [sys.executable, "-c", code, str(theirs.fileno()), json.dumps(sys.path)]
        # results must not depend on the hash seed of a process, and no worker may take the accelerator
        env = {**os.environ, "PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"}
        try:
            process = subprocess.Popen(
                arguments, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True, env=env
            )
        except OSError:
            ours.close()
            raise
    return process, Channel(ours)


def told_start(error: OSError) -> str:
    """Why the system gave no process, and what may help."""
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return f"{error}: this user, machine or container has no room for more processes; free some, or use fewer"
    return str(error)


def last_line(text: str) -> str:
    """What a traceback ends with, in one line of bounded length."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def end_child(process: subprocess.Popen, channel: Channel) -> None:
    """End the process and all that it started."""
    channel.close()
    if process.returncode is None:  # not yet reaped, so its id still names its group
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def has_ended(process: subprocess.Popen) -> bool:
    """Whether it ended by itself; leaves it to `end_child` to reap it."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def end_if_forked(process: int) -> None:
    """Ends this process if it is not the one of that id: a child that a reward, an environment or a tool forked, and
    that came back from it by returning or raising, must neither answer in its parent's place nor go on as it."""
    if os.getpid() != process:
        os._exit(1)


class Job(NamedTuple):
    """Call `functions[function](argument)`, for at most `timeout_s` seconds. The argument is pickled; the result must
    be plain data, as `write_data` takes it."""

    function: int
    argument: Any
    timeout_s: float


class Reply(NamedTuple):
    """`kind` DONE with the result in `value`; or RAISED, TIMEOUT or CRASHED with an explanation in it."""

    kind: str
    value: Any


class _Worker:
    """A process and where it stands. `job` is the index of what it works on, `number` that of the message with it;
    `deadline` that of its start or job."""

    def __init__(self, payload: bytes, start_timeout_s: float):
        self.process, self.channel = start_child("rljax.tasks.workers:serve")
        self.is_ready = False
        self.job: int | None = None
        self.number = _LOADING
        self.deadline = time.monotonic() + start_timeout_s
        with contextlib.suppress(OSError):  # if it died at once, reading tells
            self.channel.send(payload, start_timeout_s)

    @property
    def is_idle(self) -> bool:
        """Whether it stands and has nothing to do."""
        return self.is_ready and self.job is None

    def kill(self) -> None:
        """End the process and all that it started."""
        end_child(self.process, self.channel)

    def has_ended(self) -> bool:
        """Whether it ended by itself; leaves it to `kill` to reap it."""
        return has_ended(self.process)


def _close(workers: list[_Worker]) -> None:
    idle = [worker for worker in workers if worker.is_idle]
    for worker in idle:
        worker.channel.close()  # it then ends by itself, running its exit handlers
    deadline = time.monotonic() + _GRACE_S
    while not all(worker.has_ended() for worker in idle) and time.monotonic() < deadline:
        time.sleep(0.01)

    for worker in workers:
        worker.kill()
    workers.clear()


class WorkerPool:
    """`size` processes that hold `functions`, which must be picklable: module-level functions, or objects of such.

    Use it as a context manager, or call `open` and `close`; nothing starts before. Not for several threads at once.
    A function's method `warm_up`, if it has one, is called in each worker before its first job.
    """

    def __init__(self, functions: Sequence[Callable[[Any], Any]], size: int, *, start_timeout_s: float = 60.0):
        if size < 1:
            raise ValueError(f"a pool of {size} workers can do nothing; give at least 1")
        self._size = size
        self._payload = pickle.dumps(list(functions))
        self._start_timeout_s = start_timeout_s
        self._failed_starts = 0
        # never the same twice: an answer that comes late must fit no later job
        self._numbers = itertools.count(_LOADING + 1)
        self._workers: list[_Worker] = []
        # also ends the workers of a pool that is dropped without being closed
        self._finalizer = weakref.finalize(self, _close, self._workers)

    def open(self) -> None:
        """Start all workers and wait until they stand. Does nothing if they do.

        Raises ValueError, in one line, if a worker does not start or a function does not load in it; WorkersFailed if
        one after another is killed meanwhile; RuntimeError if the pool was closed.
        """
        self._check_not_closed()
        if self._workers:
            return
        try:
            for _ in range(self._size):
                try:
                    self._workers.append(_Worker(self._payload, self._start_timeout_s))
                except OSError as error:
                    which = f"worker process {len(self._workers) + 1} of {self._size} does not start"
                    raise ValueError(f"{which}: {told_start(error)}") from error
            while not all(worker.is_ready for worker in self._workers):
                self._wait(first_start=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "WorkerPool":
        self.open()
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End all workers. The pool cannot be used again."""
        self._finalizer()

    def _check_not_closed(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this worker pool is closed; make a new one")

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers at this moment."""
        return [w.process.pid for w in self._workers]

    def run(self, jobs: Sequence[Job]) -> list[Reply]:
        """Do all jobs, several at a time; replies are in the order of the jobs.

        A job's time runs from when a worker takes it. One that exceeds it is killed (TIMEOUT), one whose worker dies
        is lost (CRASHED), and neither is tried again, but for one case: SIGKILL may have come from outside (a kernel
        short of memory, an operator), so a job is done once more behind it. Raises RuntimeError if the pool is not
        open, and WorkersFailed, which is one, if workers can no longer be started.
        """
        self._check_not_closed()
        if not self._workers:
            raise RuntimeError("this worker pool is not open; use it in a `with` block, or call open() first")

        waiting = deque(range(len(jobs)))
        replies: dict[int, Reply] = {}
        killed_before: set[int] = set()
        try:
            while len(replies) < len(jobs):
                for worker in list(self._workers):
                    if worker.is_idle:
                        self._assign(worker, waiting, jobs, replies)
                if len(replies) == len(jobs):
                    break

                # A job whose worker was killed goes to the front, once: it has waited longest.
                for index, reply in self._wait():
                    if reply.kind != _KILLED:
                        replies[index] = reply
                    elif index in killed_before:
                        replies[index] = Reply(CRASHED, reply.value)
                    else:
                        killed_before.add(index)
                        waiting.appendleft(index)
        except BaseException:  # such as Ctrl-C: no worker may hold a job of this call in the next one
            for worker in [w for w in self._workers if w.job is not None]:
                self._replace(worker)
            raise
        return [replies[i] for i in range(len(jobs))]

    def _assign(self, worker: _Worker, waiting: deque[int], jobs: Sequence[Job], replies: dict[int, Reply]) -> None:
        """Give the worker the first waiting job that can be sent."""
        while waiting and worker.job is None:
            index = waiting.popleft()
            try:
                number = next(self._numbers)
                message = pickle.dumps((number, *jobs[index]))
            except Exception:  # whatever a value's own pickling raises
                replies[index] = Reply(RAISED, traceback.format_exc())
                continue

            # it died while idle, or what ran in it before left something behind: not this job's fault
            is_sound = not worker.channel.has_input()
            try:
                if is_sound:
                    worker.channel.send(message, jobs[index].timeout_s)
            except OSError:
                is_sound = False
            if not is_sound:
                waiting.appendleft(index)
                self._replace(worker)
                return
            worker.job = index
            worker.number = number
            worker.deadline = time.monotonic() + jobs[index].timeout_s

    def _wait(self, first_start: bool = False) -> list[tuple[int, Reply]]:
        """Sleep until something happens; replies of the jobs that ended by it."""
        active = [worker for worker in self._workers if not worker.is_idle]
        timeout = max(0.0, min(worker.deadline for worker in active) - time.monotonic())
        heard = set(wait([worker.channel.fileno() for worker in active], timeout))
        now = time.monotonic()

        # an answer counts even if it came late: it is there
        ended = []
        for worker in active:
            reply = self._hear(worker) if worker.channel.fileno() in heard else None
            if reply is None and now >= worker.deadline:
                reply = Reply(TIMEOUT, "")
            if reply is None:
                continue

            job = worker.job
            if not worker.is_ready:
                self._after_start(worker, reply, first_start)
                continue
            if reply.kind in (TIMEOUT, CRASHED, _KILLED):
                self._replace(worker)
            worker.job = None
            assert job is not None
            ended.append((job, reply))
        return ended

    def _hear(self, worker: _Worker) -> Reply | None:
        """What the worker says, if all of it is there."""
        try:
            message = worker.channel.take()
            if message is None:
                return None
            number, kind, value = read_data(message)
            if number != worker.number:
                raise Garbled(f"it answers the message {number!r:.20}, not {worker.number}")
            if kind not in (RAISED, DONE if worker.is_ready else _STARTED):
                raise Garbled(f"it is of the kind {kind!r:.20}")
            return Reply(kind, value)
        except (EOFError, OSError):
            worker.kill()
            code = worker.process.returncode
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return Reply(_KILLED if code == -signal.SIGKILL else CRASHED, f"the worker process {how}")
        except (Garbled, ValueError) as error:
            return Reply(CRASHED, f"the worker process sent what is no answer ({error})")

    def _after_start(self, worker: _Worker, reply: Reply, first_start: bool) -> None:
        if reply.kind == _STARTED:
            worker.is_ready = True
            self._failed_starts = 0
            return

        reason = str(reply.value).strip() or f"no answer in {self._start_timeout_s} s"
        if first_start and reply.kind != _KILLED:
            raise ValueError(
                f"a worker process cannot load its functions ({last_line(reason)}); "
                "they must come from modules that import on their own"
            ) from _InWorker(reason)
        self._count_failed_start(last_line(reason), _InWorker(reason))
        self._replace(worker)

    def _count_failed_start(self, reason: str, cause: Exception) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise WorkersFailed(
                f"{_MAX_FAILED_STARTS} worker processes in a row did not start; the last: {reason}"
            ) from cause

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        place = self._workers.index(worker)
        while True:
            try:
                self._workers[place] = _Worker(self._payload, self._start_timeout_s)
                return
            except OSError as error:
                self._count_failed_start(told_start(error), error)
            time.sleep(_FORK_PAUSE_S)


def serve(descriptor: int) -> None:
    """The life of a worker process: load the functions, then do jobs until the socket closes."""
    os.set_inheritable(descriptor, False)
    worker = os.getpid()
    channel = Channel(socket.socket(fileno=descriptor), most_bytes=None)

    # a thread reads, so that the end of the parent is noticed during a job
    inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    try:
        threading.Thread(target=_receive, args=(channel, inbox), daemon=True).start()
    except RuntimeError as error:  # the system gives no thread
        with contextlib.suppress(OSError):
            channel.send(write_data(_LOADING, RAISED, f"{error}: there may be no more processes and threads"))
        return

    null = open(os.devnull, "w")  # noqa: SIM115  for the life of the process
    functions: list[Callable[[Any], Any]] | None = None
    for message in iter(inbox.get, None):
        number = _LOADING
        try:
            if functions is None:
                # the first message brings the functions, and what they load must not count to the time of a job
                functions = pickle.loads(message)
                for function in functions:
                    getattr(function, "warm_up", lambda: None)()
                answer = write_data(number, _STARTED, None)
            else:
                number, *fields = pickle.loads(message)
                job = Job(*fields)
                faulthandler.dump_traceback_later(job.timeout_s + _BACKSTOP_S, exit=True, file=null)

                random.seed(0)  # which worker did what before must not show in the result
                answer = write_data(number, DONE, functions[job.function](job.argument))
        except BaseException:
            # also SystemExit and KeyboardInterrupt: a function costs its own job and never the worker
            answer = write_data(number, RAISED, traceback.format_exc())
        finally:
            # a copy that a function forked must not come back here and answer too
            end_if_forked(worker)
            faulthandler.cancel_dump_traceback_later()

        try:
            channel.send(answer)
        except OSError:  # the parent is gone
            return


def _receive(channel: Channel, inbox: "queue.SimpleQueue[bytes | None]") -> None:
    try:
        while True:
            inbox.put(channel.receive())
    except (EOFError, OSError):
        inbox.put(None)
    time.sleep(_GRACE_S)
    if os.getpgrp() == os.getpid():  # the group is the worker's own, so nobody else's processes end with it
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
