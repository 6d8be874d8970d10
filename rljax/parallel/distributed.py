"""Several processes as one program: start-up, and the few collectives that host code needs.

Every helper is a no-op, or the identity, in a single process.
"""

import contextlib
import hashlib
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rljax.parallel.exchange import exchange, tell_failure

T = TypeVar("T")

COORDINATOR, PROCESSES, PROCESS_ID = "RLJAX_COORDINATOR", "RLJAX_NUM_PROCESSES", "RLJAX_PROCESS_ID"
"""Environment variables that stand in for the arguments of `initialize_distributed`."""

_LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""In which launchers say how many processes they have started."""

HEARTBEAT_S = 100
"""Seconds of silence of a process after which JAX ends the others, unless told otherwise."""


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    auto: bool = False,
    heartbeat_s: int = HEARTBEAT_S,
) -> bool:
    """Joins the processes of a run; call it before anything else touches a device. Returns whether there are several.

    The first three arguments (or the environment variables above) belong together: `host:port` of process 0, the
    number of processes and this one's index. Without them, a multi-host TPU, Slurm or Open MPI job is recognised by its
    environment and left to JAX's own detection; `auto` asks for that detection in any case (say, on Kubernetes).
    Otherwise the run has one process. Calling it again does nothing.

    A process that Slurm or Open MPI has started alone on its machine has all devices there. Of several on a machine,
    each has the one of its index; `JAX_LOCAL_DEVICE_IDS` says otherwise.

    A process that is silent for `heartbeat_s` seconds (its machine has died, say) ends all others. One that hangs and
    is not dead is not silent. ValueError for incomplete or impossible arguments.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1

    if heartbeat_s < 1:
        raise ValueError(f"heartbeat_s={heartbeat_s} must be at least 1 second; {HEARTBEAT_S} is usual")

    # Arguments go before the environment.
    coordinator = coordinator or os.environ.get(COORDINATOR)
    num_processes = _env_int(PROCESSES) if num_processes is None else num_processes
    process_id = _env_int(PROCESS_ID) if process_id is None else process_id

    settings: dict[str, Any] = {
        "heartbeat_timeout_seconds": heartbeat_s,
        "local_device_ids": _local_devices(os.environ),
    }
    # Nothing is said: the cluster is asked, if there is one.
    if coordinator is None and num_processes is None and process_id is None:
        if not (auto or on_cluster(os.environ)):
            return False
        try:
            jax.distributed.initialize(**settings)
        except ValueError as error:
            raise ValueError(
                "JAX recognises no cluster in this environment; give coordinator, num_processes and process_id"
            ) from error
        return jax.process_count() > 1

    if coordinator is None or num_processes is None or process_id is None:
        given = {COORDINATOR: coordinator, PROCESSES: num_processes, PROCESS_ID: process_id}
        missing = ", ".join(name for name, value in given.items() if value is None)
        raise ValueError(f"a run of several processes needs {missing} too; give all three or none")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id={process_id} must lie in 0..{num_processes - 1} ({num_processes=})")
    if ":" not in coordinator:
        raise ValueError(f"coordinator={coordinator!r} must be host:port of process 0")

    # One process needs no coordinator: the same launch script serves a laptop.
    if num_processes == 1:
        return False
    jax.distributed.initialize(coordinator, num_processes, process_id, **settings)
    return True


def _local_devices(environ: Mapping[str, str]) -> tuple[()] | None:
    """Which devices of this machine JAX is told to take: none in particular, which is all, for the only process here.
    Under Slurm and Open MPI JAX takes one device a process by itself, which None leaves to it."""
    if environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    tasks = environ.get("SLURM_STEP_NUM_TASKS")
    alone_by_slurm = tasks is not None and tasks == environ.get("SLURM_STEP_NUM_NODES")
    return () if alone_by_slurm or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" else None


