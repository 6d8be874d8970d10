"""One writer a run folder where nothing can be locked: an object that says who writes, and is renewed while they do.

An object store has no lock, but a read sees the last write. So a run writes its name, looks after a moment whether it
still stands there, and renews it from then on. Who finds another's name watches it: if it is renewed, the folder is in
use; if it stands still for as long as a lease lasts, its run is dead. No clock of another machine is relied on.
"""

import json
import os
import secrets
import socket
import threading
import time
from typing import Any

from absl import logging

from rljax.training.storage import AnyPath

LEASE_S = 60.0
"""Seconds after which a lease that is not renewed is over."""

_RENEW_S = LEASE_S / 5
_SETTLE_S = 1.0  # from writing a name to looking whether it stands
_POLL_S = 0.5

_held: dict[str, "Lease"] = {}
"""Leases of this process by folder."""


class Lease:
    """The right to write in `folder`, once it is taken. A thread renews it until `release`."""

    def __init__(self, folder: AnyPath):
        self.folder = folder
        self.holders = 0
        self._file = folder / "lock"
        self._id = secrets.token_hex(8)
        self._beats = 0
        self._ending = threading.Event()
        self._lost = ""
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Raises ValueError, in one line, while another run has it. It may take as long as a lease lasts."""
        while True:
            self._watch()
            begin = time.monotonic()
            self._write()
            spent = time.monotonic() - begin

            # Two may see it free and write one after the other. The later name stands, and the earlier run finds it, as
            # long as it looks later than a write takes.
            time.sleep(_SETTLE_S + 2 * spent)
            if (_read(self._file) or {}).get("id") == self._id:
                break
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    def _watch(self) -> None:
        """Returns when nobody has it any more."""
        first = _read(self._file)
        if first is None or first.get("id") == self._id or _is_over_here(first):
            return

        who = described(first)
        logging.warning("workdir %s was last written by %s; looking for %g s if it still is", self.folder, who, LEASE_S)
        deadline = time.monotonic() + LEASE_S
        while time.monotonic() < deadline:
            time.sleep(_POLL_S)
            found = _read(self._file)
            if found is None:
                return
            if found != first:
                raise ValueError(
                    f"workdir {self.folder} is in use by another run ({described(found)}); wait until it has ended, "
                    "end it, or name another folder"
                )

    @property
    def is_lost(self) -> bool:
        """Whether another run has taken the folder."""
        return bool(self._lost)

    def check(self) -> None:
        """Raises RuntimeError if another run has taken the folder while this process stood still."""
        if self._lost:
            raise RuntimeError(self._lost)

    def release(self) -> None:
        """Gives the folder back."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if not self._lost and (_read(self._file) or {}).get("id") == self._id:
                self._file.unlink()
        except Exception as error:  # whatever the client of the storage raises; it runs out by itself
            logging.warning("the lease on %s cannot be given back (%s)", self.folder, type(error).__name__)

    def _write(self) -> None:
        self._beats += 1
        self._file.write_text(json.dumps({"id": self._id, "beats": self._beats, **_this_process()}))

    def _renew(self) -> None:
        while not self._ending.wait(_RENEW_S):
            try:
                found = _read(self._file)
                if found is not None and found.get("id") != self._id:
                    self._lost = (
                        f"workdir {self.folder} was taken by another run ({described(found)}) while this process stood "
                        "still for longer than a lease lasts; this run ends, and writes nothing more"
                    )
                    return
                self._write()
            except Exception as error:  # whatever the client of the storage raises; the next time may do
                logging.warning("the lease on %s cannot be renewed (%s)", self.folder, type(error).__name__)


def take_lease(folder: AnyPath) -> Lease:
    """The lease on a folder, which this process may take several times. Raises as `Lease.take`."""
    lease = _held.get(str(folder))
    if lease is None:
        lease = Lease(folder)
        lease.take()
        _held[str(folder)] = lease
    lease.holders += 1
    return lease


def release_lease(lease: Lease) -> None:
    """Gives it back once for every `take_lease`."""
    lease.holders -= 1
    if lease.holders == 0:
        _held.pop(str(lease.folder), None)
        lease.release()


def described(holder: dict[str, Any]) -> str:
    """Who holds a lease, for a person."""
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _read(file: AnyPath) -> dict[str, Any] | None:
    """None where there is none, or what is no lease."""
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


_SINCE = time.strftime("%Y-%m-%d %H:%M:%S")


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": _SINCE, "machine": _machine()}


def _machine() -> str:
    """What tells process ids of one machine, and container, from those of others."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_over_here(holder: dict[str, Any]) -> bool:
    """Whether its process was one of this machine, and has ended."""
    pid = holder.get("pid")
    if not _machine() or holder.get("machine") != _machine() or not isinstance(pid, int):
        return False
    return not os.path.exists(f"/proc/{pid}")
