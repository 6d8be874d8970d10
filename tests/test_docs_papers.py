"""The paper index is complete and true: each recipe has an entry, a block that is the recipe, a config that runs."""

import dataclasses
import importlib.util
import inspect
import operator
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from docs_metrics import unexplained
from objectives import make_batch, make_rows

import rljax.advantages
import rljax.algorithms
import rljax.losses
import rljax.trees.forks
from rljax.algorithms import DISTRIBUTION_RECIPES, FOREST_RECIPES, PREFERENCE_RECIPES, RECIPES
from rljax.evaluation import Candidates, verifier_prompt
from rljax.experiment.check import check
from rljax.experiment.config import to_dict
from rljax.experiment.rounds import run_rounds
from rljax.experiment.train import train
from rljax.plans.fork_rules import PartialGroup
from rljax.plans.phrases import SUMMARY_PHRASES, PhraseFinder
from rljax.tasks import Example
from rljax.testing import run_metrics
from rljax.types import TEACHER_DIVERGENCE

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "papers"
SHARED = {
    "spelling",
    "turns",
    "shouted_words",
    "evolving",
    "atlas",
    "diary",
    "annotated_words",
    "shop_and_words",
    "hidden_rules",
    "tables",
    "trail",
}
"""What configs of the folder import."""
PREFERENCES = {"dpo", "reward_model"}
"""Configs of `rljax prefer`."""
STUDIES = {
    "model_surgery": ("surgery", "editing.md"),
    "stv": ("stv", "editing.md"),
    "skillclaw": ("skills", "papers.md"),
    "cogmath": ("cogmath", "suites.md"),
    "longcontext": ("longcontext", "suites.md"),
    "geosketch": ("geosketch", "suites.md"),
    "curriculum_study": ("curriculum", "papers.md"),
}
"""Configs of `rljax study WORD`, which have no recipe, with their words and their pages."""
HARNESSES = {"context_folding"}
"""Configs of agents that manage their context, whose recipes are of their own (test_rollouts_folding)."""
CURRICULA = {"coevolve", "d2evo", "role_agent_world"}
"""Configs whose paper is a curriculum, over a recipe that has a config of its own."""
WORLDS = {"map_agent", "memory_agent"}
"""Configs whose paper is an environment, over a recipe that has a config of its own."""
STAGES = {"agenttuning", "expert_iteration", "teacherlm"}
"""Configs of `rljax stages`."""
ALL = (*RECIPES, *FOREST_RECIPES, *DISTRIBUTION_RECIPES)
NO_RECIPE = {*SHARED, *PREFERENCES, *STUDIES, *HARNESSES, *CURRICULA, *WORLDS, *STAGES}
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in NO_RECIPE)
PAGE = (ROOT / "docs" / "papers.md").read_text()
ENTRIES = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
NO_PAPER = {"Reinforce", "RandomForks"}
METRIC = re.compile(r"\b(?:rollout|loss|critic|pack|teacher)/\w+(?:/\w+)*")
ALWAYS_RUN = {"tree_grpo"}
"""The other configs make their two steps in the slow suite."""

