"""The sandbox server: a small process that forks sandboxes. Run as a script by `rljax.envs.sandbox`.

    trainer -- server -- guard (one a sandbox) -- init (process 1 of its namespace) -- the program

The server never sees the trainer's memory or environment: it is a fresh interpreter. Every guard waits for its
sandbox, ends it when the trainer says so or goes away, and reports how it ended. Every sandbox serves once.
"""

import ast
import contextlib
import gc
import importlib
import importlib.util
import io
import json
import linecache
import os
import random
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import types

MEMORY_ERROR = 86  # exit code of a program that ended with MemoryError
READY = b"\x01"
RUN = b"r"
KILL = b"k"
SCRATCH = "/scratch"
PROGRAM = "<program>"
_WATCH_MS = 50  # at most, between two looks at what a program uses
_FILL_BYTES = 4 * 2**20  # that one processor fills in a ms, with huge pages: what pages of 4 KB take is less than half
# The kernel notes some 214 bytes for each mapping (seen on 64-bit Linux 6.18), which no limit counts. Programs have
# some hundreds: arrays of their own that the C library maps one by one are 4096 at most in 512 MB.
_MOST_MAPPINGS = 8192
_MAPPING_BYTES = 256
_MOST_QUEUED = 256  # signals and timers of the program's user
_DEVICES = ("null", "zero", "full", "random", "urandom")


