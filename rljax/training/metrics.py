"""Metrics to files: JSONL and TensorBoard always, Weights & Biases if asked; and the time of each phase."""

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rljax.training.storage import (
    AnyPath,
    GrowingFile,
    as_path,
    copy_files,
    is_remote,
    remove_tree,
    replace_text,
)


class MetricsWriter:
    """Appends one line a step to `folder/metrics.jsonl`, the same to TensorBoard in `folder/tensorboard`, and to W&B
    when `wandb_project` is named (the extra `wandb`).

    Lines are flushed at once; in a remote folder some seconds later, and by `flush`. Lines of steps after
    `resume_after` are dropped (0: all of them), so that a resumed run's file goes on where its checkpoint was;
    TensorBoard is told to forget them too, and with 0 its files and the id of the W&B run go. Values that are not
    finite are written as strings.
    """

    def __init__(
        self,
        folder: str | AnyPath,
        *,
        resume_after: int = 0,
        wandb_project: str = "",
        run_name: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = as_path(folder)
        folder.mkdir(parents=True, exist_ok=True)

        # The order is important: lines after the checkpoint go before the file is opened to append.
        self.path = folder / "metrics.jsonl"
        truncate_jsonl(self.path, resume_after)
        self._lines = GrowingFile(self.path)
        if not resume_after:
            remove_tree(folder / "tensorboard")
            (folder / "wandb_id").unlink(missing_ok=True)

        # TensorBoard and W&B write local files; where the folder is remote, those of the first are copied there.
        self._copy_to = folder / "tensorboard" if is_remote(folder) else None
        self._copied = time.monotonic()
        self._local = Path(tempfile.mkdtemp()) if is_remote(folder) else Path(str(folder))
        self._events = EventFileWriter(str(self._local / "tensorboard"))
        if resume_after:
            # A START event makes TensorBoard drop what an earlier process wrote from this step on.
            start = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(wall_time=time.time(), step=resume_after + 1, session_log=start))

        self._wandb = None
        if wandb_project:
            import wandb

            # One id for the folder, so that a resumed run goes on in the same W&B run.
            self._wandb = wandb.init(
                project=wandb_project,
                name=run_name or None,
                id=_run_id(folder),
                resume="allow",
                dir=str(self._local),
                config=dict(config or {}),
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for `step`, keys sorted."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = {name: float(value) for name, value in sorted(metrics.items())}
        line = {"step": step} | {name: _json_number(value) for name, value in values.items()}
        self._lines.append(json.dumps(line) + "\n")

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()
        if time.monotonic() - self._copied >= GrowingFile.UPLOAD_S:
            self._copy_events()

        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def flush(self) -> None:
        """Everything that was written is in the folder afterwards."""
        self._lines.flush()
        self._copy_events()

    def _copy_events(self) -> None:
        if self._copy_to is not None:
            copy_files(self._local / "tensorboard", self._copy_to)
            self._copied = time.monotonic()

    def close(self, *, uploads: bool = True) -> None:
        """Ends all logs. Without `uploads` nothing more is written to a remote folder."""
        self._events.close()
        if uploads:
            self.flush()
        if self._copy_to is not None:
            remove_tree(self._local)
        if self._wandb is not None:
            self._wandb.finish()


def _run_id(folder: AnyPath) -> str:
    """A W&B id that a resumed run finds again."""
    file = folder / "wandb_id"
    if not file.exists():
        file.write_text(f"{time.time_ns():x}")
    return file.read_text().strip()


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
