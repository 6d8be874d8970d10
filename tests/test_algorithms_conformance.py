"""One suite over every recipe: what any algorithm has to keep, whatever it optimises.

Methods of preferences keep the same where it has a meaning, at the end of this file. They have no rewards, so nothing
is said of equal ones or of a toy environment, and no ratio to what sampled. That padding, order and a split into
microbatches change nothing is a promise of tests/test_losses_preferences.py, in float64, and that a forest is as good
as its rows one of tests/test_composability.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from objectives import NAN, make_batch

from rljax.algorithms import (
    CISPO,
    DAPO,
    DIS,
    FIPO,
    GRPO,
    GSPO,
    KTO,
    MOPD,
    OWPO,
    PKPO,
    PPO,
    PREFERENCE_RECIPES,
    RECIPES,
    RLOO,
    VCPO,
    ActGuideRL,
    AgentRL,
    CrossStageDistillation,
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
    OnPolicyDistillation,
    PassAtK,
    Reinforce,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    RoleAgent,
)
from rljax.losses import PAIR, SIDE
from rljax.types import TEACHER_LOGPROBS, RolloutBatch, Rows

BATCH_STATISTICS = {PPO, AgentRL, Reinforce, ReinforcePlusPlus, ReinforcePlusPlusBaseline, MOPD}
"""Their baseline spans groups, or a scale does, so two batches apart differ from the two together."""

TAUGHT = (OnPolicyDistillation, CrossStageDistillation, MOPD)
"""They have credit from a teacher, which does without groups but where the verifier counts as well."""

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
    **dict.fromkeys(TAUGHT, ("teacher_kl", "teacher_clipped", "teacher_reversal")),
}

GROUP = 4
WIDTH = 9
FRAME = (12, 12)
"""Rows and positions that everything is padded to, so that a recipe's credit and gradient are compiled once."""

every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)


def build(recipe, **changes):
    """The recipe with its defaults but a small group, and all its penalties on."""
    return recipe(group_size=GROUP, **{"kl_coef": 0.02, "entropy_coef": 0.01} | changes).build()


class Run:
    """An algorithm's credit and loss as they are, or each as one compiled program of the shape of the frame."""

    def __init__(self, algorithm, transform=lambda function: function):
        self.algorithm = algorithm
        self.advantages = transform(algorithm.advantage_fn)
        self.token_weights = transform(algorithm.loss.token_weights)
        self._gradients = transform(jax.value_and_grad(algorithm.loss.loss, argnums=(0, 1), has_aux=True))

    def rows(self, batch) -> Rows:
        """What the learner hands to the loss, with nothing packed."""
        mask = np.asarray(batch.action_mask) & np.asarray(batch.is_valid)[:, None]
        drift = 0.02 * noise_of(mask.shape, 5)
        rows = Rows(
            loss_mask=mask,
            loss_weights=np.asarray(self.token_weights(mask)),
            token_count=np.asarray(mask.sum(), np.float32),
            advantages=np.asarray(self.advantages(batch)),
            behavior_logprobs=batch.behavior_logprobs,
            old_logprobs=(batch.behavior_logprobs + drift).astype(np.float32),
            source=batch.source,
            ref_logprobs=batch.ref_logprobs,
            uniforms=np.abs(batch.behavior_logprobs) * 997 % 1,  # as the tokens' own: padding and order do not matter
            columns=batch.columns,
        )
        correct = self.algorithm.loss.correct_fn
        return rows if correct is None else jax.tree.map(np.asarray, correct(rows).rows)

    def gradients(self, rows, logprobs, entropies):
        """(loss, metrics), (gradient by log-probs, by entropies), as numpy."""
        return jax.tree.map(np.asarray, self._gradients(logprobs, entropies, rows))


@functools.cache
def compiled(recipe) -> Run:
    """The recipe on the frame, with its penalties on. All tests of one recipe share its programs."""
    return Run(build(recipe), jax.jit)


