"""Forks, credit, ratio, surrogate, weights, filters, aggregation, penalties and corrections combine freely.

The table below holds every pair of choices of different kinds at least once (a pairwise covering array, computed here).
Each line is an `Algorithm` that makes two updates of a tiny decoder, on a rollout grown by its fork plan, packed as a
forest and as flat rows: finite, not zero, and the same either way. The first lines, until each choice has had a turn,
run by default; the others are slow.

A second table does the same for what a run is made of: what of the model is trained, how rows are packed, when rollouts
are made, and where credit comes from. Each line is a run of two steps, and slow.

Methods of preferences have a loss of their own, which is all that is chosen: no rollout, so no fork, credit or ratio to
one, and scores of whole rows in place of surrogates, weights and aggregations. So none of the kinds above applies, and
they stand in no table, but make the same two updates, on a forest and on flat rows. A reward model's numbers come from
another head; here log-probs stand for them, as its loss knows no difference. Of what a run is made of only what is
trained applies: their rows are always packed as a forest, there are no rollouts to schedule, and no teachers.
"""

import dataclasses
import functools
import itertools
import json
import random

import jax
import numpy as np
import optax
import pytest

from rljax import advantages as adv
from rljax import losses as ls
from rljax.algorithms import (
    DPO,
    GKD,
    GRPO,
    KTO,
    PREFERENCE_RECIPES,
    Algorithm,
    BradleyTerry,
    OnPolicyDistillation,
    ReSum,
)
from rljax.batching import dense_rows, spread, stack
from rljax.experiment import FileData, LoraConfig, ModelTeacher, PreferenceConfig, RolloutConfig
from rljax.experiment.build import build as build_run
from rljax.experiment.prefer import prefer
from rljax.experiment.train import train
from rljax.plans import ForkPlan, RolloutPlan, TeacherSpec
from rljax.plans import fork_rules as rules
from rljax.rollouts.collect import collect
from rljax.testing import run_metrics, tiny_config
from rljax.training import Learner, LossNeeds, UpdateConfig
from rljax.types import ROW_WEIGHT, TEACHER_LOGPROBS

GROUP, GROUPS = 6, 4
STEPS = ("a", "b", "c")
PHRASES = [[3, 4]]


def forks(rule, **changes):
    return ForkPlan(chains=2, points=2, rule=rule, step_delimiters=STEPS)._replace(**changes)


def fives(tokens, sampled):
    """Where a natural phrase begins."""
    return np.flatnonzero(tokens == 5).tolist()


