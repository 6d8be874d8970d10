"""The trainer's side of the sandbox: chooses a level, keeps sandboxes ready, runs programs in them."""

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rljax.envs.sandbox.groups import MemoryGroup, make_groups, remove_groups
from rljax.envs.sandbox.server import KILL, MEMORY_ERROR, READY, RUN, SCRATCH

LEVELS = ("namespaces", "landlock", "seccomp", "rlimits")
"""Levels of isolation, strongest first. The first two are chosen by themselves, the others only when asked for."""

OUTCOMES = ("ok", "error", "timeout", "cpu", "memory", "processes", "output", "signal", "lost")
"""How a program ended: well, with an exception or exit code, over a limit, by a signal; or its sandbox was lost."""

_STOPS = {
    "namespaces": (
        "stops: any network (there is none, and no socket can be made, nor a pair of them); seeing or writing any file "
        "but the interpreter and system libraries (read-only) and a scratch folder in memory that vanishes; watching "
        "or holding up what others open; seeing or signalling any process but its own; outliving the run, in any "
        "number of processes; the environment, /proc, /sys, devices; gaining privileges; more CPU, memory, processes, "
        "output, files or time than the limits"
    ),
    "landlock": (
        "stops: any socket, pairs too; opening any file but the interpreter and system libraries (read-only) and a "
        "scratch folder; watching or holding up what others open; starting or signalling processes, so nothing "
        "outlives the run; the environment; more CPU, memory, output or time than the limits"
    ),
    "seccomp": (
        "stops: any socket, pairs too; starting or signalling processes, so nothing outlives the run; the environment; "
        "changing modes or owners of files; more CPU, memory, output or time than the limits"
    ),
    "rlimits": "stops: more CPU or output or time than the limits, and on Linux more memory; the environment",
}
_LETS = {
    "namespaces": (
        "does not stop: a fault of the kernel itself; reading what the interpreter's own folder or /usr hold; timing "
        "side channels; slowing other work within its CPU and memory limits, beside which there are the scratch "
        "folder, 64 KB for each pipe and the kernel's notes on processes, descriptors and locks of files"
    ),
    "landlock": (
        "does not stop: a fault of the kernel itself; asking whether a file exists, its size and dates; filling the "
        "disk of the scratch folder, file after file, until the run ends; threads up to the memory limit"
    ),
    "seccomp": (
        "does not stop: READING AND WRITING EVERY FILE that the user may, /proc of the user's processes among them; "
        "filling the disk"
    ),
    "rlimits": (
        "does not stop: THE NETWORK; READING AND WRITING EVERY FILE that the user may; signalling the user's "
        "processes; away from Linux also processes that leave their session. Not for code that nobody has read"
    ),
}


@dataclass(frozen=True)
class Limits:
    """What one program may take."""

    wall_s: float = 5.0
    """Seconds on the wall."""
    cpu_s: float = 5.0
    """Seconds of CPU time, of each process."""
    memory_mb: int = 512
    """MB for each process, and for all together."""
    processes: int = 16
    """Processes and threads at a time."""
    output_bytes: int = 32_768
    """Bytes of standard output and error together."""
    scratch_mb: int = 32
    """MB of the scratch folder."""
    open_files: int = 64
    """Files open at a time, in each process."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < 2**31:
                raise ValueError(f"sandbox limit {name} is {value}; it must be positive (and below 2**31)")


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended, and what it printed."""

    outcome: str
    """One of `OUTCOMES`."""
    output: str
    """Standard output and error, in the order they came."""
    exit_code: int | None
    """128 + n for signal n; None if the sandbox was lost."""
    wall_s: float
    """Seconds that it ran."""
    cpu_s: float
    """Its seconds of CPU time, without those of processes that were killed."""
    start_s: float
    """Seconds until a sandbox stood ready for it."""
    is_truncated: bool = False
    """Whether output was left out."""


_GRACE_S = 10.0  # from the order to end a program to the report of its end
_LOOK_S = 0.1  # between looks at whether the kernel has ended one of its processes for want of memory


class _Unready(Exception):
    """A sandbox did not come up."""


