"""Programs that try to get out of the sandbox, and what tells whether one did.

    python -m rljax.envs.sandbox.attacks          runs the list here, at the level that is chosen by itself

Each prints `ESCAPED` and what it reached. They are written to do little harm where nothing holds them: bombs are small
and children end by themselves after some seconds.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rljax.envs.sandbox.runner import Limits, Sandbox, SandboxResult

LIMITS = Limits(wall_s=1.0, cpu_s=1.0, memory_mb=96, processes=12, output_bytes=16_384, scratch_mb=8, open_files=48)
"""Small, so that what an attack can spend is small."""

_START = "import os, sys, time, signal, ctypes\ndef escaped(*what): print('ESCAPED', *what, flush=True)\n"

ATTACKS: dict[str, str] = {
    "fork bomb": """
made = 0
try:
    for _ in range(200):
        if os.fork() == 0:
            time.sleep(4); os._exit(0)
        made += 1
except OSError: pass
if made > 40: escaped(made, 'processes')
""",
    "fork tree": """
try:
    for _ in range(7): os.fork()
except OSError: pass
time.sleep(4)
""",
    "thread bomb": """
import threading
made = 0
try:
    for _ in range(400):
        threading.Thread(target=time.sleep, args=(4,), daemon=True).start(); made += 1
except (RuntimeError, MemoryError): pass
if made > 200: escaped(made, 'threads')
""",
    "memory bomb": """
kept = []
for i in range(12): kept.append(bytearray(b'x') * 50_000_000)
escaped('held 600 MB')
""",
    "memory bomb of several processes": """
made = 0
try:
    for _ in range(6):
        if os.fork() == 0:
            kept = bytearray(os.urandom(1) * 60_000_000); time.sleep(3); os._exit(0)
        made += 1
except OSError: pass
time.sleep(0.8)
try:
    while made and os.waitpid(-1, os.WNOHANG)[0]: made -= 1
except ChildProcessError: pass
if made > 1: escaped(60 * made, 'MB stood for 0.8 s')
""",
    "memory bomb of several processes at one moment": """
read, write = os.pipe()
made = 0
try:
    for _ in range(9):
        if os.fork() == 0:
            os.close(write); os.read(read, 1)
            kept = bytearray(os.urandom(1) * 80_000_000); time.sleep(3); os._exit(0)
        made += 1
except OSError: pass
os.close(read); os.close(write)
time.sleep(0.8)
try:
    while made and os.waitpid(-1, os.WNOHANG)[0]: made -= 1
except ChildProcessError: pass
if made > 1: escaped(80 * made, 'MB stood for 0.8 s')
""",
    "shared memory": """
import mmap
for make in (lambda: mmap.mmap(-1, 400_000_000), lambda: os.ftruncate(os.memfd_create('x'), 400_000_000)):
    try: make(); escaped('400 MB')
    except (OSError, ValueError, MemoryError): pass
