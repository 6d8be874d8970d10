"""Options that are set together make a run, or are refused in one line that names one of them; before weights load."""

import copy
import dataclasses
import http.client
import math
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_fuzz_config import NASTY, with_value

import rljax.experiment.prefer
from rljax.algorithms import (
    GKD,
    GRPO,
    MOPD,
    PPO,
    PREFERENCE_RECIPES,
    CrossStageDistillation,
    DecoupledPPO,
    OnPolicyDistillation,
    TreeGRPO,
)
from rljax.experiment import (
    CoEvolvedTasks,
    EngineTeacher,
    FailedTasks,
    FreshModel,
    LightSAMConfig,
    MediumTasks,
    ModelTeacher,
    MultiTurn,
    MuonConfig,
    OwnTeacher,
    PreferenceConfig,
    Remote,
    RewardConfig,
    RowsData,
    RunModel,
    TwoStageTasks,
)
from rljax.experiment.build import build
from rljax.experiment.fine_tune import fine_tune
from rljax.experiment.prefer import prefer
from rljax.experiment.serve import ServeConfig
from rljax.rollouts.engines.config import EnginesConfig
from rljax.settings import is_web_address
from rljax.testing import tiny_config

SHAPE = dict(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16)
ECHO = (RewardConfig("rljax.testing:echo_reward"),)
LARGE = 10**9

TURNS = MultiTurn(make="agent_tasks:Ask", tool_format="agent_tasks:FORMAT", context_length=64, prefill_chunks=(8,))

BASES = {
    "one turn": {},
    "experts": {"model": FreshModel("abcdefgh=", family="qwen3_moe", experts=4, **SHAPE)},
    "engines": {"actor": Remote(rewards=ECHO)},
    "turns": {
        "model": FreshModel("n0123456789:;?y<> \n", **SHAPE),
        "data": RowsData("agent_tasks:rows", {"size": 20}, test_args={"size": 4, "first": 100}),
        "actor": TURNS,
    },
    "taught": {"algorithm": GKD(), "teachers": (OwnTeacher(),)},
    "forks": {"algorithm": TreeGRPO(chains=2, points=1)},
    "critic": {"algorithm": PPO()},
    "corrected": {"algorithm": DecoupledPPO(group_size=4)},
}
"""Configs of one kind each, which others are made of by changing a few fields."""

MATRICES = ("query", "key", "value", "out", "gate", "up", "down")
OTHER = FreshModel("abcdefgh=", **SHAPE)

