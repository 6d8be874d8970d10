"""Corrections for stale data against worked examples, closed forms and float64 differences."""

import dataclasses
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import NAN, float64, make_batch, make_rows, term, value_and_grad

from rljax.advantages import (
    group_normalized,
    leave_one_out,
    pass_at_k_normalized,
    pass_at_k_unbiased,
    task_normalized,
)
from rljax.algorithms import (
    DIS,
    M2PO,
    MOPD,
    RECIPES,
    VCPO,
    ActGuideRL,
    AgentRL,
    CrossStageDistillation,
    DecoupledPPO,
    IcePop,
    OnPolicyDistillation,
)
from rljax.losses import (
    behavior_ratio,
    behavior_sequence_ratio,
    cispo,
    clipped,
    compared_with,
    double_sided,
    effective_sample_size,
    geometric_log_weights,
    interpolated_logprobs,
    limit_second_moment,
    masked_is,
    policy_loss,
    probability_band,
    product_log_weights,
    scale_step_by_sample_size,
    second_moment_mask,
    squared_log_ratio,
    token_mean,
    token_ratio,
    truncated_is,
    unclipped,
    veto,
)


def one_row(new, behavior, advantages, *, old=None, mask=None, aggregate=token_mean):
    """(log-probs, rows) of one row from probabilities."""
    new, behavior = np.log([new]), np.log([behavior])
    old = behavior if old is None else np.log([old])
    mask = np.ones(new.shape, bool) if mask is None else np.array([mask], bool)
    return new, make_rows(mask, aggregate=aggregate, old=old, behavior=behavior, advantages=np.array([advantages]))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_what_a_recipe_compares_the_policy_with_is_read_off_its_gradient(recipe):
    """Only these know who sampled a token; those with both would lose their correction if both were one."""
    sampler_alone = {ActGuideRL, AgentRL, DIS, MOPD, OnPolicyDistillation}
    both = {CrossStageDistillation, DecoupledPPO, IcePop, M2PO, VCPO}
    got = recipe().build().compared_with()
    assert got == (recipe in sampler_alone | both, recipe not in sampler_alone)


def test_a_penalty_a_weight_or_a_column_counts_as_a_comparison_and_a_report_does_not():
    plain = (token_ratio, clipped(), token_mean)
    assert compared_with(policy_loss(*plain, penalties=[squared_log_ratio()])) == (True, True)
    assert compared_with(policy_loss(*plain, weight_fns=[truncated_is()])) == (True, True)
    reports = [lambda logprobs, entropies, rows: {"loss/gap": rows.behavior_logprobs}]
    assert compared_with(policy_loss(*plain, report_fns=reports)) == (False, True)
    weights = [lambda logprobs, entropies, rows: rows.columns["row"][:, None] * rows.columns["token"]]
    loss = policy_loss(*plain, weight_fns=weights)
    assert compared_with(loss, {"row": False, "token": True}) == (False, True)


@pytest.mark.parametrize(
    ("bounds", "loss", "slope"),
    [
        ((0.8, 3.0), 0.116511, [-0.3, -0.125, 0.0625, 0]),
        ((0.3, 5.0), 0.034717, [-0.3, 0, 0, 1.125]),
        ((0.2, 0.28), 0.153248, [-0.3, 0, 0, 0]),
    ],
)
def test_double_sided_importance_sampling_meets_the_worked_example(bounds, loss, slope):
    with float64():
        logprobs, rows = one_row([0.6, 0.3, 0.05, 0.9], [0.5, 0.6, 0.2, 0.2], [1, 1, -1, -1])
        made = policy_loss(behavior_ratio, double_sided(clip_low=bounds[0], clip_high=bounds[1]), token_mean)
        value, metrics, gradient = value_and_grad(made, rows, logprobs)
    np.testing.assert_allclose(value, loss, atol=1e-6)
    np.testing.assert_allclose(gradient[0], slope, atol=1e-12)
    assert metrics["loss/clip_fraction"] == np.mean(np.array(slope) == 0)