def _load_kernel():
    path = os.path.join(os.path.dirname(__file__), "kernel.py")
    spec = importlib.util.spec_from_file_location("_sandbox_kernel", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Server:
    """`config`: level, readable (paths), folder (an empty one), preload (modules) and the limits."""

    def __init__(self, config):
        self.config = config
        self.level = config["level"]
        self.kernel = _load_kernel()
        self.uid = os.geteuid()
        self.gid = os.getegid()
        self.rootless = self.uid != 0
        self.proc = None  # a descriptor: behind the namespaces there is no /proc to open
        self.made = 0
        for name in config["preload"]:
            importlib.import_module(name)

        if os.path.isdir("/proc/self"):
            self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        self.first_uid = _highest_id("/proc/self/uid_map")
        if self.level == "namespaces":
            self._enter_namespaces()

        # what else counts as a process of the program: its init and, in a user namespace, the guard; or all of the user
        config["own_processes"] = 1 + self.rootless if self.level == "namespaces" else 512
        if size := _read(self.proc, f"{os.getpid()}/statm"):
            config["base_bytes"] = int(size.split()[0]) * resource.getpagesize()

    def _enter_namespaces(self):
        """Leave the network and the file system; from here on all there is is read-only."""
        kernel = self.kernel
        folder = self.config["folder"]
        spaces = kernel.NEWNS | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS
        if not self.rootless:
            try:
                kernel.unshare(spaces)
            except PermissionError:  # root in a container may lack the right
                self.rootless = True
        if self.rootless:
            kernel.unshare(spaces | kernel.NEWUSER)
            kernel.map_user(self.uid, self.gid)

        # private first: no mount from here on may reach the machine's own file system
        kernel.mount(None, "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount("tmpfs", folder, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,nr_inodes=8k,mode=755")
        for path in self.config["readable"]:
            self._show(path, folder + path)

        os.makedirs(folder + "/dev", exist_ok=True)
        for name in _DEVICES:
            open(f"{folder}/dev/{name}", "w").close()
            kernel.mount(f"/dev/{name}", f"{folder}/dev/{name}", flags=kernel.MS_BIND)

        # every sandbox mounts a scratch folder of its own there
        os.symlink(SCRATCH, folder + "/dev/shm")
        os.mkdir(folder + SCRATCH)
        if not os.path.lexists(folder + "/tmp"):
            os.symlink(SCRATCH, folder + "/tmp")

        kernel.change_root(folder)
        kernel.make_readonly("/", recursive=False)

    def _show(self, path, target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            return

        # a mount needs something to be mounted on
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            open(target, "w").close()
        self.kernel.mount(path, target, flags=self.kernel.MS_BIND | self.kernel.MS_REC)
        self.kernel.make_readonly(target, recursive=True)

    def serve(self, connection):
        """One message, with descriptors (control, job, output, and perhaps that by which the sandbox joins a control
        group), asks for one sandbox."""
        signal.signal(signal.SIGCHLD, _reap)
        # the collector would touch, and so copy, the pages that every fork shares with this process
        gc.collect()
        gc.freeze()

        while True:
            message, descriptors, _, _ = socket.recv_fds(connection, 4096, 4)
            if not message:
                return
            self.made += 1
            try:
                pid = os.fork()
            except OSError:  # the trainer sees its sockets close
                pid = -1

            if pid == 0:
                code = 1
                try:
                    connection.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    Guard(self, descriptors, message[1:].decode() or SCRATCH).run()
                    code = 0
                finally:
                    os._exit(code)  # never back into this loop

            for descriptor in descriptors:
                os.close(descriptor)


class Guard:
    """Sets up one sandbox, waits for its end and reports it."""

    def __init__(self, server, descriptors, scratch):
        self.server = server
        self.config = server.config
        self.kernel = server.kernel
        self.control, self.job, self.output, *self.joins = descriptors
        self.scratch = scratch
        self.uid = server.uid
        self.gid = server.gid
        self.namespaces = server.level == "namespaces"
        # programs have no more processes than the limit, and no more processors than there are
        here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.processors = min(here, self.config["processes"])
        self.next_count = 0.0
        self.is_tight = False

    def run(self):
        try:
            self._prepare()
            pid = os.fork()
            if pid == 0:
                self._contained()
        except BaseException as error:
            os.write(self.output, f"{type(error).__name__}: {error}".encode())
            raise

        # the output ends when the last process of the sandbox has closed it, this one included
        for descriptor in (self.job, self.output, *self.joins):
            os.close(descriptor)
        report = self._watch(pid)
        with contextlib.suppress(OSError):
            os.write(self.control, json.dumps(report).encode())

    def _prepare(self):
        kernel = self.kernel
        linux = sys.platform == "linux"
        if linux:
            kernel.die_with_parent()
        if not self.namespaces:
            if linux:
                kernel.adopt_orphans()
            return

        spaces = kernel.NEWPID | kernel.NEWNS
        if self.server.rootless:
            kernel.unshare(spaces | kernel.NEWUSER)
            kernel.map_user_at(self.server.proc, self.uid, self.gid)
        else:
            kernel.unshare(spaces)
            # a user of its own, since the kernel counts the processes of a user
            self.uid = self.gid = self.server.first_uid - self.server.made % 20000
        options = f"size={self.config['scratch_mb']}m,nr_inodes=4096,mode=700,uid={self.uid},gid={self.gid}"
        kernel.mount("tmpfs", SCRATCH, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)

    def _contained(self):
        """The child: process 1 of a namespace, or, where there are none, the program itself. Never returns."""
        code = 1
        try:
            for group in self.joins:
                # before anything is forked; the trainer looks whether it worked
                with contextlib.suppress(OSError):
                    os.write(group, b"0")
            os.setsid()
            os.dup2(self.job, 0)
            os.dup2(self.output, 1)
            os.dup2(self.output, 2)

            # the order is important: each step needs what a later one takes away
            level = self.server.level
            os.chdir(self.scratch)
            if level == "landlock":
                devices = [f"/dev/{name}" for name in _DEVICES]
                self.kernel.landlock(self.config["readable"], [self.scratch, *devices])
            os.closerange(3, 65536)
            if level != "rlimits":
                changes_user = self.namespaces and not self.server.rootless
                self.kernel.drop_privileges(*((self.uid, self.gid) if changes_user else ()))
                self.kernel.die_with_parent()  # a change of user forgets it
                self.kernel.seccomp(self.namespaces)
            if not self.namespaces:
                Program(self.config, self.scratch).run()

            # process 1 of a namespace must wait for whatever is orphaned in it
            program = os.fork()
            if program == 0:
                Program(self.config, self.scratch).run()
            os.closerange(0, 3)
            ended, status = os.wait()
            while ended != program:
                ended, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            code = 128 - code if code < 0 else code
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(1, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(code)  # the kernel ends everything else in the namespace with it

    def _watch(self, pid):
        """Wait for the end, or bring it about; nothing of the sandbox lives when this returns."""
        poller = select.poll()
        handle = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
        if handle is not None:
            poller.register(handle, select.POLLIN)
        poller.register(self.control, select.POLLIN)

        reason = None
        # before it runs nothing can exceed a limit; without a handle its end is looked for now and then
        patience = None if handle is not None else _WATCH_MS
        while True:
            ready = {descriptor for descriptor, _ in poller.poll(patience)}
            if self.control in ready:
                if os.read(self.control, 16) == RUN:
                    patience = _WATCH_MS
                else:  # told to, or the trainer is gone
                    reason = reason or "killed"
                    _kill(pid)
                    poller.unregister(self.control)
            else:
                excess, left = self._excess(pid)
                if excess:
                    reason = reason or excess
                    _kill(pid)
                # before all processors together can have reached the limit
                if patience is not None:
                    patience = max(2, min(_WATCH_MS, int(left / (_FILL_BYTES * self.processors))))

            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                break

        if not self.namespaces:
            self._end_orphans(pid)
        code = os.waitstatus_to_exitcode(status)
        return {"code": 128 - code if code < 0 else code, "reason": reason, "cpu_s": usage.ru_utime + usage.ru_stime}

    def _excess(self, pid):
        """(The limit that all processes together have passed, or None; bytes up to that of memory.) Limits
        of one process alone are the kernel's business, and so is the number of processes, except for users that it
        exempts."""
        most = self.config["memory_mb"] * 2**20
        processes = _descendants(self.server.proc, pid)
        if len(processes) < 2 + self.namespaces:
            return None, most - _resident_bytes(self.server.proc, processes[-1])
        if len(processes) > self.config["processes"] + 2:
            return "processes", 0

        # Processes that fill memory leave this one little of the processors, so it counts while they stand still: once
        # they have more than the limit, with what they have in common for each of them.
        others = processes[self.namespaces :]
        held = [process for process in others if self.is_tight and _hold(self.server.proc, process)]
        try:
            resident = sum(_resident_bytes(self.server.proc, process) for process in processes)
            if resident > most and not self.is_tight:
                held = [process for process in others if _hold(self.server.proc, process)]
            self.is_tight = resident > most

            if not self.is_tight and time.monotonic() < self.next_count:
                return None, most - resident
            self.next_count = time.monotonic() + _WATCH_MS / 1000
            total = self._count_memory(processes, most)
            if total > most:
                # what is to be ended does not go on
                held = []
                return "memory", 0
            return None, most - total
        finally:
            for process in held:
                _signal(process, signal.SIGCONT)

    def _count_memory(self, processes, most):
        """Bytes of all processes together, of which no more are counted than tells that there are more than `most`."""
        total = 0
        for process in processes:
            # proportional shares: what processes have in common counts once; and what the kernel notes of each mapping
            mappings = _count_lines(self.server.proc, f"{process}/maps", _MOST_MAPPINGS)
            total += _MAPPING_BYTES * mappings
            for line in _read(self.server.proc, f"{process}/smaps_rollup").splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024

            # at once: processes of many mappings take the kernel long to list, and meanwhile nothing ends them
            if mappings > _MOST_MAPPINGS:
                return most + 1
            if total > most:
                return total
        return total

    def _end_orphans(self, pid):
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            for process in _descendants(self.server.proc, os.getpid())[1:]:
                _kill(process)
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.002)
            except ChildProcessError:
                return


class Program:
    """The inside: takes one job from descriptor 0 and runs it."""

    def __init__(self, config, scratch):
        self.config = config
        self.scratch = scratch

    def run(self):
        code = 1
        try:
            self._set_limits()
            os.write(1, READY)
            # waits here, ready, until the trainer has a program for it
            with open(0, "rb", closefd=False) as file:
                job = json.loads(file.read())
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.close(null)
            code = self._execute(job["code"], job["stdin"], job["echo"])
        finally:
            os._exit(code)

    def _set_limits(self):
        def limit(what, soft, hard=None):
            ceiling = resource.getrlimit(what)[1]
            values = [v if ceiling < 0 else min(v, ceiling) for v in (soft, soft if hard is None else hard)]
            resource.setrlimit(what, tuple(values))

        config = self.config
        cpu = max(1, round(self.config["cpu_s"] + 0.499))  # whole seconds, rounded up
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_CPU, cpu, cpu + 1)
        limit(resource.RLIMIT_FSIZE, config["scratch_mb"] * 2**20)
        limit(resource.RLIMIT_NOFILE, config["open_files"])
        if sys.platform == "linux":
            # beyond what the server itself maps, which every program inherits
            limit(resource.RLIMIT_AS, config["memory_mb"] * 2**20 + config.get("base_bytes", 2**27))
            limit(resource.RLIMIT_MEMLOCK, 0)
            limit(resource.RLIMIT_MSGQUEUE, 0)
            # queued signals and timers are the kernel's memory; those that are not queued come all the same
            limit(resource.RLIMIT_SIGPENDING, _MOST_QUEUED)
        if config["level"] in ("namespaces", "rlimits"):  # the other levels allow no process at all
            limit(resource.RLIMIT_NPROC, config["processes"] + self.config["own_processes"])

    def _execute(self, code, stdin, echo):
        os.environ.update(HOME=self.scratch, TMPDIR=self.scratch)
        tempfile.tempdir = None
        random.seed(0)  # the same program prints the same, whichever server runs it

        sys.stdin = io.StringIO(stdin)
        for name in ("stdout", "stderr"):
            raw = open({"stdout": 1, "stderr": 2}[name], "wb", 0, closefd=False)  # noqa: SIM115  for life
            text = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)
            setattr(sys, name, text)

        socket.socketpair = _wakeup_pair

        # the program is the main module, and tracebacks show its lines
        sys.argv = ["program.py"]
        sys.path.insert(0, self.scratch)
        module = types.ModuleType("__main__")
        module.__dict__["__builtins__"] = __builtins__
        sys.modules["__main__"] = module
        linecache.cache[PROGRAM] = (len(code), None, code.splitlines(True), PROGRAM)

        status = 0
        try:
            tree = ast.parse(code, PROGRAM)
            last = None
            if echo and tree.body and isinstance(tree.body[-1], ast.Expr):
                last = ast.Expression(tree.body.pop().value)
            exec(compile(tree, PROGRAM, "exec"), module.__dict__)
            if last is not None:
                value = eval(compile(last, PROGRAM, "eval"), module.__dict__)
                if value is not None:
                    print(repr(value))
            # as an interpreter does at its end
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            if status and not isinstance(stop.code, int):
                print(stop.code, file=sys.stderr)
        except BaseException as error:
            status = MEMORY_ERROR if isinstance(error, MemoryError) else 1
            # from the program on: our own frames tell it nothing
            trace = error.__traceback__
            while trace is not None and trace.tb_frame.f_code.co_filename != PROGRAM:
                trace = trace.tb_next
            traceback.print_exception(type(error), error, trace, limit=-8)

        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        return status & 0xFF


