"""Updates on 8 virtual devices equal those of one, in every mesh shape; checkpoints move between meshes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from devices import xla_flags

TESTS = Path(__file__).parent
pytestmark = pytest.mark.slow  # eight devices on few cores


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=xla_flags(8),
        PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}",
    )
    folder = tmp_path_factory.mktemp("mesh") / "checkpoints"
    command = [sys.executable, str(TESTS / "training_mesh_program.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["data 4 x tensor 2", "fsdp 8", "2 x 2 x 2"])
def test_a_mesh_computes_what_one_device_does(results, name):
    """Up to float32 rounding, which sums of another order change: 1e-4 of a step of 1e-2 a weight."""
    want, got = results["one device"], results[name]
    for step, (a, b) in enumerate(zip(got["metrics"], want["metrics"], strict=True)):
        for key in b:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-5, err_msg=f"{key} at step {step}")
    for key, values in want["sums"].items():
        np.testing.assert_allclose(got["sums"][key], values, atol=2e-5, err_msg=key)


def test_each_mesh_compiles_its_update_once(results):
    assert {name: r["compiled"] for name, r in results.items()} == dict.fromkeys(results, 1)


def test_a_checkpoint_goes_on_on_another_mesh(results):
    want, got = results["fsdp 8"], results["restored"]
    for key, values in want["sums"].items():
        np.testing.assert_allclose(got["sums"][key], values, atol=2e-5, err_msg=key)
