"""What the viewer reads of one run folder: metrics as they grow, the config, and files of rollouts."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_LIVE_S = 120.0


class RolloutFile(NamedTuple):
    """The rollouts of one step, one JSON line a sample."""

    path: Path
    step: int
    is_untrained: bool
    """Drawn by dynamic sampling, and left out."""


class RunReader:
    """A run folder that another process may be writing. Reads only. Safe to use from several threads."""

    def __init__(self, path: Path):
        self.path = path
        self._lines: list[dict[str, Any]] = []
        self._offset = 0
        self._stamp: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` that are whole. Only what has been appended since the last call is read."""
        file = self.path / "metrics.jsonl"
        with self._lock:
            try:
                stat = file.stat()
            except FileNotFoundError:
                self._forget()
                return []

            # A start that goes on drops lines behind its checkpoint: in place, or by another file in its stead.
            if stat.st_size < self._offset or (self._stamp and self._stamp[0] != stat.st_ino):
                self._forget()
            if (stat.st_ino, stat.st_mtime_ns) != self._stamp:
                self._read_on(file)
                self._stamp = (stat.st_ino, stat.st_mtime_ns)
            return list(self._lines)

    def _forget(self) -> None:
        self._lines = []
        self._offset = 0
        self._stamp = None

    def _read_on(self, file: Path) -> None:
        with open(file, "rb") as opened:
            opened.seek(self._offset)
            for line in opened:
                # What has no end yet is being written.
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                found = parse(line)
                if found is not None and isinstance(found.get("step"), int):
                    self._lines.append(found)

    def config(self) -> dict[str, Any]:
        """What `config.json` holds; empty where there is none."""
        try:
            return parse((self.path / "config.json").read_bytes()) or {}
        except OSError:
            return {}

    def is_live(self) -> bool:
        """Whether the run has written a line of late and has not come to its end."""
        try:
            age = time.time() - (self.path / "metrics.jsonl").stat().st_mtime
        except OSError:
            return False
        return age < _LIVE_S and not (self.path / "summary.json").exists()

    def rollout_files(self) -> list[RolloutFile]:
        """By step, those that were trained on first."""
        found = []
        for folder, is_untrained in ((self.path / "rollouts", False), (self.path / "rollouts" / "untrained", True)):
            for file in folder.glob("step_*.jsonl"):
                number = file.stem.removeprefix("step_")
                if number.isdigit():
                    found.append(RolloutFile(file, int(number), is_untrained))
        return sorted(found, key=lambda file: (file.step, file.is_untrained))


def parse(line: bytes) -> dict[str, Any] | None:
    """The object that a line holds; None for anything else, such as a line of a killed process."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def records_in(file: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(offset in bytes, size in bytes, record) of each line that can be read."""
    offset = 0
    with open(file, "rb") as opened:
        for line in opened:
            record = parse(line)
            if record is not None:
                yield offset, len(line), record
            offset += len(line)