def test_double_sided_drops_a_ratio_at_its_bound_and_survives_extreme_ones():
    ratio = jnp.asarray([[0.5, 0.6, 1.5, 1.4]])
    surrogate = double_sided(clip_low=0.5, clip_high=0.5)(ratio, jnp.ones((1, 4)), -jnp.ones((1, 4)))
    np.testing.assert_array_equal(surrogate.is_clipped, [[True, False, True, False]])
    rows = make_rows([[1, 1]], aggregate=token_mean, old=[[-900.0, -1.0]], advantages=[[1.0, 1.0]])
    _, _, gradient = value_and_grad(DIS(clip_low=0.8).build().loss, rows, np.array([[-1.0, -1.0]], np.float32))
    np.testing.assert_array_equal(gradient, [[0, -0.5]])


def test_icepop_meets_the_worked_examples():
    with float64():
        rho = np.array([[0.4, 0.5, 1, 1.9, 2, 2.5]])
        rows = make_rows(
            np.ones((1, 6)),
            aggregate=token_mean,
            old=np.log(rho),
            behavior=np.zeros((1, 6)),
            advantages=np.ones((1, 6)),
        )
        np.testing.assert_allclose(
            term(masked_is(0.5, 2.0), rows.old_logprobs, rows), [[0, 0.5, 1, 1.9, 2, 0]], atol=1e-12
        )

        loss = IcePop(group_size=2).build().loss
        mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
        rows = make_rows(
            mask,
            aggregate=loss.token_weights,
            old=np.log([[0.5, 0.4, 0.2], [0.6, 0.3, 0.1]]),
            behavior=np.log([[0.5, 0.1, 0.25], [0.5, 0.3, 0.1]]),
            advantages=np.array([[1.0] * 3, [-1.0] * 3]),
        )
        value, _, gradient = value_and_grad(loss, rows, np.log([[0.6, 0.4, 0.1], [0.9, 0.15, 0.1]]))
    np.testing.assert_allclose(value, 0.383333, atol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.2, 0, -0.066667], [0.45, 0, 0]], atol=1e-6)


def test_decoupled_ppo_meets_the_worked_example():
    with float64():
        logprobs, rows = one_row([0.45, 0.38, 0.7], [0.2, 0.5, 0.1], [1, -1, 1], old=[0.3, 0.4, 0.8])
        whole = policy_loss(token_ratio, clipped(), token_mean, weight_fns=(truncated_is(100.0),))
        value, _, gradient = value_and_grad(whole, rows, logprobs)
        np.testing.assert_allclose(value, -2.68, atol=1e-12)
        np.testing.assert_allclose(gradient, [[0, 0.253333, -2.333333]], atol=1e-6)
        value, _, gradient = value_and_grad(DecoupledPPO().build().loss, rows, logprobs)
        np.testing.assert_allclose(value, -0.346667, atol=1e-6)
        np.testing.assert_allclose(gradient, [[0, 0.253333, 0]], atol=1e-6)
        capped, _, _ = value_and_grad(DecoupledPPO(cap_weights=True).build().loss, rows, logprobs)
        np.testing.assert_allclose(capped, -(1.5 * 1.2 - 0.8 * 0.95 + 5 * 0.875) / 3, atol=1e-12)


def test_old_logprobs_between_versions_are_interpolated():
    got = interpolated_logprobs(
        np.array([[-1, -0.8, -0.4]]),
        np.array([[-2, -1, -0.5]]),
        behavior_version=np.array([[3, 5, 6]]),
        old_version=6,
        version=7,
    )
    np.testing.assert_allclose(got, [[-1.25, -0.9, -0.5]], atol=1e-6)


def test_probability_band_and_squared_log_ratio_meet_the_worked_example():
    with float64():
        logprobs, rows = one_row([0.6, 0.3, 0.1, 0.5], [0.3, 0.55, 0.08, 0.5], [1, -1, 1, -1])
        loss = prime_rl()
        value, metrics, _ = value_and_grad(loss, rows, logprobs)
        np.testing.assert_array_equal(term(probability_band(), logprobs, rows), [[False, False, True, True]])
    np.testing.assert_allclose(value, np.mean([0.00048, 0.000367, -1.24995, 1.0]), atol=1e-6)
    assert metrics["loss/kept_fraction"] == 0.5


