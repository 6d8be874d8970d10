"""What a wrong value of a config is told: its path, what is allowed, and how to write it."""

import dataclasses
import re

import pytest
from test_fuzz_config import with_value

from rljax.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    FileData,
    MultiTurn,
    MuonConfig,
    OwnTeacher,
    ReasoningGymData,
    RewardConfig,
    RowsData,
    SamplingConfig,
)
from rljax.experiment.check import check
from rljax.settings import check_fields, field, placed
from rljax.tasks import final_number
from rljax.testing import tiny_config


@dataclasses.dataclass
class Part:
    """A part with a bound on either side."""

    share: float = field(default=0.5, above=0, most=1)
    count: int | None = field(default=None, least=2)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"share": 0.0}, "config.part.share=0.0 must be above 0 and at most 1"),
        ({"share": 1.5}, "config.part.share=1.5 must be above 0 and at most 1"),
        ({"count": 1}, "config.part.count=1 must be at least 2"),
        ({"count": True}, "config.part.count=True must be a whole number or None"),
        ({"share": 1.0, "count": 2}, ""),
        ({"count": None}, ""),
    ],
)
def test_bounds_are_those_of_the_field(values, says):
    part = Part()
    for name, value in values.items():
        setattr(part, name, value)
    if not says:
        check_fields(part, "config.part")
        return
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        check_fields(part, "config.part")


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("rate=2 is too high", "config.part.rate=2 is too high"),
        ("GRPO: rate=2 is too high", "config.part.rate=2 is too high"),
        ("there is none", "config.part: there is none"),
        ("config.other.x=1 is it", "config.other.x=1 is it"),
    ],
)
def test_a_message_gets_the_path_that_it_lacks(message, says):
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"), placed("config.part"):
        raise ValueError(message)


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        ("config", "steps", 2.5, "=2.5 must be a whole number"),
        ("config.log", "rollouts_every", 0, "=0 must be at least 1"),
        ("config.actor", "prompt_buckets", 16, "=16 must be a tuple of whole numbers, such as (16,)"),
        ("config.optimizer", "learning_rate", float("inf"), "=inf must be a finite number"),
        ("config.optimizer", "b1", 2.0, "=2.0 must be at least 0 and below 1"),
        ("config.optimizer", "eps", -1.0, "=-1.0 must be above 0"),
        ("config.checkpoint", "every", -1, "=-1 must be at least 0"),
        ("config.sampling", "temperature", 1e-38, "=1e-38 must be 0"),
        ("config.warmup.optimizer", "schedule", "linear", "='linear' needs total_steps"),
    ],
)
def test_what_is_said_of_a_wrong_value(part, name, value, says):
    config = tiny_config()
    with pytest.raises(ValueError, match=re.escape(f"{part}.{name}{says}")), with_value(config, part, name, value):
        check(config)


@pytest.mark.parametrize(
    ("changes", "field", "why"),
    [
        (
            {"checkpoint": CheckpointConfig(best_metric="x")},
            "checkpoint.best_metric='x'",
            "checkpoint.keep_best=0; set",
        ),
        ({"checkpoint": CheckpointConfig(every=0, keep_best=1)}, "checkpoint.keep_best=1", "checkpoint.every=0; set"),
        ({"evaluation": EvaluationConfig(temperature=0.0, top_p=0.9)}, "evaluation.top_p=0.9", ".temperature=0.0; set"),
        ({"sampling": SamplingConfig(temperature=0.0, top_k=5)}, "sampling.top_k=5", ".temperature=0.0; set"),
        ({"sampling": SamplingConfig(temperature=0.0, top_p=0.5)}, "sampling.top_p=0.5", ".temperature=0.0; set"),
        ({"sampling": SamplingConfig(temperature=0.0, min_p=0.1)}, "sampling.min_p=0.1", ".temperature=0.0; set"),
        ({"optimizer": MuonConfig(total_steps=9)}, "optimizer.total_steps=9", "optimizer.schedule='constant'; set"),
        ({"actor": MultiTurn(make="m:f", stale_every=3)}, "actor.stale_every=3", "actor.stale_share=0.0; set"),
        (
            {"data": FileData("a.jsonl", "b.jsonl", 0.5)},
            "data.test_fraction=0.5",
            "data.test='b.jsonl'; leave",
        ),
        (
            {"data": RowsData("m:f", {}, {"seed": 1}, 0.5)},
            "data.test_fraction=0.5",
            ".test_args={'seed': 1}; leave",
        ),
        ({"data": ReasoningGymData(extract=final_number)}, "data.extract=", "the rewards of config.actor and not"),
        ({"data": ReasoningGymData(full_score_only=False)}, "data.full_score_only=False", "the rewards of"),
        (
            {"teachers": (OwnTeacher(context_format="{text}"),)},
            "teachers[0].context_format='{text}'",
            "teachers[0].context_column=''; name a column",
        ),
        ({"reference_refresh": 2}, "reference_refresh=2", "GRPO has no reference model; set"),
        ({"reference_weight": 0.5}, "reference_weight=0.5", "the reference never moves; set"),
    ],
)
def test_a_value_without_effect_is_refused(changes, field, why):
    with pytest.raises(ValueError, match=rf"^config\.{re.escape(field)}.* has no effect.*{re.escape(why)}"):
        check(tiny_config(**changes))


def test_one_reward_without_its_tuple_is_told_how_to_write_it():
    config = tiny_config()
    config.actor.rewards = RewardConfig()
    with pytest.raises(ValueError, match=r"config\.actor\.rewards=RewardConfig\(.* must be a tuple of RewardConfig"):
        check(config)