FORKS = {
    "independent": None,
    "random_token": forks(rules.random_token(2, 2, tail=0.0)),
    "random_step": forks(rules.random_step(2, 2)),
    "top_surprisal": forks(rules.top_surprisal(2, 2, tail=0.0, last_words=())),
    "top_branching_score": forks(rules.top_branching_score(4)),
    "entropy_jump": forks(rules.filled(rules.entropy_jump(4, scale=2.0, window=2), 4)),
    "summary": forks(
        rules.summary_points(fives, PHRASES, 2, middle=0.8),
        points=1,
        rounds=2,
        fork_forks=False,
        max_injected=2,
    ),
}
ADVANTAGES = {
    "group_normalized": adv.group_normalized(),
    "leave_one_out": adv.leave_one_out(),
    "kl_in_reward": adv.kl_in_reward(adv.group_centered(), kl_coef=0.1),
    "whitened_returns": adv.whitened_returns(kl_coef=0.1),
    "gae": adv.gae_advantages(lam=0.9),
    "pass_at_k": adv.pass_at_k_unbiased(2),
    "task_normalized": adv.task_normalized(adv.group_normalized()),
    "intra_and_inter_tree": adv.intra_and_inter_tree(),
    "global_and_local": adv.global_and_local(),
    "prefix_weighted": adv.prefix_weighted(adv.group_normalized(), power=0.5),
    "shared_mean": adv.shared_mean(adv.group_normalized()),
    "sibling_normalized": adv.sibling_normalized(),
    "dual_group": adv.dual_group(),
    "entropy_scaled": adv.entropy_scaled(adv.group_normalized()),
    "summary_contrast": adv.summary_contrast(),
    "beside_teacher": adv.beside_teacher(adv.group_centered(), match_scale=True, discount=0.5),
}
RATIOS = {
    "token": ls.token_ratio,
    "behavior": ls.behavior_ratio,
    "sequence": ls.sequence_ratio,
    "sequence_token": ls.sequence_token_ratio,
    "geometric": ls.geometric_ratio(),
    "behavior_sequence": ls.behavior_sequence_ratio,
    "rescued": ls.rescue(ls.token_ratio, clip_low=0.01, clip_high=0.01, noise=ls.two_sided(0.2)).ratio_fn,
}
SURROGATES = {
    "clipped": ls.clipped(),
    "dual_clip": ls.clipped(clip_high=0.28, dual_clip=3.0),
    "clip_balanced": ls.clip_balanced(),
    "cispo": ls.cispo(max_ratio=5.0),
    "double_sided": ls.double_sided(),
    "soft_gate": ls.soft_gate(),
    "unclipped": ls.unclipped(),
}
WEIGHTS = {
    "none": (),
    "future_kl": (ls.future_kl_weights(low=0.8),),
    "one_way": (ls.one_way_weights(ls.exponential_gate()),),
    "rare_token": (ls.rare_token_weights(),),
    "divergence": (ls.divergence_weights(),),
    "truncated_is": (ls.truncated_is(2.0),),
    "sequence_masked_is": (ls.sequence_masked_is(10.0),),
    "procedure": (ls.procedure_weights(),),
    "future_kl x one_way": (ls.future_kl_weights(low=0.8), ls.one_way_weights(ls.sigmoid_gate())),
}
FILTERS = {
    "none": (),
    "max_dual_clipped": (ls.max_dual_clipped(1, dual_clip=3.0),),
    "max_ratio x off_policy": (ls.max_ratio(3.0), ls.off_policy_sequence(0.5)),
    "veto": (ls.veto(),),
}
AGGREGATIONS = {
    "token_mean": ls.token_mean,
    "sequence_mean": ls.sequence_mean,
    "sequence_sum": ls.sequence_sum,
    "fixed_length": ls.fixed_length(8),
}
PENALTIES = {
    "none": (),
    "kl and entropy": (ls.kl_penalty(0.05), ls.entropy_bonus(0.01)),
    "teacher": (ls.teacher_penalty(0.05),),
    "corrected kl": (ls.importance_corrected_kl(0.05),),
    "squared_log_ratio": (ls.squared_log_ratio(0.05),),
}


def high_entropy_apart(entropies, loss_mask):
    """`high_entropy` of about a half of the tokens, at the widest gap between entropies in their middle third.

    What samples share has one entropy in a forest; on rows of their own its copies differ in the last bit. A threshold
    at such a tie would select other tokens for another layout.
    """
    ordered = np.sort(np.asarray(entropies)[np.asarray(loss_mask)])
    first = len(ordered) // 3
    gaps = np.diff(ordered)[first : 2 * first]
    assert gaps.max() > 1000 * np.spacing(ordered[-1])
    fraction = 1 - (first + gaps.argmax() + 0.5) / (len(ordered) - 1)
    return ls.high_entropy(fraction)(entropies, loss_mask)


WHOLE = {
    "none": {},
    "high_entropy": {"select_fn": high_entropy_apart},
    "second_moment": {"correct_fn": ls.limit_second_moment(1e-3)},
    "step_scale": {"correct_fn": ls.scale_step_by_sample_size()},
}
KINDS = (FORKS, ADVANTAGES, RATIOS, SURROGATES, WEIGHTS, FILTERS, AGGREGATIONS, PENALTIES, WHOLE)
Choice = tuple[int, str]
"""(kind, name)."""


def covering_array(kinds, seed: int = 0) -> list[tuple[str, ...]]:
    """Lines of one name per kind, such that each pair of names of two kinds is in one of them; greedy."""
    rng = random.Random(seed)
    open_pairs = set(all_pairs(kinds))
    lines = []
    while open_pairs:
        line: dict[int, str] = dict(rng.choice(sorted(open_pairs)))
        for kind in rng.sample([k for k in range(len(kinds)) if k not in line], len(kinds) - 2):
            names = rng.sample(list(kinds[kind]), len(kinds[kind]))
            line[kind] = max(names, key=lambda n: len(open_pairs & set(pairs_with((kind, n), line))))
        lines.append(tuple(line[kind] for kind in range(len(kinds))))
        open_pairs -= set(pairs_of(lines[-1]))
    return lines


