"""A run that goes on with another config says so, or is refused before anything is written."""

import pytest

from rljax.experiment.changes import changed_fields, review_changes
from rljax.experiment.config import to_dict
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


def test_fewer_steps_of_supervised_training_are_refused():
    new = config()
    new["warmup"]["steps"] = 1
    with pytest.raises(ValueError, match=r"config\.warmup\.steps=1, but .* has done 2"):
        review_changes(config(), new, 2, "config.warmup.steps")
