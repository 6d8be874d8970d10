"""Rollouts beside updates: the numbers of the same schedule run one after the other, whatever breaks the run off."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from devices import xla_flags
from made import EXAMPLES, assert_same_rollout, made

import rljax.experiment.pipeline
from rljax.algorithms import GRPO, DecoupledPPO
from rljax.experiment import RolloutConfig
from rljax.experiment.build import Run, build
from rljax.experiment.check import check
from rljax.experiment.config import to_dict
from rljax.experiment.journal import Journal, fields_of, from_bytes, to_bytes, trajectory_of_fields
from rljax.experiment.pipeline import Beside, Pipeline
from rljax.experiment.train import fitting, resume, sampled_otherwise
from rljax.parallel import make_mesh, replicated, split_devices
from rljax.plans import RolloutPlan
from rljax.rollouts.orders import QueuedActor
from rljax.tasks import UniformCurriculum
from rljax.testing import params_fingerprint, rollout_records, run_metrics, tiny_config
from rljax.training import Checkpointer, RunFolder
from rljax.types import TrainState

TESTS = Path(__file__).parent
STEPS = 6


def program(folder, *arguments, devices=8, **streams):
    environment = dict(
        os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=xla_flags(devices), PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}"
    )
    command = [sys.executable, str(TESTS / "overlap_program.py"), str(folder), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **streams)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    process = program(tmp_path_factory.mktemp("runs"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 4])
def test_overlapped_rollouts_give_the_numbers_of_the_same_schedule_in_turn(computed, staleness):
    """Weights, metrics, rollouts and evaluations, bit for bit."""
    in_turn, beside = computed[f"{staleness}/0"], computed[f"{staleness}/4"]
    assert [line["rollout/staleness_max"] for line in in_turn["metrics"]] == [min(s, staleness) for s in range(STEPS)]
    assert beside == in_turn
    assert sorted(beside["evaluations"]) == ["step_000000.json", "step_000004.json", "step_000006.json"]


@pytest.mark.slow
def test_another_staleness_gives_other_weights(computed):
    assert computed["1/0"]["weights"] != computed["4/0"]["weights"]


@pytest.mark.slow
def test_a_run_broken_off_three_times_gives_the_same_numbers_and_makes_no_rollout_twice(computed):
    assert computed["broken"] == computed["4/0"]
    first, second, third, last = computed["pieces"]
    assert sorted(made for piece in computed["pieces"] for made in piece["made"]) == list(range(STEPS))
    # With rollout 5 under way, only the checkpoint of step 1 has all that were ordered before it: 1 to 4.
    assert first["steps"] == [0, 1, 2, 3] and second["steps"] == [1, 2, 3, 4]
    # What is asked to end waits for the rollouts that its checkpoint goes on with, and loses no step.
    assert third["steps"] == [4, 5] and last["steps"] == [5]


@pytest.mark.slow
def test_rollouts_that_no_checkpoint_goes_on_with_are_removed(computed):
    assert computed["journal"] == ["rollout_000004.npz", "rollout_000005.npz"]


def test_a_journal_gives_back_every_bit_of_a_rollout(tmp_path):
    journal = Journal(tmp_path / "journal")
    want = made()
    journal.write(want)
    (got,) = journal.load(5, EXAMPLES)

    assert got.is_recorded and not want.is_recorded
    assert (got.step, got.version, got.lacking, got.behind) == (5, 4, "no signal", want.behind)
    assert_same_rollout(got.rollout, want.rollout)


def test_a_damaged_or_missing_rollout_ends_what_a_journal_gives(tmp_path):
    journal = Journal(tmp_path / "journal")
    assert journal.load(0, EXAMPLES) == [] and journal.holds(3, 3) and not journal.holds(3, 4)
    for step in (0, 1, 2, 4):
        journal.write(made(step))
    assert [one.step for one in journal.load(0, EXAMPLES)] == [0, 1, 2]
    assert journal.holds(0, 3) and not journal.holds(2, 4)

    file = tmp_path / "journal" / "rollout_000001.npz"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole[:200] + b"?" + whole[201:]):
        file.write_bytes(broken)
        assert [one.step for one in journal.load(0, EXAMPLES)] == [0]
        # No checkpoint that needs it is one to go on from.
        again = Journal(journal.folder)
        assert again.holds(0, 1) and not again.holds(0, 2) and again.holds(2, 3)

    journal.keep(1, 4)
    assert journal.steps() == {1, 2}


def test_rows_from_before_grammars_of_turns_are_read():
    """Every row said where its grammar begins, also those without any; it went on to the end."""
    (row, guided, _) = made().rollout.trajectories
    for one, turns in ((row, None), (guided, [[1, 2]])):
        old = {name: value for name, value in fields_of(one).items() if name not in ("grammar_turns", "drawn")}
        read = trajectory_of_fields(old | {"grammar_start": 1 if turns else 0})
        assert (None if read.grammar_turns is None else read.grammar_turns.tolist()) == turns
        assert read.drawn is None and read.tokens is one.tokens and read.columns == one.columns


def test_a_rollout_of_other_data_is_refused():
    with pytest.raises(ValueError, match="data row 2, which the data does not hold"):
        from_bytes(to_bytes(made()), {0: EXAMPLES[0]})


class Actor(QueuedActor):
    """Takes note of its weights, and of what it is told."""

    def unused(self, *_):
        raise AssertionError("no order needs this")

    decoders = ()
    ready = for_evaluation = cache_bytes = longest_row = __enter__ = __exit__ = unused

    def __init__(self):
        super().__init__()
        self.log = []

    def set_params(self, params, version):
        assert params["w"] == version
        self.log.append(f"weights {version}")

    def checkpointed(self):
        self.log.append("checkpointed")


@pytest.fixture
def beside():
    mesh = make_mesh(devices=jax.devices()[:1])
    return Beside(mesh, {"w": replicated(mesh)})


def pipeline_of(monkeypatch, collected, beside, staleness):
    actor = Actor()

    def collect(actor, plan, draw, n, step, version, **rules):
        actor.log.append(f"rollout {step} by {version}")
        collected(step)
        return made(step, version).rollout

    monkeypatch.setattr(rljax.experiment.pipeline, "collect", collect)
    config = RolloutConfig(staleness=staleness)
    return Pipeline(actor, RolloutPlan(2), UniformCurriculum(list(EXAMPLES.values())), config, prompts=2, beside=beside)


def version(n):
    return {"w": jax.numpy.int32(n)}


@pytest.mark.parametrize("has_own", [False, True])
@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_a_rollout_is_of_the_weights_that_the_schedule_says(monkeypatch, beside, has_own, staleness):
    pipeline = pipeline_of(monkeypatch, lambda step: None, beside if has_own else None, staleness)
    pipeline.until = 12
    with pipeline:
        for step in range(12):
            pipeline.order(step, version(step))
            assert pipeline.take(step).version == max(0, step - staleness)
            if step == 2:
                assert pipeline.evaluate(3, version(3), lambda: "score") == "score"
                pipeline.checkpointed()

    log = pipeline.actor.log
    rollouts = [line for line in log if line.startswith("rollout")]
    assert rollouts == [f"rollout {s} by {max(0, s - staleness)}" for s in range(12)]
    # An evaluation and a checkpoint behind step 2 come between what weights of step 2 and of step 3 sample.
    last = 2 + staleness
    place = log.index("checkpointed")
    assert log[place - 2 : place] == [f"rollout {last} by 2", "weights 3"]
    assert log[place + 1] == "weights 3"
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]


def test_what_an_order_raises_is_raised_to_who_takes_it_and_ends_the_rest(monkeypatch, beside):
    def fails(step):
        if step == 1:
            raise RuntimeError("no judge here")

    pipeline = pipeline_of(monkeypatch, fails, beside, 3)
    with pipeline:
        pipeline.order(0, version(0))
        assert pipeline.take(0).step == 0
        for step in (1, 2):
            with pytest.raises(RuntimeError, match="no judge here"):
                pipeline.take(step)
    assert not any("rollout 2" in line for line in pipeline.actor.log)


def test_a_run_that_ends_gives_up_the_rollout_under_way(monkeypatch, beside):
    begun = threading.Event()

    def never_ends(step):
        begun.set()
        while True:
            time.sleep(0.01)

    pipeline = pipeline_of(monkeypatch, never_ends, beside, 1)
    with pytest.raises(KeyboardInterrupt), pipeline:
        pipeline.order(0, version(0))
        assert begun.wait(60)
        assert pipeline.num_missing(2) == 2
        pipeline.settle(2, 0.05)
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]


def test_only_rollouts_of_the_same_config_and_within_the_staleness_are_used_again():
    recorded = [made(5, 1), made(6, 2), made(7, 6)]
    within = {staleness: fitting(recorded, RolloutConfig(staleness=staleness)) for staleness in (3, 4)}
    assert within == {3: [], 4: recorded} and fitting(recorded[2:], RolloutConfig(staleness=1)) == recorded[2:]

    old = {"steps": 3, "rollout": {"devices": 0, "staleness": 1}, "actor": {"rewards": []}}
    assert not sampled_otherwise(old, old | {"steps": 9, "rollout": {"devices": 4, "staleness": 1}})
    assert sampled_otherwise(old, old | {"actor": {"rewards": ["other"]}})
    assert sampled_otherwise(old, old | {"rollout": {"devices": 0, "staleness": 2}})


def state(value):
    zero = jax.numpy.int32(0)
    return TrainState(trainable={"w": jax.numpy.full(2, value)}, opt_state={}, step=zero, skipped=zero)


def test_a_checkpoint_that_is_not_complete_is_passed_over_and_counts_for_none(tmp_path):
    there = {1, 2}
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), state(0.0))

    def opened():
        return Checkpointer(tmp_path, keep_last=1, is_complete=lambda step, host: host["needs"] in there)

    checkpoints = opened()
    for step in (1, 2, 3, 4):
        checkpoints.save(step, state(float(step)), {"needs": step})
    checkpoints.wait()
    # The newest that is complete stays, and so do those that may become it.
    assert checkpoints.steps == [2, 3, 4] and checkpoints.first_kept == 2
    checkpoints.close()

    checkpoints = opened()
    found, host, step = checkpoints.restore(target)
    assert step == 2 and host == {"needs": 2} and float(found.trainable["w"][0]) == 2.0
    # Later ones would be of another history, should the run not repeat itself.
    assert checkpoints.steps == [2]

    # None is thrown away for what may be put back.
    there.clear()
    assert checkpoints.restore(target) is None and checkpoints.steps == [2]
    checkpoints.close()


def test_checkpoints_whose_rollouts_are_gone_are_not_begun_anew_in_silence(tmp_path):
    folder = RunFolder(tmp_path, config=to_dict(tiny_config()))
    folder.evaluation_file(0).write_text("{}")
    journal = Journal(folder.journal)
    journal.write(made(4))
    checkpoints = Mock(spec=Checkpointer, steps=[7])
    checkpoints.restore.return_value = None
    with pytest.raises(ValueError, match=r"no checkpoint in .* rollouts that they need are missing in .*journal; put"):
        resume(Mock(spec=Run), checkpoints, folder, journal)
    checkpoints.drop.assert_not_called()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"staleness": 1}, r"config\.rollout\.staleness=1 trains on tokens that other policies sampled, and GRPO"),
        ({"devices": -1}, r"config\.rollout\.devices=-1 must be at least 0"),
        ({"devices": 1}, r"config\.rollout\.devices=1 leaves none of the 1 devices of a process to train on"),
    ],
)
def test_schedules_that_cannot_be_are_refused(changes, says):
    config = tiny_config(algorithm=GRPO(group_size=4), rollout=RolloutConfig(**changes))
    with pytest.raises(ValueError, match=says):
        build(config, jax.devices()[:1])


def test_stale_rollouts_are_for_methods_that_know_who_sampled():
    check(tiny_config(algorithm=DecoupledPPO(group_size=4), rollout=RolloutConfig(staleness=4)))
    config = tiny_config(algorithm=GRPO(group_size=4), rollout=RolloutConfig(staleness=4))
    check(dataclasses.replace(config, update=dataclasses.replace(config.update, use_sampler_logprobs=True)))


def test_every_process_gives_its_last_devices_to_rollouts():
    devices = [Mock(spec=jax.Device, id=i, process_index=i // 4) for i in range(8)]
    training, rolling = split_devices(devices, 1)
    assert [device.id for device in training] == [0, 1, 2, 4, 5, 6] and [device.id for device in rolling] == [3]
    assert split_devices(devices, 0) == (devices, devices)
    with pytest.raises(ValueError, match=r"devices=4 leaves none of the 4 devices of a process .*at most 3"):
        split_devices(devices, 4)


def started(folder, processes, *arguments):
    """A run as one process with eight devices, or as two with two each."""
    if processes == 1:
        return [program(folder, *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    streams = {"devices": 2, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return [program(folder, *arguments, index, address, **streams) for index in range(2)]


def kill_at_random(folder, rng, processes, *arguments):
    """Starts a run and kills it at some moment; returns whether it was still running."""
    running = started(folder, processes, *arguments)
    journal = folder / "journal"

    def number():
        return len(list(journal.glob("*.npz"))) + len(list(folder.glob("checkpoints/*")))

    before = number()
    wanted = before + rng.choice([1, 1, 2, 3])
    until = time.monotonic() + 300
    while all(process.poll() is None for process in running) and number() < wanted:
        assert time.monotonic() < until, "it makes no rollout"
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.5))
    was_running = all(process.poll() is None for process in running)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    return was_running


def finish(folder, processes, *arguments):
    for process in started(folder, processes, *arguments):
        errors = process.communicate(timeout=900)[1]
        assert process.returncode == 0, errors[-4000:]


def files(folder):
    """What a run computed, as text: its log without what tells of the process, rollouts, evaluations."""
    evaluations = {file.name: file.read_text() for file in sorted((folder / "evaluations").iterdir())}
    return run_metrics(folder), rollout_records(folder), params_fingerprint(folder), evaluations


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["single", "turns"])
@pytest.mark.parametrize("staleness", [1, 4])
def test_a_run_killed_three_times_gives_the_numbers_of_the_same_schedule_in_turn(kind, staleness, processes, tmp_path):
    """Turns with groups in flight, whose environments take another time for every answer."""
    in_turn, beside, killed = tmp_path / "in_turn", tmp_path / "beside", tmp_path / "killed"
    own = 4 if processes == 1 else 1
    finish(in_turn, processes, kind, staleness, 0)
    finish(beside, processes, kind, staleness, own)
    rng = random.Random(staleness)
    assert sum(kill_at_random(killed, rng, processes, kind, staleness, own) for _ in range(3)) > 0
    finish(killed, processes, kind, staleness, own)
    assert files(beside) == files(in_turn)
    assert files(killed) == files(in_turn)
