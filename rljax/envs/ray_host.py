"""Environments on the machines of a Ray cluster: an actor there keeps a worker process and passes requests on to it.

The process behind the actor is that of `rljax.envs.host`, so an environment can do there what it can do here, and gets
the same answers. An actor runs nothing but this module: if it is lost, that is no environment's doing, and its requests
are made again at another one. Ray itself is imported only once a cluster is asked for.
"""

import importlib.util
import logging
import math
import os
import pickle
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rljax.envs.host import (
    CRASHED,
    Act,
    Answer,
    Close,
    Request,
    Worker,
    packed,
    read_answer,
    seconds_for,
    write_answer,
)
from rljax.tasks.channel import Garbled
from rljax.tasks.workers import last_line

_LOCAL = "local"
_STORE_BYTES = 80 * 2**20  # of a cluster that is started here: messages are small, and Ray takes no less than 75 MiB
_NETWORK_S = 30.0  # that a request may be on its way beyond its own time
_PROBE_S = 10.0  # for a machine to take a connection
_MOST_LOST = 3  # actors that one request may lose
_GRACE_S = 5.0  # for requests under way to return when the connection is closed


@dataclass
class RayConfig:
    """Where environments live if `hosts` is "ray". Raises ValueError, in `check`, for values that can never work."""

    address: str = ""
    """The cluster: `host:port`, `ray://host:port` or `auto`. Empty takes the variable `RAY_ADDRESS`; where that is not
    set, Ray is started on this machine alone, to try a config: it is no cluster of several machines."""
    cpus: float = 1.0
    """CPUs of the cluster that a worker holds; of a fraction, several workers share one. Lower it for environments that
    mostly wait."""
    resources: dict[str, float] = field(default_factory=dict)
    """Other resources that a worker holds, by name, as the machines of the cluster declare them."""
    modules: tuple[str, ...] = ()
    """Top-level modules or packages that are sent to the cluster beside rljax and that of the environment's factory.
    Name those of your own that they import; what comes from a package index must be installed there."""
    start_s: float = 300.0
    """Seconds in which the cluster must find room for workers. Raise it where machines are added on demand."""

    def check(self) -> None:
        if not 0 <= self.cpus < math.inf:
            raise ValueError(f"RayConfig: cpus={self.cpus} must be at least 0")
        for name, amount in self.resources.items():
            if not 0 < amount < math.inf:
                raise ValueError(f"RayConfig: resources={self.resources}: that of {name!r} must be above 0")
        if not 0 < self.start_s < math.inf:
            raise ValueError(f"RayConfig: start_s={self.start_s} must be a positive number of seconds")
        for name in self.modules:
            if _source_of(name) is None:
                raise ValueError(
                    f"RayConfig: modules={self.modules}: {name!r} is no top-level module or package of Python source "
                    "that can be imported here"
                )


