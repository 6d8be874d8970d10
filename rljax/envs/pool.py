"""Hundreds of episodes at once, in threads, in worker processes or on a cluster; what an environment does wrong ends
its own episode."""

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
from rljax.envs.host import Act, Answer, Close, Host, Past, Request, Start, Worker, seconds_for
from rljax.envs.ray_host import Cluster, RayConfig, RayWorker
from rljax.envs.tools import cut

THREADS = "threads"
PROCESSES = "processes"
RAY = "ray"
HOSTS = (THREADS, PROCESSES, RAY)
"""Where environments may live."""

CLOSE = "close"
"""Key of `EnvironmentPool.failures`: an environment failed to close."""

_GRACE_S = 2.0  # for environments to close when the pool does
_MOST_HUNG = 4  # hung threads for each of the pool's own; beyond, a call fails at once


@runtime_checkable
class Encoder(Protocol):
    """What the pool asks of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(eq=False)
class Episode:
    """One run of an environment, as far as it got. The pool changes it while a call is under way, and only then."""

    id: int
    row: Mapping[str, Any]
    """The data row that it was opened on."""
    opening: Prompt = ""
    """What `reset` returned."""
    actions: list[str] = field(default_factory=list)
    """The policy's turns, as text."""
    steps: list[Step] = field(default_factory=list)
    """What each action led to, observations cut to the limits."""
    end: str | None = None
    """One of `END_REASONS` once the episode is over."""
    error: str = ""
    """More about the end where the environment failed."""
    seconds: float = 0.0
    """Time in the environment so far."""
    parent: int | None = None
    """The episode that this one was forked from."""
    is_open: bool = False
    """Whether the opening is there."""
    _uncut: list[Step] = field(default_factory=list, repr=False)  # what a replay must come to
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def reward(self) -> float:
        """Sum of the rewards so far."""
        return float(sum(step.reward for step in self.steps))

    @property
    def counts(self) -> dict[str, float]:
        """Sums of the steps' counts."""
        names = dict.fromkeys(name for step in self.steps for name in step.counts)
        return {name: sum(step.counts.get(name, 0.0) for step in self.steps) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """What `EnvironmentPool.restore` brings the episode back from: JSON, if the row and the opening are.

        Observations are those that the environment gave, uncut, since a replay must come to them. A call that is under
        way is not part of it: it is taken again after `restore`.
        """
        with self._lock:
            return {
                "row": dict(self.row),
                "opening": self.opening if self.is_open else None,
                "actions": list(self.actions),
                "steps": [
                    {
                        "observation": step.observation,
                        "reward": step.reward,
                        "done": step.done,
                        "counts": dict(step.counts),
                    }
                    for step in self._uncut
                ],
                "end": self.end,
                "error": self.error,
                "seconds": self.seconds,
            }


@dataclass(eq=False)
class _Job:
    episode: Episode
    request: Request
    timeout_s: float
    future: Future
    _claimed: threading.Lock = field(default_factory=threading.Lock)

    def claim(self) -> bool:
        """Whether the caller is the first to answer, and so the one that does: a thread that was given up may still
        come back, and the pool may close."""
        return self._claimed.acquire(blocking=False)


@dataclass(eq=False)
class _Lane:
    """A thread that serves jobs, by its worker where it has one."""

    inbox: "queue.SimpleQueue[_Job | None]"
    worker: Worker | RayWorker | None = None
    episodes: int = 0
    """How many episodes have this lane as theirs."""
    job: _Job | None = None
    """What a thread is at."""
    deadline: float = 0.0
    """When that has taken too long, on the monotonic clock."""
    is_abandoned: bool = False
    """Whether the thread hangs; another lane has its place."""


class EnvironmentPool:
    """Runs episodes; every call returns a future of the `Episode`, and no future ever raises.

    `make` builds a fresh environment for an episode: a callable, or its name `module:function`. `hosts` says where the
    environments live: in `workers` "threads" of this process, in so many "processes" of this machine, or in processes
    on the machines of a cluster, "ray" (see `RayConfig`); for the last two `make` must be importable there. An
    environment that hangs in a thread is left behind with it and a new thread takes over, which helps only if it lets
    go of the interpreter; in a process it is killed, and what else lived there is brought back by replay, as is what
    lived on a machine that is lost.

    Use it as a context manager, or call `open` and `close`: no thread or process starts, and no environment is made,
    before. Observations are cut to the limits, by tokens too if there is a `tokenizer`. `failures` counts ends by
    reason since the start, and as `close` the environments that failed to close. Raises ValueError for a factory that
    cannot be called, or not be sent to a process.
    """

    def __init__(
        self,
        make: Callable[[], Environment] | str,
        *,
        workers: int = 64,
        hosts: str = THREADS,
        ray: RayConfig | None = None,
        limits: EnvironmentLimits | None = None,
        tokenizer: Encoder | None = None,
        start_timeout_s: float = 60.0,
    ):
        check_hosts(hosts)
        if workers < 1:
            raise ValueError(f"an environment pool of {workers} workers can do nothing; give at least 1")
        self._make: Callable[[], Environment] = load(make) if isinstance(make, str) else make
        if not callable(self._make):
            raise ValueError(
                f"environment factory {make!r} cannot be called; give a function that makes an environment"
            )
        self.limits = EnvironmentLimits() if limits is None else limits
        self.limits.check()
        self.failures: Counter[str] = Counter()

        self._workers = workers
        self._tokenizer = tokenizer
        self._start_timeout_s = start_timeout_s
        # exactly one of the two is there: what is sent to processes, or the environments of this one
        self._payload = None if hosts == THREADS else _pickled(self._make)
        self._host = Host(self._make) if hosts == THREADS else None
        self._cluster: Cluster | None = None
        if hosts == RAY:
            assert self._payload is not None
            self._cluster = Cluster(ray or RayConfig(), self._make, self._payload, start_timeout_s)

        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._where: dict[int, _Lane] = {}  # processes: where an episode lives
        self._lanes: list[_Lane] = []  # none until the pool is open
        self._hung = 0  # threads that were given up and have not come back
        # also ends the workers of a pool that is dropped without being closed
        self._finalizer = weakref.finalize(self, _close, self._lanes, self._host, self._cluster)

    def open(self) -> None:
        """Start the workers. Does nothing if they stand.

        Makes one environment, in each process where there are processes. Raises ValueError if that fails, `make`
        cannot be loaded in a worker process, or the cluster has no room; RuntimeError if the pool was closed.
        """
        self._check_not_closed()
        if self._lanes:
            return
        try:
            self._start_lanes()
        except BaseException:
            self.close()
            raise

        for lane in self._lanes:
            self._run_lane(lane)
        if self._host is not None:
            threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True, name="environment watch").start()

    def _start_lanes(self) -> None:
        if self._cluster is not None:
            self._lanes += [_Lane(queue.SimpleQueue(), worker) for worker in self._cluster.start(self._workers)]
            return
        if self._payload is not None:
            for _ in range(self._workers):
                self._lanes.append(_Lane(queue.SimpleQueue(), Worker(self._payload, self._start_timeout_s)))
            return

        assert self._host is not None
        self._host.check()
        # any thread may serve any episode
        shared: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lanes += [_Lane(shared) for _ in range(self._workers)]

    def __enter__(self) -> "EnvironmentPool":
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers. The pool cannot be used again."""
        self._finalizer()

    def _check_not_closed(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this environment pool is closed; make a new one")

    def start(self, row: Mapping[str, Any]) -> "Future[Episode]":
        """Open an episode on a row of data."""
        episode = Episode(next(self._ids), row)
        return self._submit(episode, Start(copy.deepcopy(dict(row))))

    def step(self, episode: Episode, action: str) -> "Future[Episode]":
        """Take the policy's turn. Raises ValueError if the episode is over."""
        if episode.end is not None:
            raise ValueError(f"episode {episode.id} has ended ({episode.end}); it takes no further action")
        past = Past(episode.row, episode.opening, tuple(episode.actions), tuple(episode._uncut))
        return self._submit(episode, Act(action, past))

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

        # its seconds begin at 0: the time of its first turns belongs to the parent
        new = Episode(
            next(self._ids),
            episode.row,
            episode.opening,
            actions=episode.actions[:turn],
            steps=episode.steps[:turn],
            parent=episode.id,
            is_open=True,
            _uncut=episode._uncut[:turn],
        )
        past = Past(new.row, new.opening, tuple(new.actions), tuple(new._uncut), parent=episode.id)
        return self._submit(new, past, near=episode)

    def restore(self, state: Mapping[str, Any], row: Mapping[str, Any] | None = None) -> "Future[Episode]":
        """The episode that `Episode.state_dict` was taken of, in this pool.

        By replaying the actions, which must lead to the same observations, or the episode ends as `replay`. One that
        had ended is not played again, and one whose opening had not come is opened. `row` replaces the row of the
        state, for rows that JSON cannot hold.
        """
        row = dict(state["row"] if row is None else row)
        if state["opening"] is None and state["end"] is None:
            return self.start(row)

        # cut anew, so that the policy reads what it read as long as the limits are the same
        uncut = [Step(**step) for step in state["steps"]]
        episode = Episode(
            next(self._ids),
            row,
            state["opening"] or "",
            actions=list(state["actions"]),
            steps=[self._cut(step) for step in uncut],
            end=state["end"],
            error=state["error"],
            seconds=state["seconds"],
            is_open=state["opening"] is not None,
            _uncut=uncut,
        )
        if episode.end is not None:
            self._check_open()
            future: Future[Episode] = Future()
            future.set_result(episode)
            return future

        past = Past(row, episode.opening, tuple(episode.actions), tuple(uncut))
        return self._submit(episode, past)

    def release(self, episode: Episode) -> None:
        """Forget an episode that needs no further steps or forks."""
        with self._lock:
            lane = self._where.pop(episode.id, None)
            if lane is not None:
                lane.episodes -= 1
        # threads: dropped at once; only what has to be closed, which may take its time, is left to a lane
        if lane is not None and (self._host is None or self._host.forget(episode.id)):
            lane.inbox.put(_Job(episode, Close(), self.limits.step_s, Future()))

    def _check_open(self) -> None:
        self._check_not_closed()
        if not self._lanes:
            raise RuntimeError("this environment pool is not open; use it in a `with` block, or call open() first")

    def _submit(self, episode: Episode, request: Request, near: Episode | None = None) -> "Future[Episode]":
        """Hands a request to the lane where its episode lives; a new one goes to that of `near`, whose snapshots it
        may need, or else to the lane with fewest episodes."""
        self._check_open()
        job = _Job(episode, request, seconds_for(request, self.limits.step_s), Future())
        with self._lock:
            lane = self._where.get(episode.id)
            if lane is None and near is not None:
                lane = self._where.get(near.id)
            if lane is None:
                lane = min(self._lanes, key=lambda lane: lane.episodes)
            if episode.id not in self._where:
                self._where[episode.id] = lane
                lane.episodes += 1
        lane.inbox.put(job)
        return job.future

    def _run_lane(self, lane: _Lane) -> None:
        threading.Thread(target=_serve, args=(weakref.ref(self), lane), daemon=True, name="environment").start()

    def _serve_job(self, lane: _Lane, job: _Job) -> None:
        lane.deadline = time.monotonic() + job.timeout_s
        lane.job = job
        if lane.worker is not None:
            answer = lane.worker.serve(job.episode.id, job.request, self.limits.step_s)
        elif self._hung >= _MOST_HUNG * self._workers:
            problem = f"{self._hung} threads hang in environments; take hosts='processes', or give them timeouts"
            answer = Answer(None, TIMEOUT, problem)
        else:
            assert self._host is not None
            answer = self._host.serve(job.episode.id, job.request)
        with self._lock:
            lane.job = None
            if lane.is_abandoned:  # too late; another lane has its place
                self._hung -= 1
        self._deliver(job, answer)

    def _give_up(self, lane: _Lane, job: _Job) -> None:
        """A thread hangs: leave it, and put another in its place."""
        fresh = _Lane(lane.inbox)
        with self._lock:
            # it may have come back in this very moment
            if lane.job is not job:
                return
            lane.is_abandoned = True
            self._hung += 1
            self._lanes[self._lanes.index(lane)] = fresh
        self._run_lane(fresh)
        self._deliver(job, Answer(None, TIMEOUT, f"it took longer than {job.timeout_s:g} s", job.timeout_s))

    def _deliver(self, job: _Job, answer: Answer) -> None:
        """Write down what came of a job."""
        episode = job.episode
        request = job.request
        # before the job is claimed: the tokenizer may raise, and then somebody else must answer
        step = self._cut(answer.value) if isinstance(request, Act) and answer.reason is None else None
        if not job.claim():
            return

        if isinstance(request, Close):
            # its episode is over, whatever became of the environment
            with self._lock:
                self.failures[CLOSE] += answer.reason is not None
            job.future.set_result(episode)
            return

        with self._lock, episode._lock:
            # a restored episode has its time from before
            is_restored = isinstance(request, Past) and request.parent is None
            episode.seconds += 0.0 if is_restored else answer.seconds
            if answer.reason is not None:
                episode.end = answer.reason
                episode.error = answer.error
            elif isinstance(request, Start):
                episode.opening = answer.value
                episode.is_open = True
            elif isinstance(request, Act) and step is not None:
                episode.actions.append(request.action)
                episode.steps.append(step)
                episode._uncut.append(answer.value)
                episode.end = self._end(episode)
            if episode.end is not None:
                self.failures[episode.end] += episode.end != DONE
        job.future.set_result(episode)

    def _end(self, episode: Episode) -> str | None:
        """Why the episode is over after its last step, if it is."""
        limits = self.limits
        if episode.steps[-1].done:
            return DONE
        if len(episode.steps) >= limits.turns:
            return TURNS
        if episode.counts.get("tool_calls", 0.0) >= limits.tool_calls:
            return TOOL_CALLS
        return SECONDS if episode.seconds > limits.episode_s else None

    def _cut(self, step: Step) -> Step:
        """The step with the observation that the policy reads: three quarters from its beginning, a quarter from its
        end, where it is too long."""
        text = cut(step.observation, self.limits.observation_chars)
        if self._tokenizer is not None:
            most = self.limits.observation_tokens
            ids = self._tokenizer.encode(text)
            if len(ids) > most:
                tail = most // 4
                head = self._tokenizer.decode(ids[: most - tail])
                note = f"\n[{len(ids) - most} tokens left out]\n"
                text = head + note + (self._tokenizer.decode(ids[len(ids) - tail :]) if tail else "")
        return Step(text, step.reward, step.done, step.counts)


