"""The tree methods run through the loop, spend what their plan says, and train a forest as they would its rows."""

import dataclasses

import jax
import numpy as np
import pytest

from rljax.algorithms import (
    AEPO,
    APPO,
    ARPO,
    FOREST_RECIPES,
    GRPO,
    GSPO,
    RECIPES,
    RandomForks,
    ReSum,
    TreeGRPO,
    TreeRL,
)
from rljax.batching import stack
from rljax.experiment.check import check
from rljax.experiment.train import train
from rljax.models import DecoderConfig, init_params
from rljax.testing import rollout_records, run_metrics, tiny_config
from rljax.text import CharTokenizer
from rljax.training import Learner, LossNeeds, OptimizerConfig, UpdateConfig
from rljax.types import INTERVENTION_INJECT, TEACHER_LOGPROBS, Trajectory

TOKENIZER = CharTokenizer("abcdefgh=")
TINY = {
    TreeGRPO: dict(step_delimiters=("a", "b", "c")),
    TreeRL: dict(chains=2, tail=0.0, last_words=()),
    ReSum: dict(chains=2, rounds=2, inject=("ab", "c"), detect=("ab", "d")),
    APPO: dict(chains=3),
    ARPO: dict(chains=3, step_delimiters=("a", "b", "c"), window=2),
    AEPO: dict(chains=3, step_delimiters=("a", "b", "c"), window=2),
    RandomForks: dict(rounds=2),
}
RUN = RandomForks
"""The recipe that always makes a run; the others' programs differ by their plans, which smaller tests hold."""
every_recipe = pytest.mark.parametrize("recipe", FOREST_RECIPES, ids=lambda recipe: recipe.__name__)


def config_of(recipe, **changes):
    tiny = tiny_config(algorithm=recipe(**TINY[recipe]), steps=2)
    update = dataclasses.replace(tiny.update, row_buckets=(64,), microbatch_buckets=(8,), minibatches=2)
    sampling = dataclasses.replace(tiny.sampling, max_new_tokens=8)
    evaluation = dataclasses.replace(tiny.evaluation, problems=2)
    return dataclasses.replace(tiny, update=update, sampling=sampling, evaluation=evaluation, **changes)


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(recipe, id=recipe.__name__, marks=() if recipe is RUN else pytest.mark.slow) for recipe in TINY],
)
def test_it_runs_and_spends_what_its_plan_says(recipe, tmp_path):
    config = config_of(recipe)
    train(config, str(tmp_path / "run"))
    leaves = config.algorithm.group_size
    for line, records in zip(run_metrics(tmp_path / "run"), rollout_records(tmp_path / "run").values(), strict=True):
        assert len(records) == line["rollout/leaves"] == 4 * leaves - line["rollout/unused_forks"]
        assert sum("parent" in r for r in records) == len(records) - 4 * config.algorithm.chains > 0
        # The chains of APPO are of the weights before the last update, but in the first step.
        is_lagged = recipe is APPO and line["step"] > 1
        assert (line["rollout/logprob_gap_max"] < 2e-5) != is_lagged and np.isfinite(line["loss/grad_norm"])
        given = [r for r in records if r.get("forced")]
        assert bool(given) == (recipe is ReSum)
        for record in given:
            for start, stop in record["forced"]:
                assert not any(record["logprobs"][start:stop])
                given = TOKENIZER.decode(record["tokens"][start:stop])
                # Injected, or the first token where a phrase is suppressed, which begins none.
                assert given in ("ab", "c") or (len(given) < 2 and given not in ("a", "d"))


def forest_batch(seed=0, groups=3, interventions=(0,)):
    """Random forests: three chains a group and forks of whatever is there, some nested, rewards of any kind."""
    rng, rows = np.random.default_rng(seed), []
    for group in range(groups):
        prompt, first = rng.integers(3, 12, 3), len(rows)
        for i in range(8):
            parent_row = first + int(rng.integers(max(i, 1)))
            parent = None if i < 3 else rows[parent_row]
            fork = 3 if parent is None else int(rng.integers(3, len(parent.tokens) + 1))
            head = prompt if parent is None else parent.tokens[:fork]
            own = rng.integers(3, 12, rng.integers(1, 6))
            length = len(head) + len(own)

            def column(name, new, fork=fork, parent=parent, length=length):
                old = np.zeros(3) if parent is None else getattr(parent, name)[:fork]
                return np.concatenate([old, new])[:length]

            injected = int(rng.choice(interventions)) if parent is not None else 0
            sampled = np.ones(len(own), bool)
            sampled[:1] &= injected != INTERVENTION_INJECT
            rows.append(
                Trajectory(
                    tokens=np.concatenate([head, own]).astype(np.int32),
                    action_mask=column("action_mask", sampled).astype(bool),
                    behavior_logprobs=column("behavior_logprobs", -rng.random(len(own)) - 1).astype(np.float32),
                    entropies=column("entropies", rng.random(len(own)) + 1).astype(np.float32),
                    turn_ids=np.zeros(length, np.int32),
                    policy_version=np.zeros(length, np.int32),
                    prompt_id=group,
                    group_id=group,
                    episode_id=len(rows),
                    reward=float(rng.integers(0, 2)),
                    parent_row=-1 if parent is None else parent_row,
                    fork_index=0 if parent is None else fork,
                    intervention=injected,
                )
            )
    return stack(rows)