def require_ray() -> None:
    """Raises ValueError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError("hosts='ray' needs Ray: pip install 'rljax-lm[ray]'; or take hosts='processes'")


class Cluster:
    """Makes workers on a Ray cluster. `payload` is the pickled `make`.

    The connection is one for a process: the first pool that asks for it opens it, and the last that closes ends it. One
    that is there already, as in a process which Ray itself placed, is used as it is and left open.
    """

    def __init__(self, config: RayConfig, make: Callable[[], Any], payload: bytes, start_timeout_s: float):
        require_ray()
        config.check()
        self.config = config
        self.start_timeout_s = start_timeout_s
        self._make = make
        self._payload = payload
        self._environment: dict[str, Any] = {}
        self._is_open = False

    def start(self, count: int) -> "list[RayWorker]":
        """So many workers. Raises ValueError, in one line, if the cluster cannot be reached or has no room, or makes no
        environments there."""
        if not self._is_open:
            self._environment = _connect(self.config, self._make, count)
            self._is_open = True

        return [RayWorker(self, actor) for actor in self._new_actors(count)]

    def replace(self) -> Any:
        """An actor in place of one that was lost. Raises ValueError as `start`."""
        return self._new_actors(1)[0]

    def close(self) -> None:
        """Leave the cluster, once no worker is used any more."""
        if self._is_open:
            self._is_open = False
            _disconnect()

    def _new_actors(self, count: int) -> list[Any]:
        """Actors that have started. One that is lost meanwhile is replaced, a few times."""
        actors = {place: self._new_actor() for place in range(count)}
        waited_for = dict(actors)
        try:
            for _ in range(_MOST_LOST):
                lost = self._wait_for(waited_for)
                if not lost:
                    return [actors[place] for place in range(count)]
                waited_for = {place: self._new_actor() for place in lost}
                actors |= waited_for
            raise ValueError(
                f"a Ray actor did not start ({next(iter(lost.values()))}); what the environment imports must be "
                "installed on the machines of the cluster, or be named in config.actor.ray.modules if it is your own"
            )
        except BaseException:
            for actor in actors.values():
                _end(actor)
            raise

    def _new_actor(self) -> Any:
        import ray

        # no restarts of Ray's own: what lived in an actor comes back by replay, which its lane sees to
        return (
            ray.remote(_Relay)
            .options(
                num_cpus=self.config.cpus,
                resources=self.config.resources or None,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy="SPREAD",
                **self._environment,
            )
            .remote(self._payload, self.start_timeout_s)
        )

    def _wait_for(self, actors: Mapping[int, Any]) -> dict[int, str]:
        """Starts them. Which of them were lost before they had started, and why. Raises ValueError where others would
        fare alike."""
        import ray

        begun = [actor.start.remote() for actor in actors.values()]
        _, missing = ray.wait(begun, num_returns=len(begun), timeout=self.config.start_s)
        if missing:
            has = ray.cluster_resources()
            each = {"CPU": self.config.cpus, **self.config.resources}
            told = ", ".join(f"{amount:g} {name} each, of {has.get(name, 0):g}" for name, amount in each.items())
            raise ValueError(
                f"{len(missing)} of {len(begun)} workers found no room on the Ray cluster in {self.config.start_s:g} s "
                f"(they hold {told}); lower config.actor.workers or config.actor.ray.cpus, or add machines"
            )
        lost = {}
        for place, one in zip(actors, begun, strict=True):
            try:
                problem = ray.get(one)
            except ray.exceptions.RayError as error:
                lost[place] = _last_line(error)
                continue
            if problem:
                raise ValueError(problem)
        return lost


class RayWorker:
    """A `Worker` behind a Ray actor. If the actor is lost, by a kill or with its machine, another takes its place, and
    the request that was under way is made again there: its episode comes back by replay."""

    def __init__(self, cluster: Cluster, actor: Any):
        self._cluster = cluster
        self._lock = threading.Lock()
        self._is_over = False
        self._closing: Any = None
        self.actor = actor

    def serve(self, episode: int, request: Request, step_s: float) -> Answer:
        """As `Worker.serve`; CRASHED too if one actor after another is lost."""
        message = packed(episode, request, step_s)
        if isinstance(message, Answer):
            return message

        # as long as the process may take, if it has to be started and the episode to be played again
        longest = seconds_for(request, step_s) + 2 * self._cluster.start_timeout_s + _NETWORK_S
        longest += seconds_for(request.past, step_s) if isinstance(request, Act) else 0.0

        begin = time.monotonic()
        why = ""
        for _ in range(_MOST_LOST):
            try:
                with _in_use():
                    return read_answer(self._ask(message, longest), 0, request)
            except _Lost as error:
                why = str(error)
            except Garbled as error:
                why = f"it sent what is no answer ({error})"

            problem = "" if isinstance(request, Close) and self._is_over else self._replace()
            if self._is_over or isinstance(request, Close):  # what was to be closed is gone with it
                break
            if problem:
                return Answer(None, CRASHED, f"the Ray actor was lost ({why}), and {problem}", time.monotonic() - begin)
        reason = None if isinstance(request, Close) else CRASHED
        says = f"{_MOST_LOST} Ray actors were lost one after another; the last: {why}"
        return Answer(None, reason, says if reason else "", time.monotonic() - begin)

    def _ask(self, message: bytes, timeout_s: float) -> bytes:
        import ray

        try:
            return ray.get(self.actor.serve.remote(message), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise _Lost(f"no answer in {timeout_s:g} s") from None
        except ray.exceptions.RayError as error:
            raise _Lost(_last_line(error)) from None

    def _replace(self) -> str:
        """Another actor; why there is none, if there is none."""
        _end(self.actor)
        if self._is_over:
            return ""
        try:
            with _in_use():
                actor = self._cluster.replace()
        except ValueError as error:
            return f"no new worker started: {error}"
        with self._lock:
            self.actor = actor
            if self._is_over:  # it was ended in between
                _end(actor)
        return ""

    def let_go(self) -> None:
        """Tell the process that nothing more comes: it closes its environments and ends by itself."""
        with suppress(Exception):  # whatever Ray says of an actor that is lost
            self._closing = self.actor.close.remote()

    def has_ended(self) -> bool:
        """Whether it did."""
        import ray

        if self._closing is None:
            return True
        done, _ = ray.wait([self._closing], timeout=0)
        return bool(done)

    def kill(self) -> None:
        """End the actor and its process; no other takes its place."""
        with self._lock:
            self._is_over = True
            _end(self.actor)


class _Lost(Exception):
    """An actor that answers no more."""


class _Relay:
    """The Ray actor."""

    def __init__(self, payload: bytes, start_timeout_s: float):
        self._payload = payload
        self._start_timeout_s = start_timeout_s
        self._worker: Worker | None = None

    def start(self) -> str:
        """Starts the process; why it makes no environments, if it does not."""
        try:
            self._worker = Worker(self._payload, self._start_timeout_s)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    def serve(self, message: bytes) -> bytes:
        assert self._worker is not None
        episode, request, step_s = pickle.loads(message)
        return write_answer(0, self._worker.serve(episode, request, step_s))

    def close(self) -> None:
        """Returns once the process has ended."""
        assert self._worker is not None
        self._worker.let_go()
        while not self._worker.has_ended():
            time.sleep(0.01)


_lock = threading.Lock()
_users = 0
"""Open clusters of this process."""
_opened: str | None = None
"""The address of the connection if it was opened here."""
_calls = 0
"""Threads that wait for Ray."""


@contextmanager
def _in_use() -> Iterator[None]:
    """While a thread waits for Ray. Ray does not bear being shut down under it."""
    global _calls
    with _lock:
        _calls += 1
    try:
        yield
    finally:
        with _lock:
            _calls -= 1


def _connect(config: RayConfig, make: Callable[[], Any], count: int) -> dict[str, Any]:
    """Joins the cluster; the options of actors in it. Raises ValueError, in one line, if that fails."""
    import ray

    global _users, _opened
    address = config.address or os.environ.get("RAY_ADDRESS", "") or _LOCAL
    with _lock:
        if not ray.is_initialized():
            _open(address, config, make, count)
            _opened = address
        elif _opened is not None and address != _opened:
            raise ValueError(
                f"config.actor.ray.address={address!r}: this process is connected to {_opened!r}, and Ray knows one "
                "cluster a process; close the other pool first"
            )
        elif _opened is None and config.address not in ("", "auto", ray.get_runtime_context().gcs_address):
            raise ValueError(
                f"config.actor.ray.address={config.address!r}: this process is connected to the cluster at "
                f"{ray.get_runtime_context().gcs_address} already; leave the address empty to use it"
            )
        _users += 1

    # the same modules are found on this machine where they are found here
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    return {"runtime_env": {"env_vars": {"PYTHONPATH": path}}} if _opened == _LOCAL else {}


def _open(address: str, config: RayConfig, make: Callable[[], Any], count: int) -> None:
    import ray

    options: dict[str, Any] = {"address": address, "logging_level": logging.WARNING}
    if address == _LOCAL:
        # nothing of it is told to anybody
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {
            "num_cpus": max(1, math.ceil(count * config.cpus)),
            "resources": {name: count * amount for name, amount in config.resources.items()},
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        sent = ["rljax", *_own_module(make), *config.modules]
        paths = [path for name in dict.fromkeys(sent) if (path := _source_of(name))]
        options["runtime_env"] = {"py_modules": paths, "excludes": ["**/__pycache__/"]}

    with _signals_kept():
        try:
            _probe(address)
            ray.init(**options)
        except (Exception, SystemExit) as error:  # whatever Ray raises
            raise ValueError(
                f"config.actor.ray.address={config.address!r}: the Ray cluster {address!r} cannot be joined "
                f"({_last_line(error)}); check that it runs, with the same versions of Ray and Python, "
                "and that this process has its token (RAY_AUTH_MODE, RAY_AUTH_TOKEN), if it asks for one"
            ) from None


def _probe(address: str) -> None:
    """Raises OSError if nobody listens at `host:port`, of which Ray makes sure for more than five minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()