def check_hosts(hosts: str) -> None:
    """Raises ValueError for none of `HOSTS`."""
    if hosts not in HOSTS:
        raise ValueError(f"hosts={hosts!r} must be one of {', '.join(map(repr, HOSTS))}")


def _pickled(make: Any) -> bytes:
    try:
        if getattr(make, "__module__", None) == "__main__":
            raise ValueError("it is defined in the main script, which worker processes do not run")
        return pickle.dumps(make)
    except Exception as error:
        raise ValueError(
            f"environment factory {make!r} cannot be sent to a worker process ({error}); define it at the top level "
            "of a module, or use hosts='threads'"
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
            _fail(job, RAISED, f"{type(error).__name__}: {error}")
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


def _fail(job: _Job, reason: str, error: str) -> None:
    """Ends the episode of a job that nobody serves any more."""
    if not job.claim():
        return
    with job.episode._lock:
        job.episode.end = reason
        job.episode.error = error
    job.future.set_result(job.episode)


def _close(lanes: list[_Lane], host: Host | None, cluster: Cluster | None) -> None:
    idle = [lane.worker for lane in lanes if lane.worker is not None and lane.job is None]
    for lane in lanes:
        waiting: list[_Job | None] = [lane.job]
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.append(lane.inbox.get_nowait())
        for job in waiting:
            if job is not None:
                _fail(job, CRASHED, "the pool was closed")

    # every thread gets its own end, whether it shares the queue or not
    for lane in lanes:
        lane.inbox.put(None)
    _close_environments(idle, host)
    for lane in lanes:
        if lane.worker is not None:
            lane.worker.kill()
    lanes.clear()
    if cluster is not None:
        cluster.close()


def _close_environments(idle: Sequence[Worker | RayWorker], host: Host | None) -> None:
    """Those that nobody is at; one that hangs in `close` is left behind."""
    deadline = time.monotonic() + _GRACE_S
    if host is not None:
        closing = threading.Thread(target=_close_host, args=(host,), daemon=True, name="environment close")
        closing.start()
        closing.join(_GRACE_S)
    for worker in idle:
        worker.let_go()
    while not all(worker.has_ended() for worker in idle) and time.monotonic() < deadline:
        time.sleep(0.01)


def _close_host(host: Host) -> None:
    with contextlib.suppress(Exception, SystemExit):
        host.close()
