"""The run folder: files that can be read while a run goes on, and that a resumed run continues."""

import json
import os
import signal
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from rljax.training import MetricsWriter, PhaseTimer, RunFolder, lease, local_copy, reachable, read_jsonl, run_folder
from rljax.training.run_folder import progress_line


def write(folder, steps, start):
    with RunFolder(folder, config={"name": "test", "steps": 10}) as run:
        run.start(start)
        for step in steps:
            records = [{"text": "é", "tokens": np.arange(2), "reward": np.float32(1)}]
            run.log_step(step, {"rollout/reward_mean": step / 10, "loss/total": float("nan")}, records)
            run.write_json(run.evaluation_file(step), {"score": step})


def test_a_resumed_run_continues_its_files(tmp_path):
    write(tmp_path / "whole", range(1, 9), 0)
    write(tmp_path / "cut", range(1, 7), 0)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rollout/rew')  # cut off by a kill
    write(tmp_path / "cut", range(5, 9), 4)
    for name in ("metrics.jsonl", *(f"rollouts/step_{s:06d}.jsonl" for s in range(1, 9))):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = read_jsonl(tmp_path / "cut" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[0]["loss/total"] == "nan"
    assert read_jsonl(tmp_path / "cut" / "rollouts" / "step_000001.jsonl")[0] == {
        "text": "é",
        "tokens": [0, 1],
        "reward": 1.0,
    }


def test_half_characters_are_escaped_wherever_text_of_others_is_written(tmp_path):
    record = {"completion": "a\ud800b", "error": "\udfff", "prompt": [{"role": "user", "content": "é\udc00"}]}
    with RunFolder(tmp_path, config={"name": "\ud800"}) as run:
        run.start(0)
        run.log_step(1, {}, [record])
        run.write_json("evaluations/step_000001.json", record)
    assert read_jsonl(tmp_path / "rollouts" / "step_000001.jsonl") == [record]
    assert json.loads((tmp_path / "evaluations" / "step_000001.json").read_text(encoding="utf-8")) == record
    assert "é" in (tmp_path / "rollouts" / "step_000001.jsonl").read_text(encoding="utf-8")


def test_what_was_written_after_the_checkpoint_is_dropped_at_once(tmp_path):
    write(tmp_path, range(1, 7), 0)
    half_written = tmp_path / "evaluations" / "step_000005.json.tmp"
    half_written.write_text("{")
    with RunFolder(tmp_path) as run:
        run.start(4)
        assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4]
        assert not run.evaluation_file(5).exists() and run.evaluation_file(4).exists()
        assert not half_written.exists()
        assert len(list((tmp_path / "rollouts").iterdir())) == 4


