"""Programs compiled for TPU pods and GPUs, on a machine that has neither: `make test-aot`."""

import contextlib
import dataclasses
import io

import pytest
from machines import machine

from rljax.algorithms import GRPO
from rljax.experiment.dry_run import phase_peak, print_plan
from rljax.experiment.memory import bytes_of, predict_update
from rljax.models import DecoderConfig
from rljax.parallel import MeshConfig, chip_of, collectives, compiled_memory, make_mesh, traffic
from rljax.testing import full_minibatch, tiny_config
from rljax.training import Learner, OptimizerConfig, UpdateConfig

pytestmark = pytest.mark.aot

MODEL = DecoderConfig(
    vocab_size=32768,
    num_layers=4,
    embed_dim=512,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    mlp_dim=1536,
    dtype="bfloat16",
    param_dtype="float32",
)


@pytest.mark.parametrize(
    ("name", "count", "platform", "gib"),
    [
        ("v4:2x2x2", 8, "tpu", 32),
        ("v5e:16x16", 256, "tpu", 16),
        ("v5e:1x1", 1, "tpu", 16),
        ("v5p:4x4x4", 64, "tpu", 95),
        ("v6e:8x8", 64, "tpu", 32),
        ("h100:64", 64, "gpu", 79),
        ("h200:8", 8, "gpu", 131),
    ],
)
def test_a_machine_by_name_has_its_devices(name, count, platform, gib):
    devices = machine(name)
    assert len(devices) == count and {device.platform for device in devices} == {platform}
    assert chip_of(devices[0]).memory // 2**30 == gib


@pytest.mark.parametrize("name", ["v5e:3x3", "v5p:3x3x3"])
def test_a_shape_that_no_pod_has_is_refused_in_one_line(name):
    machine("v5e:2x2")
    with pytest.raises(ValueError, match=rf"^topology '{name}': [^\n]+$"):
        machine(name)


@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2", "h100:8"])
def test_an_update_compiles_with_the_state_in_place(name):
    mesh = make_mesh(1, 8, 1, devices=machine(name))
    update = UpdateConfig(pack_length=1024, microbatch_size=8, head_chunk=256)
    learner = Learner(MODEL, GRPO(kl_coef=0.0).build().loss, OptimizerConfig(), update, mesh=mesh)
    compiled = learner.lower_update(full_minibatch(mesh, microbatches=2, rows=8, length=1024)).compile()
    memory = compiled_memory(compiled)
    state = learner.abstract_state()
    held = bytes_of(state.trainable) + bytes_of(state.opt_state)
    # What is replaced is written where it lay.
    assert memory.aliased == pytest.approx(held, rel=0.02)
    assert memory.peak < chip_of(mesh.devices.flat[0]).memory

    # Weights are gathered for their products, and gradients reduced.
    moved = traffic(collectives(compiled))
    assert moved["all-gather"] > 0 and moved.keys() & {"reduce-scatter", "all-reduce"}


def test_a_prediction_knows_that_kernels_keep_no_scores():
    """In XLA's form those of a row of 4096 tokens would be twice what all else takes."""
    mesh = make_mesh(devices=machine("v5e:1x1"))
    update = UpdateConfig(pack_length=4096, microbatch_size=1, remat="full")
    learner = Learner(MODEL, GRPO(kl_coef=0.0).build().loss, OptimizerConfig(), update, mesh=mesh)
    batch = full_minibatch(mesh, microbatches=1, rows=1, length=4096)
    temporaries = compiled_memory(learner.lower_update(batch).compile()).temporaries
    assert 0.9 < sum(predict_update(learner, batch).values()) / temporaries < 1.1


def test_a_prediction_for_several_gpus_counts_the_gradients_that_lie_there_while_the_head_is_gathered():
    """Of many layers these are a fifth of what an update adds."""
    mesh = make_mesh(1, 8, 1, devices=machine("h100:8"))
    update = UpdateConfig(pack_length=1024, microbatch_size=8, head_chunk=256, remat="full")
    config = dataclasses.replace(MODEL, num_layers=32)
    learner = Learner(config, GRPO(kl_coef=0.0).build().loss, OptimizerConfig(), update, mesh=mesh)
    batch = full_minibatch(mesh, microbatches=2, rows=8, length=1024)
    temporaries = compiled_memory(learner.lower_update(batch).compile()).temporaries

    predicted = predict_update(learner, batch)
    assert {"vocabulary head", "gradients"} <= predicted.keys()
    assert 0.9 < sum(predicted.values()) / temporaries < 1.1


@pytest.mark.parametrize("name", ["v5e:2x4", "h100:8"])
def test_a_run_is_planned_for_a_machine(name):
    machine(name)
    update = dataclasses.replace(tiny_config().update, microbatch_size=8)
    config = tiny_config(mesh=MeshConfig(fsdp=8), update=update)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        result = print_plan(config, topology=name)
    assert {program.name for program in result["compiled"]} == {"weights", "prefill", "decode", "update"}
    assert "it fits" in text.getvalue() and result["topology"] == name
    for phase in result["phases"]:
        assert phase_peak(phase, result["compiled"])[0] > sum(phase.held.values())


def test_a_plan_of_several_hosts_has_a_copy_of_the_weights_on_each():
    """Four hosts of four chips: each decodes by itself, with a copy that is gathered from all."""
    machine("v5e:4x4")
    update = dataclasses.replace(tiny_config().update, microbatch_size=16)
    config = tiny_config(mesh=MeshConfig(fsdp=16), update=update, prompts_per_step=16)
    with contextlib.redirect_stdout(io.StringIO()):
        result = print_plan(config, topology="v5e:4x4")

    sample = next(phase for phase in result["phases"] if phase.name == "sample")
    # The copy is in bfloat16 but for the norms, what is trained is split 16 ways in float32.
    assert sample.held["decoder weights"] > 7 * sample.held["parameters"]
    weights = next(program for program in result["compiled"] if program.name == "weights")
    assert traffic(weights.collectives).keys() == {"all-gather"}