def _env_int(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise ValueError(f"{name}={text!r} must be a whole number")
    return int(text)


def on_cluster(environ: Mapping[str, str]) -> bool:
    """Whether the environment belongs to a job of several processes that JAX can join by itself."""
    workers = [host for host in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    counts = [environ.get(name, "1") for name in (*_LAUNCHED, "MEGASCALE_NUM_SLICES")]
    return len(workers) > 1 or any(count.isdigit() and int(count) > 1 for count in counts)


def require_one_process(what: str) -> None:
    """ValueError where this is one of several processes, or a launcher has started it as one: each would do the same
    work, and write over the others' files."""
    counts = {name: os.environ.get(name, "1") for name in (PROCESSES, *_LAUNCHED)}
    started = [f"{name}={count}" for name, count in counts.items() if count.isdigit() and int(count) > 1]
    if started or jax.distributed.is_initialized():
        where = started[0] if started else f"{jax.process_count()} processes"
        raise ValueError(f"{what} runs on one process, and this is one of several ({where}); start it once")


def is_main_process() -> bool:
    """True in process 0, which writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here. `name` must be the same in all, and tells in an error where they parted."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """The `value` of every process, by process index, in every process. Picklable host objects of any size; each
    process holds all of them. No device takes part. Errors as in `exchange`.

    All processes come here in the same order, thread by thread: threads that call it have the same names in all.
    """
    if jax.process_count() == 1:
        return [value]
    return [pickle.loads(data) for data in exchange(_name(), pickle.dumps(value))]


def _name() -> str:
    """Of the exchanges of the calling thread."""
    return f"host {threading.current_thread().name}"


def on_main(function: Callable[[], T]) -> T:
    """What `function` gives in the main process, in every process; it runs in that one alone. Picklable.

    For whatever may come out differently the second time: a judge, a clock, a file. What it raises is raised in every
    process, in the others as a ValueError or RuntimeError with the same text.
    """
    if jax.process_count() == 1:
        return function()

    answer = b""
    mine: Exception | None = None
    if is_main_process():
        # The others wait for an answer, whatever it is; a value that cannot be pickled is none.
        try:
            answer = pickle.dumps((function(), None))
        except Exception as error:
            mine = error
            theirs = RuntimeError(f"process 0 failed with {type(error).__name__}: {error}")
            answer = pickle.dumps((None, ValueError(str(error)) if isinstance(error, ValueError) else theirs))

    # Only the main process has anything to send.
    value, failure = pickle.loads(exchange(_name(), answer)[0])
    if mine is not None:
        raise mine
    if failure is not None:
        raise failure
    return value


def check_equal(**values: Any) -> None:
    """Raises RuntimeError in every process, naming the first value that differs, unless all have the same. Picklable;
    arrays are compared bit for bit.

    Processes that compute with other shapes or numbers wait for each other for ever, or mix what does not belong
    together.
    """
    if jax.process_count() == 1:
        return
    digests = gather({name: hashlib.sha256(pickle.dumps(value)).hexdigest() for name, value in values.items()})
    for name in values:
        found = [digest.get(name) for digest in digests]
        if len(set(found)) > 1:
            apart = next(index for index, digest in enumerate(found) if digest != found[0])
            raise RuntimeError(
                f"the processes of this run disagree: {name} of process {apart} differs from that of process 0; all "
                "must run the same code on the same config, data and model"
            )


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """On several processes, an exception inside ends this process at once, with its text and status 1 (2 for a
    ValueError). `SystemExit` passes: it is raised by all.

    The others may wait for it, and it would wait for them in its exit handlers. It tells them before it goes, which
    those hear that wait on the host; those that wait in a program are ended by JAX's coordination service, within its
    heartbeat timeout at the latest.
    """
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        tell_failure(f"{type(error).__name__}: {error}")
        if isinstance(error, ValueError) and not os.environ.get("RLJAX_TRACEBACK"):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, ValueError) else 1)


def to_host(tree: Any) -> Any:
    """Device arrays as whole numpy arrays in every process, also when their shards lie in others."""

    def fetch(value):
        if isinstance(value, jax.Array) and not value.is_fully_addressable and not value.is_fully_replicated:
            value = multihost_utils.process_allgather(value, tiled=True)
        return np.asarray(value)

    return jax.tree.map(fetch, tree)
