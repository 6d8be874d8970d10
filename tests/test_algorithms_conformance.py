"""One suite over every recipe: what any algorithm has to keep, whatever it optimises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from objectives import NAN, make_batch, map_fields

from rljax.algorithms import (
    CISPO,
    DAPO,
    DIS,
    FIPO,
    GRPO,
    GSPO,
    OWPO,
    PKPO,
    PPO,
    RECIPES,
    RLOO,
    VCPO,
    ActGuideRL,
    AgentRL,
    DecoupledPPO,
    DeepDive,
    DirectionReweighting,
    DivergenceWeighting,
    DrGRPO,
    DynamicSampling,
    HighEntropy,
    IcePop,
    NearBoundaryRescue,
    NearBoundaryRescueGSPO,
    PassAtK,
    Reinforce,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    RoleAgent,
)
from rljax.types import RolloutBatch, Rows

BATCH_STATISTICS = {PPO, AgentRL, Reinforce, ReinforcePlusPlus, ReinforcePlusPlusBaseline}
"""Their baseline spans groups, so two batches apart differ from the two together."""

ALWAYS_NEED_REF = {OWPO}
"""They compare the policy with a reference in more than a KL penalty."""

OWN_METRICS = {
    FIPO: (
        *("future_kl", "future_kl_excluded", "advantage_mean"),
        *("influence_low", "influence_high", "influence_safety"),
    ),
    OWPO: ("inferior", "superior", "force_reversal"),
    NearBoundaryRescue: ("clip_active", "rescued"),
    NearBoundaryRescueGSPO: ("clip_active", "rescued"),
}

GROUP, WIDTH = 4, 9
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)


def build(recipe, **changes):
    """The recipe with its defaults but a small group, and all its penalties on."""
    return recipe(group_size=GROUP, **{"kl_coef": 0.02, "entropy_coef": 0.01} | changes).build()


def example(rewards=(1, 0, 0.5, 0, 0.2, 0.9, 0.9, 0), seed=0, **changes) -> RolloutBatch:
    """Two groups of four; one row has one token."""
    lengths = np.random.default_rng(seed).integers(2, 7, len(rewards))
    lengths[1] = 1
    group_id = np.arange(len(rewards)) // GROUP
    return make_batch(**{"group_id": group_id, "rewards": rewards, "lengths": lengths, "width": WIDTH} | changes)


def to_rows(algorithm, batch, *, token_weights=None) -> Rows:
    """What the learner hands to the loss, with nothing packed."""
    mask = np.asarray(batch.action_mask) & np.asarray(batch.is_valid)[:, None]
    rng = np.random.default_rng(5)
    drift = 0.02 * rng.normal(size=(32, 32))[: mask.shape[0], : mask.shape[1]]
    rows = Rows(
        row_index=np.zeros(mask.shape, np.int32),
        loss_mask=mask,
        loss_weights=algorithm.loss.token_weights(mask) if token_weights is None else token_weights,
        token_count=np.asarray(mask.sum(), np.float32),
        advantages=algorithm.advantage_fn(batch),
        behavior_logprobs=batch.behavior_logprobs,
        old_logprobs=(batch.behavior_logprobs + drift).astype(np.float32),
        source=batch.source,
        ref_logprobs=batch.ref_logprobs,
        uniforms=np.abs(batch.behavior_logprobs) * 997 % 1,  # as the tokens' own: padding and order do not matter
    )
    return rows if algorithm.loss.correct_fn is None else algorithm.loss.correct_fn(rows).rows


def current(rows, spread=0.1, seed=6):
    """Log-probs and entropies of a policy that has moved on from `old`, NaN where nothing was scored."""
    noise = np.random.default_rng(seed).normal(size=(32, 32))[: rows.loss_mask.shape[0], : rows.loss_mask.shape[1]]
    old = np.where(rows.loss_mask, rows.old_logprobs, NAN)
    entropies = np.where(rows.loss_mask, 1 + 0.1 * noise, NAN)
    return jnp.asarray(old + spread * noise, jnp.float32), jnp.asarray(entropies, jnp.float32)


def gradients(algorithm, rows, logprobs, entropies):
    """(loss, metrics), (gradient by log-probs, by entropies)."""
    return jax.value_and_grad(algorithm.loss.loss, argnums=(0, 1), has_aux=True)(logprobs, entropies, rows)


def take(struct, index):
    """Rows `index` of every field that has rows."""
    return map_fields(struct, lambda x: x if np.ndim(x) == 0 else np.asarray(x)[index])


@every_recipe
def test_loss_metrics_and_gradient_are_finite_and_gradient_stays_on_the_loss_mask(recipe):
    algorithm = build(recipe)
    rows = to_rows(algorithm, example(is_valid=[1, 1, 0, 1, 1, 1, 1, 1], rewards=(1, 0, NAN, 0, 0.2, 0.9, 0.9, 0)))
    (value, metrics), slopes = gradients(algorithm, rows, *current(rows))
    assert np.isfinite(value)
    assert all(np.isfinite(v) for v in metrics.values()), metrics
    for slope in slopes:
        assert np.isfinite(slope).all()
        assert not np.asarray(slope)[~rows.loss_mask].any()
        assert np.asarray(slope)[rows.loss_mask].any()
    assert not rows.loss_mask[2].any()


@every_recipe
def test_metric_names_are_the_documented_ones(recipe):
    algorithm = build(recipe)
    rows = to_rows(algorithm, example())
    _, metrics = algorithm.loss.loss(*current(rows), rows)
    names = {f"loss/{n}" for n in ("policy", "clip_fraction", "ratio_mean", "ratio_max", "approx_kl", "entropy")}
    optional = {f"loss/{n}" for n in ("kl_ref", "weight_mean", "kept_fraction")}
    assert names <= set(metrics) <= names | optional | {f"loss/{n}" for n in OWN_METRICS.get(recipe, ())}


@every_recipe
def test_padding_rows_and_columns_change_nothing(recipe):
    algorithm = build(recipe)
    batch = example()
    lengths = np.append(batch.lengths - 2, [0, 3])
    bigger = make_batch(
        group_id=[*batch.group_id, 0, 1],
        rewards=[*batch.reward, NAN, 5.0],
        lengths=lengths,
        width=WIDTH + 3,
        is_valid=[1] * 8 + [0, 0],
    )
    fields = ("behavior_logprobs", "ref_logprobs", "values")
    for name in fields:  # the same numbers, whatever the width
        getattr(bigger, name)[:8, :WIDTH] = getattr(batch, name)
    rows, padded = to_rows(algorithm, batch), to_rows(algorithm, bigger)
    (value, metrics), (slope, _) = gradients(algorithm, rows, *current(rows))
    (value_2, metrics_2), (slope_2, _) = gradients(algorithm, padded, *current(padded))
    np.testing.assert_allclose(value, value_2, rtol=1e-5)
    np.testing.assert_allclose(slope_2[:8, :WIDTH], slope, atol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics_2[name], rtol=1e-5, atol=1e-7, err_msg=name)


@every_recipe
def test_permuting_rows_permutes_the_gradient(recipe):
    algorithm = build(recipe)
    batch = example()
    rows = to_rows(algorithm, batch)
    logprobs, entropies = current(rows)
    order = np.random.default_rng(1).permutation(8)
    shuffled = dataclasses.replace(
        to_rows(algorithm, take(batch, order)), old_logprobs=np.asarray(rows.old_logprobs)[order]
    )
    (value, _), (slope, _) = gradients(algorithm, rows, logprobs, entropies)
    (value_2, _), (slope_2, _) = gradients(algorithm, shuffled, logprobs[order], entropies[order])
    np.testing.assert_allclose(value, value_2, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(slope_2, np.asarray(slope)[order], atol=1e-6)


@every_recipe
def test_microbatches_add_up_to_the_minibatch(recipe):
    algorithm = build(recipe)
    rows = to_rows(algorithm, example())
    logprobs, entropies = current(rows)
    (value, metrics), (slope, _) = gradients(algorithm, rows, logprobs, entropies)
    parts = [slice(i, i + 2) for i in range(0, 8, 2)]
    pieces = [gradients(algorithm, take(rows, p), logprobs[p], entropies[p]) for p in parts]
    np.testing.assert_allclose(sum(v for (v, _), _ in pieces), value, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([s for _, (s, _) in pieces]), slope, atol=1e-7)
    for name in metrics:
        combine = max if name.endswith("_max") else sum
        got = combine([m[name] for (_, m), _ in pieces])
        np.testing.assert_allclose(got, metrics[name], rtol=1e-5, atol=1e-7, err_msg=name)


@every_recipe
def test_jit_equals_no_jit(recipe):
    algorithm = build(recipe)
    batch = example()
    rows = to_rows(algorithm, batch)
    logprobs, entropies = current(rows)
    advantages = jax.jit(algorithm.advantage_fn)(map_fields(batch, jnp.asarray))
    np.testing.assert_allclose(advantages, rows.advantages, atol=1e-5)
    weights = jax.jit(algorithm.loss.token_weights)(rows.loss_mask)
    np.testing.assert_allclose(weights, rows.loss_weights, rtol=1e-6)
    value, metrics = algorithm.loss.loss(logprobs, entropies, rows)
    value_2, metrics_2 = jax.jit(algorithm.loss.loss)(logprobs, entropies, map_fields(rows, jnp.asarray))
    np.testing.assert_allclose(value, value_2, rtol=1e-5, atol=1e-7)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics_2[name], rtol=1e-5, atol=1e-6, err_msg=name)


@every_recipe
@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_extreme_ratios_stay_finite(recipe, shift):
    algorithm = build(recipe)
    rows = to_rows(algorithm, example())
    logprobs, entropies = current(rows)
    (value, metrics), slopes = gradients(algorithm, rows, logprobs + shift, entropies)
    assert np.isfinite(value)
    assert all(np.isfinite(v) for v in metrics.values()), metrics
    assert all(np.isfinite(slope).all() for slope in slopes)


@every_recipe
def test_a_batch_without_a_single_token_gives_loss_0_and_gradient_0(recipe):
    algorithm = build(recipe)
    rows = to_rows(algorithm, example(lengths=np.zeros(8, int)))
    (value, metrics), slopes = gradients(algorithm, rows, *current(rows))
    assert value == 0
    assert all(v == 0 for v in metrics.values())
    assert not any(np.asarray(slope).any() for slope in slopes)


@every_recipe
def test_equal_rewards_without_kl_give_gradient_0(recipe):
    algorithm = build(recipe, kl_coef=0.0, entropy_coef=0.0)
    batch = example(rewards=[0.1] * 8)
    if algorithm.plan.critic:  # that knows
        batch = dataclasses.replace(batch, values=np.full_like(batch.values, 0.1))
    rows = to_rows(algorithm, batch)
    np.testing.assert_array_equal(rows.advantages, 0)
    (value, _), (slope, _) = gradients(algorithm, rows, *current(rows))
    assert value == 0
    assert not np.asarray(slope).any()


@every_recipe
def test_first_update_pushes_towards_reward_and_away_from_failure(recipe):
    """On-policy, the gradient of the loss by a log-prob has the sign of -advantage wherever there is an advantage."""
    algorithm = build(recipe, kl_coef=0.0, entropy_coef=0.0)
    rows = to_rows(algorithm, example())
    rows = dataclasses.replace(rows, old_logprobs=rows.behavior_logprobs)
    old = jnp.asarray(rows.old_logprobs)
    (_, metrics), (slope, _) = gradients(algorithm, rows, old, jnp.zeros_like(old))
    advantages = np.asarray(rows.advantages)
    np.testing.assert_array_equal(np.sign(slope), -np.sign(advantages) * rows.loss_mask)
    assert metrics["loss/ratio_mean"] == pytest.approx(1)
    assert metrics["loss/ratio_max"] == 1
    assert metrics["loss/clip_fraction"] == 0
    assert metrics["loss/approx_kl"] == 0


@every_recipe
def test_two_batches_together_are_the_two_apart(recipe):
    algorithm = build(recipe)
    batch = example()
    rows = to_rows(algorithm, batch)
    halves = [take(batch, slice(0, 4)), take(batch, slice(4, 8))]
    halves[1] = dataclasses.replace(halves[1], group_id=halves[1].group_id - 1)
    apart = np.concatenate([algorithm.advantage_fn(half) for half in halves])
    if recipe in BATCH_STATISTICS:
        assert np.abs(apart - rows.advantages).max() > 1e-3
    else:
        np.testing.assert_allclose(apart, rows.advantages, atol=1e-5)
    logprobs, entropies = current(rows)
    whole = algorithm.loss.loss(logprobs, entropies, rows)[0]
    parts = [algorithm.loss.loss(logprobs[p], entropies[p], take(rows, p))[0] for p in (slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5, atol=1e-7)


@every_recipe
def test_reward_rises_on_a_table_of_logits(recipe):
    """Three prompts, four tokens each from a softmax per prompt and position; the reward is the share of tokens that
    are right. The recipe's own advantages and loss, two updates per rollout."""
    prompts, length, vocab, group = 3, 4, 5, 8
    algorithm = recipe(group_size=group, kl_coef=0.0).build()
    if recipe is DrGRPO:
        algorithm = recipe(group_size=group, horizon=length).build()
    rng, noise = np.random.default_rng(0), np.random.default_rng(1)
    targets = rng.integers(0, vocab, (prompts, length))
    prompt_of = np.repeat(np.arange(prompts), group)

    def logprobs_of(table, tokens):
        logs = jax.nn.log_softmax(table)[prompt_of]
        entropies = -(jnp.exp(logs) * logs).sum(-1)
        return jnp.take_along_axis(logs, tokens[..., None], axis=2)[..., 0], entropies

    @jax.jit
    def update(table, state, tokens, rows):
        def objective(table):
            return algorithm.loss.loss(*logprobs_of(table, tokens), rows)[0]

        updates, state = optimizer.update(jax.grad(objective)(table), state)
        return optax.apply_updates(table, updates), state

    @jax.jit
    def prepare(table, tokens, batch):
        old, _ = logprobs_of(table, tokens)
        batch = dataclasses.replace(batch, behavior_logprobs=old, ref_logprobs=old)
        return old, algorithm.advantage_fn(batch)

    table, history = jnp.zeros((prompts, length, vocab)), []
    optimizer = optax.adam(0.1)  # recipes differ in the scale of their gradient, which Adam takes out
    state = optimizer.init(table)
    blank = make_batch(
        group_id=prompt_of, rewards=np.zeros(prompts * group), lengths=[length] * len(prompt_of), prompt=0
    )
    blank = dataclasses.replace(blank, values=np.zeros_like(blank.values))  # a critic that knows nothing
    mask = jnp.ones((len(prompt_of), length), bool)
    weights = algorithm.loss.token_weights(mask)
    for _ in range(40):
        uniform = rng.random((len(prompt_of), length, 1))
        cdf = np.cumsum(np.asarray(jax.nn.softmax(table))[prompt_of], axis=-1)
        tokens = np.minimum((uniform > cdf).sum(-1), vocab - 1).astype(np.int32)
        rewards = (tokens == targets[prompt_of]).mean(axis=1).astype(np.float32)
        history.append(rewards.mean())
        old, advantages = prepare(table, tokens, dataclasses.replace(blank, reward=rewards))
        rows = Rows(
            row_index=np.zeros(mask.shape, np.int32),
            loss_mask=mask,
            loss_weights=weights,
            token_count=np.asarray(mask.size, np.float32),
            advantages=advantages,
            behavior_logprobs=old,
            old_logprobs=old,
            source=np.zeros(len(prompt_of), np.int32),
            ref_logprobs=old,
            uniforms=noise.random(mask.shape).astype(np.float32),
        )
        for _ in range(2):
            table, state = update(table, state, tokens, rows)
    assert np.mean(history[:3]) < 0.35
    assert np.mean(history[-3:]) > 0.9, history


