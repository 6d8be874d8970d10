"""Runs that distil: whose rows a teacher scores, what it is refused for, and that a stage teaches the next."""

import dataclasses

import jax
import numpy as np
import pytest

from rljax.algorithms import MOPD, OnPolicyDistillation
from rljax.batching import loss_mask
from rljax.experiment import ModelTeacher, RunModel, SamplingConfig
from rljax.experiment.build import build, stack_rows
from rljax.experiment.memory import held_state
from rljax.experiment.model import run_checkpoints
from rljax.experiment.train import train
from rljax.models import abstract_params
from rljax.rollouts.collect import collect
from rljax.testing import run_metrics, tiny_config
from rljax.training import restore_params
from rljax.types import TEACHER_LOGPROBS

OTHER = dataclasses.replace(tiny_config().model, num_layers=1, embed_dim=16)


def config(*teachers, **changes):
    settings = {"algorithm": OnPolicyDistillation(group_size=4), "teachers": teachers or (ModelTeacher(OTHER),)}
    return tiny_config(**settings | changes)


def test_each_row_is_scored_by_its_own_teacher_and_a_teacher_with_the_students_weights_has_its_log_probs():
    """The student's own weights for one task, other ones for the rest."""
    own = tiny_config().model
    run = build(config(ModelTeacher(own, tasks=("own",)), ModelTeacher(OTHER)))
    params = run.initial_params()
    run.teachers.open()
    with run.actor:
        run.actor.set_params(params, 0)
        rollout = collect(run.actor, run.algorithm.plan, lambda n: run.dataset.train[:n], 4, 0)
    batch = stack_rows(run.config, rollout.trajectories, 16)
    tasks = ["own", "else", "own", "else"]
    examples = [
        dataclasses.replace(rollout.examples[t.group_id], columns={"task": tasks[t.group_id]})
        for t in rollout.trajectories
    ]
    taught, metrics = run.teachers.taught(batch, examples, run.student())

    mask = loss_mask(batch)
    is_own = np.array([example.columns["task"] == "own" for example in examples])[:, None] & mask
    scored = run.learner.score_rows(params, batch)
    got = taught.columns[TEACHER_LOGPROBS]
    np.testing.assert_array_equal(got[is_own], scored[is_own])
    np.testing.assert_allclose(got[is_own], batch.behavior_logprobs[is_own], atol=1e-5)
    assert np.abs(got - batch.behavior_logprobs)[mask & ~is_own].mean() > 0.01
    assert not got[~mask].any()

    gap = (batch.behavior_logprobs - got).astype(np.float64)
    assert metrics["teacher/kl_0"] == pytest.approx(0, abs=1e-5)
    assert metrics["teacher/kl_1"] == pytest.approx(gap[mask & ~is_own].mean())
    assert metrics["teacher/kl"] == pytest.approx(gap[mask].mean())
    assert metrics["teacher/share_0"] == is_own.sum() / mask.sum()


def test_a_run_teaches_the_next_by_its_checkpoint(tmp_path):
    """The next begins with the weights that the first began with, of which one step has made the teacher's."""
    train(tiny_config(steps=1), str(tmp_path / "stage"))
    teacher = ModelTeacher(RunModel(str(tmp_path / "stage"), step=1))
    train(config(teacher, steps=1), str(tmp_path / "next"))
    (line,) = run_metrics(tmp_path / "next")
    assert line["loss/teacher_kl"] == pytest.approx(line["teacher/kl"], abs=1e-5)

    run = build(tiny_config())
    trained, _ = restore_params(run_checkpoints(str(tmp_path / "stage")), abstract_params(run.decoder), 1)
    (loaded,) = build(config(teacher)).teachers.teachers
    loaded.open()
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained)


def test_weights_of_teachers_are_in_the_plan_of_memory():
    run = build(config(ModelTeacher(dataclasses.replace(OTHER, param_dtype="bfloat16"))))
    (shapes,) = run.teachers.abstract_params()
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert held_state(run)["teachers"] == 2 * count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": MOPD(), "teachers": ()}, r"config.teachers=\(\) but MOPD needs one"),
        ({"algorithm": tiny_config().algorithm}, "config.teachers has no effect: GRPO asks no teacher"),
        ({"sampling": SamplingConfig(max_new_tokens=4, top_p=0.9)}, "config.sampling.top_p=0.9 cuts tokens off"),
        (
            {"teachers": (ModelTeacher(dataclasses.replace(OTHER, alphabet="abcdefg=")),)},
            r"config.teachers\[0\].model has \d+ tokens and the student \d+",
        ),
        (
            {"teachers": (ModelTeacher(dataclasses.replace(OTHER, alphabet="abcdefhg=")),)},
            r"config.teachers\[0\].model has 'h' for token \d+ where the student has 'g'",
        ),
        ({"teachers": (ModelTeacher(OTHER), ModelTeacher(OTHER))}, "config.teachers: 2 teachers have no tasks"),
        ({"teachers": (ModelTeacher(OTHER, tasks=("sums",)),)}, "config.teachers: .* has the column task=None"),
        (
            {"teachers": (ModelTeacher(RunModel("nowhere")),)},
            r"config.teachers\[0\].model.path='nowhere' is no folder of a run",
        ),
    ],
)
def test_what_cannot_teach_is_refused_before_weights_load(changes, message):
    with pytest.raises(ValueError, match=message):
        build(config(**changes))
