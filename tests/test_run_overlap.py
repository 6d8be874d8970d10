"""Rollouts beside updates: the numbers of the same schedule run one after the other, whatever breaks the run off."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from devices import xla_flags

TESTS = Path(__file__).parent
STEPS = 6


def program(folder, *arguments, **streams):
    environment = dict(
        os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=xla_flags(8), PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}"
    )
    command = [sys.executable, str(TESTS / "overlap_program.py"), str(folder), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **streams)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    process = program(tmp_path_factory.mktemp("runs"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("staleness", [1, 4])
def test_overlapped_rollouts_give_the_numbers_of_the_same_schedule_in_turn(computed, staleness):
    """Weights, metrics, rollouts and evaluations, bit for bit."""
    in_turn, beside = computed[f"{staleness}/0"], computed[f"{staleness}/4"]
    assert [line["rollout/staleness_max"] for line in in_turn["metrics"]] == [min(s, staleness) for s in range(STEPS)]
    assert beside == in_turn
    assert sorted(beside["evaluations"]) == ["step_000000.json", "step_000004.json", "step_000006.json"]


def test_another_staleness_gives_other_weights(computed):
    assert computed["1/0"]["weights"] != computed["4/0"]["weights"]


def test_a_run_broken_off_three_times_gives_the_same_numbers_and_makes_no_rollout_twice(computed):
    assert computed["broken"] == computed["4/0"]
    first, second, third, last = computed["pieces"]
    assert sorted(made for piece in computed["pieces"] for made in piece["made"]) == list(range(STEPS))
    # With rollout 5 under way, only the checkpoint of step 1 has all that were ordered before it: 1 to 4.
    assert first["steps"] == [0, 1, 2, 3] and second["steps"] == [1, 2, 3, 4]
    # What is asked to end waits for the rollouts that its checkpoint goes on with, and loses no step.
    assert third["steps"] == [4, 5] and last["steps"] == [5]


def test_rollouts_that_no_checkpoint_goes_on_with_are_removed(computed):
    assert computed["journal"] == ["rollout_000004.npz", "rollout_000005.npz"]
