"""The decoder under a mesh samples the same tokens as on one device."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

PROGRAM = pathlib.Path(__file__).with_name("sampling_mesh_program.py")


def test_meshes_of_eight_devices_sample_what_one_device_samples():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "8x1x1", "2x2x2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    single, *others = json.loads(done.stdout)
    for found in others:
        assert found["tokens"] == single["tokens"]
        for got, want in zip(found["logprobs"], single["logprobs"], strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
        assert found["compiles"] == 0
        assert found["turns"] == single["turns"] and found["turns"]["compiles"] == 0