@every_recipe
def test_needs_ref_exactly_when_a_kl_coefficient_is_on(recipe):
    assert build(recipe).plan.needs_ref
    without = build(recipe, kl_coef=0.0)
    assert without.plan.needs_ref == (recipe in ALWAYS_NEED_REF)
    batch = dataclasses.replace(example(), ref_logprobs=None)
    if recipe not in ALWAYS_NEED_REF:
        rows = to_rows(without, batch)
        assert np.isfinite(without.loss.loss(*current(rows), rows)[0])
    with pytest.raises(ValueError, match="ref_logprobs"):
        rows = to_rows(build(recipe), batch)
        build(recipe).loss.loss(*current(rows), rows)


@every_recipe
def test_a_group_of_one_is_refused_where_the_group_is_the_baseline(recipe):
    if recipe in {PPO, Reinforce, ReinforcePlusPlus}:
        assert recipe(group_size=1).build().plan.group_size == 1
    else:
        with pytest.raises(ValueError, match=rf"^{recipe.__name__} .*group_size=1 must be at least 2.*Reinforce"):
            recipe(group_size=1).build()
    with pytest.raises(ValueError, match="group_size=0"):
        recipe(group_size=0).build()


@every_recipe
def test_negative_coefficients_are_refused(recipe):
    for name in ("kl_coef", "entropy_coef"):
        with pytest.raises(ValueError, match=rf"{name}=-0.1 must be at least 0"):
            recipe(**{name: -0.1}).build()


