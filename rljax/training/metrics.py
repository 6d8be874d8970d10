"""Metrics to files and trackers; and the time of each phase."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from rljax.training.sinks import ID_FILES, Sink, TensorBoardSink, Trackers, drop_local_place, local_place
from rljax.training.storage import AnyPath, GrowingFile, as_path, remove_tree, replace_text

NO_TRACKERS = Trackers()


class MetricsWriter:
    """Appends one line a step to `folder/metrics.jsonl`, and gives the same to TensorBoard in `folder/tensorboard` and
    to `trackers`.

    Lines are flushed at once; in a remote folder some seconds later, and by `flush`. Lines of steps after
    `resume_after` are dropped (0: all of them), so that a resumed run's file goes on where its checkpoint was;
    TensorBoard is told to forget them too, and with 0 its files and the ids of trackers go. Values that are not
    finite are written as strings. A tracker that fails gets nothing more, and the run goes on.
    """

    def __init__(
        self,
        folder: str | AnyPath,
        *,
        resume_after: int = 0,
        trackers: Trackers = NO_TRACKERS,
        run_name: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        folder = as_path(folder)
        folder.mkdir(parents=True, exist_ok=True)

        # The order is important: lines after the checkpoint go before the file is opened to append.
        self.path = folder / "metrics.jsonl"
        truncate_jsonl(self.path, resume_after)
        self._lines = GrowingFile(self.path)
        if not resume_after:
            remove_tree(folder / "tensorboard")
            for name in ID_FILES:
                (folder / name).unlink(missing_ok=True)

        self._folder = folder
        self._local = local_place(folder)
        self._tensorboard = TensorBoardSink(folder, self._local, resume_after)
        self._traces = trackers.traces
        self._trackers = trackers.open(folder, self._local, run_name, config or {})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for `step`, keys sorted."""
        values = {name: float(value) for name, value in sorted(metrics.items())}
        line = {"step": step} | {name: _json_number(value) for name, value in values.items()}
        self._lines.append(json.dumps(line) + "\n")
        self._tensorboard.write(step, values)

        self._tell_trackers(step, lambda sink: sink.write(step, values))

    def write_rollouts(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """The first rollouts of `step`, as many as trackers are to show, before its metrics; the run folder has all."""
        if shown := records[: self._traces]:
            self._tell_trackers(step, lambda sink: sink.write_rollouts(step, shown))

    def _tell_trackers(self, step: int, tell: Callable[[Sink], None]) -> None:
        for name, sink in list(self._trackers.items()):
            try:
                tell(sink)
            except Exception as error:
                # A service that is away must not end a run, whose metrics are all in its folder.
                del self._trackers[name]
                logging.warning(
                    "%s failed at step %d and gets no more metrics of this start (%s: %s); all are in %s",
                    *(name, step, type(error).__name__, error, self.path),
                )

    def flush(self) -> None:
        """Everything that was written is in the folder afterwards."""
        self._lines.flush()
        self._tensorboard.flush()
        for sink in self._trackers.values():
            sink.flush()

    def close(self, *, uploads: bool = True) -> None:
        """Ends all logs. Without `uploads` nothing more is written to a remote folder."""
        if uploads:
            self._lines.flush()
        self._tensorboard.close(uploads=uploads)
        drop_local_place(self._folder, self._local)
        for name, sink in self._trackers.items():
            try:
                sink.close(uploads=uploads)
            except Exception as error:
                logging.warning("%s could not end its log (%s: %s)", name, type(error).__name__, error)


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def read_json(path: str | AnyPath) -> Any:
    """What a JSON file holds. ValueError, with its name, for one that is not whole."""
    path = as_path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or remove it to have it made anew") from None


def read_jsonl(path: str | AnyPath) -> list[dict[str, Any]]:
    """The lines of a JSONL file; a last line that a kill cut off is left out. Missing files are empty. ValueError, with
    file and line, for a damaged one."""
    path = as_path(path)
    if not path.exists():
        return []

    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            if line:
                found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}); restore or remove the line") from None
    return found


def truncate_jsonl(path: str | AnyPath, last_step: int) -> None:
    """Drops the lines of steps after `last_step`, and a line cut off by a kill. The file is replaced in one move."""
    path = as_path(path)
    if not path.exists():
        return

    kept = [json.dumps(line) + "\n" for line in read_jsonl(path) if line["step"] <= last_step]
    replace_text(path, "".join(kept))


class PhaseTimer:
    """Seconds by phase of a step: `with timer("sample"): ...`. Phases may repeat; they add up.

    A phase that dispatches device work must wait for it inside, or the next phase is charged.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def add(self, seconds: Mapping[str, float]) -> None:
        """Adds phases that somebody else has timed."""
        for phase, spent in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    @property
    def total(self) -> float:
        """Seconds since the timer was made."""
        return time.perf_counter() - self._start

    def metrics(self) -> dict[str, float]:
        """`time/<phase>_s` for each phase, and `time/total_s`."""
        return {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()} | {"time/total_s": self.total}
