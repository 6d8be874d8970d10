"""Hundreds of episodes at once, in threads or worker processes; what an environment does wrong ends its own episode."""

import contextlib
import copy
import itertools
import pickle
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from rljax.envs.base import (
    CRASHED,
    DONE,
    RAISED,
    SECONDS,
    TIMEOUT,
    TOOL_CALLS,
    TURNS,
    Environment,
    EnvironmentLimits,
    Prompt,
    Step,
)
from rljax.envs.formats import load
from rljax.envs.host import Act, Answer, Close, Host, HostProcess, Past, Request, Start
from rljax.envs.tools import cut


@runtime_checkable
class Encoder(Protocol):
    """What the pool asks of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


_LIMITS = EnvironmentLimits()


@dataclass(eq=False)
class Episode:
    """One run of an environment, as far as it got. The pool changes it while a call is under way, and only then.

    `end` is one of `END_REASONS` once the episode is over; `error` says more where the environment failed.
    """

    id: int
    row: Mapping[str, Any]
    opening: Prompt = ""
    actions: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    end: str | None = None
    error: str = ""
    seconds: float = 0.0
    parent: int | None = None
    _uncut: list[Step] = field(default_factory=list, repr=False)  # what a replay must come to

    @property
    def reward(self) -> float:
        """Sum of the rewards so far."""
        return float(sum(step.reward for step in self.steps))

    @property
    def counts(self) -> dict[str, float]:
        """Sums of the steps' counts."""
        names = dict.fromkeys(name for step in self.steps for name in step.counts)
        return {name: sum(step.counts.get(name, 0.0) for step in self.steps) for name in names}


@dataclass(eq=False)
class _Job:
    episode: Episode
    request: Request
    timeout_s: float
    future: Future
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class _Lane:
    """A thread that serves jobs, in a process where there is one. `job` and `deadline` say what it is at."""

    inbox: "queue.SimpleQueue[_Job | None]"
    process: HostProcess | None = None
    known: set[int] = field(default_factory=set)  # episodes that live in the process
    episodes: int = 0
    job: _Job | None = None
    deadline: float = 0.0
    is_abandoned: bool = False