""",
    "endless output": "while True: print('x' * 4000)",
    "endless output past Python": "while True: os.write(2, b'y' * 60000)",
    "output without a line end": "while True: sys.stdout.write('z' * 10000)",
    "endless loop": "while True: pass",
    "loop that ignores signals": """
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "sleep": "time.sleep(60)",
    "stop itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "stack overflow": "f = lambda: f()\nsys.setrecursionlimit(10**9)\nf()",
    "segmentation fault": "ctypes.string_at(0)",
    "leave by the back door": "os._exit(0)",
    "forge the start signal": "os.write(1, b'\\x01' * 10)\nos.close(1)\nos.close(2)\nos.close(0)",
    "read the home": """
for path in (SECRET, '/etc/shadow', '/etc/passwd', HOME + '/.bashrc', HOME + '/.ssh/id_rsa'):
    try: escaped(path, open(path).read(20))
    except OSError: pass
for folder in (os.path.dirname(SECRET), '/home', '/var/log', HOME + '/.ssh', HOME + '/.cache'):
    try: escaped(folder, os.listdir(folder))
    except OSError: pass
""",
    "read the environment": """
if WORD in str(os.environ): escaped('environment')
for process in ['self', 1, os.getppid(), VICTIM, *range(2, 400)]:
    try:
        if WORD in open(f'/proc/{process}/environ').read(): escaped('environment of', process)
    except OSError: pass
""",
    "read memory of others": """
for process in (1, os.getppid(), VICTIM):
    for kind in ('mem', 'maps', 'cmdline', 'fd'):
        try: open(f'/proc/{process}/{kind}', 'rb').read(1); escaped(process, kind)
        except OSError: pass
libc = ctypes.CDLL(None, use_errno=True)
for process in (os.getppid() or 1, VICTIM):
    if libc.ptrace(16, process, 0, 0) == 0: escaped('ptrace', process)
""",
    "write outside": """
name = 'rljax-attack-' + WORD
for path in (SECRET, SECRET + '.new', HOME + '/' + name, '/usr/' + name, '/etc/' + name, '/var/tmp/' + name,
             '/' + name, '/dev/' + name, sys.prefix + '/' + name, os.path.dirname(os.__file__) + '/' + name):
    try: open(path, 'a').write('x'); escaped(path)
    except OSError: pass
    for change in (lambda: os.chmod(path, 0o777), lambda: os.utime(path), lambda: os.remove(path),
                   lambda: os.truncate(path, 0)):
        try: change(); escaped('changed', path)
        except OSError: pass
""",
    "climb out": """
for path in ('../' * 20 + SECRET, '/proc/self/root' + SECRET, '/proc/1/root' + SECRET, '/proc/self/cwd/..' + SECRET):
    try: escaped(path, open(path).read())
    except OSError: pass
for fd in range(3, 64):
    try: escaped('inherited descriptor', fd, os.fstat(fd))
    except OSError: pass
    try: escaped(os.open(SECRET, os.O_RDONLY, dir_fd=fd))
    except OSError: pass
try: os.mkdir('jail'); os.chroot('jail'); escaped('chroot')
except OSError: pass
""",
    "symlinks and hard links": """
for make in (os.symlink, os.link):
    try:
        make(SECRET, 'link-' + make.__name__)
        escaped(open('link-' + make.__name__).read())
    except OSError: pass
for target in ('/proc/self/exe', '/proc/1/root', '/proc/self/fd', '/', '/dev/stdin'):
    name = 'to' + target.replace('/', '-')
    try: os.symlink(target, name); escaped(open(name + SECRET).read())
    except OSError: pass
try: os.rename(SECRET, 'mine'); escaped('moved the secret')
except OSError: pass
""",
    "proc and sys": """
for path in ('/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger', '/proc/self/oom_score_adj', '/sys/power/state',
             '/proc/1/oom_score_adj', '/sys/fs/cgroup/cgroup.procs', '/proc/self/mem', '/proc/kcore', '/proc/kmsg'):
    try: open(path, 'r+'); escaped(path)
    except OSError: pass
""",
    "devices": """
for path in ('/dev/mem', '/dev/kmsg', '/dev/vda', '/dev/sda', '/dev/tty', '/dev/ptmx', '/dev/fuse', '/dev/kvm'):
    try: open(path, 'rb'); escaped(path)
    except OSError: pass
for mode, device in ((0o20600, os.makedev(1, 1)), (0o60600, os.makedev(254, 0))):
    try: os.mknod('device', mode, device); escaped('mknod')
    except OSError: pass
""",
    "sockets": """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try: socket.socket(family, kind); escaped('socket', family, kind)
        except OSError: pass
try: socket.create_connection(('127.0.0.1', PORT), 0.2); escaped('connected')
except OSError: pass
try: socket.getaddrinfo('localhost', 80, type=socket.SOCK_STREAM) and None
except OSError: pass
""",
    "pairs of sockets": """
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_RAW):
    try: socket.socketpair(socket.AF_UNIX, kind); escaped('socketpair', kind)
    except OSError: pass
""",
    "datagrams to a socket outside": """
import socket
try:
    mine = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]
    mine.sendto(b'x', MAILBOX)
    escaped('sent')
except OSError: pass
""",
    "memory in buffers of sockets": """
import socket
held = 0
try:
    for _ in range(11):
        if os.fork() == 0: break
except OSError: pass
kept = []
try:
    for _ in range(200):
        kept.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
        for end in kept[-1]:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            end.setblocking(False)
            while True: held += end.send(bytes(60000))
except OSError: pass
if held > 2_000_000: escaped(held, 'bytes in each process')
time.sleep(4)
""",
    "memory in pipes": """
import fcntl, mmap
page = mmap.mmap(-1, 2 << 20)
libc = ctypes.CDLL(None, use_errno=True)
ends, held = [], 0
try:
    while True:
        ends.append(os.pipe()); os.set_blocking(ends[-1][1], False)
        try: fcntl.fcntl(ends[-1][1], 1031, 1 << 20); escaped('a larger pipe')
        except OSError: pass
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.c_char.from_buffer(page)), 4096)
        if libc.vmsplice(ends[-1][1], vector, ctypes.c_size_t(1), 0) > 0: escaped('pages kept by a pipe')
        try:
            while True: held += os.write(ends[-1][1], bytes(65536))
        except BlockingIOError: pass
except OSError: pass
if held > 4_000_000: escaped(held, 'bytes')
""",
    "memory in timers and signals": """
libc = ctypes.CDLL(None, use_errno=True)
signal.pthread_sigmask(signal.SIG_BLOCK, (40,))
timer, made = ctypes.c_void_p(), 0
while made < 2000 and libc.timer_create(1, None, ctypes.byref(timer)) == 0: made += 1
queued = 0
while queued < 2000 and libc.sigqueue(os.getpid(), 40, ctypes.c_void_p(1)) == 0: queued += 1
if made + queued > 400: escaped(made, 'timers', queued, 'signals')
""",
    "watch what others open": """
libc = ctypes.CDLL(None, use_errno=True)
for make in (lambda: libc.inotify_init(), lambda: libc.inotify_init1(0), lambda: libc.fanotify_init(0, 0)):
    watch = make()
    if watch >= 0:
        escaped('a watch')
        for folder in ('/usr', sys.prefix, os.path.dirname(os.__file__), os.path.dirname(SECRET)):
            if libc.inotify_add_watch(watch, folder.encode(), 0xfff) >= 0: escaped('on', folder)
import fcntl
for folder in ('/usr', sys.prefix):
    try: fcntl.fcntl(os.open(folder, os.O_RDONLY), fcntl.F_NOTIFY, 0x8000001f); escaped('told of', folder)
    except OSError: pass
""",
    "hold up who opens a file": """
import fcntl
for path in (os.__file__, signal.__file__, sys.executable):
    for kind in (fcntl.F_RDLCK, fcntl.F_WRLCK):
        try: fcntl.fcntl(os.open(path, os.O_RDONLY), fcntl.F_SETLEASE, kind); escaped('lease on', path)
        except OSError: pass
""",
    "signals by way of a descriptor": """
import fcntl
read, write = os.pipe()
for command, value in ((fcntl.F_SETOWN, VICTIM), (10, signal.SIGKILL), (15, VICTIM)):
    try: fcntl.fcntl(read, command, value); escaped('command', command)
    except (OSError, TypeError): pass
fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC)
os.write(write, b'x')
""",
    "kill the parent": """
for process in (os.getppid(), VICTIM):
    try: process > 1 and (os.kill(process, 9), escaped('killed', process))
    except OSError: pass
    try: process > 1 and (os.killpg(process, 9), escaped('killed the group', process))
    except OSError: pass
if os.getpid() < 10:  # a namespace of its own
    for process in (-1, 1, 0): 
        try: os.kill(process, 9)
        except OSError: pass
""",
    "slow the parent": """
import resource
for process in (VICTIM, os.getppid()):
    for change in (lambda: resource.prlimit(process, resource.RLIMIT_CPU, (1, 1)),
                   lambda: os.setpriority(0, process, 19), lambda: os.sched_setaffinity(process, {0})):
        try: process > 1 and (change(), escaped('changed', process))
        except (OSError, ValueError): pass
""",
    "survive as a daemon": """
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGHUP, signal.SIG_IGN)
            for fd in range(3): os.close(fd)
            time.sleep(3)
            open(SECRET + '.survived', 'w')
        os._exit(0)
except OSError: pass
""",
    "survive the timeout": """
try:
    for _ in range(4):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0: time.sleep(6); os._exit(0)
            time.sleep(6); os._exit(0)
except OSError: pass
time.sleep(60)
""",
    "leave another program behind": """
import subprocess
try: subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(6) # ' + WORD], start_new_session=True)
except OSError: pass
""",
    "flee from the killer": """
try:
    begin = time.monotonic()
    while time.monotonic() < begin + 6:
        if os.fork(): os._exit(0)
        os.setsid()
except OSError: pass
""",
    "privileges": """
for change in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgroups([0])):
    try:
        before = os.getresuid(); change(); os.getresuid() != before and escaped('became another user')
    except OSError: pass
libc = ctypes.CDLL(None, use_errno=True)
for flags in (0x10000000, 0x20000, 0x40000000, 0x20000000):
    if libc.unshare(flags) == 0: escaped('unshare', hex(flags))
for arguments in ((b'none', b'/scratch', b'tmpfs', 0, None), (b'proc', b'.', b'proc', 0, None)):
    if libc.mount(*arguments) == 0: escaped('mount', arguments)
for number in (425, 321, 298, 323, 319, 41, 272, 175, 246, 304, 0x40000000 + 41):
    if libc.syscall(number, 0, 0, 0, 0, 0) >= 0: escaped('system call', number)
""",
    "raise the limits": """
import resource
for what in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
    soft, hard = resource.getrlimit(what)
    for ceiling in (-1, hard * 2):
        try: hard > 0 and (resource.setrlimit(what, (ceiling, ceiling)), escaped('limit', what))
        except (OSError, ValueError): pass
""",
    "fill the disk": """
total = 0
try:
    for i in range(10):
        with open(f'f{i}', 'wb') as file:
            for _ in range(8): total += file.write(bytes(1_000_000))
except OSError: pass
if total > 20_000_000: escaped(total, 'bytes')
""",
    "many files": """
made = 0
try:
    for i in range(6000): open(f'{i}', 'w').close(); made += 1
except OSError: pass
if made > 5000: escaped(made, 'files')
""",
}
"""Name and program; SECRET, HOME, WORD, VICTIM, PORT and MAILBOX stand for what `Outside` sets up."""

