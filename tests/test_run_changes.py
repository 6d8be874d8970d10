"""A run that goes on with another config says so, or is refused before anything is written."""

import dataclasses

import pytest

from rljax.experiment import WarmupConfig
from rljax.experiment.build import build
from rljax.experiment.changes import changed_fields, review_changes
from rljax.experiment.config import to_dict
from rljax.experiment.dry_run import check_tables
from rljax.tasks import Example
from rljax.testing import tiny_config


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
        review_changes(config(), new, 2, "config.steps")


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


def test_fewer_steps_of_supervised_training_are_refused():
    new = config()
    new["warmup"]["steps"] = 1
    with pytest.raises(ValueError, match=r"config\.warmup\.steps=1, but .* has done 2"):
        review_changes(config(), new, 2, "config.warmup.steps")
