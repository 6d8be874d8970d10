"""One writer a run folder: a lock that the kernel takes back when its process ends, however it ends."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from absl import logging

_held: dict[Path, tuple[int, int]] = {}
"""Open file and number of holders by lock file."""


def _let_go() -> None:
    """In a child: closes its copies. The lock is of the open file, and stays with the parent's."""
    for file, _ in _held.values():
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def lock(folder: Path) -> None:
    """Takes `folder/lock` for this process, which may take it several times. ValueError, in one line, while another
    process has it.

    The lock is not inherited by children, so that one that outlives the run does not keep the folder.
    """
    path = folder / "lock"
    if path in _held:
        file, holders = _held[path]
        _held[path] = (file, holders + 1)
        return

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        said = os.read(file, 4096).decode(errors="replace").strip()
        os.close(file)
        raise ValueError(
            f"workdir {folder} is in use by another run ({_described(said)}); wait until it has ended, end it, or "
            "name another folder"
        ) from None
    except OSError as error:
        # Some network file systems have no locks.
        os.close(file)
        logging.warning("%s cannot be locked (%s): do not start a second run in it", folder, error)
        return

    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(file, 0)
    os.write(file, json.dumps(holder).encode())
    _held[path] = (file, 1)


def unlock(folder: Path) -> None:
    """Gives the lock back once for every `lock`; does nothing where there is none."""
    path = folder / "lock"
    if path not in _held:
        return
    file, holders = _held.pop(path)
    if holders > 1:
        _held[path] = (file, holders - 1)
    else:
        os.close(file)


def _described(holder: str) -> str:
    try:
        found = json.loads(holder)
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):  # it has not written its name yet
        return "its process is not known"
