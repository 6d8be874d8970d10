"""Credit and losses of distillation against the worked examples of the method sheet."""

import jax.numpy as jnp
import numpy as np
import pytest
from objectives import float64, make_batch, make_rows, value_and_grad

from rljax.advantages import beside_teacher, from_teacher, group_normalized, teacher_credit
from rljax.algorithms import MOPD, CrossStageDistillation, OnPolicyDistillation
from rljax.losses import (
    behavior_ratio,
    by_row,
    column_weights,
    cross_entropy,
    double_sided,
    k2,
    k3,
    policy_loss,
    sequence_mean,
    teacher_penalty,
    teacher_report,
    token_mean,
    token_ratio,
    unclipped,
)
from rljax.types import TEACHER_LOGPROBS

MU = np.log([[0.5, 0.4, 0.2, 0.05, 0.3]])
PI = np.log([[0.5, 0.1, 0.25, 0.3, 0.33]])
NU = np.log([[0.7, 0.2, 0.1, 0.3, 0.03]])
A = [0.3364722366, 0.6931471806, -0.9162907319, 0, -2.3978952728]
ALL = np.ones((1, 5), bool)


@pytest.mark.parametrize(
    ("discount", "want"),
    [
        (0.0, A),
        (0.5, [0.3041046894, -0.0647350945, -1.5157645501, -1.1989476364, -2.3978952728]),
        (1.0, [-2.2845665875, -2.6210388241, -3.3141860047, -2.3978952728, -2.3978952728]),
    ],
)
def test_credit_is_the_log_ratio_to_the_teacher_to_go(discount, want):
    with float64():
        got = teacher_credit(NU, PI, ALL, discount=discount)
    np.testing.assert_allclose(got[0], want, atol=1e-9)


def test_credit_steps_over_masked_tokens_and_is_clipped_before_it_is_added_up():
    mask = np.array([[1, 1, 0, 1, 1]], bool)
    with float64():
        teacher = np.where(mask, NU, np.nan)
        got = teacher_credit(teacher, PI, mask, clip=0.5, discount=0.5)
    # 0.3365 + 0.5 (0.5 + 0.5 (0 + 0.5 (-0.5))), and so on from the right.
    np.testing.assert_allclose(got[0], [0.5239722366, 0.375, 0, -0.25, -0.5], atol=1e-9)


@pytest.mark.parametrize(
    ("alpha", "verified", "want"),
    [
        (0.0, 0.8, [-0.0672944473, 0, 0.2290726830, 0, 0.5275369600]),
        (0.5, 0.8, [-0.1472944473, 0, 0.1290726830, 0, 0.4395369600]),
    ],
)
def test_mopd_is_its_worked_example(alpha, verified, want):
    with float64():
        advantages = teacher_credit(NU, PI, ALL) + alpha * verified
        rows = make_rows(ALL, aggregate=sequence_mean, old=PI, behavior=MU, advantages=advantages)
        loss = policy_loss(behavior_ratio, double_sided(clip_low=0.5, clip_high=1.0), sequence_mean)
        value, _, slope = value_and_grad(loss, rows, PI)
    np.testing.assert_allclose(slope[0], want, atol=1e-9)
    if alpha == 0:
        assert value == pytest.approx(-0.8557777229, abs=1e-9)


P = np.array([0.6, 0.25, 0.1, 0.05])
Q = np.array([0.4, 0.1, 0.3, 0.2])


def expected_slope(loss, **fields):
    """Of the student's logits, over its own samples: one token each, weighed by its probability."""
    mask = np.ones((4, 1), bool)
    rows = make_rows(mask, aggregate=lambda m: Q[:, None], old=np.log(Q)[:, None], **fields)
    rows = rows.replace(columns={TEACHER_LOGPROBS: jnp.log(P)[:, None]})
    _, _, slope = value_and_grad(loss, rows, np.log(Q)[:, None])
    return slope[:, 0] - Q * slope.sum()


REVERSE = [-0.3033970202, -0.1269318174, 0.2236754539, 0.2066533837]


def test_the_gradient_of_each_estimator_is_that_of_its_divergence():
    with float64():
        credit = np.log(P / Q)
        advantage = expected_slope(policy_loss(token_ratio, unclipped(), token_mean), advantages=credit[:, None])
        nothing = np.zeros((4, 1))
        plain = (token_ratio, unclipped(), token_mean)
        squared = expected_slope(policy_loss(*plain, penalties=[teacher_penalty(1.0, k2)]), advantages=nothing)
        forward = expected_slope(policy_loss(*plain, penalties=[teacher_penalty(1.0, k3)]), advantages=nothing)
    np.testing.assert_allclose(advantage, REVERSE, atol=1e-9)
    np.testing.assert_allclose(squared, REVERSE, atol=1e-9)
    np.testing.assert_allclose(forward, Q - P, atol=1e-9)


def taught_batch(teacher=None):
    batch = make_batch(group_id=[0] * 4 + [1] * 4, rewards=[1, 0, 0.5, 0, 0.2, 0.9, 0.9, 0], lengths=[3] * 8)
    teacher = batch.ref_logprobs if teacher is None else teacher(batch)
    return batch.replace(columns={TEACHER_LOGPROBS: np.asarray(teacher, np.float32)})