def noise_of(shape, seed):
    """Normal numbers that a smaller shape has the first ones of."""
    return np.random.default_rng(seed).normal(size=(32, 32))[: shape[0], : shape[1]]


def example(rewards=(1, 0, 0.5, 0, 0.2, 0.9, 0.9, 0), seed=0, **changes) -> RolloutBatch:
    """Two groups of four; one row has one token."""
    lengths = np.random.default_rng(seed).integers(2, 7, len(rewards))
    lengths[1] = 1
    group_id = np.arange(len(rewards)) // GROUP
    return make_batch(**{"group_id": group_id, "rewards": rewards, "lengths": lengths, "width": WIDTH} | changes)


def framed(struct):
    """`struct` with padding rows and columns up to the frame: NaN where a number may stand, False in masks. The padding
    rows of a batch belong to a group that is there."""

    def pad(x):
        x = np.asarray(x)
        fill = np.nan if np.issubdtype(x.dtype, np.floating) else 0
        margins = [(0, size - n) for size, n in zip(FRAME, x.shape, strict=False)]
        return np.pad(x, margins, constant_values=fill) if x.ndim else x

    return jax.tree.map(pad, struct)


def take(struct, index):
    """Rows `index` of every field that has rows."""
    return jax.tree.map(lambda x: x if np.ndim(x) == 0 else np.asarray(x)[index], struct)


def current(rows, spread=0.1):
    """Log-probs and entropies of a policy that has moved on from `old`, NaN where nothing was scored."""
    noise = noise_of(rows.loss_mask.shape, 6)
    old = np.where(rows.loss_mask, rows.old_logprobs, NAN)
    entropies = np.where(rows.loss_mask, 1 + 0.1 * noise, NAN)
    return (old + spread * noise).astype(np.float32), entropies.astype(np.float32)


def parts_of(run, rows, logprobs, entropies, parts):
    """The gradients of microbatches that hold the rows of each of `parts`, the rest of the frame being padding."""
    return [
        run.gradients(framed(take(rows, part)), *framed((logprobs[part], entropies[part])))  # NaN beyond the part
        for part in parts
    ]


@every_recipe
def test_loss_metrics_and_gradient_are_finite_and_gradient_stays_on_the_loss_mask(recipe):
    run = compiled(recipe)
    batch = example(is_valid=[1, 1, 0, 1, 1, 1, 1, 1], rewards=(1, 0, NAN, 0, 0.2, 0.9, 0.9, 0))
    rows = run.rows(framed(batch))
    (value, metrics), slopes = run.gradients(rows, *current(rows))
    assert np.isfinite(value)
    assert all(np.isfinite(v) for v in metrics.values()), metrics
    for slope in slopes:
        assert np.isfinite(slope).all()
        assert not slope[~rows.loss_mask].any()
        assert slope[rows.loss_mask].any()
    assert not rows.loss_mask[2].any()


@every_recipe
def test_metric_names_are_the_documented_ones(recipe):
    run = compiled(recipe)
    rows = run.rows(framed(example()))
    (_, metrics), _ = run.gradients(rows, *current(rows))
    names = {f"loss/{n}" for n in ("policy", "clip_fraction", "ratio_mean", "ratio_max", "approx_kl", "entropy")}
    optional = {f"loss/{n}" for n in ("kl_ref", "weight_mean", "kept_fraction")}
    assert names <= set(metrics) <= names | optional | {f"loss/{n}" for n in OWN_METRICS.get(recipe, ())}