OPTIONS = {
    "lora.rank": [0, 1, 8, 4096],
    "lora.alpha": [1e-30, 16.0, 3e38],
    "lora.targets": [(), ("query",), ("query", "query"), MATRICES[:2], MATRICES, ("embed",)],
    "lora.rank_stabilized": [True],
    "lora.base_dtype": ["float32", "bfloat16"],
    "lora.path": ["", "no/such/folder", "/dev/null", "gs://x"],
    "critic.adapters": [True],
    "critic.warmup_steps": [0, 3, LARGE],
    "rollout.devices": [0, 1, LARGE],
    "rollout.staleness": [0, 1, 3, LARGE],
    "rollout.push_every": [1, 2, 4, LARGE],
    "rollout.reset_moments": ["none", "first", "all"],
    "rollout.in_step": [True],
    "rollout.groups.incomplete": ["as_is", "pad", "reweight"],
    "rollout.groups.max_age": [None, 0, 1, LARGE],
    "sampling.temperature": [0.0, 0.5, 1.0, 1e6, 1e-30],
    "sampling.top_k": [0, 1, LARGE],
    "sampling.top_p": [0.5, 1.0, 1e-30],
    "sampling.max_new_tokens": [1, 2, 4, 60, LARGE],
    "sampling.logit_bias": [
        ((0, 1.0),), (("a", 2.0),), (("ab", 1.0),), ((LARGE, 1.0),), ((0, -3e38),), ((0, 1.0), ("a", 1.0)),
        ((-1, 1.0),), (("", 0.0),), ((0, 50.0),), ((2**31, 1.0),),
    ],
    "sampling.banned": [(0,), ("a", "a"), tuple(range(9)), tuple(range(12)), tuple(range(20)), ("ab",), (-1,), ("",)],
    "sampling.repetition_penalty": [0.01, 1.0, 100.0],
    "sampling.presence_penalty": [-100.0, 1.5],
    "sampling.frequency_penalty": [100.0, 1e-30],
    "sampling.top_logprobs": [0, 5, 100],
    "sampling.json_schema": ["", '{"type": "string"}', "{", "[]", '{"type": "nonsense"}', "1", '"x"', "null"],
    "sampling.regex": ["", "a*", "(", "[^a]", "(?=a)b", "\\", "a{9999999}"],
    "sampling.lark": ["", 'start: "a"', "start:", "x"],
    "sampling.schema_column": ["", "answer", "nothing"],
    "sampling.stop_column": ["", "answer", "nothing", "number"],
    "sampling.stop_strings": [(), ("a",), ("",), ("z",), ("ab", "ab")],
    "actor.record_experts": [True],
    "actor.prompt_slots": [0, 1, 64],
    "actor.sample_slots": [0, 1, 64],
    "actor.engine": ["rljax", "vllm"],
    "actor.engines": [("http://localhost:1",), ("http://h:1",), (), ("x",), ("http://",), ("http://localhost:x",)],
    "actor.weights": ["", "weights", "gs://w", "\0"],
    "actor.hand_over": ["reload", "restart"],
    "actor.command": ["", "serve {weights}", "serve", "{", "{weights} {0}", "{weights.x}", "{weights!z}", "'{weights}"],
    "actor.probes": [1, LARGE],
    "actor.longest_prompt": [1, 8, LARGE],
    "actor.groups_in_flight": [0, 2, LARGE],
    "actor.steps_in_flight": [None, 1, 3],
    "actor.at_hand_over": ["recompute", "keep"],
    "actor.answers_after": [0, 2],
    "actor.stale_share": [0.0, 0.5, 1.0],
    "algorithm": [
        GRPO(group_size=4, kl_coef=0.1), DecoupledPPO(group_size=4), OnPolicyDistillation(), MOPD(group_size=2), PPO(),
        CrossStageDistillation(), GKD(support=3), GKD(support=9), GKD(rl_coef=1.0), TreeGRPO(chains=2, points=1),
    ],
    "teachers": [
        (), (OwnTeacher(),), (OwnTeacher("policy"),), (OwnTeacher("policy", context_column="answer"),),
        (ModelTeacher(OTHER),), (ModelTeacher(OTHER, tasks=("even",)), ModelTeacher(OTHER)), (EngineTeacher(),),
        (EngineTeacher(("x",)),), (EngineTeacher(("http://",)),), (ModelTeacher(RunModel("nowhere")),),
        (ModelTeacher(dataclasses.replace(OTHER, alphabet="ab")),), (ModelTeacher(OTHER), ModelTeacher(OTHER)),
        (ModelTeacher(OTHER, context_column="answer", context_format="{text"),),
        (ModelTeacher(OTHER, context_column="answer", context_format="{text}="),), (ModelTeacher(RunModel("\0")),),
    ],
    "curriculum": [FailedTasks(), MediumTasks(), TwoStageTasks(), MediumTasks(rate=0.0), CoEvolvedTasks("no:maker")],
    "optimizer": [MuonConfig(), LightSAMConfig()],
    "reference_refresh": [0, 2],
    "reference_weight": [0.25, 1.0, 0.0, 2.0],
    "update.minibatches": [1, 2, 4],
    "update.epochs": [1, 3],
    "update.use_sampler_logprobs": [True],
    "update.pack_length": [1, 8, 64, 4096],
    "steps": [1, 4],
    "log.profile_steps": [(), (1, 2), (2, 1), (0, 1), (1, LARGE), (1,)],
    "log.recordings": [True],
    "log.per_token": [True],
    "mesh.tensor": [1, 2],
    "mesh.expert": [1, 2],
    "mesh.sequence": [1, 2],
}  # fmt: skip
"""Values by field: some that work, some that cannot, some that do not go with other fields."""


def parent_of(config, path):
    """The part that holds a field, or None where a config of this kind has none such."""
    *above, name = path.split(".")
    for step in above:
        config = getattr(config, step)
    return config if hasattr(config, name) else None


def fields_there(config):
    return [path for path in OPTIONS if parent_of(config, path) is not None]


FIELDS = {base: fields_there(tiny_config(**changes)) for base, changes in BASES.items()}


@st.composite
def changed(draw):
    """(name of a base, up to four fields with other values)."""
    base = draw(st.sampled_from(list(BASES)))
    chosen = draw(st.lists(st.sampled_from(FIELDS[base]), min_size=1, max_size=4, unique=True))
    return base, {path: draw(st.sampled_from(OPTIONS[path])) for path in chosen}


def with_options(base, options):
    """A config of its own. What another actor or method has no field for is left out."""
    config = tiny_config(**copy.deepcopy(BASES[base]))
    for path, value in options.items():
        parent = parent_of(config, path)
        if parent is not None:
            setattr(parent, path.split(".")[-1], copy.deepcopy(value))
    return config


