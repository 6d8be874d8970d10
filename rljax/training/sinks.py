"""Where metrics go beside `metrics.jsonl`: TensorBoard always; Weights & Biases, trackio and MLflow where asked."""

import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rljax.training.storage import AnyPath, GrowingFile, copy_files, is_remote, remove_tree


@runtime_checkable
class Sink(Protocol):
    """Takes the metrics of a run, step by step, and rollouts to look at."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of the step that brings the count to `step`."""
        ...

    def write_rollouts(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Some rollouts of that step, before its metrics, as lines of `rollouts/`."""
        ...

    def flush(self) -> None:
        """What was written is in the run folder afterwards, where the sink keeps it there."""
        ...

    def close(self, *, uploads: bool = True) -> None:
        """Ends the log. Without `uploads` nothing more is written to a remote run folder."""
        ...


@dataclasses.dataclass(frozen=True)
class Trackers:
    """The services that get metrics, by the names that they put a run under; an empty name is none. And of how many
    rollouts of a step they are told (`traces`)."""

    wandb_project: str = ""
    trackio_project: str = ""
    mlflow_experiment: str = ""
    traces: int = 0

    @classmethod
    def of(cls, log: Mapping[str, Any]) -> "Trackers":
        """Those that `config.log` names."""
        return cls(**{field.name: log.get(field.name, field.default) for field in dataclasses.fields(cls)})

    def open(self, folder: AnyPath, local: Path, name: str, config: Mapping[str, Any]) -> dict[str, Sink]:
        """A sink for each, by name. They keep in `folder` under which id a resumed run goes on, and other files in
        `local`."""
        sinks: dict[str, Sink] = {}
        if self.wandb_project:
            sinks["W&B"] = WandbSink(self.wandb_project, folder, local, name, config)
        if self.trackio_project:
            sinks["trackio"] = TrackioSink(self.trackio_project, folder, name, config)
        if self.mlflow_experiment:
            sinks["MLflow"] = MlflowSink(self.mlflow_experiment, folder, name, config)
        return sinks


ID_FILES = ("wandb_id", "trackio_id", "mlflow_id")
"""Files of a run folder with the ids under which trackers know the run; a run that starts over gets new ones."""


class TensorBoardSink:
    """Events in `folder/tensorboard`. With `resume_after` above 0 TensorBoard is told to forget later steps."""

    def __init__(self, folder: AnyPath, local: Path, resume_after: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # It writes local files; where the folder is remote, they are copied there.
        self._local = local / "tensorboard"
        self._copy_to = folder / "tensorboard" if is_remote(folder) else None
        self._copied = time.monotonic()
        self._events = EventFileWriter(str(self._local))
        if resume_after:
            # A START event makes TensorBoard drop what an earlier process wrote from this step on.
            start = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(wall_time=time.time(), step=resume_after + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()
        if time.monotonic() - self._copied >= GrowingFile.UPLOAD_S:
            self.flush()

    def write_rollouts(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """It has no place for them; they are in the run folder."""

    def flush(self) -> None:
        if self._copy_to is not None:
            copy_files(self._local, self._copy_to)
            self._copied = time.monotonic()

    def close(self, *, uploads: bool = True) -> None:
        self._events.close()
        if uploads:
            self.flush()


class WandbSink:
    """A run of Weights & Biases (the extra `wandb`); rollouts are the table `rollouts`."""

    def __init__(self, project: str, folder: AnyPath, local: Path, name: str, config: Mapping[str, Any]):
        import wandb

        # One id for the folder, so that a resumed run goes on in the same one.
        self._run = wandb.init(
            project=project,
            name=name or None,
            id=_kept_id(folder / "wandb_id"),
            resume="allow",
            dir=str(local),
            config=dict(config),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def write_rollouts(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        columns = _as_columns(records)
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self._run.log({"rollouts": wandb.Table(columns=list(columns), data=rows)}, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self, *, uploads: bool = True) -> None:
        self._run.finish()


class TrackioSink:
    """A run of trackio (the extra `trackio`): in `TRACKIO_DIR` of this machine, or in the Space or on the server that
    its own variables name. Rollouts are traces: what was asked and said, and beside it the reward and its parts."""

    def __init__(self, project: str, folder: AnyPath, name: str, config: Mapping[str, Any]):
        import trackio

        # It knows a run by its name, which must be the folder's alone.
        known_as = "-".join(filter(None, [name, _kept_id(folder / "trackio_id")]))
        self._run = trackio.init(project=project, name=known_as, resume="allow", config=dict(config), embed=False)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def write_rollouts(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        import trackio

        for record in records:
            about = {name: value for name, value in _as_row(record).items() if name not in ("prompt", "completion")}
            self._run.log({"rollouts": trackio.Trace(messages=_messages_of(record), metadata=about)}, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self, *, uploads: bool = True) -> None:
        self._run.finish()


class MlflowSink:
    """A run of MLflow (the extra `mlflow`), on the server or in the folder that `MLFLOW_TRACKING_URI` names. Its names
    know no `@`: `eval/avg@4` is `eval/avg_at_4` there. Rollouts are tables in `rollouts/`, one a step."""

    def __init__(self, experiment: str, folder: AnyPath, name: str, config: Mapping[str, Any]):
        from mlflow import MlflowClient

        self._client = MlflowClient()
        file = folder / "mlflow_id"
        if not file.exists():
            known = self._client.get_experiment_by_name(experiment)
            where = self._client.create_experiment(experiment) if known is None else known.experiment_id
            run = self._client.create_run(where, run_name=name or None)
            file.write_text(run.info.run_id)
            self._client.log_dict(run.info.run_id, dict(config), "config.json")
        self._id = file.read_text().strip()
        self._client.update_run(self._id, status="RUNNING")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        # A call takes so many at most.
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000], synchronous=True)

    def write_rollouts(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        self._client.log_table(self._id, _as_columns(records), f"rollouts/step_{step:06d}.json")

    def flush(self) -> None:
        """What is written has been sent."""

    def close(self, *, uploads: bool = True) -> None:
        self._client.set_terminated(self._id)


def _messages_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A rollout as a conversation: the chat that it continues, or text, and all that came after it."""
    prompt = record["prompt"]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
    return [*asked, {"role": "assistant", "content": record["completion"]}]


def _as_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a rollout a table shows; texts and numbers alone."""
    prompt = record["prompt"]
    row = {"step": record["step"], "prompt_id": record["prompt_id"], "sample": record["sample"]}
    row["prompt"] = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    row |= {name: record.get(name) for name in ("completion", "reward", "advantage", "finish_reason", "error")}
    return row | {"components": json.dumps(record.get("components") or {})}


def _as_columns(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    rows = [_as_row(record) for record in records]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


def _kept_id(file: AnyPath) -> str:
    """An id that a resumed run finds again."""
    if not file.exists():
        file.write_text(f"{time.time_ns():x}")
    return file.read_text().strip()


def local_place(folder: AnyPath) -> Path:
    """Where what cannot write to a remote run folder writes: the folder itself, or one of this machine for it."""
    return Path(tempfile.mkdtemp()) if is_remote(folder) else Path(str(folder))


def drop_local_place(folder: AnyPath, local: Path) -> None:
    """Removes it, if it is not the run folder itself."""
    if is_remote(folder):
        remove_tree(local)