@every_recipe
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
def test_equal_rewards_give_no_credit(recipe, reward):
    if recipe is ReSum:
        pytest.skip("its reward for summaries differs between rows of equal task reward; see the contrastive tests")
    batch = forest_batch()
    batch = dataclasses.replace(batch, reward=np.where(batch.is_valid, np.float32(reward), 0))
    assert not np.any(recipe(**TINY[recipe]).build().advantage_fn(batch))


@every_recipe
def test_credit_is_zero_off_the_tokens_that_the_policy_sampled_and_ignores_invalid_rows(recipe):
    algorithm = recipe(**TINY[recipe]).build()
    batch = forest_batch(interventions=(0, INTERVENTION_INJECT))
    credit = np.asarray(algorithm.advantage_fn(batch))
    assert np.any(credit) and not np.any(credit[~np.asarray(batch.action_mask)])
    bad = np.asarray(batch.is_valid) & (np.arange(len(batch.is_valid)) != 7)
    spoiled = dataclasses.replace(batch, is_valid=bad, reward=np.where(bad, batch.reward, np.nan).astype(np.float32))
    again = np.asarray(algorithm.advantage_fn(spoiled))
    assert np.all(np.isfinite(again)) and not np.any(again[7])


CONFIG = DecoderConfig(
    vocab_size=12, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, dtype="float32"
)


def update_of(algorithm, batch, *, share):
    """(loss, gradients) of one minibatch, from weights that are not the ones that sampled."""
    learner = Learner(
        CONFIG,
        algorithm.loss,
        OptimizerConfig(learning_rate=1e-2),
        # Two epochs, so that the old log-probs are a constant.
        UpdateConfig(pack_length=64, share_prefixes=share, epochs=2),
        needs=LossNeeds(reference=True, uniforms=algorithm.plan.needs_uniforms),
    )
    state = learner.init_state(init_params(CONFIG, jax.random.key(1)))
    behavior, ref = (learner.score_rows(init_params(CONFIG, jax.random.key(seed)), batch) for seed in (2, 3))
    batch = dataclasses.replace(batch, behavior_logprobs=behavior, ref_logprobs=ref, values=ref)  # any numbers serve
    if algorithm.plan.teacher:
        batch = dataclasses.replace(batch, columns={TEACHER_LOGPROBS: ref})
    advantages = np.asarray(algorithm.advantage_fn(batch))
    train_batch = learner.prepare(state, batch, advantages)[0]
    moved = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(x.size), x.shape), state.trainable)
    scored = jax.jit(learner.program.gradients)(moved, train_batch, learner._sampling)
    return scored.metrics, scored.grads, train_batch


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            recipe, marks=() if recipe in (GRPO, GSPO, TreeRL, ReSum) else pytest.mark.slow, id=recipe.__name__
        )
        for recipe in (*RECIPES, *FOREST_RECIPES)
    ],
)
def test_a_forest_trains_as_its_rows_do(recipe):
    """Loss and gradient of the forest equal those of the same rows packed one by one, to relative 1e-5."""
    if recipe in FOREST_RECIPES:
        algorithm = recipe(**TINY[recipe]).build()
    else:
        algorithm = recipe(group_size=8, kl_coef=0.02, entropy_coef=0.01).build()
    batch = forest_batch(interventions=(0, INTERVENTION_INJECT))
    metrics, grads, forest = update_of(algorithm, batch, share=True)
    flat_metrics, flat_grads, flat = update_of(algorithm, batch, share=False)
    assert np.sum(forest.packed.subtree_end > 0) < 0.8 * np.sum(flat.packed.subtree_end > 0)
    for name, value in flat_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(flat_grads))
    assert scale > 0
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(flat_grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale)


def test_a_phrase_without_tokens_or_out_of_the_vocabulary_is_refused_at_the_start(tmp_path):
    for inject, message in ((("",), "has no tokens"), (("ab", "Z"), "'Z'"), ((), "has no phrases")):
        recipe = ReSum(chains=2, inject=inject, detect=("ab",))
        with pytest.raises(ValueError, match=message):
            recipe.build().bind(TOKENIZER)
    config = config_of(ReSum)
    config.sampling.max_new_tokens = 2
    with pytest.raises(ValueError, match="leaves no room beside the tokens that a fork of ReSum begins with"):
        train(config, str(tmp_path / "run"))


def test_an_impossible_plan_is_refused():
    with pytest.raises(ValueError, match="forks nothing: points must be at least 1"):
        check(tiny_config(algorithm=TreeGRPO(points=0)))
    with pytest.raises(ValueError, match="clip_low=2"):
        TreeRL(clip_low=2.0).build()


def test_without_forks_tree_grpo_gives_grpos_credit():
    batch = forest_batch()
    chains = np.asarray(batch.parent_row) == -1
    alone = dataclasses.replace(batch, is_valid=np.asarray(batch.is_valid) & chains)
    want = GRPO(group_size=3).build().advantage_fn(alone)
    np.testing.assert_allclose(TreeGRPO().build().advantage_fn(alone), want, atol=1e-6)
