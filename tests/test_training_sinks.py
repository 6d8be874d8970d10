"""Trackers receive what `metrics.jsonl` has: each real package writes offline, and is read back by its own means."""

import logging

import pytest

from rljax.training import MetricsWriter, RunFolder, Sink, Trackers, read_jsonl, sinks

LINES = {
    1: {"loss/total": 0.5, "eval/avg@4": 0.25, "rollout/reward_mean": 1 / 3},
    2: {"loss/total": -2.0, "time/total_s": 1e-9},
    3: {"loss/total": 7.0},
}


def needed(package):
    return pytest.importorskip(package, reason=f"{package} is not installed (the extra of that name)")


def write_in_two_starts(folder, **log):
    """Steps 1 and 2, and the third in a start that goes on."""
    for start, steps in ((0, (1, 2)), (2, (3,))):
        with RunFolder(folder, config={"name": "walk", "steps": 3, "log": log}) as run:
            run.start(start)
            for step in steps:
                run.log_step(step, LINES[step])
    found = {line.pop("step"): line for line in read_jsonl(folder / "metrics.jsonl")}
    assert found == LINES
    return found


def test_trackio_received_what_jsonl_has(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = needed("trackio")
    want = write_in_two_starts(tmp_path / "run", trackio_project="words")

    # It writes from a thread of its own, which a run waits for at its end.
    (run,) = trackio.Api().runs("words")
    assert run.name.startswith("walk-")
    logs = trackio.sqlite_storage.SQLiteStorage.get_logs("words", run.name)
    assert {log.pop("step"): {k: v for k, v in log.items() if k != "timestamp"} for log in logs} == want


def test_mlflow_received_what_jsonl_has(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = needed("mlflow")
    want = write_in_two_starts(tmp_path / "run", mlflow_experiment="words")

    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("words").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "walk"
    got = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            got.setdefault(metric.step, {})[name.replace("_at_", "@")] = metric.value
    assert got == want
    assert mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/config.json")["steps"] == 3


class Away:
    """A tracker whose service is away from the second step on."""

    def __init__(self):
        self.got = []

    def write(self, step, values):
        if step > 1:
            raise ConnectionError("no route")
        self.got.append(step)

    def flush(self):
        pass

    def close(self, *, uploads=True):
        raise AssertionError("what has failed is left alone")


def test_a_tracker_that_fails_gets_no_more_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    away = Away()
    assert isinstance(away, Sink)
    monkeypatch.setattr(sinks.Trackers, "open", lambda *_: {"W&B": away})
    writer = MetricsWriter(tmp_path, trackers=Trackers("words"))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            writer.write(step, {"loss/total": 0.5})
    writer.close()
    assert away.got == [1] and [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    # Threads of other tests may have something to say too.
    messages = [record.getMessage() for record in caplog.records]
    (said,) = [message for message in messages if message.startswith("W&B")]
    assert said.startswith("W&B failed at step 2 and gets no more metrics of this start (ConnectionError: no route)")


def test_an_id_of_a_tracker_is_new_where_a_run_starts_over(tmp_path):
    for name in sinks.ID_FILES:
        (tmp_path / name).write_text("old")
    MetricsWriter(tmp_path, resume_after=1).close()
    assert all((tmp_path / name).exists() for name in sinks.ID_FILES)
    MetricsWriter(tmp_path).close()
    assert not any((tmp_path / name).exists() for name in sinks.ID_FILES)
