"""Runs that distil: whose rows a teacher scores, what it is refused for, and that a stage teaches the next."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algorithms import GKD, MOPD, OnPolicyDistillation
from rljax.batching import loss_mask
from rljax.experiment import ModelTeacher, OwnTeacher, RunModel, SamplingConfig
from rljax.experiment.build import build, stack_rows
from rljax.experiment.memory import held_state
from rljax.experiment.model import run_checkpoints
from rljax.experiment.train import train
from rljax.models import abstract_params, hidden_states, logits
from rljax.rollouts.collect import collect
from rljax.tasks.echo import EchoData
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


def test_a_teacher_that_knows_more_scores_the_same_completions_behind_another_prompt():
    """The student itself, which is told the answer; against rows that are written out with that prompt."""
    teacher = OwnTeacher("policy", context_column="answer", context_format="{text}=")
    changes = {"algorithm": GKD(group_size=4, support=3), "data": EchoData()}
    base = tiny_config()
    model = dataclasses.replace(base.model, alphabet="abcdefgh=\n")
    run = build(config(teacher, model=model, update=dataclasses.replace(base.update, pack_length=64), **changes))
    run.state = run.init_state(run.initial_params())
    with run.actor:
        run.actor.set_params(run.policy(), 0)
        rollout = collect(run.actor, run.algorithm.plan, lambda n: run.dataset.train[:n], 4, 0)
    batch = stack_rows(run.config, rollout.trajectories, 16)
    examples = [rollout.examples[t.group_id] for t in rollout.trajectories]
    taught, _ = run.teachers.taught(batch, examples, run.student())

    for row in (0, 5, 15):
        example = examples[row]
        prompt = run.tokenizer.encode(f"{example.prompt}\n\n{example.columns['answer']}=")
        completion = batch.tokens[row][len(run.tokenizer.encode(example.prompt)) : batch.lengths[row]]
        tokens = np.array([[*prompt, *completion]], np.int32)
        whole = jax.nn.log_softmax(logits_of(run, tokens))[0, len(prompt) - 1 : -1]
        place = np.flatnonzero(batch.action_mask[row])
        got = taught.columns[TEACHER_LOGPROBS][row, place]
        np.testing.assert_allclose(got, whole[np.arange(len(completion)), completion], atol=1e-5)
        best, ids = jax.lax.top_k(whole, 3)
        np.testing.assert_array_equal(taught.teacher["ids"][row, place], ids)
        np.testing.assert_allclose(taught.teacher["logprobs"][row, place], best, atol=1e-5)
        rest = np.log1p(-np.exp(best).sum(-1))
        np.testing.assert_allclose(taught.teacher["tail"][row, place, 0], rest, atol=1e-5)


def logits_of(run, tokens):
    positions = np.arange(tokens.shape[1])[None]
    ends = np.full(tokens.shape, tokens.shape[1])
    params = run.policy()
    hidden = hidden_states(run.decoder, params, *map(jnp.asarray, (tokens, positions, ends)))
    return logits(run.decoder, params, hidden)


def test_weights_of_teachers_are_in_the_plan_of_memory():
    run = build(config(ModelTeacher(dataclasses.replace(OTHER, param_dtype="bfloat16"))))
    (shapes,) = run.teachers.abstract_params()
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert held_state(run)["teachers"] == 2 * count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": MOPD(), "teachers": ()}, r"config.teachers=\(\) but MOPD needs one"),
        (
            {"teachers": (OwnTeacher("policy"),)},
            r"config.teachers\[0\].context_column='' with weights='policy'",
        ),
        (
            {"teachers": (OwnTeacher(context_column="hint"),)},
            r"config.teachers\[0\].context_column='hint': .* has no such column, only answer",
        ),
        (
            {"teachers": (OwnTeacher(context_column="answer", context_format="x"),)},
            r"config.teachers\[0\].context_format='x' must hold",
        ),
        ({"algorithm": GKD(support=64)}, "config.algorithm.support=64 must be below the"),
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
