"""The decoder under a mesh samples the same tokens as on one device."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from devices import xla_flags

HERE = pathlib.Path(__file__).parent


def run_program(name, *args):
    environment = os.environ | {"XLA_FLAGS": xla_flags(8), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(HERE / name), *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_meshes_of_eight_devices_sample_what_one_device_samples():
    single, *others = run_program("sampling_mesh_program.py", "8x1x1", "2x2x2")
    for found in others:
        assert found["tokens"] == single["tokens"]
        for got, want in zip(found["logprobs"], single["logprobs"], strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
        assert found["compiles"] == 0
        assert found["freed"] == found["weights"]
        assert found["turns"] == single["turns"] and found["turns"]["compiles"] == 0


def test_weights_may_lie_on_other_devices_or_on_the_host():
    found = run_program("hand_over_mesh_program.py")
    for decoder in ("sampler", "turns"):
        want = found["own"][decoder]
        assert want["devices"] == [0, 1, 2, 3] and any(want["logprobs"])
        assert found["others"][decoder] == want
        assert found["host"][decoder] == want
    assert found["kept"]