def all_pairs(kinds) -> list[tuple[Choice, Choice]]:
    two = itertools.combinations(range(len(kinds)), 2)
    return [((i, a), (j, b)) for i, j in two for a in kinds[i] for b in kinds[j]]


def pairs_of(line: tuple[str, ...]) -> list[tuple[Choice, Choice]]:
    return list(itertools.combinations(enumerate(line), 2))


def pairs_with(choice: Choice, line: dict[int, str]) -> list[tuple[Choice, Choice]]:
    return [(min(choice, other), max(choice, other)) for other in line.items()]


def fast_part(lines: list[tuple[str, ...]]) -> int:
    """How many lines it takes until every choice has occurred."""
    missing = {(kind, name) for kind, names in enumerate(KINDS) for name in names}
    for count, line in enumerate(lines, 1):
        missing -= set(enumerate(line))
        if not missing:
            return count
    raise AssertionError(missing)


LINES = covering_array(KINDS)
FAST = fast_part(LINES)


def build(line: tuple[str, ...]) -> Algorithm:
    fork, credit, ratio, surrogate, weights, filters, aggregate, penalties, whole = (
        names[name] for names, name in zip(KINDS, line, strict=True)
    )
    loss = ls.policy_loss(ratio, surrogate, aggregate, weights, filters, penalties, **whole)
    plan = RolloutPlan(GROUP, forks=fork, needs_ref=True, needs_uniforms=True, teacher=TeacherSpec())
    return Algorithm(plan, credit, loss)


@functools.cache
def toy():
    """(run, its params): a tiny decoder whose sampler serves all fork plans of the table."""
    summaries = ReSum(chains=2, points=1, rounds=2, inject=("ab",), detect=("ab",), step_delimiters=STEPS)
    config = tiny_config(algorithm=summaries)
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, max_new_tokens=8))
    run = build_run(config)
    params = run.initial_params()
    run.actor.__enter__()  # stays open for all lines of the table
    run.actor.set_params(params, 0)
    return run, params


def near(seed: int, distance: float = 0.02):
    """Weights near those that sampled."""
    _, params = toy()
    return disturbed(params, jax.random.key(seed), distance)


@jax.jit
def disturbed(params, key, distance):
    leaves, shape = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return shape.unflatten([x + distance * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@functools.cache
def rollout(name: str):
    """The samples that a fork plan of the table grows, as a batch with the log-probs of a reference and values."""
    run, _ = toy()
    plan = RolloutPlan(GROUP, forks=FORKS[name])
    rollout = collect(run.actor, plan, lambda n: run.dataset.train[:n], GROUPS, 0)
    batch = stack(rollout.trajectories, row_buckets=(GROUP * GROUPS,), length_buckets=(16,))
    assert np.any(np.asarray(batch.parent_row)[np.asarray(batch.is_valid)] >= 0) == (name != "independent")
    reference = learner(True).score_rows(near(2), batch)
    columns = {**batch.columns, TEACHER_LOGPROBS: learner(True).score_rows(near(3), batch)}
    return dataclasses.replace(batch, ref_logprobs=reference, values=0.1 * reference, columns=columns)


@functools.cache
def learner(share: bool) -> Learner:
    """Lays rollouts out as a forest or as flat rows, always of one shape; it is given its losses by `gradients`."""
    update = UpdateConfig(
        pack_length=64,
        microbatch_size=8,
        epochs=2,
        head_chunk=64,
        share_prefixes=share,
        length_buckets=(64,),
        score_buckets=(64,),
        row_buckets=(GROUP * GROUPS,),
        microbatch_buckets=(1,),
    )
    loss = ls.policy_loss(ls.token_ratio, ls.unclipped(), ls.token_mean)
    return Learner(toy()[0].decoder, loss, optax.sgd(1.0), update, needs=LossNeeds(uniforms=True))


@jax.jit
def scores(params, packed, ragged):
    of_tokens = learner(True).program.token_logprobs(params, packed, ragged, None)
    return tuple(spread(ragged, x) for x in of_tokens)


@jax.jit
def pull_back(params, packed, ragged, slopes):
    return jax.vjp(lambda p: scores(p, packed, ragged), params)[1](slopes)[0]


def gradients(loss, slopes_of, share: bool, batch, advantages, old, epoch: int, params):
    """(loss, metrics, gradient by the weights, tokens computed) at `params`. The model is compiled once for all lines;
    `slopes_of`, the loss and its gradient by log-probs and entropies, once for a line."""
    made = learner(share)
    made.loss = loss
    minibatch = made.prepare(made.init_state(jax.tree.map(np.array, old)), batch, advantages)[epoch]
    whole = dense_rows(minibatch.rows)
    if loss.correct_fn is not None:
        whole = loss.correct_fn(whole).rows
    packed, ragged, rows = jax.tree.map(lambda x: x[0], (minibatch.packed, minibatch.rows, whole))
    where = (params, packed, ragged)
    logprobs, entropies = scores(*where)
    if loss.select_fn is not None:
        selected = loss.select_fn(entropies[None], rows.loss_mask[None])[0]
        rows = dataclasses.replace(rows, advantages=np.where(selected, rows.advantages, 0))
    (value, metrics), slopes = slopes_of(logprobs, entropies, rows)
    return value, metrics, pull_back(*where, slopes), int(np.sum(np.asarray(packed.subtree_end) > 0))


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, id="-".join(line).replace(" ", "_"), marks=() if i < FAST else pytest.mark.slow)
        for i, line in enumerate(LINES)
    ],
)
def test_two_updates_are_finite_and_the_same_on_a_forest_and_on_its_rows(line):
    algorithm, batch = build(line), rollout(line[0])
    check_two_updates(algorithm.loss, batch, np.asarray(jax.jit(algorithm.advantage_fn)(batch)))


