"""Studies of a policy beside its base, end to end on the toy model: equal where they must be, and honest counts."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rljax.analysis.study import StudyOptions, study
from rljax.experiment import CheckpointConfig, EvaluationConfig, MultiTurn, SamplingConfig
from rljax.experiment.train import train
from rljax.testing import echo_reward, tiny_config

ROOT = Path(__file__).parent.parent
ALWAYS = -1.0
"""A divergence that every token is above."""


def config(**changes):
    settings = {
        "steps": 2,
        "model": dataclasses.replace(tiny_config().model, num_layers=1),
        "evaluation": EvaluationConfig(problems=0, samples=8, batch_prompts=5),
        "checkpoint": CheckpointConfig(every=1),
    }
    return tiny_config(**settings | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run folder of two steps, with a checkpoint of each."""
    path = str(tmp_path_factory.mktemp("run"))
    train(config(evaluation=EvaluationConfig(problems=2, samples=1)), path)
    return path


@pytest.fixture(scope="module")
def moved(folder):
    """How far two updates have moved the model."""
    return study(config(), "shifts", checkpoint=folder)


@pytest.fixture(scope="module")
def always(folder):
    """Cross-sampling at every token."""
    return study(config(), "cross", checkpoint=folder, options=StudyOptions(threshold=ALWAYS))


def test_a_model_has_not_moved_from_itself(folder, moved):
    options = StudyOptions(threshold=1e-5)
    same = study(config(), "shifts", checkpoint=folder, base=folder, options=options)
    assert same.tokens == moved.tokens > 13 * 8  # the policy's own answers, whatever the base
    assert same.divergence_mean == pytest.approx(0, abs=1e-6)
    assert (same.signed_mean, same.high_share, same.signed_quantiles) == (0, 0, (0, 0, 0))
    assert moved.divergence_mean > 1e-3
    assert moved.signed_mean > 0  # an estimate of a KL divergence


@pytest.mark.slow
def test_nothing_changes_when_both_models_are_one(folder):
    cross = study(config(), "cross", checkpoint=folder, base=folder, options=StudyOptions(threshold=ALWAYS))
    alone, switched, control = cross.into_base
    assert switched.interventions == switched.length_mean and control.share == 1
    assert alone.interventions == switched.effective == control.effective == 0
    assert alone.completions == switched.completions == control.completions
    assert alone.accuracy == switched.accuracy == control.accuracy and alone.reward_mean == control.reward_mean
    assert [arm.completions for arm in cross.into_policy] == [arm.completions for arm in cross.into_base]

    extrapolated = study(config(), "extrapolate", checkpoint=folder, base=folder)
    assert all(arm.completions == alone.completions and arm.interventions == 0 for arm in extrapolated.arms)


def test_handing_over_every_token_is_the_other_models_own_sampling(always):
    assert always.into_base[1].completions == always.into_policy[0].completions
    assert always.into_policy[1].completions == always.into_base[0].completions
    assert always.into_base[0].completions != always.into_policy[0].completions
    assert 0 < always.into_base[1].effective < always.into_base[1].interventions == always.into_base[1].length_mean


def test_the_control_intervenes_as_often_as_the_criterion_within_its_budget(folder, moved):
    options = StudyOptions(threshold=moved.divergence_mean, budget=2, entropy=ALWAYS)
    cross = study(config(), "cross", checkpoint=folder, options=options)
    for alone, switched, control, by_entropy in (cross.into_base, cross.into_policy):
        assert 0.1 < switched.share < 0.7 and switched.interventions < 2
        assert control.share == pytest.approx(switched.share, abs=0.08)  # 3 deviations of some 370 draws
        assert control.completions != switched.completions
        assert alone.interventions == 0
        assert 1.5 < by_entropy.interventions <= 2  # at the first two tokens, where there are two


def test_accuracy_is_the_reward_of_the_completions(always):
    examples = config().data.load().test
    arm = always.into_policy[0]
    values = [
        [echo_reward(text, **example.columns) for text in group]
        for example, group in zip(examples, arm.completions, strict=True)
    ]
    assert arm.rewards == values
    assert arm.reward_mean == pytest.approx(np.mean(values)) and arm.reward_mean > 0
    assert arm.accuracy.value == pytest.approx(np.mean(np.array(values) >= 1))