DISK = ("fill the disk", "many files")
"""Attacks that level "landlock" does not stop, as its description says."""


class Outside:
    """What there is to get at: a secret file in the home, a word in the environment, a process, a listening port, a
    socket for datagrams. A context manager."""

    def __enter__(self) -> "Outside":
        self.word = "rljax" + secrets.token_hex(8)
        home = Path.home() if os.access(Path.home(), os.W_OK) else Path(tempfile.gettempdir())
        self.folder = Path(tempfile.mkdtemp(dir=home, prefix="rljax-outside-"))
        self.secret = self.folder / "secret.txt"
        self.secret.write_text(self.word)
        os.environ["RLJAX_ATTACK_WORD"] = self.word
        self.victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(86400)"], start_new_session=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.post = tempfile.TemporaryDirectory(prefix="rljax-post-")
        self.mailbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.mailbox.bind(f"{self.post.name}/box")
        self.mailbox.setblocking(False)
        return self

    def __exit__(self, *error: object) -> None:
        os.environ.pop("RLJAX_ATTACK_WORD", None)
        self.listener.close()
        self.mailbox.close()
        self.post.cleanup()
        self.victim.kill()
        self.victim.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def program(self, attack: str) -> str:
        """The attack, told where everything is."""
        names: dict[str, Any] = {"SECRET": str(self.secret), "HOME": str(Path.home()), "WORD": self.word}
        names |= {"VICTIM": self.victim.pid, "PORT": self.listener.getsockname()[1]}
        names |= {"MAILBOX": self.mailbox.getsockname()}
        return "".join(f"{name} = {value!r}\n" for name, value in names.items()) + _START + ATTACKS[attack]

    def leaks(self, result: SandboxResult, limits: Limits) -> list[str]:
        """What one attack got at; empty if it was contained."""
        found = [line for line in result.output.splitlines() if line.startswith("ESCAPED")]
        if self.word in result.output and not found:
            found.append("the output holds the secret")
        if result.outcome == "lost":
            found.append(f"the sandbox was lost: {result.output[:200]}")
        if len(result.output.encode()) > 3 * limits.output_bytes:
            found.append(f"{len(result.output)} characters of output")
        if result.wall_s > limits.wall_s + 5:
            found.append(f"it ran {result.wall_s:.1f} s")
        with contextlib.suppress(BlockingIOError):
            found.append(f"a datagram came out: {self.mailbox.recv(16)!r}")
        if self.victim.poll() is not None:
            found.append("the process outside is dead")
        if not self.secret.exists() or self.secret.read_text() != self.word or len(list(self.folder.iterdir())) > 1:
            found.append("the folder outside was written to")
        return found

    def left_behind(self, sandbox: Sandbox, *, wait_s: float = 5.0) -> list[str]:
        """Processes that outlived their run; what is just ending is given `wait_s` seconds."""
        deadline = time.monotonic() + wait_s
        while (found := self._strays(sandbox)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def _strays(self, sandbox: Sandbox) -> list[str]:
        parents, lines = {}, {}
        for process in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError, IndexError, ValueError):
                parents[int(process)] = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
                lines[int(process)] = Path(f"/proc/{process}/cmdline").read_text(errors="replace").replace("\0", " ")

        # every process of a sandbox is below a guard, and every guard below the server
        server = sandbox.server_pid
        guards = [process for process, parent in parents.items() if parent == server]
        depth = {process: 1 for process in guards}
        for _ in range(8):
            depth |= {p: depth[parent] + 1 for p, parent in parents.items() if parent in depth and p not in depth}
        expected = sandbox.num_ready * (3 if sandbox.level == "namespaces" else 2)
        found = [f"{p}: {lines[p]}" for p in lines if self.word in lines[p]]
        found += [
            f"{p}: orphan of the server" for p in lines if sandbox.folder in lines[p] and p not in (server, *depth)
        ]
        if len(depth) > expected:
            found.append(f"{len(depth)} processes below the server instead of {expected}")
        return found


