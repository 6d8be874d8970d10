"""The whole loop, evaluation and checkpoints included: a mesh, or two processes, compute what one device does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from devices import xla_flags

TESTS = Path(__file__).parent
MESHES = ["8x1x1", "2x2x2", "1x4x2", "1x2x2x2"]


def start(folder, shapes, devices, *process):
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=xla_flags(devices),
        NOTES=str(folder),
        PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}",
    )
    command = [sys.executable, str(TESTS / "run_mesh_program.py"), str(folder), ",".join(shapes), *process]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process):
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


def judged(folder):
    """What was judged by each process."""
    return {
        name: sorted((folder / name).read_text().splitlines())
        for name in ("0", "1", "alone")
        if (folder / name).exists()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one device computes, and what its judge was asked."""
    folder = tmp_path_factory.mktemp("one")
    found = result(start(folder, ["1x1x1"], 1))["1x1x1"]
    return found, judged(folder)["alone"]


@pytest.fixture(scope="module")
def single(alone):
    return alone[0]


@pytest.fixture(scope="module")
def judged_alone(alone):
    return alone[1]


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    return result(start(tmp_path_factory.mktemp("mesh"), MESHES, 8))


def assert_the_same(got, want):
    """Samples are equal token by token. Numbers agree to float32 rounding, which sums of another order change: 1e-3
    relative after three updates, of which each starts from weights already 1e-5 apart."""
    assert got["tokens"] == want["tokens"]
    for a, b in zip(got["metrics"], want["metrics"], strict=True):
        assert a.keys() == b.keys()
        for key in b.keys() - {"rollout/logprob_gap_max", "rollout/logprob_gap_mean"}:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-3, atol=2e-5, err_msg=f"{key}, step {b['step']}")
        assert a["rollout/logprob_gap_max"] < 1e-4
    for key, value in want["after"].items():
        np.testing.assert_allclose(got["after"][key], value, rtol=1e-3, atol=1e-5, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_run_what_one_runs(meshes, single, mesh):
    assert_the_same(meshes[mesh], single)


def start_two(folder, *more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [start(folder, ["2x2x1"], 2, str(index), address, *more) for index in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_no_process_waits_for_one_that_has_failed(failing, tmp_path):
    processes = start_two(tmp_path, str(failing))
    try:
        said = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[failing].returncode == 1 and "this process alone" in said[failing]
    assert processes[1 - failing].returncode != 0


def test_two_processes_run_what_one_runs_with_half_of_the_work_each(tmp_path, single, judged_alone):
    processes = start_two(tmp_path)
    try:
        main, other = (result(process) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert not other  # only the main process writes the run folder
    assert_the_same(main["2x2x1"], single)

    # Every sample is judged once, by the process that played it: of training, and of the evaluations.
    by_process = judged(tmp_path)
    assert sorted([*by_process["0"], *by_process["1"]]) == judged_alone
    assert len(by_process["0"]) == len(by_process["1"]) == len(judged_alone) // 2