class _Worker:
    """Our ends of one sandbox that is used once: control socket, job pipe, output pipe, and its control group if it is
    to have one."""

    def __init__(self, server: socket.socket, scratch: str, group: MemoryGroup | None, limits: Limits):
        self.scratch = scratch
        self.group = group
        self.limits = limits
        # packets: a message of the control socket is never read in parts
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        job, self.job = os.pipe()
        self.output, output = os.pipe()
        os.set_blocking(self.output, False)
        self.is_ready = False

        try:
            joins = [] if group is None else [group.joins]
            socket.send_fds(server, [b"+" + scratch.encode()], [theirs.fileno(), job, output, *joins])
        except OSError as error:
            self.close()
            raise _Unready(f"the sandbox server is gone ({error})") from None
        finally:
            theirs.close()
            os.close(job)
            os.close(output)

    def wait_ready(self, timeout_s: float) -> None:
        if self.is_ready:
            return
        poller = select.poll()
        poller.register(self.output, select.POLLIN)
        if not poller.poll(timeout_s * 1000):
            raise _Unready(f"no sandbox came up in {timeout_s} s")

        # what comes in place of the sign is an explanation
        first = os.read(self.output, 1)
        if first != READY:
            with contextlib.suppress(OSError):
                first += os.read(self.output, 4096)
            raise _Unready(first.decode("utf-8", "replace") or "the sandbox ended while it was set up")
        self.is_ready = True

        # Files of the scratch folder are memory too, beside that of the processes.
        if self.group is not None and not self.group.bound((self.limits.memory_mb + self.limits.scratch_mb) * 2**20):
            self.group.close()
            self.group = None

    def execute(self, job: dict[str, object], wall_s: float, start_s: float) -> SandboxResult:
        limits = self.limits
        begin = time.monotonic()
        with contextlib.suppress(OSError):  # if it died just now, the report says so
            self.control.send(RUN)
            with open(self.job, "wb", closefd=True) as file:
                self.job = -1
                file.write(json.dumps(job).encode())

        deadline = begin + wall_s
        verdict: str | None = None  # of ours: why we ended it
        report: dict | None = None  # of the guard: how it ended
        chunks: list[bytes] = []
        size = 0
        is_open = True  # the output
        poller = select.poll()
        poller.register(self.control, select.POLLIN)
        poller.register(self.output, select.POLLIN)
        while report is None:
            left = deadline - time.monotonic()
            if left <= 0:
                # once told to end it, the guard has some time for its report
                if verdict is not None and left < -_GRACE_S:
                    break
                if verdict is None:
                    verdict = "timeout"
                    self._kill()
                left = _GRACE_S
            elif verdict is None and self.group is not None:
                # The kernel may end one process alone; the rest of the program goes with it.
                if self.group.was_full():
                    verdict = "memory"
                    deadline = time.monotonic()
                    self._kill()
                left = min(left, _LOOK_S)
            ready = {descriptor for descriptor, _ in poller.poll(1000 * left)}
            if self.control.fileno() in ready:
                report = self._report()

            # after the report what is left in the pipe is all that there will be
            if (report is not None or self.output in ready) and is_open:
                while is_open and (chunk := _read(self.output)) is not None:
                    is_open = bool(chunk)
                    chunks.append(chunk[: max(0, limits.output_bytes - size)])
                    size += len(chunk)
                    if size > limits.output_bytes and verdict is None:
                        verdict = "output"
                        deadline = time.monotonic()
                        self._kill()
                        break
                    if time.monotonic() > deadline + _GRACE_S:
                        break
                if not is_open:
                    poller.unregister(self.output)

        report = report or {}
        # It may have ended, by itself or for its time, between two looks.
        if verdict in (None, "timeout") and self.group is not None and self.group.was_full():
            verdict = "memory"
        return SandboxResult(
            outcome=verdict or _outcome(report, limits),
            output=b"".join(chunks).decode("utf-8", "replace"),
            exit_code=report.get("code"),
            wall_s=time.monotonic() - begin,
            cpu_s=report.get("cpu_s", 0.0),
            start_s=start_s,
            is_truncated=size > limits.output_bytes,
        )

    def _kill(self) -> None:
        with contextlib.suppress(OSError):
            self.control.send(KILL)

    def _report(self) -> dict:
        try:
            return json.loads(self.control.recv(4096) or b"{}")
        except (OSError, ValueError):
            return {}

    def close(self) -> None:
        """The guard ends the sandbox when this closes, if it still stands."""
        self.control.close()
        for descriptor in (self.job, self.output):
            if descriptor >= 0:
                os.close(descriptor)
        self.job = self.output = -1
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)
        if self.group is not None:
            self.group.close()


def _read(descriptor: int) -> bytes | None:
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return None


def _outcome(report: dict, limits: Limits) -> str:
    code = report.get("code")
    if code is None or report.get("reason") == "killed":
        return "lost"
    if report.get("reason"):
        return report["reason"]
    if code == MEMORY_ERROR:
        return "memory"
    # SIGXCPU at the soft limit, SIGKILL at the hard one
    if code == 128 + 24 or (code == 128 + 9 and report.get("cpu_s", 0.0) >= limits.cpu_s):
        return "cpu"
    return "ok" if code == 0 else "signal" if code > 128 else "error"


