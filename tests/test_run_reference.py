"""The reference that follows the policy: when it is copied, what may hold it back, and that a run resumes with it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from breaking import break_off

import rljax.algorithms.owpo as owpo
from rljax.algorithms import OWPO, OnPolicyDistillation
from rljax.experiment import CheckpointConfig, EvaluationConfig, OwnTeacher
from rljax.experiment.teachers import _Own
from rljax.experiment.train import train
from rljax.parallel import to_host
from rljax.plans import not_worse
from rljax.testing import params_fingerprint, run_metrics, tiny_config
from rljax.training import Learner


@pytest.mark.parametrize(
    ("now", "before", "want"),
    [
        ([0.5, 0.5], [0.5, 0.5], True),
        ([0.9, 0.5], [0.1, 0.5], True),
        ([0.2, 0.5, 0.4], [0.5, 0.5, 0.4], True),  # down by 0.1, which is one standard error
        ([0.4, 0.4, 0.3], [0.5, 0.5, 0.4], False),  # as much, but everywhere
        ([0.4], [0.5], False),
        ([0.5], [0.5], True),
    ],
)
def test_not_worse_means_within_one_standard_error(now, before, want):
    assert not_worse(np.array(now), np.array(before)) is want


def config(**changes):
    settings = {
        "steps": 4,
        "algorithm": OWPO(group_size=4, overlong_buffer=0, max_sampling_rounds=20, refresh_every=1),
        "evaluation": EvaluationConfig(problems=3, samples=2),
        "checkpoint": CheckpointConfig(every=1),
    }
    return tiny_config(**settings | changes)


@pytest.mark.slow
def test_the_gate_sees_scores_now_and_at_the_last_refresh_and_a_run_resumes_with_both(tmp_path, monkeypatch):
    """The gate says no after the second step, so the third is compared with the first; broken off in between."""
    seen, copies = [], []

    def gate(now, before):
        seen.append((now.tolist(), before.tolist()))
        return len(seen) != 2

    def copy(self, state, weight=1.0, refresh=Learner.refresh_reference):
        copies.append(int(state.step))
        return refresh(self, state, weight)

    monkeypatch.setattr(owpo, "not_worse", gate)
    monkeypatch.setattr(Learner, "refresh_reference", copy)
    break_off(config(), tmp_path, before=2)
    assert len(seen) == 2
    train(config(), str(tmp_path))
    scores = {}
    for file in (tmp_path / "evaluations").iterdir():
        problems = json.loads(file.read_text())["problems"]
        scores[int(file.stem[-6:])] = [float(np.mean([r >= 1 for r in p["rewards"]])) for p in problems]
    assert seen == [(scores[now], scores[before]) for now, before in [(1, 0), (2, 1), (3, 1), (4, 3)]]
    assert copies == [1, 3, 4]


def test_the_interval_is_the_run_s_before_the_plan_s(tmp_path, monkeypatch):
    copies = []

    def copy(self, state, weight=1.0, refresh=Learner.refresh_reference):
        copies.append(int(state.step))
        return refresh(self, state, weight)

    monkeypatch.setattr(Learner, "refresh_reference", copy)
    ungated = dataclasses.replace(config().algorithm, gated_refresh=False)
    quick = {"algorithm": ungated, "checkpoint": CheckpointConfig(every=0), "steps": 3}
    train(config(reference_refresh=2, **quick), str(tmp_path / "run"))
    assert copies == [2]
    assert {p.name for p in (tmp_path / "run" / "evaluations").iterdir()} == {"step_000000.json", "step_000003.json"}


def whole_and_broken_off(made, tmp_path, *, before):
    """The metrics of a run, after it was seen that one which is broken off before a step has them and its weights."""
    train(made, str(tmp_path / "whole"))
    break_off(made, tmp_path / "parts", before=before)
    train(made, str(tmp_path / "parts"))
    whole = run_metrics(tmp_path / "whole")
    assert run_metrics(tmp_path / "parts") == whole
    assert params_fingerprint(tmp_path / "parts") == params_fingerprint(tmp_path / "whole")
    return whole


@pytest.mark.slow
def test_a_ratchet_that_is_broken_off_equals_one_that_is_not(tmp_path):
    whole_and_broken_off(config(), tmp_path, before=3)


def averaged(**changes):
    """A student that is taught by the average of what it was, which is told the answer."""
    teacher = OwnTeacher(context_column="answer", context_format="{text}=")
    model = dataclasses.replace(tiny_config().model, alphabet="abcdefgh=\n", num_layers=1)
    settings = {"algorithm": OnPolicyDistillation(group_size=4), "teachers": (teacher,), "model": model}
    return config(**settings | {"reference_refresh": 1, "reference_weight": 0.25} | changes)


def weights_of_teachers(monkeypatch):
    """What teachers score with from now on, and what the policy is then: two lists of trees of numpy arrays."""
    taught, policies = [], []

    def params(self, student, own=_Own._params):
        found = own(self, student)
        # Copies, since the update of the step donates what these are views of.
        taught.append(jax.tree.map(lambda x: np.array(to_host(x)), found))
        policies.append(jax.tree.map(lambda x: np.array(to_host(x)), student.policy()))
        return found

    monkeypatch.setattr(_Own, "_params", params)
    return taught, policies


def test_a_teacher_is_the_moving_average_of_the_student(tmp_path, monkeypatch):
    """Against the recursion in float64 on what the policy was at each step."""
    taught, policies = weights_of_teachers(monkeypatch)
    train(averaged(steps=3, checkpoint=CheckpointConfig(every=0)), str(tmp_path))
    assert len(taught) == 3
    want = jax.tree.map(np.float64, policies[0])
    for step, (got, policy) in enumerate(zip(taught, policies, strict=True)):
        # The policy of this step is what the last one left, which is when the reference moved.
        want = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * np.float64(new), want, policy)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), got, want)
        gaps = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), got, policy)
        assert (max(jax.tree.leaves(gaps)) > 1e-3) == (step > 0)


@pytest.mark.slow
def test_a_run_that_is_broken_off_goes_on_with_its_average(tmp_path):
    whole = whole_and_broken_off(averaged(), tmp_path, before=2)
    assert len({line["teacher/kl"] for line in whole}) == 4
