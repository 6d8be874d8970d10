"""A run that goes on with another config says so, or is refused before anything is written."""

import dataclasses
from unittest.mock import Mock

import pytest

from rljax.experiment import EvaluationConfig, WarmupConfig
from rljax.experiment.build import Run, build
from rljax.experiment.changes import review_changes
from rljax.experiment.config import changed_fields, to_dict
from rljax.experiment.dry_run import check_tables, print_plan
from rljax.experiment.evaluate import evaluate_model
from rljax.experiment.journal import Journal
from rljax.experiment.sft import check_demonstrations
from rljax.experiment.train import resume
from rljax.tasks import Example
from rljax.testing import tiny_config
from rljax.training import Checkpointer, RunFolder


def config(**changes):
    return to_dict(tiny_config(**changes))


def test_what_differs_is_named_by_its_path():
    old = config()
    new = config(seed=1)
    new["optimizer"]["learning_rate"] = 0.5
    new["model"] = {"class": "PretrainedModel", "path": "smollm2"}
    changed = changed_fields(old, new)
    assert changed["config.seed"] == (0, 1)
    assert changed["config.optimizer.learning_rate"] == (1e-2, 0.5)
    assert changed["config.model.path"] == (None, "smollm2") and changed["config.model.mlp_dim"] == (64, None)
    assert changed_fields(old, config()) == {}


def test_a_change_is_said(capsys):
    new = config()
    new["optimizer"]["learning_rate"] = 0.5
    review_changes(config(), new, 2, "config.steps")
    assert "config.optimizer.learning_rate: 0.01 -> 0.5" in capsys.readouterr().out
    review_changes(config(), config(), 2, "config.steps")
    review_changes(None, config(), 2, "config.steps")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        ("", "steps", 1, r"config\.steps=1, but the run in this folder has done 2"),
        ("evaluation", "samples", 4, r"config\.evaluation\.samples=4, but .* was made with 2"),
        ("evaluation", "problems", 3, r"config\.evaluation\.problems=3, but .* was made with 8"),
        ("evaluation", "temperature", 0.5, r"config\.evaluation\.temperature=0\.5, but .* was made with 1\.0"),
    ],
)
def test_what_the_run_could_not_end_with_is_refused(part, name, value, says):
    new = config()
    (new[part] if part else new)[name] = value
    with pytest.raises(ValueError, match=says):
        review_changes(config(), new, 2, "config.steps", is_evaluated=True)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"microbatch_buckets": (1,)}, r"config\.update does not fit rollouts of full length: .* is 2, .* bucket is 1"),
        ({"row_buckets": (4,)}, r"config\.update does not fit .*largest bucket is 4; .* or leave the table empty"),
        ({"trajectory_buckets": (6,)}, r"config\.update does not fit rollouts .* is 7, but the largest bucket is 6"),
    ],
)
def test_a_table_that_the_run_would_exceed_is_found_before_it_begins(table, says):
    run = build(tiny_config())
    check_tables(run)
    run.config.update = dataclasses.replace(run.config.update, **table)
    with pytest.raises(ValueError, match=says):
        check_tables(run)


def test_a_warm_up_that_does_not_fit_the_tables_is_found_too():
    def long(examples):
        return [Example(e.prompt, {"completion": "a" * 40}) for e in examples]

    run = build(tiny_config())
    run.config.warmup = WarmupConfig(steps=1, batch_size=16, demonstrations=long)
    with pytest.raises(ValueError, match=r"does not fit the longest demonstrations: .* is 16, .* bucket is 8"):
        check_tables(run)


@pytest.mark.parametrize(
    ("completions", "says"),
    [
        ([], "config.warmup.demonstrations returns no example"),
        (["a" * 80], r"has 84 tokens, but config.update.pack_length=64; raise it to at least 84"),
        (["a", 5], "the completion is 5; it must be a text, or a list of texts by turns"),
        (["a", ["a", 5]], "it must be a text, or a list of texts by turns"),
        (["a", "Z"], "character 'Z' of 'Z' is not in the alphabet"),
    ],
)
def test_a_demonstration_that_cannot_be_trained_on_is_named_before_the_run_begins(completions, says):
    run = build(tiny_config())
    check_demonstrations(run)
    made = [Example("ab=", {"completion": completion}, id=i) for i, completion in enumerate(completions)]
    run.config.warmup = WarmupConfig(steps=1, batch_size=1, demonstrations=lambda _: made)
    with pytest.raises(ValueError, match=says) as refused:
        check_demonstrations(run)
    assert f"the row of id {len(made) - 1}" in str(refused.value) or not made


def test_fewer_steps_of_supervised_training_are_refused():
    new = config()
    new["warmup"]["steps"] = 1
    with pytest.raises(ValueError, match=r"config\.warmup\.steps=1, but .* has done 2"):
        review_changes(config(), new, 2, "config.warmup.steps")


def test_an_evaluation_may_change_that_nothing_is_compared_with(capsys):
    new = config()
    new["evaluation"]["solved_by"] = "right"
    review_changes(config(), new, 2, "config.steps")
    assert "config.evaluation.solved_by: '' -> 'right'" in capsys.readouterr().out


def test_a_folder_of_before_a_field_was_there_goes_on(capsys):
    old = config()
    del old["evaluation"]["solved_by"], old["update"]["max_empty"]
    review_changes(old, config(), 2, "config.steps", is_evaluated=True)
    assert "config.evaluation.solved_by: None -> ''" in capsys.readouterr().out


def folder_of(path, steps, warmup=0):
    """A run folder that was left with checkpoints of these steps."""
    folder = RunFolder(path, config=config())
    folder.previous_config = config(warmup=WarmupConfig(steps=9))
    for name, found in (("checkpoints", steps), ("warmup_checkpoints", warmup)):
        if found:
            (folder.path / name / str(found)).mkdir(parents=True)
    return folder


def test_a_warm_up_that_goes_on_is_reviewed_too(tmp_path):
    folder = folder_of(tmp_path, 0, warmup=4)
    folder.config = config(warmup=WarmupConfig(steps=3))
    checkpoints = Mock(spec=Checkpointer, steps=[])
    checkpoints.restore.return_value = None
    with pytest.raises(ValueError, match=r"config\.warmup\.steps=3, but .* has done 4"):
        resume(Mock(spec=Run), checkpoints, folder, Mock(spec=Journal))
    assert not (tmp_path / "config.json").exists(), "a refused start is written down"


def test_weights_of_later_are_not_evaluated_in_the_place_of_the_first(tmp_path):
    folder = folder_of(tmp_path, 2)
    with pytest.raises(ValueError, match=r"step_000000\.json is missing, .* weights .* are gone"):
        resume(Mock(spec=Run), Mock(spec=Checkpointer, steps=[2]), folder, Mock(spec=Journal))


def test_the_plan_of_a_run_that_would_be_refused_is_refused():
    changed = dataclasses.replace(tiny_config().update, microbatch_buckets=(1,))
    with pytest.raises(ValueError, match=r"config\.update does not fit rollouts of full length"):
        print_plan(tiny_config(update=changed), measure=False)
    with pytest.raises(ValueError, match=r"config\.evaluation\.problems=-1 must be at least 0 here"):
        print_plan(tiny_config(evaluation=EvaluationConfig(problems=-1)), measure=False)


def test_a_file_in_no_folder_is_refused_before_the_evaluation(tmp_path):
    with pytest.raises(ValueError, match=r"--json=.*there is no folder .*nowhere; make it"):
        evaluate_model(tiny_config(), json_file=str(tmp_path / "nowhere" / "x.json"))