_socketpair = socket.socketpair


class _PipeEnd:
    """What asyncio wants of the sockets by which it wakes itself."""

    def __init__(self, descriptor):
        self.descriptor = descriptor

    def fileno(self):
        return self.descriptor

    def setblocking(self, flag):
        os.set_blocking(self.descriptor, flag)

    def recv(self, size):
        return os.read(self.descriptor, size)

    def send(self, data):
        return os.write(self.descriptor, data)

    def close(self):
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def _wakeup_pair(*arguments, **keywords):
    """Event loops call it without arguments, send on the second end and read from the first: a pipe does for them.
    Other pairs are the kernel's to refuse."""
    if arguments or keywords:
        return _socketpair(*arguments, **keywords)
    return tuple(map(_PipeEnd, os.pipe()))


def _signal(pid, number):
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def _kill(pid):
    _signal(pid, signal.SIGKILL)


def _hold(proc, pid):
    """Have a process stand still, and say whether it is to go on later: not if it has stopped itself."""
    if _read(proc, f"{pid}/stat").rpartition(")")[2].split()[:1] == ["T"]:
        return False
    _signal(pid, signal.SIGSTOP)
    return True


def _resident_bytes(proc, pid):
    """Of a process, with what others hold too; 0 for one that is gone."""
    pages = _read(proc, f"{pid}/statm").split()[1:2]
    return sum(map(int, pages)) * resource.getpagesize()