class _Server:
    """The server process at one level, and the sandboxes that stand ready in it."""

    def __init__(self, level: str, limits: Limits, preload: Sequence[str], start_timeout_s: float):
        self.level = level
        self.limits = limits
        # Where memory is bounded in control groups, and why it is not.
        self.groups: Path | None = None
        self.no_groups = ""
        self._made = 0
        try:
            self.groups = make_groups()
        except OSError as error:
            self.no_groups = str(error)
        self.folder = Path(tempfile.mkdtemp(prefix="rljax-sandbox-"))
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        config = {
            "descriptor": theirs.fileno(),
            "level": level,
            "folder": str(self.folder),
            "readable": readable_paths(),
            "preload": list(preload),
            **asdict(limits),
        }

        # one thread each: programs of a reinforcement learner run beside each other, not over many cores
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        threads |= {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}  # some interpreters need it
        env = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": SCRATCH, "PYTHONHASHSEED": "0", **threads}
        script = str(Path(__file__).with_name("server.py"))
        # -E and -s instead of -I: the hash seed above must count
        arguments = [sys.executable, "-s", "-P", "-B", script, json.dumps(config)]
        self.process = subprocess.Popen(
            arguments,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=env,
            cwd="/",
        )
        theirs.close()

        self.ready: deque[_Worker] = deque()
        self.socket.settimeout(start_timeout_s)
        try:
            answer = self.socket.recv(4096)
        except OSError as error:
            answer = str(error).encode()
        self.socket.settimeout(None)
        if answer != READY:
            self.close()
            raise _Unready(answer.decode("utf-8", "replace") or "the sandbox server ended while it started")

    def spawn(self) -> _Worker:
        scratch = "" if self.level == "namespaces" else tempfile.mkdtemp(dir=self.folder)
        group = None
        if self.groups is not None:
            self._made += 1
            # Without one the guard counts alone, as it does where there are none.
            with contextlib.suppress(OSError):
                group = MemoryGroup(self.groups, self._made)
        return _Worker(self.socket, scratch, group, self.limits)

    def take(self, spare: int) -> _Worker:
        """The oldest sandbox, `spare` others left ready. Raises _Unready if the server is gone, or going: its sockets
        close well before the kernel has taken its namespaces down and the process can be waited for."""
        if self.process.poll() is not None:
            raise _Unready(f"the sandbox server ended with exit code {self.process.returncode}")
        while len(self.ready) <= spare:
            self.ready.append(self.spawn())
        return self.ready.popleft()

    def close(self) -> None:
        while self.ready:
            self.ready.pop().close()
        self.socket.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.groups is not None:
            remove_groups(self.groups)


def readable_paths() -> list[str]:
    """What a program may read: the interpreter, its packages and the system's libraries. None lies within another."""
    python = os.path.realpath(sys.executable)
    own = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.path.dirname(python))]
    system = ["/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/localtime"]
    found: list[str] = []
    for path in [*system, *own, *map(os.path.realpath, own)]:
        path = os.path.abspath(path)
        covered = any(path == other or (path + "/").startswith(other + "/") for other in found)
        if path != "/" and os.path.lexists(path) and not covered:
            found.append(path)
    return found


