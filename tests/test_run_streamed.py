"""A run on rows that are read as they come over the network reads the same ones when it goes on."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stub import SHA, serving
from streamed_program import ROWS, STEPS

from rljax.experiment import HubData, commits
from rljax.tasks import SkilledData
from rljax.testing import params_fingerprint, rollout_records, run_metrics, tiny_config
from rljax.training import read_json

TESTS = Path(__file__).parent
NEWER = "b" * 40


def files(letters):
    """Those of a data set with more rows than are read; each split in two files."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"{x}{y}=", "answer": x} for x in letters for y in letters]
    parts = {"train-00000-of-00002": rows[8:14], "train-00001-of-00002": rows[14:40], "test-00000-of-00001": rows[:8]}
    made = {}
    for name, part in parts.items():
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), file)
        made[f"data/{name}.parquet"] = file.getvalue()
    return made


def start(hub, home, folder, *dies_at):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    }
    command = [sys.executable, str(TESTS / "streamed_program.py"), str(folder), *map(str, dies_at)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    wanted = -signal.SIGKILL if dies_at else 0
    assert done.returncode == wanted, (done.returncode, done.stdout[-2000:], done.stderr[-3000:])


@pytest.mark.slow
def test_a_run_killed_within_an_epoch_of_streamed_rows_goes_on_with_the_same_rows(tmp_path):
    """Bit for bit, though the branch that it reads has other rows by then, in another order."""
    pytest.importorskip("datasets", reason="needs rljax-lm[hub]")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with serving(name="user/echo", files=files("abcdefgh")) as hub:
        start(hub, tmp_path / "home", whole)
        start(hub, tmp_path / "home", killed, 3)
        done = len(run_metrics(killed))
        assert 0 < done < STEPS and 4 * done % ROWS

        hub.commits[NEWER] = files("hgfedcba")
        hub.head = NEWER
        start(hub, tmp_path / "home", killed)
    assert read_json(killed / "data.json") == {"path": "user/echo", "revision": "", "commit": SHA}

    assert rollout_records(killed) == rollout_records(whole)
    assert run_metrics(killed) == run_metrics(whole)
    assert params_fingerprint(killed) == params_fingerprint(whole)
    for name in ("step_000000.json", f"step_{STEPS:06d}.json"):
        assert (killed / "evaluations" / name).read_text() == (whole / "evaluations" / name).read_text()
    drawn = [record["prompt"] for records in rollout_records(whole).values() for record in records[::4]]
    assert len(set(drawn[:ROWS])) == ROWS and sorted(drawn[:ROWS]) == sorted(drawn[ROWS:])


def test_rows_are_read_at_the_commit_that_a_folder_holds(tmp_path, monkeypatch, capsys):
    """Else at the newest, and at the revision itself where that is a commit, or no hub says what it is."""
    asked = []

    def commit_of(path, revision):
        asked.append((path, revision))
        if path == "user/away":
            raise ValueError("the hub does not say")
        return NEWER

    monkeypatch.setattr(commits, "commit_of", commit_of)
    held = {"path": "user/echo", "revision": "main", "commit": SHA}
    (tmp_path / "data.json").write_text(json.dumps(held))

    def source_of(data, *folders):
        return commits.source_of(tiny_config(data=data), folders)

    mine = HubData(path="user/echo", revision="main", max_rows=3)
    source, said = source_of(mine, tmp_path / "none", tmp_path)
    assert (source.revision, source.max_rows, said, mine.revision) == (SHA, 3, held, "main") and not asked
    skilled, said = source_of(SkilledData(data=mine, folder="skills"), tmp_path)
    assert (skilled.data.revision, skilled.folder, said) == (SHA, "skills", held) and not asked

    # Of another revision, or without a folder.
    assert source_of(HubData(path="user/echo"), tmp_path)[0].revision == NEWER
    assert source_of(mine)[1] == held | {"commit": NEWER}
    assert asked == [("user/echo", ""), ("user/echo", "main")]

    for alone in (HubData(path="user/echo", revision=SHA), HubData(path=str(tmp_path)), tiny_config().data):
        assert source_of(alone, tmp_path) == (alone, None)
    assert len(asked) == 2
    away = HubData(path="user/away")
    assert source_of(away, tmp_path) == (away, None)
    assert "the hub does not say; where its rows have changed when this run goes on" in capsys.readouterr().out

    (tmp_path / "data.json").write_text("{}\n")
    assert source_of(mine, tmp_path)[0].revision == NEWER
    (tmp_path / "data.json").write_text('{"path": "user/echo", "revision": "main"}')
    with pytest.raises(ValueError, match=r"data\.json names no commit; restore it"):
        source_of(mine, tmp_path)
