"""A control group of Linux for each program, where this user may make one: the kernel then bounds all memory of a
program's processes together, its own notes for them included."""

import contextlib
import os
import tempfile
import time
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_PREFIX = "rljax-sandbox-"


class MemoryGroup:
    """Of one program. Its processes come in by themselves, through the descriptor `joins`."""

    def __init__(self, above: Path, number: int):
        self.folder = above / str(number)
        self.folder.mkdir()
        self.joins = os.open(self.folder / "cgroup.procs", os.O_WRONLY)

    def bound(self, num_bytes: int) -> bool:
        """Let it take so much beyond what it has. Whether a process is in it at all, and the kernel took the bound."""
        self._forget_descriptor()
        try:
            if not (self.folder / "cgroup.procs").read_text().strip():
                return False
            used = int(_file(self.folder, "memory.usage_in_bytes", "memory.current").read_text())
            _file(self.folder, "memory.limit_in_bytes", "memory.max").write_text(str(used + num_bytes))
            # A program ends as a whole, where the kernel knows how.
            together = self.folder / "memory.oom.group"
            if together.exists():
                together.write_text("1")
        except OSError:
            return False
        return True

    def was_full(self) -> bool:
        """Whether the kernel has ended a process for want of memory."""
        with contextlib.suppress(OSError):
            for line in _file(self.folder, "memory.oom_control", "memory.events").read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill" and int(count):
                    return True
        return False

    def close(self) -> None:
        """A group that a process is just leaving goes with those above it."""
        self._forget_descriptor()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _forget_descriptor(self) -> None:
        if self.joins >= 0:
            os.close(self.joins)
        self.joins = -1


def make_groups() -> Path:
    """A group for those of programs, in that of this process. OSError where none can be made, with the reason. Those
    that processes have left which were killed are taken away."""
    above = _own_group()
    # Containers may share a group and number their processes alike: what another one's number means is not known here.
    prefix = f"{_PREFIX}{os.stat('/proc/self/ns/pid').st_ino}-"
    for old in above.glob(f"{prefix}*"):
        owner = old.name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _remove(old)

    made = Path(tempfile.mkdtemp(dir=above, prefix=f"{prefix}{os.getpid()}-"))
    try:
        if (made / "cgroup.subtree_control").exists():
            (made / "cgroup.subtree_control").write_text("+memory")
        # a group in it must have a bound and a count
        group = MemoryGroup(made, 0)
        try:
            _file(group.folder, "memory.limit_in_bytes", "memory.max")
            _file(group.folder, "memory.oom_control", "memory.events")
        finally:
            group.close()
    except OSError:
        _remove(made)
        raise
    return made


def remove_groups(groups: Path, patience_s: float = 5.0) -> None:
    """Waits for processes that are just ending."""
    deadline = time.monotonic() + patience_s
    while groups.exists() and time.monotonic() < deadline:
        _remove(groups)
        if groups.exists():
            time.sleep(0.01)


def _remove(groups: Path) -> None:
    """What is empty of it."""
    folders = [groups]
    # Processes that start at one moment take the same one away, so it may vanish at any point.
    with contextlib.suppress(OSError):
        folders[:0] = [child for child in groups.iterdir() if child.is_dir()]
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _own_group() -> Path:
    """The folder of this process's group, for memory. OSError where there is none, or none can be made in it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if "memory" in kinds.split(","):
            return _ROOT / "memory" / path.lstrip("/")
        if not kinds and "memory" in (_ROOT / path.lstrip("/") / "cgroup.subtree_control").read_text().split():
            return _ROOT / path.lstrip("/")
    raise OSError("no control group of this process counts memory")


def _file(folder: Path, *names: str) -> Path:
    """The one that is there: names of the first and the second version of control groups. OSError for none."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise OSError(f"control groups have no {' or '.join(names)} here")
