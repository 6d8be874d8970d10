"""Sharded programs on eight virtual devices give the numbers of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from devices import xla_flags
from jax.sharding import AbstractMesh, PartitionSpec

from rljax import parallel

HERE = Path(__file__).parent


def run_python(script: str, *args: str, devices: int) -> str:
    """The last line that a script of this folder prints in a process with so many virtual devices."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *args], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def sharded():
    return json.loads(run_python("sharded_program.py", "8x1x1", "2x2x2", "1x4x2", devices=8))


@pytest.mark.parametrize("mesh", ["8x1x1", "2x2x2", "1x4x2"])
def test_sharded_forward_and_gradient_equal_one_device(sharded, mesh):
    found = sharded[mesh]
    # Float32 sums in another order: logits are of size 0.5 and gradients of 0.05, so these are tens of roundings.
    assert found["loss"] < 2e-6
    assert found["scores"] < 2e-6
    assert found["grad"] < 1e-6
    assert found["remat"] < 2e-6
    assert found["decode_layout"] < 2e-6


@pytest.mark.parametrize("mesh", ["8x1x1", "2x2x2", "1x4x2"])
def test_arrays_are_really_split(sharded, mesh):
    data, fsdp, tensor = map(int, mesh.split("x"))
    found = sharded[mesh]
    assert found["batch_split"] == data * fsdp
    assert found["q_bytes_share"] == 1 / (fsdp * tensor)
    assert found["reshard"] == 0
    assert found["replicated"]


def test_rows_lie_with_the_packed_sequences_that_they_are_read_from(sharded):
    assert sharded["collectives_of_rows"] == 0


def test_activations_are_split_by_their_logical_axes(sharded):
    assert sharded["constrained"] == [2, 3, 2]


def test_a_mesh_does_not_leak_into_calls_outside_it(sharded):
    assert sharded["after"]["loss"] == 0


def test_a_batch_that_does_not_divide_still_runs_in_the_forward_pass(sharded):
    assert sharded["one_row"]["scores"] < 2e-6


def test_mesh_sizes_that_do_not_multiply_to_the_devices_are_refused():
    count = jax.device_count()
    with pytest.raises(ValueError, match=rf"data={count + 1}, .*needs {count + 1} devices, not {count}.*choose sizes"):
        parallel.make_mesh(data=count + 1, fsdp=1)
    with pytest.raises(ValueError, match="only one size may be -1, not data and fsdp"):
        parallel.make_mesh(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="tensor must be at least 1"):
        parallel.make_mesh(tensor=0)
    with pytest.raises(ValueError, match=r"a multiple of 7 devices"):
        parallel.make_mesh(data=7)


MESH = AbstractMesh((1, 4, 1, 1, 3), parallel.MESH_AXES)


def test_two_axes_on_one_mesh_axis_are_refused():
    rules = {**parallel.RULES, "mlp": "fsdp"}
    with pytest.raises(ValueError, match="'embed' and 'mlp' both claim mesh axis 'fsdp'"):
        parallel.partition_spec(("embed", "mlp"), rules)


def test_unknown_axes_are_refused():
    with pytest.raises(ValueError, match="logical axis 'channels' has no rule"):
        parallel.partition_spec(("channels",))
    with pytest.raises(ValueError, match="mesh axis 'pipeline'; the mesh has"):
        parallel.named_sharding(MESH, ("mlp",), (8,), {"mlp": "pipeline"})


def test_dimensions_that_do_not_divide_are_refused_by_name():
    tree = {"layers": {"q": jax.ShapeDtypeStruct((2, 12, 16), jnp.float32)}}
    axes = {"layers": {"q": ("layers", "embed", "heads")}}
    with pytest.raises(ValueError, match=r"layers/q: axis 'heads' of size 16 does not divide over tensor=3.*None"):
        parallel.shardings(MESH, axes, tree)
    with pytest.raises(ValueError, match="one axis name per dimension"):
        parallel.named_sharding(MESH, ("embed",), (4, 4))


def test_batches_that_do_not_divide_are_refused_by_name():
    with pytest.raises(ValueError, match=r"tokens: batch of 6 does not divide over 4 devices .*multiple of 4"):
        parallel.put_batch(MESH, {"tokens": jnp.zeros((6, 2))})


def test_layouts_of_unstacked_layers_follow_the_same_table():
    mesh = parallel.make_mesh()
    tree = {"layers": ({"q": jnp.zeros((4, 4))}, {"q": jnp.zeros((4, 4))})}
    axes = {"layers": ({"q": ("embed", "heads")}, {"q": ("embed", "heads")})}
    found = parallel.shardings(mesh, axes, tree)
    assert found["layers"][1]["q"].spec == PartitionSpec(("fsdp", "sequence", "expert"), "tensor")


def test_constrain_without_a_mesh_changes_nothing():
    x = jnp.ones((2, 3))
    assert parallel.constrain(x, ("batch", None)) is x


def test_microbatches_keep_their_leading_axis_whole():
    mesh = parallel.make_mesh()
    assert parallel.batch_sharding(mesh, axis=1).spec == PartitionSpec(None, ("data", "fsdp", "expert"))
    placed = parallel.put_batch(mesh, {"x": jnp.arange(6).reshape(2, 3), "count": jnp.ones(2)}, axis=1)
    assert placed["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert placed["count"].sharding.is_fully_replicated