def check_two_updates(loss, batch, advantages):
    old = near(1)
    slopes_of = jax.jit(jax.value_and_grad(loss.loss, argnums=(0, 1), has_aux=True))
    params = old
    for epoch in range(2):
        value, metrics, grads, tokens = gradients(loss, slopes_of, True, batch, advantages, old, epoch, params)
        flat_value, flat_metrics, flat_grads, flat_tokens = gradients(
            loss, slopes_of, False, batch, advantages, old, epoch, params
        )
        assert tokens < flat_tokens
        assert np.isfinite(value) and all(np.isfinite(v) for v in metrics.values()), metrics
        np.testing.assert_allclose(value, flat_value, rtol=2e-5, atol=1e-6)
        for name, metric in flat_metrics.items():
            np.testing.assert_allclose(metrics[name], metric, rtol=2e-5, atol=1e-6, err_msg=name)
        norm = float(np.sqrt(sum(np.sum(np.square(np.asarray(g))) for g in jax.tree.leaves(grads))))
        assert np.isfinite(norm) and norm > 1e-5
        scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(flat_grads))
        for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(flat_grads), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale)
        params = jax.tree.map(lambda p, g: np.asarray(p) - 0.05 / norm * np.asarray(g), params, grads)  # noqa: B023


def preferred_rows(has_other_rows: bool):
    """The rollout's rows as pairs of one prompt; or every third row as of another prompt, which is only measured."""
    batch = rollout("independent")
    rows = np.arange(GROUP * GROUPS)
    side = np.where(rows % 2, -1.0, 1.0)
    if has_other_rows:
        side = np.where(rows % 3, side, 0.0)
    columns = {ls.SIDE: side, ls.PAIR: rows // 2, ROW_WEIGHT: side != 0}
    return dataclasses.replace(batch, columns={name: x.astype(np.float32) for name, x in columns.items()})


# One of pairs and one of labels; the others differ in what they make of a row's score.
PREFERENCE_RUNS = [
    pytest.param(recipe, marks=() if recipe in (DPO, KTO) else pytest.mark.slow, id=recipe.__name__)
    for recipe in PREFERENCE_RECIPES
]


@pytest.mark.parametrize("recipe", PREFERENCE_RUNS)
def test_two_updates_on_preferences_are_the_same_on_a_forest_and_on_its_rows(recipe):
    method = recipe().build()
    batch = preferred_rows(method.has_other_rows)
    check_two_updates(method.loss, batch, np.zeros(batch.tokens.shape, np.float32))


def test_every_pair_of_choices_is_in_the_table():
    assert set(all_pairs(KINDS)) == {pair for line in LINES for pair in pairs_of(line)}
    assert len(LINES) < 1.6 * len(ADVANTAGES) * len(WEIGHTS)  # the least there can be is the product of the largest
    for kind, names in enumerate(KINDS):
        assert {line[kind] for line in LINES[:FAST]} == set(names)


MODEL = dataclasses.replace(tiny_config().model, num_layers=1, embed_dim=16)
TEACHERS = (ModelTeacher(dataclasses.replace(MODEL, num_layers=2)),)
RUN_KINDS = (
    {
        "whole": {"model": MODEL},
        "adapters": {"model": MODEL, "lora": LoraConfig(rank=2)},
        "experts": {"model": dataclasses.replace(MODEL, family="qwen3_moe", experts=4, experts_per_token=2)},
    },
    {"forest": {"share_prefixes": True}, "rows": {"share_prefixes": False}},
    {"in turn": {}, "stale": {"rollout": RolloutConfig(staleness=1)}},
    {
        "rewards": {"algorithm": GRPO(group_size=4, kl_coef=0.1)},
        "teacher": {"algorithm": OnPolicyDistillation(group_size=4), "teachers": TEACHERS},
        "distributions": {"algorithm": GKD(group_size=4, support=3), "teachers": TEACHERS},
    },
)
"""What is trained, how rows are packed, when rollouts are made, where credit comes from: changes of a config."""
RUNS = covering_array(RUN_KINDS)


def run_config(line: tuple[str, ...]):
    trained, layout, schedule, credit = (kind[name] for kind, name in zip(RUN_KINDS, line, strict=True))
    config = tiny_config(steps=2, **trained, **schedule, **credit)
    # What older weights sampled has its ratio to these, whatever the method takes for granted.
    corrects = schedule == RUN_KINDS[2]["stale"]
    update = dataclasses.replace(config.update, use_sampler_logprobs=corrects, **layout)
    evaluation = dataclasses.replace(config.evaluation, problems=4, samples=1)
    return dataclasses.replace(config, update=update, evaluation=evaluation)


@pytest.mark.slow
@pytest.mark.parametrize("line", RUNS, ids=lambda line: "-".join(line).replace(" ", "_"))
def test_a_run_trains_whatever_it_is_made_of(line, tmp_path):
    _, _, schedule, credit = line
    train(run_config(line), str(tmp_path))
    lines = run_metrics(tmp_path)
    assert len(lines) == 2
    for metrics in lines:
        assert all(np.isfinite(value) for value in metrics.values()), metrics
        assert metrics["loss/grad_norm"] > 0
        assert ("teacher/kl" in metrics) == (credit != "rewards")
    # The first weights are all that there are for the rollout of the first step, and of the second where it is stale.
    assert lines[0]["rollout/logprob_gap_max"] < 1e-5
    assert lines[1]["rollout/staleness"] == (schedule == "stale")
    assert (lines[1]["rollout/logprob_gap_max"] < 1e-5) == (schedule != "stale")


def test_every_pair_of_what_runs_are_made_of_is_in_the_table():
    assert set(all_pairs(RUN_KINDS)) == {pair for line in RUNS for pair in pairs_of(line)}
    assert len(RUNS) <= 12


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["adapters", "experts"])
@pytest.mark.parametrize("recipe", [DPO, BradleyTerry], ids=lambda recipe: recipe.__name__)
def test_preferences_train_whatever_of_a_model_is_trained(recipe, trained, tmp_path):
    rows = [
        {"prompt": f"{letter}=", "answer": letter, "chosen": letter, "rejected": "h" * n}
        for n in (1, 2)
        for letter in "abcd"
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    preferences = PreferenceConfig(method=recipe(), steps=2, batch_size=4)
    source = FileData(train=str(data), test_fraction=0.25, repeated_prompts=True)
    prefer(tiny_config(data=source, preferences=preferences, **RUN_KINDS[0][trained]), str(tmp_path / "run"))
    lines = run_metrics(tmp_path / "run")
    assert len(lines) == 2
    for metrics in lines:
        assert all(np.isfinite(value) for value in metrics.values()), metrics
        assert metrics["loss/grad_norm"] > 0