def test_truncated_ratio_of_the_current_policy_meets_the_worked_example():
    """PipelineRL's loss is CISPO's with the sampler's log-probs as the anchor."""
    with float64():
        new = np.array([0.2, 0.4, 0.7])
        logprobs, rows = one_row(new, new / [0.5, 1, 7], [1, -1, 1])
        value, _, _ = value_and_grad(policy_loss(behavior_ratio, cispo(max_ratio=5.0), token_mean), rows, logprobs)
    np.testing.assert_allclose(-value, -0.557268, atol=1e-6)


def test_veto_drops_the_whole_row_and_no_other():
    old = np.array([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    logprobs = np.array([[-1.0, -12.0, -1.0], [-1.0, -1.0, -60.0]])
    rows = make_rows([[1, 1, 1], [1, 1, 0]], aggregate=token_mean, old=old, advantages=np.ones((2, 3)))
    np.testing.assert_array_equal(term(veto(1e-4), logprobs, rows), [[False] * 3, [True] * 3])
    assert term(veto(1e-6), logprobs, rows).all()


def prime_rl():
    return policy_loss(
        behavior_ratio,
        unclipped(),
        token_mean,
        filter_fns=(probability_band(),),
        penalties=(squared_log_ratio(),),
    )


STALE_LOSSES = {
    "dis": lambda: DIS().build().loss,
    "decoupled": lambda: DecoupledPPO().build().loss,
    "tis": lambda: policy_loss(behavior_ratio, cispo(max_ratio=5.0), token_mean),
    "band": prime_rl,
    "icepop": lambda: policy_loss(token_ratio, clipped(), token_mean, weight_fns=(masked_is(),)),
    "m2po": lambda: M2PO().build().loss,
}


@pytest.mark.parametrize("name", STALE_LOSSES)
def test_on_fresh_data_every_correction_is_the_policy_gradient(name):
    with float64():
        p = [0.2, 0.3, 0.6, 0.9]
        logprobs, rows = one_row(p, p, [1, -1, 0.5, -2], mask=[1, 1, 0, 1])
        loss = STALE_LOSSES[name]()
        if loss.correct_fn is not None:
            rows = loss.correct_fn(rows).rows
        _, _, gradient = value_and_grad(loss, rows, logprobs)
    np.testing.assert_allclose(gradient, [[-1 / 3, 1 / 3, 0, 2 / 3]], atol=1e-12)


@pytest.mark.parametrize("name", ["band", "m2po", "decoupled"])
def test_gradients_equal_differences_of_the_value(name):
    with float64():
        rng = np.random.default_rng(3)
        behavior = -rng.exponential(size=(3, 5))
        old, logprobs = behavior + 0.1 * rng.normal(size=(2, 3, 5))
        mask = np.array([[1, 1, 1, 0, 1], [0, 1, 0, 0, 0], [0] * 5], bool)
        rows = make_rows(mask, aggregate=token_mean, old=old, behavior=behavior, advantages=rng.normal(size=(3, 5)))
        loss = STALE_LOSSES[name]()
        if loss.correct_fn is not None:
            rows = loss.correct_fn(rows).rows
        _, _, gradient = value_and_grad(loss, rows, logprobs)
        step = 1e-6
        for index in np.ndindex(3, 5):
            nudge = np.zeros((3, 5))
            nudge[index] = step
            up, down = (value_and_grad(loss, rows, logprobs + s * nudge)[0] for s in (1, -1))
            slope = (up - down) / (2 * step)
            np.testing.assert_allclose(gradient[index], slope, atol=1e-8)


def test_sequence_weight_is_the_product_and_every_token_gets_its_size_as_gradient():
    with float64():
        logprobs, rows = one_row([0.6, 0.2, 0.5], [0.3, 0.4, 0.1], [1, 1, 1], mask=[1, 1, 0])
        np.testing.assert_allclose(behavior_sequence_ratio(logprobs, rows)[0, :2], 2 * 0.5, atol=1e-12)
        rows = dataclasses.replace(rows, behavior_logprobs=rows.behavior_logprobs - np.log([[3.0, 1, 1]]))
        _, _, gradient = value_and_grad(VCPO(max_weight=2.0).build().loss, rows, logprobs)
        np.testing.assert_allclose(gradient, [[-2 / 2, -2 / 2, 0]], atol=1e-12)
    single = jax.tree.map(lambda x: np.asarray(x, np.float32) if np.asarray(x).dtype == np.float64 else x, rows)
    far = dataclasses.replace(single, behavior_logprobs=single.behavior_logprobs - 900.0)
    value, _, gradient = value_and_grad(VCPO().build().loss, far, np.asarray(logprobs, np.float32))
    assert np.isfinite(value)
    np.testing.assert_allclose(gradient, [[-4, -4, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("d", "threshold", "keep"),
    [
        ([0.05, -0.6, 0.1, 0.3, -0.1], 0.04, [1, 0, 1, 1, 1]),
        ([0.05, -0.6, 0.1, 0.3, -0.1], 0.01, [1, 0, 1, 0, 1]),
        ([0.5, 0.6], 0.04, [1, 0]),
        ([0.1], 0.04, [1]),
        ([0.0, 0.0, 0.0], 0.04, [1, 1, 1]),
        ([20.0, 20.0, -20.0], 0.04, [1, 0, 0]),
        ([0.5, 0.6], float("inf"), [1, 1]),
    ],
)
def test_second_moment_mask_meets_the_worked_example(d, threshold, keep):
    got = second_moment_mask(np.array(d), np.ones(len(d), bool), threshold=threshold)
    np.testing.assert_array_equal(got, np.array(keep, bool))


def test_second_moment_mask_ignores_what_is_masked_and_the_order_of_tokens():
    rng = np.random.default_rng(0)
    d, mask = rng.normal(size=(6, 8)) * 0.4, rng.random((6, 8)) < 0.7
    keep = np.asarray(second_moment_mask(np.where(mask, d, NAN), mask))
    kept = np.sort(np.square(d[keep]))
    rest = np.sort(np.square(d[mask & ~keep]))
    assert not keep[~mask].any()
    assert kept.mean() < 0.04 <= np.append(kept, rest[0]).mean()
    assert kept.max() < rest.min()
    order = rng.permutation(48)
    moved = second_moment_mask(d.ravel()[order], mask.ravel()[order])
    np.testing.assert_array_equal(moved, keep.ravel()[order])
    assert not second_moment_mask(np.full((2, 3), NAN), np.zeros((2, 3), bool)).any()
    tied = np.asarray(second_moment_mask(np.sqrt([0.01, 0.05, 0.05, 0.05]), np.ones(4, bool)))
    np.testing.assert_array_equal(tied, [True, False, False, False])


def test_second_moment_limit_sees_the_minibatch_and_not_the_microbatch():
    """With microbatches as a leading axis the tokens dropped are those of all of them together."""
    rng = np.random.default_rng(1)
    behavior = -rng.exponential(size=(4, 30)).astype(np.float32)
    old = behavior + (np.array([[0.05], [0.05], [0.3], [0.3]]) * rng.normal(size=(4, 30))).astype(np.float32)
    mask = rng.random((4, 30)) < 0.8
    rows = make_rows(mask, aggregate=token_mean, old=old, behavior=behavior, advantages=np.ones((4, 30)))
    split = jax.tree.map(lambda x: jnp.reshape(x, (2, 2, *jnp.shape(x)[1:])) if jnp.ndim(x) else x[None], rows)
    split = dataclasses.replace(split, token_count=jnp.repeat(split.token_count, 2))
    whole, parts = limit_second_moment()(rows), limit_second_moment()(split)
    np.testing.assert_array_equal(parts.rows.advantages.reshape(4, 30), whole.rows.advantages)
    kept = np.asarray(whole.rows.advantages)[mask]
    np.testing.assert_allclose(whole.metrics["loss/m2_kept_fraction"], kept.mean())
    alone = limit_second_moment()(jax.tree.map(lambda x: x[1] if jnp.ndim(x) > 1 else x[0], split))
    assert not np.array_equal(alone.rows.advantages, whole.rows.advantages[2:])


def test_effective_sample_size_meets_the_worked_examples():
    def ess(weights):
        return float(effective_sample_size(np.log(np.array(weights, np.float32)), np.ones(len(weights), bool)))

    np.testing.assert_allclose(ess([4, 1, 1]), 0.666667, atol=1e-6)
    np.testing.assert_allclose(ess([0.5, 1, 1.5, 5]), 0.561404, atol=1e-6)
    assert ess([1, 1, 1, 1]) == 1
    np.testing.assert_allclose(effective_sample_size(np.array([60.0, 0, 0]), np.ones(3, bool)), 1 / 3)
    np.testing.assert_allclose(effective_sample_size(np.array([900.0, 0, NAN]), np.array([1, 1, 0], bool)), 1 / 2)
    assert effective_sample_size(np.array([1.0, 2.0]), np.zeros(2, bool)) == 0


def test_step_scale_meets_the_worked_examples():
    def correction(log_weights, **options):
        """Rows of two tokens, over which the log-weight is spread, and an empty one."""
        old = np.append(np.array(log_weights), 5.0)[:, None] / 2 * np.ones((1, 2))
        mask = np.append(np.ones((len(log_weights), 2), bool), [[False, False]], axis=0)
        rows = make_rows(mask, aggregate=token_mean, old=old, behavior=0 * old, advantages=0 * old)
        return scale_step_by_sample_size(**options)(rows)

    got = correction([np.log(4), 0, 0])
    np.testing.assert_allclose(got.step_scale, 0.816497, atol=1e-6)
    np.testing.assert_allclose(got.metrics["loss/effective_sample_size"], 0.666667, atol=1e-6)
    np.testing.assert_allclose(correction([30.0, 0, 0]).step_scale, 0.57735, atol=1e-5)
    assert correction([0.5, 0.5, 0.5]).step_scale == 1
    assert correction([np.log(4), 0, 0], base=0.55).step_scale == 1
    geometric = correction([np.log(16), 0, 0], row_weight_fn=geometric_log_weights)
    np.testing.assert_allclose(geometric.step_scale, 0.816497, atol=1e-6)
    assert correction([]).step_scale == 0


def test_row_weights_are_the_product_and_the_geometric_mean():
    d, mask = np.log([[1.5, 0.8, 1.1]]), np.ones((1, 3), bool)
    np.testing.assert_allclose(np.exp(product_log_weights(d, mask)), [1.32], rtol=1e-6)
    np.testing.assert_allclose(np.exp(geometric_log_weights(d, mask)), [1.096961], rtol=1e-6)


def fixed(values):
    """An advantage function that broadcasts row values."""
    return lambda batch: jnp.where(batch.action_mask, jnp.asarray(values)[:, None], 0)


def test_task_normalisation_meets_the_worked_example():
    batch = make_batch(group_id=[0, 0, 1, 1], rewards=[0.0] * 4, lengths=[3, 1, 2, 2])
    batch = dataclasses.replace(batch, task_id=np.array([0, 0, 1, 1], np.int32))
    got = np.asarray(task_normalized(fixed([1.0, -1.0, 0.5, -0.5]))(batch))
    expected = np.array([0.57735, -1.73205, 0.999998, -0.999998])[:, None] * batch.action_mask
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_task_normalisation_keeps_tasks_apart_and_leaves_ties_at_zero():
    rewards = [1, 0, 0, -0.2, 0.1, 0.1, 0.1, 0.1, 1, 0, NAN, 5]
    batch = make_batch(
        group_id=np.arange(12) // 4, rewards=rewards, lengths=[1, 4, 2, 3] * 3, is_valid=[1] * 10 + [0, 1]
    )
    batch = dataclasses.replace(batch, task_id=np.array([0] * 4 + [1] * 4 + [2] * 4, np.int32))
    inner = group_normalized()
    got, raw = np.asarray(task_normalized(inner)(batch)), np.asarray(inner(batch))
    for task in (0, 2):
        mask = batch.action_mask & batch.is_valid[:, None] & (batch.task_id == task)[:, None]
        values = raw[mask].astype(np.float64)
        np.testing.assert_allclose(got[mask], (values - values.mean()) / values.std(), rtol=1e-5)
    np.testing.assert_array_equal(got[4:8], 0)
    np.testing.assert_array_equal(got[10], 0)
    other = make_batch(group_id=[0, 0], rewards=[1.0, 0.0], lengths=[2, 2])
    assert np.abs(task_normalized(inner)(other)).max() == pytest.approx(1, abs=1e-5)  # no task ids: one task


def brute_force(rewards, k):
    """By counting sets: (largest of sets with i) - (of all sets), their std, and (of sets of m others)."""
    n = len(rewards)
    sets = [(s, max(rewards[list(s)])) for s in combinations(range(n), k)]
    everything = np.array([largest for _, largest in sets])
    with_row = np.array([np.mean([largest for s, largest in sets if i in s]) for i in range(n)])

    def without(size):
        return np.array(
            [np.mean([max(rewards[list(s)]) for s in combinations(np.delete(np.arange(n), i), size)]) for i in range(n)]
        )

    return with_row, everything.mean(), everything.std(), without


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_advantages_equal_those_of_all_sets(k):
    rng = np.random.default_rng(k)
    rewards, group = np.round(rng.random(11), 1), np.array([0, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0])
    valid = np.ones(11, bool)
    valid[3] = False
    with float64():
        batch = make_batch(
            group_id=group,
            rewards=np.where(valid, rewards, NAN),
            lengths=[2] * 11,
            is_valid=valid,
            dtype=np.float64,
        )
        normalized = np.asarray(pass_at_k_normalized(k, epsilon=0.0)(batch))[:, 2]
        unbiased = np.asarray(pass_at_k_unbiased(k)(batch))[:, 2]
        marginal = np.asarray(pass_at_k_unbiased(k, baseline=k - 1)(batch))[:, 2] if k > 1 else None
    assert normalized[3] == unbiased[3] == 0
    for members in (np.flatnonzero((group == g) & valid) for g in (0, 1)):
        with_row, mean, std, without = brute_force(rewards[members], k)
        np.testing.assert_allclose(normalized[members], (with_row - mean) / std, atol=1e-12)
        np.testing.assert_allclose(unbiased[members], k * (with_row - without(k)), atol=1e-12)
        if k > 1:
            np.testing.assert_allclose(marginal[members], k * (with_row - without(k - 1)), atol=1e-12)


def test_pass_at_k_of_right_and_wrong_answers_is_the_published_closed_form():
    """One right answer of four: pass@2 is 0.5 (the table of the evaluation sheet)."""
    batch = make_batch(group_id=[0] * 4, rewards=[0, 1, 0, 0], lengths=[1] * 4)
    mean, wrong = 0.5, 1 - 2 / 3  # 1 - C(2, 1) / C(3, 1)
    expected = np.array([wrong, 1, wrong, wrong]) - mean
    got = np.asarray(pass_at_k_normalized(2, epsilon=0.0)(batch))[:, 2]
    np.testing.assert_allclose(got, expected / np.sqrt(mean * (1 - mean)), rtol=1e-6)
    marginal = np.asarray(pass_at_k_unbiased(2, baseline=1)(batch))[:, 2]
    np.testing.assert_allclose(marginal, 2 * np.array([0, 1, 0, 0]), atol=1e-6)


def test_pass_at_1_is_grpo_without_correction_and_rloo():
    batch = make_batch(group_id=[0] * 4 + [1] * 4, rewards=[1, 0, 0.5, 0, 0.2, 0.9, 0.9, 0], lengths=[1] * 8)
    grpo = np.asarray(group_normalized(epsilon=0.0)(batch)) * np.sqrt(4 / 3)
    np.testing.assert_allclose(pass_at_k_normalized(1, epsilon=0.0)(batch), grpo, atol=1e-6)
    np.testing.assert_allclose(pass_at_k_unbiased(1)(batch), leave_one_out()(batch), atol=1e-6)


def test_pass_at_k_without_enough_rows_or_with_ties_is_zero():
    few = make_batch(group_id=[0, 0, 1, 1], rewards=[1, 0, 1, 0], lengths=[1] * 4, is_valid=[1, 1, 1, 0])
    equal = make_batch(group_id=[0] * 5, rewards=[0.1] * 5, lengths=[1] * 5)
    for advantages in (pass_at_k_normalized(2), pass_at_k_unbiased(2), pass_at_k_unbiased(2, baseline=1)):
        np.testing.assert_array_equal(np.asarray(advantages(few))[2:], 0)
        np.testing.assert_array_equal(advantages(equal), 0)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        pass_at_k_normalized(0)
    with pytest.raises(ValueError, match="baseline=0 must be"):
        pass_at_k_unbiased(1, baseline=0)
