"""Any value of any field of any config is accepted, or refused in one line that names the field and the value."""

import contextlib
import dataclasses
import re
import sys
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rljax.algorithms import DISTRIBUTION_RECIPES, FOREST_RECIPES, GKD, RECIPES, DecoupledPPO
from rljax.experiment import (
    BlackBox,
    CoEvolvedTasks,
    D2EvoTasks,
    EngineTeacher,
    FailedTasks,
    FileData,
    Guided,
    LightSAMConfig,
    MediumTasks,
    ModelTeacher,
    MultiTurn,
    MuonConfig,
    OwnTeacher,
    PretrainedModel,
    ReasoningGymData,
    ReflectedTasks,
    Remote,
    RemoteBlackBox,
    RemoteMultiTurn,
    RewardConfig,
    RowsData,
    RunModel,
    SingleTurn,
    TwoStageTasks,
)
from rljax.experiment.check import check
from rljax.settings import parts
from rljax.testing import tiny_config

ALL = (*RECIPES, *FOREST_RECIPES, *DISTRIBUTION_RECIPES)

ROOTS = {
    "tiny": {},
    "episodes": {"actor": MultiTurn(make="m:f", context_length=64), "data": RowsData("m:f")},
    "agents": {"actor": BlackBox(agent="m:f", context_length=64), "data": FileData("x.jsonl")},
    "guided": {
        "actor": Guided(SingleTurn(rewards=(RewardConfig(),))),
        "curriculum": FailedTasks(),
        "algorithm": DecoupledPPO(),
    },
    "pretrained": {"model": PretrainedModel(), "data": ReasoningGymData("chain_sum"), "optimizer": MuonConfig()},
    "lightsam": {"optimizer": LightSAMConfig()},
    "taught": {
        "algorithm": GKD(support=4),
        "teachers": (ModelTeacher(RunModel("runs/x"), tasks=("a",)), OwnTeacher(tasks=("b",)), EngineTeacher()),
    },
    "engines": {"actor": Remote(), "curriculum": MediumTasks()},
    "episodes by engines": {
        "actor": RemoteMultiTurn(make="m:f", context_length=64),
        "data": RowsData("m:f"),
        "curriculum": TwoStageTasks(),
    },
    "agents by engines": {
        "actor": RemoteBlackBox(agent="m:f", context_length=64),
        "data": FileData("x.jsonl"),
        "curriculum": CoEvolvedTasks(maker="m:f"),
    },
    "questions": {"curriculum": D2EvoTasks()},
    "reflections": {"curriculum": ReflectedTasks()},
}
"""Configs in which every kind of part stands at least once."""

NASTY = [
    *(None, True, -1, 0, 1, 2, 2**31, 10**400, -0.5, 0.5, 2.5, 1e-38, 1e308),
    *(float("nan"), float("inf"), "", "x", "a:b", "\ud800", "two\nlines", b"x"),
    *((), (16,), (0,), (2, 1), (1.5,), ("x",), (None,), [16], {}, {"a": 1}, object(), 1j),
]

BASES = {root: tiny_config(**changes) for root, changes in ROOTS.items()}

FIELDS = list(
    {
        (type(part), field.name): (root, path, field.name)
        for root, base in reversed(BASES.items())
        for path, part in reversed(list(parts(base, "config")))
        for field in dataclasses.fields(part)
    }.values()
)
"""(root, path, name) of every field of every class, where it stands first."""

values = st.one_of(
    st.integers(), st.floats(), st.text(max_size=8), st.booleans(), st.none(), st.tuples(st.integers()),
    st.lists(st.integers(), max_size=3).map(tuple), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@contextlib.contextmanager
def with_value(config, path, name, value):
    """The config, with one field changed after it was made, as a flag does it."""
    part = dict(parts(config, "config"))[path]
    before = getattr(part, name)
    # A flag makes a float of a whole number that has one; in Python both compute alike, but beartype tells them apart.
    hint = {field.name: field.type for field in dataclasses.fields(part)}[name]
    is_float = float in (hint, *typing.get_args(hint))
    setattr(part, name, float(value) if is_float and type(value) is int and abs(value) < sys.float_info.max else value)
    try:
        yield config
    finally:
        setattr(part, name, before)


def assert_taken_or_named(config, path, name, value):
    try:
        with with_value(config, path, name, value):
            check(config)
    except ValueError as error:
        said = str(error)
        assert "\n" not in said and len(said) < 1000, said
        # What takes two fields may begin with the other one; both are named. Recipes that fork speak of their plan.
        is_named = f"{path}.{name}" in said or (said.startswith("config.") and re.search(rf"\b{name}\b", said))
        assert is_named or said.startswith("config.algorithm"), (path, name, value, said)


every_sixth_or_all = pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])


@every_sixth_or_all
@pytest.mark.parametrize("root", ROOTS)
def test_a_value_that_cannot_be_is_named_with_its_field(root, every):
    for place, (where, path, name) in enumerate(FIELDS):
        if where == root:
            for value in NASTY[place % every :: every]:
                assert_taken_or_named(BASES[root], path, name, value)


@given(field=st.sampled_from(FIELDS), value=values)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_of_any_field_is_taken_or_named(field, value):
    root, path, name = field
    assert_taken_or_named(BASES[root], path, name, value)


@every_sixth_or_all
@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.__name__)
def test_any_hyperparameter_of_any_recipe_is_taken_or_named(recipe, every):
    base = tiny_config(algorithm=recipe())
    if recipe().build().plan.teacher:
        base.teachers = (ModelTeacher(base.model),)
    # What a recipe inherits is tried with the first one.
    own = [f.name for f in dataclasses.fields(recipe) if recipe is RECIPES[0] or f.name in recipe.__annotations__]
    for place, name in enumerate(own):
        for value in NASTY[place % every :: every]:
            assert_taken_or_named(base, "config.algorithm", name, value)