class Sandbox:
    """Runs Python programs that nobody has read. Safe for many threads at once.

    Use it as a context manager, or call `open` and `close`: no server starts before. `workers` programs run at a time,
    and as many sandboxes stand ready; each serves once, so nothing passes from one program to the next. `level` None
    takes the stronger of "namespaces" and "landlock" that works here. `preload` names modules that the server imports
    once, for programs to import at no cost; all packages of this interpreter can be imported anyway. A sandbox or
    server that dies is replaced.

    Raises ValueError for no workers, or a level that is not one of `LEVELS`.
    """

    def __init__(
        self,
        limits: Limits = Limits(),
        *,
        workers: int = 4,
        level: str | None = None,
        preload: Sequence[str] = (
            "collections",
            "datetime",
            "fractions",
            "heapq",
            "itertools",
            "math",
            "re",
            "statistics",
        ),
        start_timeout_s: float = 30.0,
    ):
        if workers < 1:
            raise ValueError(f"a sandbox of {workers} workers can run nothing; give at least 1")
        if level is not None and level not in LEVELS:
            raise ValueError(f"sandbox level {level!r} is not one of {', '.join(LEVELS)}")
        self.limits = limits
        self.level = level or ""  # chosen by `open` where none was asked for
        self.refused: dict[str, str] = {}  # the levels that `open` tried in vain, and why
        self._workers = workers
        self._preload = tuple(preload)
        self._start_timeout_s = start_timeout_s
        self._slots = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()
        self._servers: list[_Server] = []  # one, once it is open
        # also ends the server of a sandbox that is dropped without being closed
        self._finalizer = weakref.finalize(self, _close, self._servers)

    def open(self) -> None:
        """Start the server, and prove it on a program. Does nothing if it stands.

        Raises ValueError if the level does not work here, saying why, or, without a level, if only weaker ones may;
        RuntimeError if the sandbox was closed.
        """
        with self._lock:
            self._check_not_closed()
            if self._servers:
                return
            for candidate in (self.level,) if self.level else LEVELS[:2]:
                try:
                    self._start(candidate)
                    self.level = candidate
                    return
                except (_Unready, OSError) as error:
                    self.refused[candidate] = str(error)

        self.close()
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
        remedy = (
            "choose another level"
            if self.level
            else "allow user namespaces or use Linux 5.13 or newer, or take level='seccomp' or 'rlimits' after reading "
            "what they do not stop"
        )
        raise ValueError(f"no sandbox works here ({reasons}); {remedy}")

    def _start(self, level: str) -> None:
        """A server at this level that has proved itself on a program."""
        server = _Server(level, self.limits, self._preload, self._start_timeout_s)
        try:
            # not from `take`: those that stand ready are spawned once the first one has worked
            worker = server.spawn()
            try:
                worker.wait_ready(self._start_timeout_s)
                result = worker.execute({"code": "print(6*7)", "stdin": "", "echo": False}, 30.0, 0.0)
            finally:
                worker.close()
            if result.output != "42\n" or result.outcome != "ok":
                raise _Unready(f"a first program ended with {result.outcome}: {result.output}")

            server.ready.extend(server.spawn() for _ in range(self._workers))
        except BaseException:
            server.close()
            raise
        self._servers[:] = [server]

    def __enter__(self) -> "Sandbox":
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all sandboxes, those that run a program too. The sandbox cannot be used again."""
        self._finalizer()

    def _check_not_closed(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this sandbox is closed; make a new one")

    @property
    def _server(self) -> _Server:
        self._check_not_closed()
        if not self._servers:
            raise RuntimeError("this sandbox is not open; use it in a `with` block, or call open() first")
        return self._servers[0]

    @property
    def server_pid(self) -> int:
        """Process id of the server, which all sandboxes are children of."""
        return self._server.process.pid

    @property
    def folder(self) -> str:
        """An empty folder of the server; its name stands on the command line of all its processes."""
        return str(self._server.folder)

    @property
    def groups(self) -> Path | None:
        """The control group above those of all programs; None where this user may make none."""
        return self._server.groups

    @property
    def num_ready(self) -> int:
        """Sandboxes that stand, or come up, for programs to come."""
        return len(self._server.ready)

    def describe(self) -> str:
        """What this level stops and what it does not, for a person."""
        lines = [f"sandbox level: {self.level}", _STOPS[self.level], _LETS[self.level]]
        lines += [f"not available here: {name} ({reason})" for name, reason in self.refused.items()]
        limits = ", ".join(f"{name} {value:g}" for name, value in asdict(self.limits).items())
        for server in self._servers:
            by = "the kernel, in a control group for each program"
            if server.groups is None:
                by = f"a guard that counts it, as there is no control group ({server.no_groups})"
            lines.append(f"memory of all processes together is bounded by {by}")
        return "\n".join([*lines, f"limits: {limits}"])

    def run(self, code: str, *, stdin: str = "", timeout_s: float | None = None, echo: bool = False) -> SandboxResult:
        """Run one program; never raises for what it does. `timeout_s` replaces `wall_s`; with `echo` the value of a
        last line that is an expression is printed, as in a notebook. Raises RuntimeError unless it is open."""
        wall_s = self.limits.wall_s if timeout_s is None else timeout_s
        job = {"code": code, "stdin": stdin, "echo": echo}
        begin = time.monotonic()

        with self._slots:
            try:
                worker = self._take()
            except (_Unready, OSError) as error:
                return SandboxResult("lost", str(error), None, 0.0, 0.0, time.monotonic() - begin)
            try:
                return worker.execute(job, wall_s, time.monotonic() - begin)
            finally:
                worker.close()

    def _take(self) -> _Worker:
        """A sandbox that stands; another is ordered in its place."""
        for attempt in range(3):
            with self._lock:
                server = self._server
                try:
                    worker = server.take(self._workers)
                except _Unready:
                    server.close()
                    self._start(self.level)
                    worker = self._server.take(self._workers)

            # outside of the lock: one that comes up slowly holds up nobody else
            try:
                worker.wait_ready(self._start_timeout_s)
                return worker
            except _Unready:
                worker.close()
                if attempt == 2:
                    raise
        raise AssertionError


def _close(servers: list[_Server]) -> None:
    while servers:
        servers.pop().close()