@every_recipe
def test_neither_padding_nor_compilation_changes_anything(recipe):
    """Op by op on the rows alone, against one program on a frame with more rows and columns, some of them garbage."""
    batch = example()
    padded = framed(batch)
    # Rows that are not valid may hold anything, and belong to any group.
    garbage = np.arange(FRAME[0])[:, None] >= len(batch.lengths)
    tokens = garbage & (np.arange(FRAME[1]) >= 3)
    padded = dataclasses.replace(
        padded,
        action_mask=padded.action_mask | tokens,
        reward=np.where(garbage[:, 0], 5.0, padded.reward).astype(np.float32),
        group_id=np.where(garbage[:, 0], np.arange(FRAME[0]) % 2, padded.group_id).astype(np.int32),
    )
    alone = Run(compiled(recipe).algorithm)
    rows, padded_rows = alone.rows(batch), compiled(recipe).rows(padded)
    inside = tuple(slice(n) for n in rows.loss_mask.shape)
    for name, atol in (("advantages", 1e-5), ("loss_weights", 1e-7), ("old_logprobs", 1e-7)):
        got, want = getattr(padded_rows, name), np.where(rows.loss_mask, getattr(rows, name), 0)
        np.testing.assert_allclose(np.where(padded_rows.loss_mask, got, 0)[inside], want, atol=atol, err_msg=name)

    (value, metrics), slopes = alone.gradients(rows, *map(jnp.asarray, current(rows)))
    (value_2, metrics_2), slopes_2 = compiled(recipe).gradients(padded_rows, *current(padded_rows))
    np.testing.assert_allclose(value, value_2, rtol=1e-5, atol=1e-7)
    for slope, slope_2 in zip(slopes, slopes_2, strict=True):
        np.testing.assert_allclose(slope_2[inside], slope, atol=1e-6)
        assert not slope_2[len(slope) :].any() and not slope_2[:, slope.shape[1] :].any()
    assert set(metrics) == set(metrics_2)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics_2[name], rtol=1e-5, atol=1e-6, err_msg=name)


