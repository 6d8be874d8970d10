"""A run that is killed and started again gives the same numbers as one that is left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rljax.testing import params_fingerprint, rollout_records, run_metrics

TESTS = Path(__file__).parent
STEPS = 8


def start(folder):
    command = [sys.executable, str(TESTS / "run_program.py"), str(folder), str(STEPS)]
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}")
    with open(folder.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def finish(folder):
    process = start(folder)
    assert process.wait(timeout=300) == 0, folder.with_suffix(".log").read_text()[-3000:]


def kill_when(folder, happened):
    """Starts the run and kills it as soon as `happened()`; returns whether it was still running."""
    process = start(folder)
    until = time.monotonic() + 300
    while process.poll() is None and not happened():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.001)
    was_running = process.poll() is None
    if was_running:
        process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL), folder.with_suffix(".log").read_text()[-3000:]
    return was_running


def checkpoints(folder):
    """Steps of finished checkpoints."""
    path = folder / "checkpoints"
    return {int(child.name) for child in path.iterdir() if child.name.isdigit()} if path.is_dir() else set()


def half_written(folder):
    """Whether a checkpoint is being written: Orbax gives its folder, or a folder in it, a temporary name first."""
    names = {name for _, folders, _ in os.walk(folder / "checkpoints") for name in folders}
    return any("tmp" in name for name in names)


def assert_the_same_run(folder, undisturbed):
    assert run_metrics(folder) == run_metrics(undisturbed)
    assert rollout_records(folder) == rollout_records(undisturbed)
    assert params_fingerprint(folder) == params_fingerprint(undisturbed)
    for name in ("step_000000.json", f"step_{STEPS:06d}.json"):
        assert (folder / "evaluations" / name).read_text() == (undisturbed / "evaluations" / name).read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(folder)
    assert len(run_metrics(folder)) == STEPS
    return folder


@pytest.mark.slow
def test_a_run_killed_while_a_checkpoint_is_written_goes_on_where_it_was(undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert kill_when(folder, lambda: len(checkpoints(folder)) > 1 and half_written(folder))
    assert len(run_metrics(folder)) < STEPS
    finish(folder)
    assert_the_same_run(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_again_and_again_at_any_moment_gives_the_same_numbers(seed, undisturbed, tmp_path):
    folder, rng = tmp_path / "run", random.Random(seed)
    kills = 0
    for _ in range(6):
        if seed == 0:  # from the start of the process: imports, evaluation, restore
            deadline = time.monotonic() + rng.uniform(2, 14)
            happened = lambda: time.monotonic() > deadline  # noqa: E731, B023
        else:  # a moment after the log has grown
            lines, wait, grown = len(run_metrics(folder)), rng.uniform(0, 0.3), []

            def happened():
                if not grown and len(run_metrics(folder)) not in (0, lines):  # noqa: B023
                    grown.append(time.monotonic())  # noqa: B023
                return bool(grown) and time.monotonic() - grown[0] > wait  # noqa: B023

        kills += kill_when(folder, happened)
    assert kills > 0
    finish(folder)
    assert_the_same_run(folder, undisturbed)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_over(undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert kill_when(folder, lambda: (folder / "evaluations" / "step_000000.json").exists())
    finish(folder)
    assert_the_same_run(folder, undisturbed)
