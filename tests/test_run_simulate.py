"""A simulation takes its numbers from where it says: the config, a run that was made, and what is assumed."""

import copy
import dataclasses

import numpy as np
import pytest
from jax.sharding import Mesh
from test_run_environment import make_config
from test_simulation_measured import write_run

from rljax.algorithms import DecoupledPPO
from rljax.experiment import Remote, RolloutConfig, simulate
from rljax.experiment.build import build
from rljax.experiment.memory import Compiled, bytes_of
from rljax.experiment.simulate import print_simulation
from rljax.parallel import Bound, Chip, Collective, CompiledMemory
from rljax.testing import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("measured") / "run", groups=2)


def test_a_simulation_of_the_measured_run_takes_what_was_measured(folder, capsys):
    """Eight samples in 2 s, each process judging its four in 0.5 s, and 1.5 s of updates, beside each other."""
    config = tiny_config(prompts_per_step=2)
    given = [
        "devices=8",
        "devices_per_host=4",
        "staleness=1",
        "rows=8",
        "max_tokens=64",
        "drawn=4",
        "hand_over_bytes=0",
    ]
    outcomes = print_simulation(config, measured=str(folder), assumed=given)
    assert [one.scenario.rollout_devices for one in outcomes] == [0, 1, 2, 3]
    same = outcomes[1]
    assert same.rollout_s == pytest.approx(2.5, rel=0.02)
    assert same.update_s == pytest.approx(1.5)
    assert same.step_s == pytest.approx(2.5, rel=0.02)

    text = capsys.readouterr().out
    assert "measured, 3 steps" in text and "best: config.rollout.devices=" in text
    sources = {line.split()[0]: line for line in text.splitlines() if line and line[0].islower()}
    assert sources["group_size"].split() == ["group_size", "4", "config"]
    assert sources["rows"].split() == ["rows", "8", "--assume"]
    assert sources["restart_s"].split() == ["restart_s", "300", "assumed"]


def test_work_grows_with_the_samples_of_a_step(folder):
    given = [
        "devices=8",
        "devices_per_host=4",
        "rollout_devices=1",
        "rows=8",
        "max_tokens=64",
        "drawn=4",
        "hand_over_bytes=0",
    ]
    small, large = (
        print_simulation(tiny_config(prompts_per_step=groups), measured=str(folder), assumed=given)[1]
        for groups in (2, 4)
    )
    assert large.update_s == pytest.approx(2 * small.update_s)
    assert large.scenario.step_s == pytest.approx(small.scenario.step_s)


def test_without_a_run_the_costs_can_be_given(capsys):
    given = ["step_s=0.5", "update_s=6", "devices=2", "devices_per_host=2", "tokens=4", "rows=1000"]
    (turns, split) = print_simulation(tiny_config(), assumed=given)
    assert turns.step_s == pytest.approx(4 * 0.5 + 6 / 2, rel=1e-3)
    assert split.step_s == pytest.approx(4 * 0.5 + 6, rel=1e-3)
    assert "update_s" in capsys.readouterr().out


def program(phase, name, seconds, sent=0):
    moved = [Collective("all-gather", ("f32[1]",), sent, 2, "")] if sent else []
    return Compiled(phase, name, 1.0, CompiledMemory(0, 0, 0, 0, 0), moved, Bound(seconds=seconds))