@every_recipe
def test_every_recipe_names_its_paper_and_its_deviations(recipe):
    assert "arXiv " in recipe.__doc__ or recipe is Reinforce
    assert "Deviation" in recipe.__doc__


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (GRPO(clip_low=-0.1), "clip_low=-0.1 must be at least 0"),
        (GRPO(clip_low=1.5), "clip_low=1.5 must be at most 1"),
        (GRPO(dual_clip=1.1), "dual_clip=1.1 must be above 1"),
        (GRPO(clip_high=float("nan")), "clip_high=nan"),
        (DrGRPO(horizon=0), "horizon=0 must be at least 1"),
        (DAPO(overlong_length=100, overlong_buffer=200), "buffer 200 must be positive and at most"),
        (DAPO(max_sampling_rounds=0), "max_sampling_rounds=0"),
        (CISPO(cispo_max_ratio=0.5), "cispo_max_ratio=0.5 must be at least 1"),
        (CISPO(cispo_min_ratio=1.5), "cispo_min_ratio=1.5 must be at most 1"),
        (GSPO(epsilon=-1.0), "epsilon=-1.0"),
        (DIS(clip_low=1.5), "DIS: clip_low=1.5 must be at most 1"),
        (IcePop(mismatch=0.5), "mismatch=0.5 must be at least 1"),
        (DecoupledPPO(max_weight=0.5), "max_weight=0.5 must be at least 1"),
        (VCPO(ess_base=0.0), "ess_base=0.0 must be above 0"),
        (PassAtK(k=8, group_size=8), "PassAtK: k=8 must be at least 1 and below group_size=8"),
        (PKPO(k=2, baseline=3), "baseline=3 must be k - 1 or k"),
        (RLOO(group_size=-3), "group_size=-3"),
        (FIPO(influence_low=0.0), "influence_low=0.0 and influence_high=1.2 must enclose 1"),
        (FIPO(influence_low=1.1), "influence_low=1.1"),
        (FIPO(half_life=0.0), "half_life=0.0"),
        (FIPO(safety_ratio=0.5), "safety_ratio=0.5 must be at least 1"),
        (FIPO(max_dual_clipped=-1), "max_dual_clipped=-1"),
        (OWPO(lock=1.0), "lock=1.0 must be below 1"),
        (OWPO(accelerate=-0.1), "accelerate=-0.1"),
        (NearBoundaryRescue(delta=1.0), "NearBoundaryRescue: delta=1.0"),
        (NearBoundaryRescueGSPO(delta=-0.1), "NearBoundaryRescueGSPO: delta=-0.1"),
        (DirectionReweighting(alpha=-0.1), "alpha=-0.1"),
        (DivergenceWeighting(width=2.0), "width=2.0 must be at least 0 and below 2"),
        (HighEntropy(fraction=0.0), "fraction=0.0 must be above 0"),
        (ActGuideRL(shaping=-0.1), "shaping=-0.1 must be at least 0"),
        (ActGuideRL(dual_clip=1.0), "dual_clip=1.0 must be above 1"),
        (DeepDive(penalty_weight=-0.1), "penalty_weight=-0.1 must be at least 0"),
        (RoleAgent(gamma=1.5), "gamma=1.5 must be at most 1"),
        (RoleAgent(wia_mode="both"), "wia_mode='both' must be one of return, reward"),
    ],
)
def test_impossible_hyperparameters_are_one_clear_line(recipe, message):
    with pytest.raises(ValueError, match=message) as error:
        recipe.build()
    assert "\n" not in str(error.value)


def test_dapo_drops_groups_without_signal_and_punishes_overlong_answers_in_tokens():
    plan = DAPO(overlong_length=4, overlong_buffer=2).build().plan
    assert [plan.shape_reward(0.0, length) for length in (1, 2, 3, 4)] == [0, 0, -0.5, -1]
    assert plan.shape_reward(1.0, 3) == 0.5
    for rewards, kept in [([1, 1, 1], False), ([0, 0], False), ([1, 0, 1], True), ([], False), ([0.5], False)]:
        assert plan.keep_group(np.array(rewards, np.float64)) is kept
    assert plan.max_sampling_rounds == 10
    assert DAPO(overlong_buffer=0).build().plan.shape_reward is None
    assert DAPO(mask_truncated=True).build().plan.mask_truncated


def test_plans_of_the_other_recipes_keep_all_groups_and_leave_rewards_alone():
    for recipe in RECIPES:
        if not issubclass(recipe, DynamicSampling):
            plan = recipe().build().plan
            assert plan.keep_group is None
            assert plan.shape_reward is None
