"""A dry run compiles a run's own programs and says what coexists on a device, for the machine here or one by name."""

import json

import pytest
from test_parallel_mesh import run_python

from rljax.experiment import UpdateConfig
from rljax.experiment.build import build
from rljax.experiment.dry_run import print_plan
from rljax.experiment.report import describe_run
from rljax.models import attention
from rljax.parallel import topologies, topology_devices
from rljax.testing import tiny_config


@pytest.fixture(scope="module")
def found():
    return json.loads(run_python("plan_mesh_program.py", devices=4))


@pytest.fixture(scope="module")
def plans(found):
    return found["plans"]


@pytest.mark.slow
def test_a_phase_holds_what_is_there_at_its_time(plans):
    phases = plans["rows"]["phases"]
    assert list(phases) == ["sample", "score", "update"]
    state = {"parameters", "optimizer", "reference"}
    assert set(phases["sample"]["held"]) == state | {"decoder weights", "KV cache"}
    # A decoder's copy of the weights is gone while the policy is updated.
    assert set(phases["update"]["held"]) == set(phases["score"]["held"]) == state | {"batch"}

    # Conversations stay where they are while the policy is updated; a grid of prompts does not.
    assert plans["agent"]["phases"]["update"]["held"]["KV cache"] > 0


@pytest.mark.slow
def test_devices_of_the_actors_own_hold_its_weights_and_those_that_wait(found, plans):
    phases = found["halves"]["phases"]
    assert set(phases["sample"]["held"]) == {"decoder weights", "weights in waiting", "KV cache"}
    assert set(phases["update"]["held"]) == {"parameters", "optimizer", "batch"}
    # Rollouts have whole weights, of three versions at most; updates share theirs among two devices.
    held = phases["sample"]["held"]
    assert held["weights in waiting"] == 3 * held["decoder weights"]
    assert phases["update"]["held"]["parameters"] < held["decoder weights"]
    assert "by weights 3 steps old, on 2 devices of each process" in found["halves"]["text"]
    assert "by the newest weights, in turn with updates" in plans["rows"]["text"]


@pytest.mark.slow
def test_the_update_is_called_with_what_its_phase_holds(plans):
    for plan in plans.values():
        held = plan["phases"]["update"]["held"]
        counters = 8
        assert plan["arguments"]["update"] == held["parameters"] + held["optimizer"] + held["batch"] + counters


@pytest.mark.slow
def test_a_plan_of_an_agent_compiles_its_decoder(plans):
    assert set(plans["agent"]["arguments"]) == {"weights", "extend", "copy", "lay", "keep", "decode", "update"}
    held = plans["agent"]["phases"]["sample"]["held"]
    assert plans["agent"]["arguments"]["decode"] > held["decoder weights"]


@pytest.mark.slow
def test_the_peak_of_a_phase_is_that_of_its_largest_program(plans):
    for plan in plans.values():
        for name, (size, program) in plan["peaks"].items():
            assert size > sum(plan["phases"][name]["held"].values())
            assert program in plan["arguments"]
        assert "it fits" in plan["text"] and "all-gather" in plan["text"]
        assert "reduce-scatter" in plan["kinds"]["update"] or "all-reduce" in plan["kinds"]["update"]


@pytest.mark.slow
def test_what_devices_share_of_a_sequence_is_a_part_on_each(found):
    alone, shared = (x["predicted"]["activations"] for x in found["sharing"]["full"])
    assert 4 * shared == alone

    # A prediction leaves out what is small, and the compiler shares buffers as it likes.
    for pair in found["sharing"].values():
        for update in pair:
            assert 0.5 < sum(update["predicted"].values()) / update["compiled"] < 1.5


def test_a_plan_and_a_run_say_where_updates_attend_in_kernels(monkeypatch, capsys):
    """By the devices, the length of packed sequences, and what the config says."""
    print_plan(tiny_config(), measure=False)
    assert "of updates in plain operations (config.update.attention_kernel=None)" in capsys.readouterr().out

    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    for length, says in ((64, "plain operations"), (1024, "kernels")):
        sizes = dict(pack_length=length, length_buckets=(length,), microbatch_size=1)
        config = tiny_config(update=UpdateConfig(**sizes, attention_kernel=True))
        print_plan(config, measure=False)
        assert f"of updates in {says} (config.update.attention_kernel=True)" in capsys.readouterr().out
        assert ("attend in kernels, from 1024 tokens" in describe_run(build(config))) == (says == "kernels")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", r"topology 'v9:2x2' is none; write chip:shape, e.g. v5e:16x16"),
        ("v5e", r"topology 'v5e' is none; write chip:shape"),
        ("v5p:4x4", r"v5p takes 3 positive sizes, e.g. v5p:4x4x4"),
        ("h100:2x2", r"h100 takes 1 positive sizes, e.g. h100:8"),
        ("h100:12", r"more than 8 GPUs come in hosts of 8"),
    ],
)
def test_machines_that_are_none_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        print_plan(tiny_config(), topology=name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "aot-tpu"), ("h100:8", "aot-gpu")])
def test_a_compiler_that_is_missing_is_named(monkeypatch, name, extra):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"topology '{name}' needs the compiler for .*rljax-lm\[{extra}\]"):
        topology_devices(name)
