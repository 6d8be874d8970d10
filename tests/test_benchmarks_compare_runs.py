"""The comparison of runs finds what differs in a run's numbers and passes over what differs in time."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

_FILE = Path(__file__).parent.parent / "benchmarks" / "compare_runs.py"
_SPEC = importlib.util.spec_from_file_location("compare_runs", _FILE)
compare_runs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(compare_runs)

METRICS = [{"step": s, "loss/policy": s / 3, "time/total_s": 1.5, "compile/count": 3.0} for s in (1, 2, 3)]
METRICS[0]["loss/kl"] = float("nan")


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = value if path.suffix == ".jsonl" else [value]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folders(tmp_path):
    """(A, B): two folders of two runs each, with the same numbers."""
    for run in ("grpo", "dapo"):
        folder = tmp_path / "a" / run
        write(folder / "metrics.jsonl", METRICS)
        write(folder / "rollouts" / "step_000001.jsonl", [{"step": 1, "reward": r, "tokens": [1, 2]} for r in (0, 1)])
        write(folder / "evaluations" / "step_000003.json", {"step": 3, "estimates": {"greedy": {"value": 0.25}}})
        write(folder / "summary.json", {"steps": 3, "seconds": 7.5, "versions": {"jax": "1"}})
        write(folder / "config.json", {"steps": 3})
    write(tmp_path / "a" / "arena.json", {"results": [{"method": "GRPO", "avg@4": 0.5, "seconds": 3}]})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def compare(folders, *options):
    return compare_runs.main([*map(str, folders), *options])


def test_runs_that_differ_in_time_versions_and_how_a_config_is_written_are_equal(folders, capsys):
    for run in ("grpo", "dapo"):
        folder = folders[1] / run
        write(folder / "metrics.jsonl", [{**line, "time/total_s": 9.0, "compile/count": 0.0} for line in METRICS])
        write(folder / "summary.json", {"steps": 3, "seconds": 1.0, "versions": {"jax": "2"}})
        write(folder / "config.json", {"training": {"steps": 3}})
    assert compare(folders) == 0
    values = 2 * (3 * 2 + 1 + 2 * 4 + 2 + 1) + 2
    assert capsys.readouterr().out == f"equal: {values} values of 15 records in 9 files\n"


def test_one_number_that_differs_in_its_last_bit_is_found_with_file_and_step(folders, capsys):
    changed = [dict(line) for line in METRICS]
    changed[1]["loss/policy"] += 2**-53
    write(folders[1] / "dapo" / "metrics.jsonl", changed)
    assert compare(folders) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"dapo/metrics.jsonl step 2 loss/policy: {2 / 3!r} != {2 / 3 + 2**-53!r}"
    assert last.startswith("1 differences in ")
    assert compare(folders, "--ignore=loss/*") == 0


def test_a_step_a_file_or_a_metric_that_is_missing_is_a_difference(folders, capsys):
    a, b = folders
    write(b / "grpo" / "metrics.jsonl", METRICS[:2])
    (b / "dapo" / "evaluations" / "step_000003.json").unlink()
    write(b / "dapo" / "metrics.jsonl", [{**line, "loss/new": 0.0} for line in METRICS])
    assert compare(folders, "--show=4") == 1
    out = capsys.readouterr().out
    assert f"dapo/evaluations/step_000003.json: only in {a}\n" in out
    assert "dapo/metrics.jsonl step 3 loss/new: nothing != 0.0\n" in out
    assert "... 1 more" in out
    assert compare(folders) == 1
    assert f"grpo/metrics.jsonl step 3: only in {a}\n" in capsys.readouterr().out


def test_rollouts_and_results_of_scripts_are_compared_record_by_record(folders, capsys):
    write(folders[1] / "arena.json", {"results": [{"method": "GRPO", "avg@4": 0.75, "seconds": 9}]})
    rollouts = [{"step": 1, "reward": r, "tokens": [1, 2, 3][: 2 + r]} for r in (0, 1)]
    write(folders[1] / "grpo" / "rollouts" / "step_000001.jsonl", rollouts)
    assert compare(folders) == 1
    out = capsys.readouterr().out
    assert "arena.json results[0] avg@4: 0.5 != 0.75\n" in out
    assert "grpo/rollouts/step_000001.jsonl line 2 tokens length: 2 != 3\n" in out
    assert compare([folder / "arena.json" for folder in folders]) == 1


def test_paths_that_hold_nothing_to_compare_are_no_equal_runs(tmp_path, capsys):
    assert compare([tmp_path, tmp_path]) == 1
    with pytest.raises(SystemExit):
        compare([tmp_path, tmp_path / "none"])
    assert "does not exist" in capsys.readouterr().err
