"""The reference that follows the policy: when it is copied, what may hold it back, and that a run resumes with it."""

import dataclasses
import json

import numpy as np
import pytest
from breaking import break_off

import rljax.algorithms.owpo as owpo
from rljax.algorithms import OWPO
from rljax.experiment import CheckpointConfig, EvaluationConfig
from rljax.experiment.train import train
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


@pytest.mark.slow
def test_a_ratchet_that_is_broken_off_equals_one_that_is_not(tmp_path):
    train(config(), str(tmp_path / "whole"))
    break_off(config(), tmp_path / "parts", before=3)
    train(config(), str(tmp_path / "parts"))
    assert run_metrics(tmp_path / "parts") == run_metrics(tmp_path / "whole")
    assert params_fingerprint(tmp_path / "parts") == params_fingerprint(tmp_path / "whole")