def _reap(*_):
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _read(proc, path):
    if proc is None:
        return ""
    try:
        with open(os.open(path, os.O_RDONLY, dir_fd=proc)) as file:
            return file.read()
    except OSError:
        return ""


def _count_lines(proc, path, most):
    """Lines of a file, of which no more are read than tells that there are more than `most`."""
    if proc is None:
        return 0
    lines = 0
    try:
        with open(os.open(path, os.O_RDONLY, dir_fd=proc), "rb", buffering=0) as file:
            while lines <= most and (chunk := file.read(65536)):
                lines += chunk.count(b"\n")
    except OSError:
        pass  # it is gone
    return lines


def _list(proc, path):
    if proc is None:
        return []
    try:
        folder = os.open(path, os.O_RDONLY, dir_fd=proc)
    except OSError:
        return []
    try:
        return os.listdir(folder)
    except OSError:
        return []
    finally:
        os.close(folder)


def _descendants(proc, pid):
    """`pid` and everything below it, by numbers of outside."""
    found = [pid]
    for process in found:  # grows as it goes
        for thread in _list(proc, f"{process}/task"):
            found += [int(child) for child in _read(proc, f"{process}/task/{thread}/children").split()]
    return found


def _highest_id(file):
    """A user id high up that this process may take; 65534 where none is known."""
    try:
        with open(file) as f:
            ranges = [[int(number) for number in line.split()] for line in f]
        return min(max(first + count for first, _, count in ranges), 2**31) - 3
    except (OSError, ValueError):
        return 65534


def main():
    config = json.loads(sys.argv[1])
    connection = socket.socket(fileno=config["descriptor"])
    try:
        server = Server(config)
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}".encode())
        return
    connection.send(READY)
    server.serve(connection)


if __name__ == "__main__":
    main()