def test_fresh_empties_what_a_run_writes_and_nothing_else(tmp_path):
    write(tmp_path, range(1, 3), 0)
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder(tmp_path, fresh=True) as run:
        run.start(0)
        assert run.metrics() == [] and not list((tmp_path / "rollouts").iterdir())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_tensorboard_reads_the_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss/total": 0.5 * step})
    writer.close()
    resumed = MetricsWriter(tmp_path, resume_after=2)
    resumed.write(3, {"loss/total": 9.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_a_run_that_starts_over_leaves_nothing_of_the_steps_before(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(1, 4), 0)
    (tmp_path / "summary.json").write_text("{}")
    write(tmp_path, [1], 0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("rollout/reward_mean")] == [1]
    assert not (tmp_path / "summary.json").exists() and not list((tmp_path / "evaluations").glob("*00[23].json"))


class FakeRun:
    """What `wandb.init` returns, as far as it is used."""

    def __init__(self, **settings):
        self.settings, self.lines, self.is_finished = settings, [], False

    def log(self, values, step):
        self.lines.append((step, values))

    def finish(self):
        self.is_finished = True


def test_weights_and_biases_gets_the_lines_and_a_resumed_run_its_id(tmp_path, monkeypatch):
    made = []

    def init(**settings):
        made.append(FakeRun(**settings))
        return made[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start, step in ((0, 1), (1, 2)):
        with RunFolder(tmp_path, config={"name": "test", "steps": 2, "log": {"wandb_project": "words"}}) as run:
            run.start(start)
            run.log_step(step, {"loss/total": 0.5 * step}, [])
    assert [run.lines for run in made] == [[(1, {"loss/total": 0.5})], [(2, {"loss/total": 1.0})]]
    assert all(run.is_finished and run.settings["project"] == "words" for run in made)
    assert made[0].settings["id"] == made[1].settings["id"] and made[1].settings["resume"] == "allow"
    assert made[0].settings["name"] == "test" and made[0].settings["config"]["steps"] == 2


def test_versions_and_config_are_recorded(tmp_path):
    write(tmp_path, [1], 0)
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions["packages"]["jax"] and versions["devices"] and versions["python"]
    assert json.loads((tmp_path / "config.json").read_text()) == {"name": "test", "steps": 10}


def test_the_picture_is_drawn(tmp_path):
    write(tmp_path, range(1, 9), 0)
    assert RunFolder(tmp_path).plot([(0, 0.1), (8, 0.9)]).read_bytes().startswith(b"\x89PNG")


def test_log_step_before_start_says_what_was_forgotten(tmp_path):
    with pytest.raises(RuntimeError, match="start"):
        RunFolder(tmp_path).log_step(1, {})


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "file")


def test_phases_add_up_and_the_progress_line_shows_what_there_is():
    timer = PhaseTimer()
    for _ in range(2):
        with timer("sample"):
            pass
    metrics = timer.metrics()
    assert 0 < metrics["time/sample_s"] < metrics["time/total_s"]
    assert progress_line({"rollout/reward_mean": 0.5, "time/tokens_per_s": 812.3}) == "reward=0.500 tok/s=812"


HOLDER = """
import fcntl, json, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_TRUNC)
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
os.write(file, json.dumps({"pid": os.getpid(), "host": "elsewhere", "since": "noon"}).encode())
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_in_use_by_another_process_is_refused_and_free_again_when_that_is_killed(tmp_path):
    write(tmp_path, [1], 0)
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"in use by another run \(process {other.pid} on elsewhere since noon\)"):
            RunFolder(tmp_path, fresh=True)
        assert read_jsonl(tmp_path / "metrics.jsonl"), "it was emptied"
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    write(tmp_path, [2], 1)


def test_the_lock_is_held_until_the_run_has_left_and_not_by_its_children(tmp_path):
    attempt = [sys.executable, "-c", HOLDER.replace("time.sleep(60)", ""), str(tmp_path / "lock")]
    with RunFolder(tmp_path) as run:
        with RunFolder(tmp_path):
            pass
        run.close()
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        assert subprocess.run(attempt, capture_output=True).returncode != 0
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(reader, 1)
            os._exit(0)
    try:
        assert subprocess.run(attempt, capture_output=True).returncode == 0
    finally:
        os.write(writer, b"x")
        os.waitpid(child, 0)


def test_every_start_is_kept_with_its_config(tmp_path):
    for start, rate in ((0, 1e-3), (1, 0.5)):
        with RunFolder(tmp_path, config={"optimizer": {"learning_rate": rate}}) as run:
            assert run.previous_config == (None if start == 0 else {"optimizer": {"learning_rate": 1e-3}})
            run.start(start)
    starts = read_jsonl(tmp_path / "starts.jsonl")
    assert [(s["step"], s["config"]["optimizer"]["learning_rate"]) for s in starts] == [(0, 1e-3), (1, 0.5)]


@pytest.mark.parametrize("text", ['{"step": 1', "\ufeff{}", "nonsense"])
def test_a_damaged_file_is_named(tmp_path, text):
    for name in ("metrics.jsonl", "config.json"):
        (tmp_path / name).write_text('{"step": 0}\n' + text + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_jsonl(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        RunFolder(tmp_path)


class Bucket:
    """What a storage client does, on a local folder that stands for everything behind `gs://`."""

    def __init__(self, root):
        self.root = f"{root}/"

    def __getattr__(self, name):
        from etils.epath import backend

        def here(value):
            return str(value).replace("gs://", self.root) if hasattr(value, "__fspath__") or "gs://" in value else value

        def call(*values, **options):
            found = getattr(backend.os_backend, name)(*map(here, values), **options)
            return [path.replace(self.root, "gs://") for path in found] if name == "glob" else found

        return call


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """The folder behind `gs://`."""
    from etils.epath import gpath

    client = Bucket(tmp_path)
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)
    monkeypatch.setattr(gpath._GPath, "_backend", property(lambda self: client))
    monkeypatch.setattr(gpath, "_get_backend", lambda one, other: client)
    return tmp_path / "bucket"


def test_a_run_folder_may_be_an_address_and_leaves_nothing_beside_it(bucket, monkeypatch):
    monkeypatch.chdir(bucket.parent)
    bucket.mkdir()
    write("gs://bucket/run", range(1, 5), 0)
    write("gs://bucket/run", range(3, 4), 2)
    write(bucket.parent / "local", range(1, 4), 0)
    for name in ("metrics.jsonl", "config.json", "rollouts/step_000003.jsonl", "evaluations/step_000003.json"):
        assert (bucket / "run" / name).read_bytes() == (bucket.parent / "local" / name).read_bytes()
    assert not (bucket / "run" / "rollouts" / "step_000004.jsonl").exists()
    assert len(list((bucket / "run" / "tensorboard").iterdir())) == 2
    with RunFolder("gs://bucket/run") as run:
        assert run.plot([(0, 0.1)]).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in bucket.parent.iterdir()) == ["bucket", "local"]
    with RunFolder("gs://bucket/run", fresh=True):
        assert not (bucket / "run" / "metrics.jsonl").exists()


def test_what_reads_local_folders_alone_gets_a_copy_of_a_remote_one(bucket):
    (bucket / "model" / "more").mkdir(parents=True)
    (bucket / "model" / "config.json").write_text("{}")
    (bucket / "model" / "more" / "words.txt").write_text("a b")
    with local_copy(reachable("gs://bucket/model")) as folder:
        assert folder != bucket / "model"
        assert {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()} == {
            "config.json": "{}",
            "more/words.txt": "a b",
        }
    assert not folder.exists()
    with local_copy(bucket / "model") as same:
        assert same == bucket / "model"


def test_storage_that_cannot_be_reached_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        ValueError, match=r"gs://bucket/run cannot be reached \(.*gcsfs.*\); pip install gcsfs, and gcloud"
    ):
        reachable("gs://bucket/run")
    with pytest.raises(ValueError, match=r"hdfs://x/run is on storage of an unknown kind; .* gs://, s3://"):
        reachable("hdfs://x/run")
    assert reachable("runs/x").is_absolute()


def test_logs_are_written_in_order_behind_the_loop_and_whole_at_the_end(tmp_path, monkeypatch):
    may_go_on = threading.Event()
    written = []

    def slowly(file, text, write=run_folder.write_text):
        may_go_on.wait(10)
        written.append(file.name)
        write(file, text)

    with RunFolder(tmp_path, config={"name": "test"}) as run:
        run.start(0)
        monkeypatch.setattr(run_folder, "write_text", slowly)
        run.log_rollouts(1, [{"text": "a"}])
        run.log_step(1, {"loss/total": 1.0})
        assert not written and not read_jsonl(tmp_path / "metrics.jsonl")
        may_go_on.set()
        assert [line["step"] for line in run.metrics()] == [1] and written == ["step_000001.jsonl"]
        run.log_step(2, {}, [{"text": "b"}])
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert read_jsonl(tmp_path / "rollouts" / "step_000002.jsonl") == [{"text": "b"}]


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    def full(file, text):
        raise OSError("no space left on device")

    run = RunFolder(tmp_path, config={"name": "test"})
    run.start(0)
    monkeypatch.setattr(run_folder, "write_text", full)
    run.log_rollouts(1, [{"text": "a"}])
    with pytest.raises(OSError, match="no space left"):
        run.flush()
    run.close()


def test_what_follows_a_log_that_failed_is_not_written_and_the_folder_is_free(tmp_path, monkeypatch):
    """A line of metrics tells that the rollouts of its step are whole."""

    def full(file, text):
        raise OSError(f"no space left for {file.name}")

    with pytest.raises(OSError, match="no space left for step_000001"), RunFolder(tmp_path) as run:
        run.start(0)
        monkeypatch.setattr(run_folder, "write_text", full)
        may_go_on = threading.Event()
        run._background(may_go_on.wait, 10)
        run.log_step(1, {"loss/total": 1.0}, [{"text": "a"}])
        run.log_rollouts(2, [{"text": "b"}])
        may_go_on.set()
    assert not read_jsonl(tmp_path / "metrics.jsonl")
    attempt = [sys.executable, "-c", HOLDER.replace("time.sleep(60)", ""), str(tmp_path / "lock")]
    assert subprocess.run(attempt, capture_output=True).returncode == 0