@pytest.mark.parametrize("recipe", [OnPolicyDistillation(), CrossStageDistillation(), MOPD(alpha=0.0)])
def test_a_teacher_that_is_the_student_gives_loss_and_gradient_exactly_0(recipe):
    algorithm = recipe.build()
    batch = taught_batch(lambda batch: batch.behavior_logprobs)
    mask = batch.action_mask
    advantages = algorithm.advantage_fn(batch)
    rows = make_rows(mask, aggregate=algorithm.loss.token_weights, old=batch.behavior_logprobs, advantages=advantages)
    rows = rows.replace(columns=batch.columns)
    value, metrics, slope = value_and_grad(algorithm.loss, rows, batch.behavior_logprobs)
    assert value == 0 and not slope.any()
    assert metrics["loss/teacher_kl"] == metrics["loss/teacher_reversal"] == metrics["loss/teacher_clipped"] == 0


def test_both_parts_of_the_credit_have_one_size_where_their_scale_is_matched():
    batch = taught_batch()
    mask = batch.action_mask
    taught = np.asarray(from_teacher()(batch))
    both = np.asarray(beside_teacher(group_normalized(), match_scale=True)(batch))
    verified = both - taught
    size = [np.sqrt(np.mean(np.square(x[mask]))) for x in (taught, verified)]
    assert size[0] == pytest.approx(size[1], rel=1e-5)
    plain = np.asarray(beside_teacher(group_normalized(), alpha=0.5)(batch)) - taught
    np.testing.assert_allclose(plain, 0.5 * np.asarray(group_normalized()(batch)), atol=1e-6)


def test_reversals_are_tokens_that_the_teacher_turns_round():
    with float64():
        verified = np.array([[-1.0, 1.0, 1.0, 0.0, -0.1]])
        taught = np.array([[1.2, -0.5, -1.5, 2.0, -3.0]])
        rows = make_rows(ALL, aggregate=token_mean, old=MU, behavior=MU, advantages=verified + taught)
        rows = rows.replace(columns={TEACHER_LOGPROBS: jnp.asarray(MU + taught)})
        report = teacher_report(clip=2.5)(jnp.asarray(MU), jnp.zeros((1, 5)), rows)
        # The last is clipped in the report but not in these advantages, and falls either way.
        np.testing.assert_array_equal(report["loss/teacher_reversal"], [[1, 0, 1, 0, 0]])
        np.testing.assert_array_equal(report["loss/teacher_clipped"], [[0, 0, 0, 0, 1]])
        np.testing.assert_allclose(report["loss/teacher_kl"], -taught, atol=1e-12)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (OnPolicyDistillation(clip=0.0), "OnPolicyDistillation: clip=0.0 must be above 0"),
        (OnPolicyDistillation(discount=1.5), "discount=1.5 must be at most 1"),
        (MOPD(low=1.0), "MOPD: low=1.0 and high=2.0 must enclose 1"),
        (MOPD(alpha=-1.0), "alpha=-1.0 must be at least 0"),
        (CrossStageDistillation(mismatch=0.5), "mismatch=0.5 must be at least 1"),
    ],
)
def test_impossible_hyperparameters_are_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        recipe.build()


def test_what_no_teacher_has_scored_is_refused():
    batch = taught_batch().replace(columns={})
    with pytest.raises(ValueError, match=r"teacher_logprobs.*config.teachers"):
        from_teacher()(batch)
    rows = make_rows(ALL, aggregate=token_mean, old=MU, advantages=np.zeros((1, 5)))
    with pytest.raises(ValueError, match=r"teacher_logprobs.*config.teachers"):
        value_and_grad(OnPolicyDistillation().build().loss, rows, MU)


def test_rows_mix_named_losses_by_their_columns():
    """The first row is supervised, the second is taught and rewarded by half."""
    rl, ce, kl = np.array([0.0, 0.5]), np.array([1.0, 0.0]), np.array([0.0, 2.0])
    mask = np.array([[1, 1, 0], [1, 1, 1]], bool)
    with float64():
        logprobs, teacher = -np.arange(1.0, 7).reshape(2, 3), -np.arange(2.0, 8).reshape(2, 3)
        advantages = np.full((2, 3), 3.0)
        rows = make_rows(mask, aggregate=token_mean, old=logprobs, advantages=advantages)
        columns = {"rl": rl, "ce": ce, "kl": kl, TEACHER_LOGPROBS: teacher}
        rows = rows.replace(columns={name: jnp.asarray(x) for name, x in columns.items()})
        loss = policy_loss(
            token_ratio,
            unclipped(),
            token_mean,
            weight_fns=[column_weights("rl")],
            penalties=[by_row(cross_entropy(), "ce"), by_row(teacher_penalty(1.0, k2), "kl")],
        )
        value, metrics, slope = value_and_grad(loss, rows, logprobs)
        terms = -3.0 * rl[:, None] - logprobs * ce[:, None] + kl[:, None] * (logprobs - teacher) ** 2 / 2
        slopes = -3.0 * rl[:, None] - ce[:, None] + kl[:, None] * (logprobs - teacher)
    assert value == pytest.approx((terms * mask).sum() / 5, abs=1e-12)
    np.testing.assert_allclose(slope, slopes * mask / 5, atol=1e-12)
    assert metrics["loss/cross_entropy"] == pytest.approx(-(logprobs * mask).sum() / 5)
    with pytest.raises(ValueError, match=r"needs the column 'kl'.*per='row'"):
        value_and_grad(loss, rows.replace(columns={n: x for n, x in rows.columns.items() if n != "kl"}), logprobs)
