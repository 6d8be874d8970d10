"""Where each rollout of a run lies and what one searches for, in SQLite: a page never loads a whole run.

A thread reads the files, the newest first, each once; what it has read is kept for the next time. Answers are of what
has been read so far, and say how many files are still missing.
"""

import contextlib
import hashlib
import math
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rljax.viewer.run import RolloutFile, RunReader, records_in

_VERSION = 1

_TABLES = """
create table if not exists files (name text primary key, size integer, changed integer);
create table if not exists rollouts (
    file text, place integer, offset integer, size integer,
    step integer, untrained integer, prompts integer, prompt_id text, sample integer,
    reward real, advantage real, tokens integer, gap real, truncated integer, error text
);
create index if not exists by_file on rollouts (file, place);
create index if not exists by_gap on rollouts (gap);
create index if not exists by_tokens on rollouts (tokens);
create index if not exists by_reward on rollouts (reward);
create index if not exists by_error on rollouts (error) where error is not null;
create index if not exists by_truncated on rollouts (step) where truncated;
"""

SEARCHES = {
    "gap": ("worst log-prob gap", "gap is not null", "gap desc"),
    "longest": ("longest", "1", "tokens desc"),
    "failed": ("failed rewards", "error is not null", "step desc, place"),
    "truncated": ("cut off", "truncated", "step desc, place"),
    "best": ("highest reward", "reward is not null", "reward desc"),
    "worst": ("lowest reward", "reward is not null", "reward"),
}
"""What can be looked for over all steps: a name, which rollouts, and their order."""


class Index:
    """The rollouts of one run. `folder` keeps the database, one of each run; it may be removed at any time.

    A file that has changed is read anew, one that is gone is forgotten. Close it to end its thread.
    """

    def __init__(self, run: RunReader, folder: Path):
        self._run = run
        name = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{name}-{_VERSION}.sqlite"
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._is_closed = False
        # Until the thread has looked, none counts as read.
        self._pending = len(run.rollout_files())
        with self._connect() as database:
            database.executescript(_TABLES)
        self._thread = threading.Thread(target=self._work, name="rljax-view-index", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self._file, timeout=60.0)) as database, database:
            # A cache: what a crash loses is read again.
            database.execute("pragma synchronous=off")
            yield database

    def close(self) -> None:
        self._is_closed = True
        self._wake.set()
        self._thread.join()

    def look(self) -> None:
        """Has the thread look for files that are new or changed."""
        self._wake.set()

    @property
    def pending(self) -> int:
        """Files that are still to be read."""
        return self._pending

    def _work(self) -> None:
        while not self._is_closed:
            self._wake.clear()
            for file in self._missing():
                if self._is_closed:
                    return
                self.read(file)
                self._pending -= 1
            self._wake.wait()

    def _missing(self) -> list[RolloutFile]:
        """Files that are not in the database as they are on disk, the newest first; those that are gone leave it."""
        files = self._run.rollout_files()
        with self._lock, self._connect() as database:
            known = {name: (size, changed) for name, size, changed in database.execute("select * from files")}
            gone = set(known) - {_name(file) for file in files}
            for name in gone:
                database.execute("delete from rollouts where file = ?", (name,))
                database.execute("delete from files where name = ?", (name,))

        missing = [file for file in reversed(files) if known.get(_name(file)) != _stamp(file)]
        self._pending = len(missing)
        return missing

    def read(self, file: RolloutFile) -> None:
        """Puts one file into the database, in one transaction, if it is not there as it is on disk."""
        stamp = _stamp(file)
        name = _name(file)
        with self._lock, self._connect() as database:
            found = database.execute("select size, changed from files where name = ?", (name,)).fetchone()
            if stamp is None or found == stamp:
                return
            database.execute("delete from rollouts where file = ?", (name,))
            database.executemany(f"insert into rollouts values ({','.join('?' * 15)})", _rows(file, name))
            database.execute("insert or replace into files values (?, ?, ?)", (name, *stamp))

    def groups(self, file: RolloutFile) -> list[dict[str, Any]]:
        """The groups of one file, in order: how many samples, and their rewards."""
        self.read(file)
        query = """
            select prompts, prompt_id, count(*), avg(reward), min(reward), max(reward), max(abs(advantage)),
                   avg(tokens), sum(truncated), count(error)
            from rollouts where file = ? group by prompts order by prompts
        """
        names = ("group", "prompt_id", "samples", "reward", "low", "high", "advantage", "tokens", "truncated", "failed")
        with self._lock, self._connect() as database:
            return [dict(zip(names, row, strict=True)) for row in database.execute(query, (_name(file),))]

    def first_places(self, file: RolloutFile) -> dict[int, tuple[int, int]]:
        """(offset, size) of the first line of each group."""
        self.read(file)
        query = "select prompts, offset, size from rollouts where file = ? order by place desc"
        with self._lock, self._connect() as database:
            return {group: (offset, size) for group, offset, size in database.execute(query, (_name(file),))}

    def places(self, file: RolloutFile, group: int) -> list[tuple[int, int]]:
        """(offset, size) of the lines of a group."""
        self.read(file)
        query = "select offset, size from rollouts where file = ? and prompts = ? order by place"
        with self._lock, self._connect() as database:
            return list(database.execute(query, (_name(file), group)))

    def find(self, search: str, limit: int) -> list[dict[str, Any]]:
        """The first `limit` rollouts of a search (a key of `SEARCHES`) over all steps that have been read."""
        _, which, order = SEARCHES[search]
        names = ("step", "untrained", "prompts", "sample", "reward", "advantage", "tokens", "gap", "error")
        query = f"select {', '.join(names)} from rollouts where {which} order by {order} limit ?"
        with self._lock, self._connect() as database:
            return [dict(zip(names, row, strict=True)) for row in database.execute(query, (limit,))]


def _name(file: RolloutFile) -> str:
    return f"untrained/{file.path.name}" if file.is_untrained else file.path.name


def _stamp(file: RolloutFile) -> tuple[int, int] | None:
    try:
        stat = file.path.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _rows(file: RolloutFile, name: str) -> Iterator[tuple[Any, ...]]:
    group = -1
    last: tuple[Any, int] | None = None
    for place, (offset, size, record) in enumerate(records_in(file.path)):
        prompt = record.get("prompt_id")
        sample = record.get("sample")
        sample = sample if isinstance(sample, int) else 0
        # One prompt may have several groups in a step, whose samples are counted from 0 again.
        if last is None or last[0] != prompt or sample < last[1]:
            group += 1
        last = (prompt, sample)

        tokens = record.get("tokens") or ()
        error = record.get("error")
        # Text of others may hold half a character, which no database takes.
        shown = None if error is None else str(error)[:500].encode("utf-8", "replace").decode("utf-8")
        yield (
            name,
            place,
            offset,
            size,
            file.step,
            int(file.is_untrained),
            group,
            str(prompt),
            sample,
            record.get("reward"),
            record.get("advantage"),
            len(tokens),
            _largest_gap(record),
            int(record.get("finish_reason") == "length"),
            shown,
        )


def _largest_gap(record: dict[str, Any]) -> float | None:
    """Largest difference (nats) between trainer and sampler on a token that is trained on; None where it is not
    recorded."""
    columns = record.get("per_token") or {}
    ratios = zip(columns.get("log_ratio", ()), columns.get("trained", ()), strict=False)
    return max((abs(ratio) for ratio, is_trained in ratios if is_trained and math.isfinite(ratio)), default=None)


def cache_folder() -> Path:
    """Where indexes are kept: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rljax" / "view"