class EnvironmentPool:
    """Runs episodes; every call returns a future of the `Episode`, and no future ever raises.

    `make` builds a fresh environment for an episode: a callable, or its name `module:function`. With `processes`, the
    environments live in `workers` processes (then `make` must be importable there), else in `workers` threads of this
    one. An environment that hangs in a thread is left behind with it and a new thread takes over, which helps only if
    it lets go of the interpreter; in a process it is killed, and what else lived there is brought back by replay.

    Observations are cut to the limits, by tokens too if there is a `tokenizer`. `failures` counts ends by reason.
    A context manager. Raises ValueError if `make` cannot be loaded in a worker.
    """

    def __init__(
        self,
        make: Callable[[], Environment] | str,
        *,
        workers: int = 64,
        processes: bool = False,
        limits: EnvironmentLimits = _LIMITS,
        tokenizer: Encoder | None = None,
        start_timeout_s: float = 60.0,
    ):
        if workers < 1:
            raise ValueError(f"an environment pool of {workers} workers can do nothing; give at least 1")
        self._make: Callable[[], Environment] = load(make) if isinstance(make, str) else make
        if not callable(self._make):
            raise ValueError(
                f"environment factory {make!r} cannot be called; give a function that makes an environment"
            )
        self.limits, self._tokenizer, self._start_timeout_s = limits, tokenizer, start_timeout_s
        self.failures: Counter[str] = Counter()
        self._payload = _pickled(self._make) if processes else None
        self._host = None if processes else Host(self._make)
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._where: dict[int, _Lane] = {}  # processes: where an episode lives
        self._lanes: list[_Lane] = []
        self._finalizer = weakref.finalize(self, _close, self._lanes)
        shared: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        try:
            for _ in range(workers):
                process = HostProcess(self._payload, start_timeout_s) if self._payload is not None else None
                self._lanes.append(_Lane(queue.SimpleQueue() if processes else shared, process))
        except BaseException:
            self.close()
            raise
        for lane in self._lanes:
            self._run_lane(lane)
        if not processes:
            threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True, name="environment watch").start()

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers. The pool cannot be used again."""
        self._finalizer()

    def start(self, row: Mapping[str, Any]) -> "Future[Episode]":
        """Open an episode on a row of data."""
        episode = Episode(next(self._ids), row)
        return self._submit(episode, Start(copy.deepcopy(dict(row))), self.limits.step_s)

    def step(self, episode: Episode, action: str) -> "Future[Episode]":
        """Take the policy's turn. Raises ValueError if the episode is over."""
        if episode.end is not None:
            raise ValueError(f"episode {episode.id} has ended ({episode.end}); it takes no further action")
        past = Past(episode.row, episode.opening, tuple(episode.actions), tuple(episode._uncut))
        return self._submit(episode, Act(action, past), self.limits.step_s)

    def fork(self, episode: Episode, turn: int) -> "Future[Episode]":
        """A new episode that stands where `episode` stood after its first `turn` turns.

        By snapshot if the environment has them, else by replaying the actions, which must lead to the same
        observations. Raises ValueError for a turn that the episode has not taken, or after which it was over.
        """
        if not 0 <= turn <= len(episode.steps) or (turn and episode.steps[turn - 1].done):
            raise ValueError(
                f"episode {episode.id} cannot be forked after turn {turn}; it has taken {len(episode.steps)} turns, "
                "and nothing follows the one that ends it"
            )
        actions, steps = episode.actions[:turn], episode.steps[:turn]
        new = Episode(next(self._ids), episode.row, episode.opening, actions, steps, parent=episode.id)
        new._uncut = episode._uncut[:turn]
        past = Past(new.row, new.opening, tuple(actions), tuple(new._uncut), episode.id)
        return self._submit(new, past, self.limits.step_s * (turn + 1), near=episode)

    def release(self, episode: Episode) -> None:
        """Forget an episode that needs no further steps or forks."""
        with self._lock:
            lane = self._where.pop(episode.id, None)
            if lane is not None:
                lane.episodes -= 1
        if self._host is not None:
            self._host.serve(episode.id, Close())
        elif lane is not None:
            lane.inbox.put(_Job(episode, Close(), self.limits.step_s, Future()))

    def _submit(
        self, episode: Episode, request: Request, timeout_s: float, near: Episode | None = None
    ) -> "Future[Episode]":
        if not self._finalizer.alive:
            raise RuntimeError("this environment pool is closed; make a new one")
        job = _Job(episode, request, timeout_s, Future())
        with self._lock:
            lane = self._where.get(episode.id) or self._where.get(near.id if near else -1)
            lane = lane or min(self._lanes, key=lambda lane: lane.episodes)
            if episode.id not in self._where:
                self._where[episode.id] = lane
                lane.episodes += 1
        lane.inbox.put(job)
        return job.future

    def _run_lane(self, lane: _Lane) -> None:
        threading.Thread(target=_serve, args=(weakref.ref(self), lane), daemon=True, name="environment").start()

    def _serve_job(self, lane: _Lane, job: _Job) -> None:
        if self._host is not None:
            lane.deadline = time.monotonic() + job.timeout_s
            lane.job = job
            answer = self._host.serve(job.episode.id, job.request)
            lane.job = None
        else:
            answer = self._serve_in_process(lane, job)
        self._deliver(job, answer)

    def _serve_in_process(self, lane: _Lane, job: _Job) -> Answer:
        assert lane.process is not None and self._payload is not None
        timeout_s = job.timeout_s
        if isinstance(job.request, Act) and job.episode.id not in lane.known:  # all of it is played again
            timeout_s += self.limits.step_s * (1 + len(job.request.past.actions))
        lane.known.add(job.episode.id)
        answer = lane.process.serve(job.episode.id, job.request, timeout_s)
        if lane.process.process.returncode is not None and self._finalizer.alive:
            lane.known.clear()
            try:
                lane.process = HostProcess(self._payload, self._start_timeout_s)
            except (ValueError, OSError) as error:  # the next job tries again
                answer = Answer(None, answer.reason or CRASHED, f"{answer.error}; and no new worker started: {error}")
        return answer

    def _give_up(self, lane: _Lane, job: _Job) -> None:
        """A thread hangs: leave it, and put another in its place."""
        lane.is_abandoned = True
        fresh = _Lane(lane.inbox)
        with self._lock:
            self._lanes[self._lanes.index(lane)] = fresh
        self._run_lane(fresh)
        self._deliver(job, Answer(None, TIMEOUT, f"it took longer than {job.timeout_s:g} s", job.timeout_s))

    def _deliver(self, job: _Job, answer: Answer) -> None:
        """Write down what came of a job, once."""
        with self._lock:
            if job.done.is_set():
                return
            job.done.set()
            episode, request = job.episode, job.request
            episode.seconds += answer.seconds
            if answer.reason is not None:
                episode.end, episode.error = answer.reason, answer.error
            elif isinstance(request, Start):
                episode.opening = answer.value
            elif isinstance(request, Act):
                step = self._cut(answer.value)
                episode.actions.append(request.action)
                episode.steps.append(step)
                episode._uncut.append(answer.value)
                episode.end = self._end(episode)
            if episode.end is not None and not isinstance(request, Close):
                self.failures[episode.end] += episode.end != DONE
        job.future.set_result(episode)

    def _end(self, episode: Episode) -> str | None:
        if episode.steps[-1].done:
            return DONE
        limits = self.limits
        if len(episode.steps) >= limits.turns:
            return TURNS
        if episode.counts.get("tool_calls", 0.0) >= limits.tool_calls:
            return TOOL_CALLS
        return SECONDS if episode.seconds > limits.episode_s else None

    def _cut(self, step: Step) -> Step:
        text = cut(step.observation, self.limits.observation_chars)
        if self._tokenizer is not None:
            ids, most = self._tokenizer.encode(text), self.limits.observation_tokens
            if len(ids) > most:
                head, tail = ids[: most - most // 4], ids[len(ids) - most // 4 :] if most >= 4 else []
                note = f"\n[{len(ids) - most} tokens left out]\n"
                text = self._tokenizer.decode(head) + note + (self._tokenizer.decode(tail) if tail else "")
        return Step(text, step.reward, step.done, step.counts)


def _pickled(make: Any) -> bytes:
    try:
        if getattr(make, "__module__", None) == "__main__":
            raise ValueError("it is defined in the main script, which worker processes do not run")
        return pickle.dumps(make)
    except Exception as error:
        raise ValueError(
            f"environment factory {make!r} cannot be sent to a worker process ({error}); define it at the top level "
            "of a module, or use threads (processes=False)"
        ) from None


def _serve(pool_ref: "weakref.ref[EnvironmentPool]", lane: _Lane) -> None:
    """The life of a lane's thread; holds no reference to the pool while it waits."""
    while not lane.is_abandoned:
        job = lane.inbox.get()
        pool = pool_ref()
        if job is None or pool is None:
            return
        try:
            pool._serve_job(lane, job)
        except Exception as error:  # a fault of ours must not leave anybody waiting
            if not job.future.done():
                job.done.set()
                job.episode.end, job.episode.error = RAISED, f"{type(error).__name__}: {error}"
                job.future.set_result(job.episode)
        del pool, job


def _watch(pool_ref: "weakref.ref[EnvironmentPool]") -> None:
    """Ends what hangs in a thread."""
    while (pool := pool_ref()) is not None and pool._finalizer.alive:
        now = time.monotonic()
        for lane in list(pool._lanes):
            job = lane.job
            if job is not None and now > lane.deadline and not lane.is_abandoned:
                pool._give_up(lane, job)
        del pool
        time.sleep(0.02)


def _close(lanes: list[_Lane]) -> None:
    for lane in lanes:
        waiting: list[_Job | None] = [lane.job] if lane.job is not None else []
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.append(lane.inbox.get_nowait())
        for job in waiting:
            if job is not None and not job.done.is_set():
                job.done.set()
                job.episode.end, job.episode.error = CRASHED, "the pool was closed"
                job.future.set_result(job.episode)
    for lane in lanes:
        lane.inbox.put(None)
    for lane in lanes:
        if lane.process is not None:
            lane.process.kill()
    lanes.clear()