def test_compiled_programs_are_taken_at_their_rooflines(monkeypatch):
    """Two minibatches are scored and updated by; half of the roofline is reached."""
    chip = Chip(flops=1.0, bandwidth=1e6, memory=2**40, links=3e9, kinds=("a chip",))
    monkeypatch.setattr(simulate, "chip_of", lambda device: chip)
    run = build(tiny_config(update=dataclasses.replace(tiny_config().update, minibatches=2)))
    (plan,) = [decoder.plan() for decoder in run.actor.decoders]
    read_s = bytes_of(plan.weights) / 1e6

    programs = [
        program("sample", "weights", 9.0),
        program("sample", "prefill", 0.5),
        program("sample", "decode", read_s + plan.rows * 0.25),
        program("score", "score", 1.0),
        program("update", "update", 3.0, sent=100),
    ]
    found = simulate.scenario_of(run, programs, None, {"failures": "0.5"})
    scenario = found.scenario
    assert scenario.update_s == pytest.approx(2 * (1.0 + 3.0) * 2)
    assert scenario.update_bytes == 2 * 2 * 100
    assert scenario.network_bandwidth == scenario.hand_over_bandwidth == 3e9
    assert scenario.step_s == pytest.approx(2 * read_s)
    assert scenario.step_row_s == pytest.approx(0.25 * 2)
    assert scenario.token_s == pytest.approx(2 * (read_s + plan.rows * 0.25))
    assert (scenario.groups, scenario.group_size, scenario.failures) == (4, 4, 0.5)
    assert found.sources["failures"] == "--assume" and "roofline" in found.sources["step_s"]


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """A device of a host that is not here."""

    number: int
    process_index: int


def on_hosts(run, config, hosts, training, decoding):
    """`run` as it is on so many hosts, of whose eight devices the first train and the last decode for their host."""
    devices = [[Elsewhere(host * 8 + i, host) for i in range(8)] for host in range(hosts)]
    there = copy.copy(run)
    there.config = config
    there.mesh = Mesh(np.array([own[:training] for own in devices]).reshape(-1), ("fsdp",))
    there.rollout_mesh = Mesh(np.array(devices[0][-decoding:]), ("fsdp",))
    return there


@pytest.mark.parametrize(("own", "training", "decoding"), [(0, 8, 8), (2, 6, 2)])
def test_of_several_hosts_each_has_its_own_decoder(monkeypatch, own, training, decoding):
    """Four hosts of eight devices, of which `own` of each do nothing but roll out."""
    config = tiny_config(algorithm=DecoupledPPO(group_size=4))
    run = build(config)
    (plan,) = [decoder.plan() for decoder in run.actor.decoders]
    schedule = dataclasses.replace(config, rollout=RolloutConfig(devices=own, staleness=1 if own else 0))
    monkeypatch.setattr(simulate, "chip_of", lambda device: None)
    run = on_hosts(run, schedule, 4, training, decoding)

    scenario = simulate.scenario_of(run, [], None, {}).scenario
    assert (scenario.devices, scenario.hosts, scenario.local_devices) == (32, 4, 8)
    assert (scenario.rollout_devices, scenario.training_devices) == (own, 4 * training)
    assert scenario.rows == plan.rows, "those of one host, which has a decoder of its own"
    assert scenario.trajectory_bytes == 20

    chip = Chip(flops=1.0, bandwidth=1e12, memory=2**40, links=3e9, kinds=("a chip",))
    monkeypatch.setattr(simulate, "chip_of", lambda device: chip)
    programs = [program("sample", "prefill", 0.5), program("sample", "decode", 3.0), program("update", "update", 1.0)]
    scenario = simulate.scenario_of(run, programs, None, {}).scenario
    assert scenario.token_s == pytest.approx(2 * 3.0, rel=1e-3)
    assert scenario.prefill_s == pytest.approx(2 * 0.5 * decoding / plan.prefill[0])
    assert scenario.update_s == pytest.approx(2 * 1.0 * 4 * training)


def test_over_turns_a_token_is_told_with_its_text():
    scenario = simulate.scenario_of(build(make_config()), [], None, {}).scenario
    assert (scenario.turns, scenario.trajectory_bytes) == (make_config().actor.limits.turns, 40)


def test_engines_in_other_processes_are_measured_or_given():
    config = tiny_config(actor=Remote(rewards=tiny_config().actor.rewards, longest_prompt=4))
    with pytest.raises(ValueError, match=r"cannot compile engines in other processes: add --measured=runs/x"):
        simulate.scenario_of(build(config), [], None, {"update_s": "1"})
    assert print_simulation(config, assumed=["step_s=0.5", "update_s=6", "tokens=4", "rows=16"])
