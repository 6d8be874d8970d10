"""Trackers receive what `metrics.jsonl` has: each real package writes offline, and is read back by its own means."""

import json
import logging
import struct

import pytest

from rljax.training import MetricsWriter, RunFolder, Sink, Trackers, read_jsonl, sinks

LINES = {
    1: {"loss/total": 0.5, "eval/avg@4": 0.25, "rollout/reward_mean": 1 / 3},
    2: {"loss/total": -2.0, "time/total_s": 1e-9},
    3: {"loss/total": 7.0},
}


RECORDS = [
    {
        "step": step,
        "prompt_id": 7,
        "sample": sample,
        "prompt": [{"role": "user", "content": "2 + 2?"}] if sample else "2 + 2?",
        "completion": f" {sample + 4}",
        "reward": 1.0 - sample,
        "components": {"exact": 1.0 - sample},
        "finish_reason": "eos",
        "error": None,
        "tokens": [1, 2],
    }
    for step in LINES
    for sample in (0, 1, 2)
]
"""Rollouts of each step, of which trackers get two."""


def needed(package):
    return pytest.importorskip(package, reason=f"{package} is not installed (the extra of that name)")


def write_in_two_starts(folder, **log):
    """Steps 1 and 2, and the third in a start that goes on."""
    for start, steps in ((0, (1, 2)), (2, (3,))):
        with RunFolder(folder, config={"name": "walk", "steps": 3, "log": {"traces": 2, **log}}) as run:
            run.start(start)
            for step in steps:
                run.log_step(step, LINES[step], [record for record in RECORDS if record["step"] == step])
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
    storage = trackio.sqlite_storage.SQLiteStorage
    logs = storage.get_logs("words", run.name)
    logs = [log for log in logs if "loss/total" in log or "time/total_s" in log]
    assert {log.pop("step"): {k: v for k, v in log.items() if k != "timestamp"} for log in logs} == want

    traces = storage.get_traces("words", run.name)
    assert len(traces) == 6
    by_place = {(trace["metadata"]["step"], trace["metadata"]["sample"]): trace for trace in traces}
    trace = by_place[(2, 1)]
    assert trace["messages"] == [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": " 5"}]
    assert (trace["metadata"]["reward"], trace["metadata"]["components"]) == (0.0, '{"exact": 0.0}')


def test_wandb_received_what_jsonl_has(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    needed("wandb")
    want = write_in_two_starts(tmp_path / "run", wandb_project="words")

    got: dict[int, dict[str, float]] = {}
    told = []
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    for file in files:
        for record in wandb_records(file):
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record}
            step = int(items.pop("_step"))
            table = json.loads((file.parent / "files" / items["rollouts.path"]).read_text())
            rows = [dict(zip(table["columns"], row)) for row in table["data"]]
            told += [(row["step"], row["completion"], row["reward"]) for row in rows]
            got[step] = {name: value for name, value in items.items() if name in want[step]}
    assert got == want
    assert told == [(step, *said) for step in LINES for said in ((" 4", 1.0), (" 5", 0.0))]


def wandb_records(file):
    """The history of a run from the file that an offline run leaves: the package writes it as LevelDB writes its log
    (blocks of 32 KB; records in whole, or as a first, middle and last part), and has no reader for Python."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data.startswith(b":W&B")
    place, parts = 7, b""
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole, or its last part
            record, parts = Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "history":
                yield record.history.item


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

    for step in LINES:
        table = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/rollouts/step_{step:06d}.json")
        rows = [dict(zip(table["columns"], row)) for row in table["data"]]
        assert [(row["step"], row["completion"], row["reward"]) for row in rows] == [
            (step, " 4", 1.0),
            (step, " 5", 0.0),
        ]


class Away:
    """A tracker whose service is away from the second step on."""

    def __init__(self):
        self.got = []

    def write(self, step, values):
        if step > 1:
            raise ConnectionError("no route")
        self.got.append(step)

    def write_rollouts(self, step, records):
        self.got.append((step, len(records)))

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


def test_trackers_get_as_many_rollouts_as_the_config_says_before_their_metrics(tmp_path, monkeypatch):
    away = Away()
    monkeypatch.setattr(sinks.Trackers, "open", lambda *_: {"trackio": away})
    for traces in (0, 5):
        with RunFolder(tmp_path, config={"steps": 1, "log": {"traces": traces}}, fresh=True) as run:
            monkeypatch.setattr(away, "close", lambda **_: None)
            run.start(0)
            run.log_step(1, LINES[1], RECORDS[:3])
    assert away.got == [1, (1, 3), 1]


def test_an_id_of_a_tracker_is_new_where_a_run_starts_over(tmp_path):
    for name in sinks.ID_FILES:
        (tmp_path / name).write_text("old")
    MetricsWriter(tmp_path, resume_after=1).close()
    assert all((tmp_path / name).exists() for name in sinks.ID_FILES)
    MetricsWriter(tmp_path).close()
    assert not any((tmp_path / name).exists() for name in sinks.ID_FILES)