def names_one_of(said, options):
    """Whether what is said speaks of a field that was set, of its value, or of the class of that."""
    for path, value in options.items():
        of_value = [type(one).__name__ for one in (value if isinstance(value, tuple) else (value,))]
        if any(name in said for name in (path.split(".")[-1], *of_value, f"column {value}")):
            return True
    return False


@pytest.mark.parametrize("examples", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_options_together_make_a_run_or_are_refused_by_name(examples):
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(changed())
    @example(("one turn", {"curriculum": CoEvolvedTasks("no:maker")}))
    def made_or_refused(choice):
        base, options = choice
        try:
            run = build(with_options(base, options))
        except ValueError as error:
            said = str(error)
            assert "\n" not in said and len(said) < 1000, said
            assert names_one_of(said, options), (base, options, said)
        else:
            # Nothing of it has loaded or been opened.
            assert run.state is None and run.pipeline.journal is None

    made_or_refused()


def test_something_can_be_sampled_and_an_end_be_reached():
    vocabulary = build(with_options("one turn", {})).decoder.num_ids
    with pytest.raises(ValueError, match=rf"^config.sampling.banned names all {vocabulary} tokens of the vocabulary"):
        build(with_options("one turn", {"sampling.banned": tuple(range(vocabulary))}))

    ends = tuple(build(with_options("one turn", {})).tokenizer.stop_ids)
    options = {"sampling.banned": ends, "sampling.regex": "a+"}
    with pytest.raises(ValueError, match=r"^config.sampling.banned: every token that ends a completion is banned"):
        build(with_options("one turn", options))
    assert build(with_options("one turn", options | {"sampling.regex": ""}))


@pytest.mark.parametrize("recipe", PREFERENCE_RECIPES, ids=lambda recipe: recipe.__name__)
def test_any_hyperparameter_of_a_preference_is_taken_or_named(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(rljax.experiment.prefer, "run_in_folder", lambda *_, **__: {})
    for name in [field.name for field in dataclasses.fields(recipe)]:
        for value in NASTY:
            config = tiny_config(preferences=PreferenceConfig(method=recipe()))
            with with_value(config, "config.preferences.method", name, value):
                taken_or_named(lambda: prefer(config, str(tmp_path)), name)  # noqa: B023


@pytest.mark.parametrize(
    ("begin", "part", "name"), [(fine_tune, "warmup", "steps"), (prefer, "checkpoint", "keep_best")]
)
def test_what_a_command_looks_at_first_is_checked_first(begin, part, name, tmp_path):
    for value in ["x", None, (1,), 2.5, math.nan, -1]:
        config = tiny_config()
        setattr(getattr(config, part), name, value)
        with pytest.raises(ValueError, match=rf"^config\.{part}\.{name}="):
            begin(config, str(tmp_path))


@given(field=st.sampled_from(dataclasses.fields(ServeConfig)), value=st.sampled_from(NASTY))
@settings(max_examples=100, deadline=None)
def test_any_value_of_an_engine_is_taken_or_named(field, value):
    config = ServeConfig(model="no such folder", key="a key")
    setattr(config, field.name, value)
    taken_or_named(config.check, field.name)


def taken_or_named(make, name):
    try:
        make()
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error) and len(str(error)) < 1000, error


@given(st.text(alphabet="htps:/.[]@0123456789a ?#x\\", max_size=24).map(lambda text: f"http://{text}"))
@settings(max_examples=150, deadline=None)
@example("http://host:x")
@example("http://host:99999")
@example("http://[::1")
@example("http://:8000")
@example("http://h:")
def test_an_address_that_is_taken_can_be_asked(address):
    if is_web_address(address):
        url = urlsplit(address)
        http.client.HTTPConnection(url.hostname, url.port).close()


PIECES = [
    "serve",
    " ",
    "{weights}",
    "{port}",
    "{host}",
    "{",
    "}",
    "{0}",
    "{weights.x}",
    "{weights[0]}",
    "{port!r}",
    "'",
]


@given(st.lists(st.sampled_from([*PIECES, '"', "\\", "{port:03d}", "{port:s}"]), max_size=6).map("".join))
@settings(max_examples=100, deadline=None)
@example("serve {{weights}}")  # braces in the text, and no place
def test_a_command_that_is_taken_can_be_filled_in(command):
    places = {"address": "http://h:1", "host": "h", "port": 1, "weights": Path("a folder")}
    try:
        EnginesConfig(command=command).check_engines()
    except ValueError as error:
        assert "config.actor.command" in str(error) and "\n" not in str(error)
    else:
        words = [word.format(**places) for word in shlex.split(command)]
        assert not command or any("a folder" in word for word in words)
