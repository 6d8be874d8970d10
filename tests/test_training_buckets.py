"""Run folders in buckets: what cannot be locked, appended to or renamed keeps the promises of a disk."""

import json
import os
import subprocess
import sys
import threading
import time

import object_store
import pytest
from test_run_overlap import EXAMPLES, made
from test_training_checkpoint import assert_is_step, make_state, save_steps, target
from test_training_run_folder import write

from rljax.experiment.journal import Journal
from rljax.training import Checkpointer, RunFolder, lease, reachable, read_jsonl
from rljax.training.lease import Lease
from rljax.training.storage import GrowingFile, move_tree


@pytest.fixture
def store(monkeypatch):
    """Leases of a second instead of a minute."""
    for name, seconds in (("LEASE_S", 1.0), ("_RENEW_S", 0.05), ("_SETTLE_S", 0.05), ("_POLL_S", 0.02)):
        monkeypatch.setattr(lease, name, seconds)
    return object_store.install(monkeypatch)


def test_a_folder_in_a_bucket_holds_what_one_on_a_disk_does(store, tmp_path):
    for folder in ("gs://bucket/run", tmp_path / "run"):
        write(folder, range(1, 5), 0)
        write(folder, range(3, 4), 2)
    on_disk = {
        str(path.relative_to(tmp_path / "run")): path for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    in_bucket = object_store.contents("gs://bucket/run")
    of_run = {name for name in in_bucket if not name.startswith("tensorboard/")}
    assert of_run == {name for name in on_disk if not name.startswith("tensorboard/")} - {"lock"}
    for name in of_run - {"versions.json", "starts.jsonl"}:
        assert in_bucket[name] == on_disk[name].read_bytes(), name
    assert [line["step"] for line in map(json.loads, in_bucket["starts.jsonl"].splitlines())] == [0, 2]


def test_lines_go_out_together_and_all_of_them_before_a_checkpoint(store):
    with RunFolder("gs://bucket/run", config={}) as run:
        run.start(0)
        before = store.puts["/bucket/run/metrics.jsonl"]
        for step in range(1, 101):
            run.log_step(step, {"loss/total": float(step)})
        run._background.wait()
        assert store.puts["/bucket/run/metrics.jsonl"] == before
        run.flush()
        assert store.puts["/bucket/run/metrics.jsonl"] == before + 1
        assert [line["step"] for line in read_jsonl("gs://bucket/run/metrics.jsonl")] == list(range(1, 101))


def test_what_was_written_a_while_ago_is_there_without_being_asked_for(store, monkeypatch):
    file = GrowingFile(reachable("gs://bucket/a.jsonl"))
    file.append("1\n")
    assert object_store.contents("gs://bucket") == {}
    monkeypatch.setattr(GrowingFile, "UPLOAD_S", 0.0)
    file.append("2\n")
    assert object_store.contents("gs://bucket") == {"a.jsonl": b"1\n2\n"}
    again = GrowingFile(reachable("gs://bucket/a.jsonl"))
    again.append("3\n")
    assert object_store.contents("gs://bucket") == {"a.jsonl": b"1\n2\n3\n"}


def test_a_folder_in_use_is_refused_in_one_line_and_free_when_it_is_left(store):
    folder = reachable("gs://bucket/run")
    first = Lease(folder)
    first.take()
    with pytest.raises(
        ValueError, match=rf"workdir gs://bucket/run is in use by another run \(process {os.getpid()} on"
    ):
        Lease(folder).take()
    first.check()
    first.release()
    assert object_store.contents("gs://bucket") == {}
    second = Lease(folder)
    second.take()
    second.release()


def test_a_lease_of_a_dead_run_is_over_after_its_time_and_at_once_where_its_death_is_known(store, monkeypatch):
    folder = reachable("gs://bucket/run")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    holder = {"id": "x", "beats": 7, "pid": dead.pid, "host": "other", "since": "then", "machine": lease._machine()}

    for machine, least, most in ((lease._machine(), 0.0, 0.9), ("another one", 1.0, 30.0)):
        (folder / "lock").write_text(json.dumps(holder | {"machine": machine}))
        begin = time.monotonic()
        taken = Lease(folder)
        taken.take()
        assert least <= time.monotonic() - begin < most
        taken.release()


def test_of_several_that_come_at_once_one_gets_the_folder(store):
    folder = reachable("gs://bucket/run")
    leases = [Lease(folder) for _ in range(6)]
    refused = []

    def take(one):
        try:
            one.take()
        except ValueError as error:
            refused.append((one, str(error)))

    threads = [threading.Thread(target=take, args=(one,)) for one in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [one for one in leases if one not in [loser for loser, _ in refused]]
    assert json.loads(object_store.contents("gs://bucket/run")["lock"])["id"] == winner._id
    winner.release()
    assert len(refused) == 5 and all("is in use by another run" in says for _, says in refused)


def take_over(run):
    """Another run's name in the lock, which the first one finds. It may just be writing its own, and then the other one
    would write again."""
    name = json.dumps({"id": "x", "pid": 7, "host": "other", "since": "then"})
    deadline = time.monotonic() + 10
    while not run._lease.is_lost:
        assert time.monotonic() < deadline
        if (run.path / "lock").read_text() != name:
            (run.path / "lock").write_text(name)
        time.sleep(0.01)


def test_a_run_whose_folder_was_taken_while_it_stood_still_writes_nothing_more(store):
    run = RunFolder("gs://bucket/run", config={})
    with pytest.raises(RuntimeError, match=r"was taken by another run \(process 7 on other since then\) while"), run:
        run.start(0)
        run.log_step(1, {"loss/total": 1.0})
        run.flush()
        take_over(run)
        (run.path / "metrics.jsonl").write_text("of the other\n")
        with pytest.raises(RuntimeError, match="was taken by another run"):
            run.write_json("summary.json", {})
        with pytest.raises(RuntimeError, match="was taken by another run"):
            Journal(run.journal, run.check_lease).write(made())
        run.log_step(2, {"loss/total": 2.0})
    found = object_store.contents("gs://bucket/run")
    assert not [name for name in found if name.startswith(("summary", "journal"))]
    assert found["metrics.jsonl"] == b"of the other\n" and json.loads(found["lock"])["id"] == "x"


def test_a_kill_at_any_write_leaves_a_whole_folder_or_one_that_says_it_is_none(store, tmp_path):

    old = {"config.json": "old", "words": "old", "gone": "old"}
    new = {"config.json": "new", "words": "new", "more/words": "new"}
    source, goal = reachable("gs://bucket/new"), reachable("gs://bucket/model")
    whole = {name: text.encode() for name, text in new.items()}
    for changes in range(100):
        store.store.clear()
        for files, folder in ((old, goal), (new, source)):
            for name, text in files.items():
                (folder / name).write_text(text)
        store.fails_after = changes
        try:
            move_tree(source, goal, last="config.json")
        except InterruptedError:
            store.fails_after = None
            found = object_store.contents("gs://bucket/model")
            assert "config.json" not in found or found in (whole, {n: t.encode() for n, t in old.items()})
            if object_store.contents("gs://bucket/new") == whole:
                move_tree(source, goal, last="config.json")
                assert object_store.contents("gs://bucket/model") == whole
        else:
            break
    store.fails_after = None
    assert changes == 1 + 2 + 3 + 3 and object_store.contents("gs://bucket") == {
        f"model/{n}": t for n, t in whole.items()
    }


def test_a_journal_in_a_bucket_gives_back_its_rollouts(store):
    """Each is one object, written once: nothing is renamed."""
    journal = Journal(reachable("gs://bucket/run/journal"))
    for step in (3, 4):
        journal.write(made(step))
    assert sorted(object_store.contents("gs://bucket/run/journal")) == ["rollout_000003.npz", "rollout_000004.npz"]
    assert [one.step for one in journal.load(3, EXAMPLES)] == [3, 4] and journal.holds(3, 5)
    journal.keep(4)
    assert sorted(object_store.contents("gs://bucket/run/journal")) == ["rollout_000004.npz"]


@pytest.mark.parametrize(
    "says",
    [
        "Forbidden: https://hunter2:hunter2@storage/x",
        "403 GET https://x/o?X-Goog-Signature=hunter2&X-Goog-Credential=hunter2",
        "bad header Authorization: Bearer hunter2",
        "{'aws_secret_access_key': 'hunter2', 'token': \"hunter2\"} is wrong",
        "secret=hunter2; access-token: hunter2",
    ],
)
def test_what_a_client_says_of_keys_is_left_out(store, monkeypatch, says):
    def fails(self, path, **options):
        raise PermissionError(says)

    monkeypatch.setattr(store, "exists", fails)
    with pytest.raises(ValueError, match="gs://bucket/run cannot be reached") as error:
        reachable("gs://bucket/run")
    assert "hunter2" not in str(error.value) and "\n" not in str(error.value)


def test_an_address_with_credentials_is_refused_without_showing_them():
    with pytest.raises(ValueError, match="must hold no credentials") as error:
        reachable("s3://key:hunter2@bucket/run")
    assert "hunter2" not in str(error.value)


def test_checkpoints_go_to_a_bucket_that_arrays_cannot_be_written_to(store):
    save_steps("s3://bucket/run/checkpoints", range(1, 5), keep_last=2)
    found = {name.split("/")[0] for name in object_store.contents("s3://bucket/run/checkpoints")}
    assert found == {"3", "4"}
    assert_is_step(Checkpointer("s3://bucket/run/checkpoints").restore(target()), 4)


def test_a_kill_during_any_write_of_a_checkpoint_leaves_the_one_before(store):
    folder = "s3://bucket/checkpoints"
    save_steps(folder, [1])
    before = dict(store.store)

    # The first, one in the middle, and the last, which is the mark. How many there are differs from save to save.
    for kill in ({"fails_after": 0}, {"fails_after": 5}, {"fails_on": "/bucket/checkpoints/2/_CHECKPOINT_METADATA"}):
        store.store.clear()
        store.store.update(before)
        store.puts.clear()
        checkpointer = Checkpointer(folder)
        for name, value in kill.items():
            setattr(store, name, value)
        with pytest.raises(InterruptedError):
            checkpointer.save(2, make_state(2), {"step": 2})
        assert "fails_on" not in kill or sum(store.puts.values()) > 5
        store.fails_after = store.fails_on = None
        assert_is_step(Checkpointer(folder).restore(target()), 1)
        assert {name.split("/")[0] for name in object_store.contents(folder)} == {"1"}


def test_a_run_whose_folder_was_taken_leaves_the_checkpoints_of_the_other_alone(store):
    """Its own copies are of the steps before, and what is not among them would go."""
    run = RunFolder("s3://bucket/run", config={})
    checkpoints = Checkpointer(run.checkpoints, check=run.check_lease)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    take_over(run)
    save_steps(run.checkpoints, [2, 3], keep_last=1)
    for leaves in (checkpoints.close, lambda: run.__exit__(None, None, None)):
        with pytest.raises(RuntimeError, match="was taken by another run"):
            leaves()
    assert {name.split("/")[0] for name in object_store.contents("s3://bucket/run/checkpoints")} == {"3"}


def test_a_damaged_checkpoint_of_a_bucket_is_set_aside(store):
    folder = "s3://bucket/checkpoints"
    save_steps(folder, [1, 2])
    name = next(name for name in store.store if name.startswith("/bucket/checkpoints/2/host/metadata"))
    store.store[name].seek(0)
    store.store[name].write(b"!!")
    assert_is_step(Checkpointer(folder).restore(target()), 1)
    assert {name.split("/")[0] for name in object_store.contents(folder)} == {"1"}
    assert {name.split("/")[0] for name in object_store.contents("s3://bucket/checkpoints_unreadable")} == {"2"}