class Meter:
    """The most memory that the programs of a sandbox take from one moment on, with the kernel's for their processes, as
    their control groups count it. OSError where this user may make no group."""

    def __init__(self, sandbox: Sandbox):
        if sandbox.groups is None:
            raise OSError("the sandbox has no control groups here")
        self._groups = sandbox.groups
        peak = self._peak()
        if peak.name != "memory.peak":
            peak.write_text("0")  # from what they have now; the other kind keeps the most that there ever was

    def peak_mb(self) -> float:
        """MB of 2**20 bytes."""
        return int(self._peak().read_text()) / 2**20

    def _peak(self) -> Path:
        first = self._groups / "memory.max_usage_in_bytes"
        return first if first.exists() else self._groups / "memory.peak"


def run_attacks(sandbox: Sandbox, outside: Outside, names: list[str] | None = None) -> dict[str, list[str]]:
    """Run attacks one by one; what each got at, and at the end, under "afterwards", what was left behind."""
    found = {
        name: outside.leaks(sandbox.run(outside.program(name)), sandbox.limits) for name in names or attacks(sandbox)
    }
    return found | {"afterwards": outside.left_behind(sandbox)}


def attacks(sandbox: Sandbox) -> list[str]:
    """Names of the attacks that this sandbox promises to stop."""
    return [name for name in ATTACKS if sandbox.level == "namespaces" or name not in DISK]


def main() -> None:
    """Run the list and print the verdict."""
    with Outside() as outside, Sandbox(LIMITS, workers=1) as sandbox:
        print(sandbox.describe())
        found = run_attacks(sandbox, outside)
    for name, leaks in found.items():
        print(f"{'LEAK' if leaks else 'held'}  {name}" + "".join(f"\n      {leak}" for leak in leaks))
    sys.exit(any(found.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main()