def _disconnect() -> None:
    import ray

    global _users, _opened
    with _lock:
        _users -= 1
        if _users or _opened is None:
            return
        _opened = None

    # those that wait for actors which were ended come back at once
    deadline = time.monotonic() + _GRACE_S
    while _calls and time.monotonic() < deadline:
        time.sleep(0.01)
    with _signals_kept():
        ray.shutdown()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, by which a run is asked to save and end."""
    if threading.current_thread() is not threading.main_thread():  # there it takes nothing
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _end(actor: Any) -> None:
    import ray

    with suppress(Exception):  # one that is lost already, or the connection is
        ray.kill(actor)


def _last_line(error: BaseException) -> str:
    return last_line(str(error)) or type(error).__name__


def _own_module(make: Any) -> list[str]:
    """The top-level module of a factory, if it is none that packages install."""
    while hasattr(make, "func"):  # functools.partial
        make = make.func
    module = getattr(make, "__module__", None) or type(make).__module__
    name = module.partition(".")[0]
    spec = importlib.util.find_spec(name)
    origin = spec.origin if spec else None
    installed = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    if origin in (None, "built-in", "frozen") or any(Path(str(origin)).is_relative_to(path) for path in installed):
        return []
    return [name]


def _source_of(name: str) -> str | None:
    """The folder or file of a top-level module; None if there is none that can be sent."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is not None and spec.submodule_search_locations:
        return str(next(iter(spec.submodule_search_locations)))
    if spec is not None and spec.origin and spec.origin.endswith(".py"):
        return spec.origin
    return None