@every_recipe
def test_permuting_rows_permutes_the_gradient(recipe):
    run = compiled(recipe)
    batch = framed(example())
    rows = run.rows(batch)
    logprobs, entropies = current(rows)
    order = np.random.default_rng(1).permutation(FRAME[0])
    shuffled = run.rows(take(batch, order))
    for name in ("advantages", "loss_weights"):
        np.testing.assert_allclose(getattr(shuffled, name), getattr(rows, name)[order], atol=1e-6, err_msg=name)

    # Whitened credit sums to nearly 0, where its rounding would be all that is left of the loss; so it is one here.
    shuffled = take(rows, order)
    (value, _), (slope, _) = run.gradients(rows, logprobs, entropies)
    (value_2, _), (slope_2, _) = run.gradients(shuffled, logprobs[order], entropies[order])
    np.testing.assert_allclose(value, value_2, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(slope_2, slope[order], atol=1e-6)


@every_recipe
def test_microbatches_add_up_to_the_minibatch(recipe):
    run = compiled(recipe)
    rows = run.rows(framed(example()))
    logprobs, entropies = current(rows)
    (value, metrics), (slope, _) = run.gradients(rows, logprobs, entropies)
    parts = [slice(i, i + 2) for i in range(0, 8, 2)]
    pieces = parts_of(run, rows, logprobs, entropies, parts)
    np.testing.assert_allclose(sum(v for (v, _), _ in pieces), value, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([s[:2] for _, (s, _) in pieces]), slope[:8], atol=1e-7)
    for name in metrics:
        combine = max if name.endswith("_max") else sum
        got = combine([m[name] for (_, m), _ in pieces])
        np.testing.assert_allclose(got, metrics[name], rtol=1e-5, atol=1e-7, err_msg=name)


@every_recipe
@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_extreme_ratios_stay_finite(recipe, shift):
    run = compiled(recipe)
    rows = run.rows(framed(example()))
    logprobs, entropies = current(rows)
    (value, metrics), slopes = run.gradients(rows, logprobs + np.float32(shift), entropies)
    assert np.isfinite(value)
    assert all(np.isfinite(v) for v in metrics.values()), metrics
    assert all(np.isfinite(slope).all() for slope in slopes)


@every_recipe
def test_a_batch_without_a_single_token_gives_loss_0_and_gradient_0(recipe):
    run = compiled(recipe)
    rows = run.rows(framed(example(lengths=np.zeros(8, int))))
    (value, metrics), slopes = run.gradients(rows, *current(rows))
    assert value == 0
    assert all(v == 0 for v in metrics.values())
    assert not any(slope.any() for slope in slopes)


@every_recipe
def test_equal_rewards_without_kl_give_gradient_0(recipe):
    run = Run(build(recipe, kl_coef=0.0, entropy_coef=0.0))
    batch = example(rewards=[0.1] * 8)
    if run.algorithm.plan.critic:  # that knows
        batch = dataclasses.replace(batch, values=np.full_like(batch.values, 0.1))
    if run.algorithm.plan.teacher:  # that has nothing to teach
        batch = dataclasses.replace(batch, columns={TEACHER_LOGPROBS: batch.behavior_logprobs})
    rows = run.rows(batch)
    np.testing.assert_array_equal(rows.advantages, 0)
    (value, _), (slope, _) = run.gradients(rows, *map(jnp.asarray, current(rows)))
    assert value == 0
    assert not slope.any()


@every_recipe
def test_first_update_pushes_towards_reward_and_away_from_failure(recipe):
    """On-policy, the gradient of the loss by a log-prob has the sign of -advantage wherever there is an advantage."""
    run = Run(build(recipe, kl_coef=0.0, entropy_coef=0.0))
    rows = run.rows(example())
    rows = dataclasses.replace(rows, old_logprobs=rows.behavior_logprobs)
    old = jnp.asarray(rows.old_logprobs)
    (_, metrics), (slope, _) = run.gradients(rows, old, jnp.zeros_like(old))
    np.testing.assert_array_equal(np.sign(slope), -np.sign(rows.advantages) * rows.loss_mask)
    assert metrics["loss/ratio_mean"] == pytest.approx(1)
    assert metrics["loss/ratio_max"] == 1
    assert metrics["loss/clip_fraction"] == 0
    assert metrics["loss/approx_kl"] == 0


@every_recipe
def test_two_batches_together_are_the_two_apart(recipe):
    run = compiled(recipe)
    batch = example()
    rows = run.rows(framed(batch))
    halves = [take(batch, slice(0, 4)), take(batch, slice(4, 8))]
    halves[1] = dataclasses.replace(halves[1], group_id=halves[1].group_id - 1)
    apart = np.concatenate([np.asarray(run.advantages(framed(half)))[:4] for half in halves])
    if recipe in BATCH_STATISTICS:
        assert np.abs(apart - rows.advantages[:8]).max() > 1e-3
    else:
        np.testing.assert_allclose(apart, rows.advantages[:8], atol=1e-5)
    logprobs, entropies = current(rows)
    (whole, _), _ = run.gradients(rows, logprobs, entropies)
    pieces = parts_of(run, rows, logprobs, entropies, (slice(0, 4), slice(4, 8)))
    np.testing.assert_allclose(sum(value for (value, _), _ in pieces), whole, rtol=1e-5, atol=1e-7)


PROMPTS, LENGTH, VOCAB = 3, 4, 5
PROMPT_OF = np.repeat(np.arange(PROMPTS), GROUP)
OPTIMIZER = optax.adam(0.1)
"""Recipes differ in the scale of their gradient, which Adam takes out."""


@jax.jit
def spoken(table, tokens):
    """Log-probs and entropies of tokens [rows, LENGTH] under the table of logits, on the frame."""
    logs = jax.nn.log_softmax(table)[PROMPT_OF]
    entropies = -(jnp.exp(logs) * logs).sum(-1)
    logprobs = jnp.take_along_axis(logs, tokens[..., None], axis=2)[..., 0]
    return tuple(jnp.pad(x, ((0, 0), (0, FRAME[1] - LENGTH))) for x in (logprobs, entropies))


@jax.jit
def learn(table, state, tokens, slopes):
    """One step of the optimizer down the gradient by log-probs and entropies."""
    (slope,) = jax.vjp(lambda table: spoken(table, tokens), table)[1](slopes)
    updates, state = OPTIMIZER.update(slope, state)
    return optax.apply_updates(table, updates), state


@every_recipe
def test_reward_rises_on_a_table_of_logits(recipe):
    """Three prompts, four tokens each from a softmax per prompt and position; the reward is the share of tokens that
    are right. The recipe's own advantages and loss, two updates per rollout; the policy is its own reference."""
    run = compiled(recipe)
    rng, noise = np.random.default_rng(0), np.random.default_rng(1)
    targets = rng.integers(0, VOCAB, (PROMPTS, LENGTH))
    count = len(PROMPT_OF)
    blank = framed(make_batch(group_id=PROMPT_OF, rewards=np.zeros(count), lengths=[LENGTH] * count, prompt=0))
    blank = dataclasses.replace(blank, values=np.zeros_like(blank.values))  # a critic that knows nothing

    # Of a method that is taught, the teacher says what is right nine times out of ten.
    teacher = jnp.asarray(4 * np.eye(VOCAB)[targets], jnp.float32)

    table, history = jnp.zeros((PROMPTS, LENGTH, VOCAB)), []
    state = OPTIMIZER.init(table)
    for _ in range(60):
        uniform = rng.random((count, LENGTH, 1))
        cdf = np.cumsum(np.asarray(jax.nn.softmax(table))[PROMPT_OF], axis=-1)
        tokens = np.minimum((uniform > cdf).sum(-1), VOCAB - 1).astype(np.int32)
        rewards = (tokens == targets[PROMPT_OF]).mean(axis=1).astype(np.float32)
        history.append(rewards.mean())

        old = np.asarray(spoken(table, tokens)[0])
        columns = {TEACHER_LOGPROBS: np.asarray(spoken(teacher, tokens)[0])}
        batch = dataclasses.replace(blank, reward=rewards, behavior_logprobs=old, ref_logprobs=old, columns=columns)
        rows = Rows(
            loss_mask=blank.action_mask,
            loss_weights=np.asarray(run.token_weights(blank.action_mask)),
            token_count=np.asarray(blank.action_mask.sum(), np.float32),
            advantages=np.asarray(run.advantages(batch)),
            behavior_logprobs=old,
            old_logprobs=old,
            source=np.zeros(count, np.int32),
            ref_logprobs=old,
            uniforms=noise.random(FRAME).astype(np.float32),
            columns=columns,
        )
        for _ in range(2):
            _, slopes = run.gradients(rows, *map(np.asarray, spoken(table, tokens)))
            table, state = learn(table, state, tokens, slopes)
    assert np.mean(history[:3]) < 0.35
    assert np.mean(history[-3:]) > 0.9, history


@every_recipe
def test_needs_ref_exactly_when_a_kl_coefficient_is_on(recipe):
    assert compiled(recipe).algorithm.plan.needs_ref
    without = Run(build(recipe, kl_coef=0.0))
    assert without.algorithm.plan.needs_ref == (recipe in ALWAYS_NEED_REF)
    batch = dataclasses.replace(example(), ref_logprobs=None)
    if recipe not in ALWAYS_NEED_REF:
        rows = without.rows(batch)
        logprobs, entropies = map(jnp.asarray, current(rows))
        assert np.isfinite(without.algorithm.loss.loss(logprobs, entropies, rows)[0])
    with pytest.raises(ValueError, match="ref_logprobs"):
        plain = Run(compiled(recipe).algorithm)
        rows = plain.rows(batch)
        plain.algorithm.loss.loss(*map(jnp.asarray, current(rows)), rows)


@every_recipe
def test_a_group_of_one_is_refused_where_the_group_is_the_baseline(recipe):
    if recipe in {PPO, Reinforce, ReinforcePlusPlus, OnPolicyDistillation, CrossStageDistillation}:
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


every_preference = pytest.mark.parametrize("recipe", PREFERENCE_RECIPES, ids=lambda recipe: recipe.__name__)


@functools.cache
def compiled_preference(recipe):
    """The method, and its loss with the gradient by log-probs as one program of the frame."""
    method = recipe().build()
    return method, jax.jit(jax.value_and_grad(method.loss.loss, has_aux=True))


def preferred(recipe, **changes):
    """Rows of four pairs on the frame, of which the last row is of another prompt where the method wants such; those
    that the loss of a minibatch sees."""
    method, _ = compiled_preference(recipe)
    batch = framed(example(**changes))
    mask = np.asarray(batch.action_mask) & np.asarray(batch.is_valid)[:, None]
    side = np.tile([1.0, -1.0], FRAME[0] // 2)
    if method.has_other_rows:
        side[7] = 0
    rows = Rows(
        loss_mask=mask,
        loss_weights=np.asarray(method.loss.token_weights(mask)),
        token_count=np.asarray(mask.sum(), np.float32),
        advantages=np.zeros(mask.shape, np.float32),
        behavior_logprobs=batch.behavior_logprobs,
        old_logprobs=batch.behavior_logprobs,
        source=batch.source,
        ref_logprobs=batch.behavior_logprobs,
        columns={SIDE: side.astype(np.float32), PAIR: (np.arange(FRAME[0]) // 2).astype(np.float32)},
    )
    return corrected_preference(method, rows)


def corrected_preference(method, rows):
    """As the learner hands a whole minibatch to it, of one microbatch."""
    if method.loss.correct_fn is None:
        return rows
    return jax.tree.map(lambda x: np.asarray(x)[0], method.loss.correct_fn(jax.tree.map(lambda x: x[None], rows)).rows)


def preference_gradient(recipe, rows, shift=0.0):
    """(loss, metrics, gradient), and the log-probs: those of a model that has moved on from the reference."""
    logprobs, entropies = current(rows)
    logprobs = logprobs + np.float32(shift) * np.sign(noise_of(logprobs.shape, 8)).astype(np.float32)
    (value, metrics), slope = compiled_preference(recipe)[1](logprobs, entropies, rows)
    return float(value), {name: float(x) for name, x in metrics.items()}, np.asarray(slope)


@every_preference
def test_a_preference_has_its_documented_metrics_and_learns_on_the_loss_mask_alone(recipe):
    rows = preferred(recipe)
    value, metrics, slope = preference_gradient(recipe, rows)
    names = {"loss", "accuracy", "chosen", "rejected"} | (set() if recipe is KTO else {"margin"})
    assert set(metrics) == {f"preference/{name}" for name in names}
    assert np.isfinite(value) and all(map(np.isfinite, metrics.values())), metrics
    assert metrics["preference/loss"] == pytest.approx(value)
    assert np.isfinite(slope).all() and not slope[~rows.loss_mask].any()
    is_labelled = (rows.columns[SIDE] != 0)[:, None]
    assert slope[rows.loss_mask & is_labelled].all() and not slope[rows.loss_mask & ~is_labelled].any()


@every_preference
def test_a_first_update_makes_the_preferred_side_more_likely_and_the_other_less(recipe):
    """At the reference itself, which is where training begins; a row that is only measured moves nothing."""
    rows = preferred(recipe)
    _, function = compiled_preference(recipe)
    logprobs = np.where(rows.loss_mask, rows.old_logprobs, NAN).astype(np.float32)
    _, slope = function(logprobs, np.zeros_like(logprobs), rows)
    np.testing.assert_array_equal(np.sign(slope), -rows.columns[SIDE][:, None] * rows.loss_mask)


@every_preference
def test_a_preference_stays_finite_far_from_its_reference(recipe):
    value, metrics, slope = preference_gradient(recipe, preferred(recipe), shift=500.0)
    assert np.isfinite(value) and all(map(np.isfinite, metrics.values())), metrics
    assert np.isfinite(slope).all()


@every_preference
def test_preferences_without_a_single_token_give_loss_0_and_gradient_0(recipe):
    value, metrics, slope = preference_gradient(recipe, preferred(recipe, lengths=np.zeros(8, int)))
    assert value == 0
    assert not any(metrics.values())
    assert not slope.any()