def test_extrapolation_redraws_shifted_tokens_alone(folder, always):
    options = StudyOptions(tau=0.0, gamma=5.0)
    base, policy, replaced, beyond, from_policy = study(
        config(), "extrapolate", checkpoint=folder, options=options
    ).arms
    assert base.completions == always.into_base[0].completions
    assert policy.completions == always.into_policy[0].completions
    for arm in (replaced, beyond, from_policy):
        assert 0 < arm.effective < arm.interventions < arm.length_mean
    assert len({str(arm.completions) for arm in (base, policy, replaced, beyond, from_policy)}) == 5
    assert from_policy.share < beyond.share  # the policy has turned away from fewer of its own tokens


@pytest.mark.slow
def test_the_batch_size_changes_no_result(folder, always):
    some = config(evaluation=EvaluationConfig(problems=7, samples=8, batch_prompts=4))
    fewer = study(some, "cross", checkpoint=folder, options=StudyOptions(threshold=ALWAYS))
    for arm, of_all in zip(fewer.into_base, always.into_base, strict=True):
        assert arm.completions == of_all.completions[:7]


def test_stop_strings_end_an_answer(folder, always):
    stopping = config(sampling=SamplingConfig(max_new_tokens=4, truncated_is_wrong=False, stop_strings=("c",)))
    cross = study(stopping, "cross", checkpoint=folder, options=StudyOptions(threshold=ALWAYS))
    want = [[text.split("c")[0] for text in group] for group in always.into_base[1].completions]
    assert cross.into_base[1].completions == want != always.into_base[1].completions
    # What was decoded behind the stop string is not counted.
    assert cross.into_base[1].interventions == cross.into_base[1].length_mean < always.into_base[1].length_mean


MISTAKES = {
    "another actor": (
        {"actor": MultiTurn(make="x:y")},
        "cross",
        {},
        r"--study=cross .*SingleTurn.*not MultiTurn.*shifts",
    ),
    "a threshold out of reach": ({}, "cross", {"threshold": 0.7}, r"--threshold=0\.7.*ln 2"),
    "a negative budget": ({}, "cross", {"budget": -1}, r"--budget=-1.*at least 0"),
    "a negative gamma": ({}, "extrapolate", {"gamma": -0.1}, r"--gamma=-0\.1.*at least 0"),
    "a tau that is no number": ({}, "extrapolate", {"tau": float("nan")}, r"--tau=nan.*finite"),
    "an unknown study": ({}, "drift", {}, r"--study=drift.*shifts, cross, extrapolate"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_before_anything_loads(name, tmp_path):
    changes, which, options, says = MISTAKES[name]
    with pytest.raises(ValueError, match=says):
        study(config(**changes), which, checkpoint=str(tmp_path), options=StudyOptions(**options))


def test_a_folder_without_checkpoints_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no checkpoint"):
        study(config(), "shifts", checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path} holds no checkpoint"):
        study(config(), "shifts", checkpoint=folder, base=str(tmp_path))
    with pytest.raises(ValueError, match=r"no checkpoint of step 7.*\[1, 2\]"):
        study(config(), "shifts", checkpoint=folder, step=7)


def run_script(*arguments):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", RLJAX_ALLOCATOR="system", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "rljax", "study", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)


@pytest.mark.slow
def test_the_script_prints_and_writes_what_it_found(folder, tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(
        "import dataclasses\nfrom rljax.testing import tiny_config\n\ndef get_config():\n    config = tiny_config()\n"
        "    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))\n"
    )
    done = run_script(
        f"--config={file}",
        f"--checkpoint={folder}",
        "--step=1",
        "--study=cross",
        "--problems=3",
        "--max_tokens=3",
        f"--json={tmp_path / 'x.json'}",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for text in ("policy step 1", "3 held-out examples, 2 answers", "as many at random", "effective"):
        assert text in done.stdout, done.stdout
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["study"] == "cross" and report["step"] == 1 and report["options"]["threshold"] == 0.1
    (alone, *_) = report["result"]["into_base"]
    assert [len(group) for group in alone["completions"]] == [2, 2, 2] and alone["length_mean"] <= 3


def test_the_script_asks_for_a_checkpoint():
    done = run_script("--config=quickstart_tiny")
    assert done.returncode == 2 and done.stderr.startswith("error: --checkpoint is missing"), done.stderr[-500:]


def test_options_are_the_defaults_of_the_script():
    text = (ROOT / "rljax" / "cli" / "study.py").read_text()
    for field in dataclasses.fields(StudyOptions):
        assert f'("{field.name}", {field.default}, ' in text, field.name
