"""Which kernels and shapes are chosen follows the devices of the mesh, not those that the process happens to have."""

import ast
import pathlib

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import rljax
from rljax.parallel import make_mesh, platform
from rljax.sampling.sampler import prefill_counts
from rljax.sampling.weights import product_of_few


def mesh_of(kind):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=kind)
    return AbstractMesh((2, 1, 1), ("data", "fsdp", "tensor"), abstract_device=device)


def test_no_module_asks_for_the_default_backend():
    for path in pathlib.Path(rljax.__file__).parent.rglob("*.py"):
        names = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(ast.parse(path.read_text()))}
        assert "default_backend" not in names, path


@pytest.mark.parametrize("kind", ["cpu", "gpu", "tpu"])
def test_the_platform_is_that_of_the_mesh(kind):
    assert platform(mesh_of(kind)) == kind
    with use_abstract_mesh(mesh_of(kind)):
        assert platform() == kind
        assert platform(make_mesh(devices=jax.devices()[:1])) == jax.devices()[0].platform


def test_without_a_mesh_it_is_that_of_new_arrays():
    assert platform() == jax.devices()[0].platform
    with jax.default_device(jax.devices("cpu")[0]):
        assert platform() == "cpu"


def test_a_program_for_an_accelerator_leaves_out_what_is_done_for_a_cpu():
    def program():
        return str(jax.make_jaxpr(product_of_few)(jax.numpy.ones((3, 8)), jax.numpy.ones((5, 8))))

    with use_abstract_mesh(mesh_of("cpu")):
        assert "optimization_barrier" in program()
    with use_abstract_mesh(mesh_of("tpu")):
        assert "optimization_barrier" not in program()


def test_an_accelerator_prefills_more_prompts_at_once():
    assert prefill_counts(512, 64, "cpu") == [4, 1]
    assert prefill_counts(512, 64, "tpu") == prefill_counts(512, 64, "gpu") == [16, 4, 1]