every_config = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module", autouse=True)
def neighbours():
    """Configs import their neighbours, as under `--config=`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CONFIGS)
        yield
    for name in (*SHARED, "shop", "agent_demo"):
        sys.modules.pop(name, None)


def load(path):
    spec = importlib.util.spec_from_file_location(f"paper_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page():
    """What the blocks of the page define."""
    names: dict = {}
    for block in blocks(PAGE):
        exec(compile(block, "papers.md", "exec"), names)
    return names


def test_every_recipe_has_one_config_and_every_config_is_listed(neighbours):
    recipes = [type(load(CONFIGS / f"{name}.py").get_config().algorithm) for name in NAMES]
    assert sorted(r.__name__ for r in recipes) == sorted(r.__name__ for r in ALL)
    for name, recipe in zip(NAMES, recipes, strict=True):
        assert f"(../configs/papers/{name}.py)" in ENTRIES[recipe.__name__], name


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.__name__)
def test_every_entry_says_what_it_is_how_it_differs_and_shows_a_dozen_lines_at_most(recipe):
    entry = ENTRIES[recipe.__name__]
    papers = re.findall(r"\b2\d{3}\.\d{5}\b|\b1\d{3}\.\d{5}\b", recipe.__doc__)
    if recipe.__name__ not in NO_PAPER:
        assert papers[0] in entry
        assert "\nDiffers: " in entry
    (block,) = blocks(entry)
    assert len(block.splitlines()) <= 12


@pytest.mark.parametrize("name", sorted(CURRICULA | WORLDS))
def test_every_config_of_a_curriculum_or_a_world_is_listed_and_valid_in_both_sizes(name):
    module = load(CONFIGS / f"{name}.py")
    assert f"    rljax train --config=papers/{name} --workdir=runs/{name}\n" in module.__doc__
    assert f"(../configs/papers/{name}.py)" in PAGE
    for size in ("full", "smoke"):
        check(module.get_config(size))
    with pytest.raises(ValueError, match="big: the size must be one of full, smoke"):
        module.get_config("big")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CURRICULA | WORLDS))
def test_every_config_of_a_curriculum_or_a_world_makes_two_steps(name, tmp_path):
    module = load(CONFIGS / f"{name}.py")
    train(module.get_config("smoke"), str(tmp_path))
    lines = list(run_metrics(tmp_path))
    assert len(lines) == 2 and not unexplained(lines[-1])
    assert set(METRIC.findall(module.__doc__)) <= set(lines[-1])


def test_whatever_the_small_map_says_can_be_read_by_its_model(neighbours):
    atlas = importlib.import_module("atlas")
    environment = atlas.Atlas()
    environment.reset({"prompt": "paris 800 berlin 600:", "latitude": 45.46, "longitude": 9.19})
    actions = ("~paris 800;", "~nowhere 800;", "~paris 99999;", "?nowhere;", "a/b;", "what", "paris/milan;", "?milan;")
    steps = [environment.step(action) for action in (*actions, "=nowhere", "=milan")]
    assert all(set(step.observation) <= set(atlas.ALPHABET) for step in steps)
    assert [step.observation for step in steps[1:6]] == [atlas.WRONG] * 5
    assert steps[-3].observation == "45.46 9.19"
    assert steps[-1].done and steps[-1].reward == 1.0 and steps[-1].observation == ""


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_a_verifier_without_a_model_takes_the_city_that_both_clues_fit(neighbours, order):
    atlas = importlib.import_module("atlas")
    example = atlas.questions("test")[0]
    texts = ["=oslo", f"~paris 800; {example['city']}\n={example['city']}", "?nowhere; no\n=never told"]
    candidates = Candidates([atlas.answer_of(text) for text in texts], texts=texts)
    asked = verifier_prompt(example["prompt"], candidates, order=order)
    assert atlas.read_by_clues(asked) == str(order.index(1) + 1)


def test_whatever_the_small_memory_says_can_be_read_by_its_model_and_its_demonstrations_are_episodes(neighbours):
    diary = importlib.import_module("diary")
    examples = [Example(row.pop("prompt"), row) for row in diary.rows(40)]
    is_right = []
    for index, (example, demonstration) in enumerate(zip(examples, diary.flawed(examples), strict=True)):
        turns = demonstration.columns["completion"]
        assert set(str(example.prompt) + "".join(turns)) <= set(diary.ALPHABET)
        environment = diary.Diary()
        environment.reset({"prompt": example.prompt, **example.columns})
        steps = [environment.step(action) for action in turns[::2]]
        assert [f" {step.observation}\n" for step in steps[:-1]] == turns[1::2]
        assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]

        # What was opened is read: who has all of it is right.
        assert steps[-1].counts["is_right"] >= steps[-1].counts["sufficient"]
        if index // len(diary.KINDS) % 5 < 2:
            is_right.append(steps[-1].counts["is_right"])

    # Two in five read what they need, where a search finds it.
    assert len(is_right) == 16 and sum(is_right) >= 14
    assert environment.step("what").observation == environment.step("!nowhere;").observation == diary.WRONG


@pytest.mark.parametrize("name", sorted(STAGES))
def test_every_config_of_stages_is_listed_with_its_deviation_and_valid_in_both_sizes(name):
    module = load(CONFIGS / f"{name}.py")
    assert f"    rljax stages --config=papers/{name} --workdir=runs/" in module.__doc__
    papers = re.findall(r"\b\d{4}\.\d{5}\b", module.__doc__)
    (section,) = re.findall(rf"^### [^\n]+\n[^#]*\(\.\./configs/papers/{name}\.py\)[^#]*", PAGE, flags=re.MULTILINE)
    assert set(papers) <= set(re.findall(r"\b\d{4}\.\d{5}\b", section)) and "\nDiffers: " in section
    for size in ("full", "smoke"):
        check(module.get_config(size))
    with pytest.raises(ValueError, match="big: the size must be one of full, smoke"):
        module.get_config("big")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(STAGES))
def test_every_config_of_stages_makes_rows_and_trains_on_them(name, tmp_path):
    config = load(CONFIGS / f"{name}.py").get_config("smoke")
    scores = run_rounds(config, str(tmp_path))
    assert [score["round"] for score in scores] == list(range(config.stages.rounds + 1))
    assert not unexplained(list(run_metrics(tmp_path / "round-01" / "trained"))[-1])


@every_config
def test_every_config_says_how_to_run_it_and_is_valid_in_both_sizes(name):
    module = load(CONFIGS / f"{name}.py")
    assert f"    rljax train --config=papers/{name} --workdir=runs/{name}\n" in module.__doc__
    assert METRIC.search(module.__doc__) or "held-out" in module.__doc__
    full, smoke = module.get_config(), module.get_config("smoke")
    assert (full.steps, smoke.steps) == (20 if full.name == "turns" else 60, 2)
    for config in (full, smoke):
        check(config)
    assert {**to_dict(full.algorithm)} == {**to_dict(smoke.algorithm)}
    with pytest.raises(ValueError, match="big: the size must be one of full, smoke"):
        module.get_config("big")


def test_a_config_does_not_hide_a_module_of_the_standard_library():
    """The folder comes first on the path while a config of it runs."""
    assert not set(NAMES) & sys.stdlib_module_names


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS_RUN else pytest.mark.slow) for name in NAMES]
)
def test_every_config_makes_two_steps_and_reports_what_it_says_to_look_at(name, tmp_path):
    module = load(CONFIGS / f"{name}.py")
    summary = train(module.get_config("smoke"), str(tmp_path))
    lines = list(run_metrics(tmp_path))
    assert len(lines) == 2 and np.isfinite(list(summary["after"].values())).all()
    assert lines[-1]["loss/grad_norm"] > 0
    for line in lines:
        assert np.isfinite(list(line.values())).all()
        assert not unexplained(line)
    assert set(METRIC.findall(module.__doc__)) <= set(lines[-1])


@pytest.mark.parametrize("recipe", PREFERENCE_RECIPES, ids=lambda recipe: recipe.__name__)
def test_the_block_of_a_preference_entry_is_the_recipe(recipe, page):
    entry = ENTRIES[recipe.__name__]
    assert re.findall(r"\b\d{4}\.\d{5}\b", recipe.__doc__)[0] in entry and "\nDiffers: " in entry
    method = recipe().build()
    (block,) = blocks(entry)
    assert len(block.splitlines()) <= 12
    (name,) = re.findall(r"^(\w+) = ", block, flags=re.MULTILINE)

    rng = np.random.default_rng(0)
    mask = np.arange(5) < rng.integers(1, 6, 6)[:, None]
    old = -rng.exponential(size=mask.shape)
    rows = make_rows(
        mask, aggregate=method.loss.token_weights, old=old, advantages=0 * old, ref=old + rng.normal(size=mask.shape)
    )
    columns = {
        rljax.losses.SIDE: jnp.tile(jnp.array([1.0, -1.0]), 3),
        rljax.losses.PAIR: jnp.repeat(jnp.arange(3.0), 2),
    }
    rows = dataclasses.replace(rows, columns=columns)
    found, want = (
        jax.value_and_grad(loss.loss, has_aux=True)(jnp.asarray(old), jnp.zeros(mask.shape), rows)
        for loss in (page[name], method.loss)
    )
    assert jax.tree.structure(found) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert (page[name].correct_fn is None) == (method.loss.correct_fn is None)


@pytest.mark.parametrize("name", sorted(PREFERENCES))
def test_every_config_of_preferences_says_how_to_run_it_and_is_valid_in_both_sizes(name):
    module = load(CONFIGS / f"{name}.py")
    assert f"    rljax prefer --config=papers/{name} --workdir=runs/{name}\n" in module.__doc__
    full, smoke = module.get_config(), module.get_config("smoke")
    for config in (full, smoke):
        check(config)
    assert f"(../configs/papers/{name}.py)" in ENTRIES[type(full.preferences.method).__name__]
    assert to_dict(full.preferences.method) == to_dict(smoke.preferences.method)
    with pytest.raises(ValueError, match="big: the size must be one of full, smoke"):
        module.get_config("big")


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_every_config_of_a_study_says_how_to_run_it_and_is_valid_in_both_sizes(name):
    module = load(CONFIGS / f"{name}.py")
    word, page_name = STUDIES[name]
    assert f"    rljax study {word} --config=papers/{name} --workdir=runs/{word}\n" in module.__doc__
    papers = re.findall(r"\b\d{4}\.\d{5}\b", module.__doc__)
    assert papers
    page = (ROOT / "docs" / page_name).read_text()
    for paper in papers:
        (section,) = [
            part
            for part in re.split(r"^### ", page, flags=re.MULTILINE)
            if part.partition("\n")[2].startswith(f"arXiv {paper}")
        ]
        assert f"(../configs/papers/{name}.py)" in section and "\nDiffers: " in section
    for config in (module.get_config(), module.get_config("smoke")):
        check(config)
    with pytest.raises(ValueError, match="big: the size must be one of full, smoke"):
        module.get_config("big")


UNBOUND = {"resum": (PhraseFinder(SUMMARY_PHRASES), [[0]], ()), "arpo": (2,), "aepo": (2,)}
"""What those are given here that need a tokenizer; a recipe that is not bound yet has the same."""


def toy_batch():
    """Two groups of six samples, the first chains of which were forked."""
    batch = make_batch(
        group_id=[0] * 6 + [1] * 6,
        rewards=[1, 0, 0.5, 0, 0.2, 0.9, 0.9, 0, 0, 1, 0.3, 0.3],
        lengths=[6, 4, 6, 1, 5, 6, 3, 6, 6, 2, 6, 4],
        width=9,
    )
    parents = [-1, -1, -1, 0, 0, 2, -1, -1, -1, 7, 7, 8]
    forks = [0, 0, 0, 2, 4, 3, 0, 0, 0, 4, 2, 3]
    tokens = np.array(batch.tokens)
    for row, (parent, fork) in enumerate(zip(parents, forks, strict=True)):
        tokens[row, :fork] = tokens[parent, :fork]
    fields = {"parent_row": np.array(parents, np.int32), "fork_index": np.array(forks, np.int32), "tokens": tokens}
    entropies = np.where(batch.action_mask, 1 + 0.1 * tokens, 0).astype(np.float32)
    return dataclasses.replace(batch, entropies=entropies, **fields)


def gradients(algorithm, batch):
    """Credit, loss, metrics and gradient on rows whose policy has moved; and what is chosen of the whole minibatch."""
    rng = np.random.default_rng(3)
    mask = np.asarray(batch.action_mask)
    noise = rng.normal(size=(3, *mask.shape)).astype(np.float32)
    old = batch.behavior_logprobs + 0.1 * noise[0]
    advantages = np.asarray(algorithm.advantage_fn(batch))
    rows = make_rows(
        mask,
        aggregate=algorithm.loss.token_weights,
        old=old,
        advantages=advantages,
        behavior=batch.behavior_logprobs,
        ref=batch.ref_logprobs,
    )
    columns = {**batch.columns, TEACHER_DIVERGENCE: np.square(noise[0])}
    rows = dataclasses.replace(rows, uniforms=jnp.asarray(rng.random(mask.shape), jnp.float32), columns=columns)
    chosen = None if algorithm.loss.select_fn is None else algorithm.loss.select_fn(jnp.asarray(noise[2]), mask)
    scale = None
    if algorithm.loss.correct_fn is not None:
        correction = algorithm.loss.correct_fn(jax.tree.map(lambda x: jnp.asarray(x)[None], rows))
        rows, scale = jax.tree.map(lambda x: x[0], correction.rows), correction.step_scale
    logprobs = jnp.where(mask, old + 0.3 * noise[1], 0)
    value = jax.value_and_grad(algorithm.loss.loss, has_aux=True)(logprobs, jnp.ones(mask.shape), rows)
    return {"advantages": advantages, "loss": value, "chosen": chosen, "scale": scale}


def fork_points(plan):
    """Where the rule of a fork plan forks the same samples."""
    batch = make_batch(group_id=[0] * 8, rewards=[0] * 8, lengths=[7, 8, 5, 8, 6, 8, 8, 4], prompt=0, width=8)
    entropies = np.random.default_rng(2).random((8, 8)).astype(np.float32)
    batch = dataclasses.replace(batch, entropies=entropies, turn_ids=np.tile(np.arange(8, dtype=np.int32) // 3, (8, 1)))
    key = jax.random.key(1)
    group = PartialGroup(batch=batch, chains=plan.chains, round=0, key=key, decode=lambda ids: "x" * len(ids))
    return list(plan.rule(group))


@pytest.mark.parametrize("name", NAMES)
def test_the_block_of_an_entry_is_the_recipe(name, page):
    recipe = type(load(CONFIGS / f"{name}.py").get_config().algorithm)
    want, got = recipe().build(), page[name]
    got = got(*UNBOUND[name]) if name in UNBOUND else got
    for field in ("group_size", "max_sampling_rounds", "mask_truncated", "needs_ref", "needs_uniforms"):
        assert getattr(got.plan, field) == getattr(want.plan, field), field
    for field in ("keep_group", "refresh_every", "refresh_gate", "columns"):
        assert getattr(got.plan, field) == getattr(want.plan, field), field
    assert (got.plan.shape_reward is None) == (want.plan.shape_reward is None)
    if want.plan.shape_reward:
        lengths = (1, 16384, 18000, 20480, 30000)
        assert [got.plan.shape_reward(1.0, n) for n in lengths] == [want.plan.shape_reward(1.0, n) for n in lengths]
    batch = toy_batch()
    assert (got.plan.critic is None) == (want.plan.critic is None)
    if want.plan.critic:
        for fn in ("returns_fn", "loss"):
            assert type(getattr(got.plan.critic, fn)) is type(getattr(want.plan.critic, fn))
        np.testing.assert_allclose(got.plan.critic.returns_fn(batch), want.plan.critic.returns_fn(batch), rtol=1e-6)
    assert (got.plan.forks is None) == (want.plan.forks is None)
    if want.plan.forks:
        assert got.plan.forks._replace(rule=None) == want.plan.forks._replace(rule=None)
        assert fork_points(got.plan.forks) == fork_points(want.plan.forks)
    found, expected = gradients(got, batch), gradients(want, batch)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def public(module):
    """Names of the public functions, jitted ones included, and classes of `module`."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            n
            for n, x in vars(module).items()
            if not n.startswith("_") and getattr(x, "__module__", "") == module.__name__
        ]
    kinds = (inspect.isfunction, inspect.isclass, lambda thing: hasattr(thing, "__wrapped__"))
    return {n for n in names if any(is_kind(getattr(module, n)) for is_kind in kinds)}


@pytest.mark.parametrize("room", ["losses", "advantages", "trees.forks", "algorithms"])
def test_every_public_function_is_in_the_index(room):
    text = (ROOT / "docs" / "functions.md").read_text()
    (section,) = re.findall(rf"^## rljax\.{room}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    listed = re.findall(r"^\| `(\w+)` \| (.+) \|$", section, flags=re.MULTILINE)
    assert {name for name, _ in listed} == public(operator.attrgetter(room)(rljax)), "python docs/reference.py"
    assert len(listed) == len({name for name, _ in listed})
