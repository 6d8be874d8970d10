"""The worked examples of the method sheet for losses: values and gradients, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import ADVANTAGES, BEHAVIOR, LOGPROBS, MASK, NAN, OLD, REF, fixture_rows, float64, term, value_and_grad

from rljax import losses as L

TOL = {"rtol": 0, "atol": 2e-10}  # the sheet prints ten digits


@pytest.fixture(autouse=True)
def _double_precision():
    with float64():
        yield


def composed(surrogate=None, aggregate=L.token_mean, ratio=L.token_ratio, **parts):
    surrogate = surrogate or L.clipped(clip_low=0.2, clip_high=0.28, dual_clip=10.0)
    return L.policy_loss(ratio, surrogate, aggregate, **parts)


def check(loss, value, gradient, **rows):
    got, metrics, got_gradient = value_and_grad(loss, fixture_rows(loss.token_weights, **rows))
    np.testing.assert_allclose(got, value, rtol=0, atol=2e-12)
    np.testing.assert_allclose(got_gradient, gradient, **TOL)
    return metrics


DAPO_GRADIENT = [[-0.1578815597, -0.1058311744, 0, -0.1428571429], [0.0872430542, 0, 0.3201206479, 0]]


@pytest.mark.parametrize(
    ("surrogate", "aggregate", "value", "gradient"),
    [
        (L.clipped(), L.token_mean, -0.113491889215, DAPO_GRADIENT),
        (L.clipped(clip_high=0.28), L.token_mean, -0.124920460644, DAPO_GRADIENT),
        (L.clipped(clip_high=0.28, dual_clip=10.0), L.token_mean, -0.124920460644, DAPO_GRADIENT),
        (
            L.clipped(clip_high=0.28, dual_clip=3.0),
            L.token_mean,
            -0.230755394240,
            [DAPO_GRADIENT[0], [0.0872430542, 0, 0, 0]],
        ),
        (
            L.clipped(dual_clip=3.0),
            L.sequence_mean,
            -0.087298412498,
            [[-0.1381463648, -0.0926022776, 0, -0.125], [0.1017835632, 0, 0, 0]],
        ),
        (
            L.clipped(),
            L.fixed_length(4),
            -0.0993054030635,
            [[-0.1381463648, -0.0926022776, 0, -0.125], [0.0763376724, 0, 0.2801055669, 0]],
        ),
    ],
)
def test_clipped_surrogates(surrogate, aggregate, value, gradient):
    check(composed(surrogate, aggregate), value, gradient)


def test_clip_fraction_counts_the_tokens_without_gradient():
    metrics = check(composed(), -0.124920460644, DAPO_GRADIENT)
    assert metrics["loss/clip_fraction"] == pytest.approx(2 / 7)  # [0, 2] upper and [1, 1] lower
    assert metrics["loss/ratio_max"] == pytest.approx(4.4816890703)
    ratios = np.exp(LOGPROBS - OLD)[MASK]
    assert metrics["loss/ratio_mean"] == pytest.approx(ratios.mean())
    assert metrics["loss/approx_kl"] == pytest.approx(np.mean(ratios - 1 - np.log(ratios)))
    assert metrics["loss/policy"] == pytest.approx(-0.124920460644)


GSPO_ROW = [0.1243187248, 0.1243187248, 0.1243187248, 0]


@pytest.mark.parametrize("ratio", [L.sequence_ratio, L.sequence_token_ratio])
@pytest.mark.parametrize(
    ("low", "high", "value", "gradient"),
    [
        (0.1, 0.1, -0.152679373778, [[-0.1314088870] * 4, GSPO_ROW]),
        (3e-4, 4e-4, -0.127243825590, [[0] * 4, GSPO_ROW]),
    ],
)
def test_gspo_in_both_forms(ratio, low, high, value, gradient):
    check(composed(L.clipped(clip_low=low, clip_high=high), L.sequence_mean, ratio), value, gradient)


def test_sequence_ratios():
    ratio = L.sequence_ratio(jnp.asarray(LOGPROBS), fixture_rows(L.token_mean))
    np.testing.assert_allclose(ratio[:, 0], [1.0512710964, 1.4918246976], **TOL)


def test_gspo_token_takes_advantages_that_vary_within_a_row():
    advantages = [[1, 1, 1, -0.5], [-0.5, -0.5, 0.5, NAN]]
    loss = composed(L.clipped(clip_low=0.1, clip_high=0.1), L.sequence_mean, L.sequence_token_ratio)
    gradient = [[-0.131408887, -0.131408887, -0.131408887, 0.0657044435], [0.1243187248, 0.1243187248, 0, 0]]
    check(loss, -0.171551434677, gradient, advantages=advantages)


@pytest.mark.parametrize(
    ("low", "value", "gradient"),
    [
        (
            0.0,
            0.429150411732,
            [
                [-0.1578815597, -0.1058311744, -0.1828571429, -0.1428571429],
                [0.0872430542, 0.0433236186, 0.0914285714, 0],
            ],
        ),
        (
            0.8,
            0.406048188620,
            [
                [-0.1578815597, -0.1142857143, -0.1828571429, -0.1428571429],
                [0.0872430542, 0.0571428571, 0.0914285714, 0],
            ],
        ),
    ],
)
def test_cispo(low, value, gradient):
    check(composed(L.cispo(max_ratio=1.28, min_ratio=low)), value, gradient)


def test_gmpo():
    loss = composed(L.unclipped(), L.sequence_mean, L.geometric_ratio(log_clip=0.35))
    gradient = [[-0.1297764996, -0.1297764996, 0, -0.1297764996], [0.1306926821, 0, 0.1306926821, 0]]
    check(loss, -0.127027952168, gradient)
    ratio = L.geometric_ratio(log_clip=0.35)(jnp.asarray(LOGPROBS), fixture_rows(L.token_mean))
    np.testing.assert_allclose(ratio[:, 0], [1.0382119971, 1.5683121855], **TOL)


def test_sapo():
    gradient = [[-0.1377650613, -0.0910643805, -0.1756407467, -0.125], [0.1004206670, 0.0484473167, 0.0366840833, 0]]
    loss = composed(L.soft_gate(), L.sequence_mean)
    check(loss, -0.428224109496, gradient)
    ratio = np.exp(LOGPROBS - OLD)
    _, _, got = value_and_grad(loss, fixture_rows(loss.token_weights))
    plain = -ADVANTAGES * ratio * np.asarray(loss.token_weights(MASK))
    multipliers = [[0.9972398592, 0.9833924487, 0.9418841074, 1], [0.9866098594, 0.9585134595, 0.0982239045]]
    np.testing.assert_allclose(got[MASK] / plain[MASK], np.concatenate(multipliers), **TOL)


def test_mismatch_weights_and_row_statistics():
    rows = fixture_rows(L.token_mean)
    rho = np.asarray(L.behavior_weights(rows))
    want = [[1.0512710964, 1, 0.8187307531, 1], [1, 1.0512710964, 1.8221188004, 1]]
    np.testing.assert_allclose(rho, want, **TOL)
    np.testing.assert_allclose(L.sequence_behavior_weights(rows)[:, 0], [0.8607079764, 1.9155408290], **TOL)
    normalised = L.batch_normalized(jnp.minimum(rho, 1.5), MASK)
    want = [[0.9915950711, 0.9432344089, 0.7722550179, 0.9432344089], [0.9432344089, 0.9915950711, 1.4148516133, 0]]
    np.testing.assert_allclose(normalised, want, **TOL)


@pytest.mark.parametrize(
    ("weight", "value", "gradient"),
    [
        (
            L.truncated_is(1.5),
            0.0631212561477,
            [[-0.1659763204, -0.1058311744, 0, -0.1428571429], [0.0872430542, 0, 0.4801809718, 0]],
        ),
        (
            L.masked_is(0.5, 1.5),
            -0.417059715674,
            [[-0.1659763204, -0.1058311744, 0, -0.1428571429], [0.0872430542, 0, 0, 0]],
        ),
        (
            L.sequence_truncated_is(1.5),
            0.189435301286,
            [[-0.1358899178, -0.0910897359, 0, -0.1229582823], [0.1308645812, 0, 0.4801809718, 0]],
        ),
        (
            L.sequence_masked_is(1.5),
            -0.507324537482,
            [[-0.1358899178, -0.0910897359, 0, -0.1229582823], [0, 0, 0, 0]],
        ),
    ],
)
def test_truncated_and_masked_importance_sampling(weight, value, gradient):
    check(composed(weight_fns=(weight,)), value, gradient)


def test_bypass_puts_correction_and_anchor_into_one_ratio():
    gradient = [[-0.1659763204, -0.1058311744, -0.1744861083, -0.1428571429], [0.0872430542, 0, 0.5832978509, 0]]
    check(composed(ratio=L.behavior_ratio), 0.138533016256, gradient)


def test_decoupled_ppo():
    surrogate = L.clipped(clip_low=0.2, clip_high=0.28)
    gradient = [[-0.1659763204, -0.1058311744, 0, -0.1428571429], [0.0872430542, 0, 0.5832978509, 0]]
    check(composed(surrogate, weight_fns=(L.truncated_is(5.0),)), 0.166238135224, gradient)
    masked = composed(surrogate, weight_fns=(L.masked_is(0.0, 1.5),))
    value, _, _ = value_and_grad(masked, fixture_rows(masked.token_weights))
    assert value == pytest.approx(-0.417059715674, abs=2e-12)


def test_log_linear_stand_in_for_the_old_policy():
    want = [[-1.175, -0.55, -2.0, -0.1], [-0.6, -1.875, -1.55, -5.0]]
    got = L.interpolated_logprobs(LOGPROBS, BEHAVIOR, behavior_version=3, old_version=4, version=5)
    np.testing.assert_allclose(got, want, atol=1e-12)
    fresh = L.interpolated_logprobs(LOGPROBS, BEHAVIOR, behavior_version=5, old_version=5, version=5)
    np.testing.assert_allclose(fresh, BEHAVIOR, atol=0)


@pytest.mark.parametrize(
    ("keep", "rows_kept"),
    [
        (L.geometric_band(0.9, 1.1), [True, False]),  # geometric means 0.9632, 1.2419
        (L.geometric_band(0.9, 1.3), [True, True]),
        (L.max_behavior_k3(0.01), [True, False]),  # mean k3 0.0050, 0.0745
        (L.max_behavior_k3(0.0050004), [False, False]),
        (L.max_behavior_k3(0.0744633), [True, True]),
        (L.off_policy_sequence(0.5), [True, True]),  # mean(lp_old - lp) -0.05, -0.4
        (L.off_policy_sequence(-0.3), [True, True]),
        (L.off_policy_sequence(-0.41), [True, False]),  # row 0 is kept for its positive advantage
    ],
)
def test_row_filters(keep, rows_kept):
    kept = np.asarray(term(keep, jnp.asarray(LOGPROBS), fixture_rows(L.token_mean)))
    np.testing.assert_array_equal(kept[:, :3], np.repeat(np.array(rows_kept)[:, None], 3, axis=1))


def test_the_denominator_keeps_the_tokens_that_a_filter_drops():
    loss = composed(filter_fns=(L.max_ratio(1.4),))  # drops [0, 2] and [1, 2], ratios 1.49 and 4.48
    value, metrics, gradient = value_and_grad(loss, fixture_rows(loss.token_weights))
    np.testing.assert_allclose(gradient, [DAPO_GRADIENT[0], [0.0872430542, 0, 0, 0]], **TOL)
    assert value == pytest.approx((-1.1051709181 - 0.7408182207 - 1 + 0.5 * 1.2214027582 + 0.5 * 0.8) / 7)
    assert metrics["loss/kept_fraction"] == pytest.approx(5 / 7)


def test_kl_estimators():
    l = np.where(MASK, LOGPROBS - REF, 0)
    k3 = np.asarray(L.k3(l))
    want = [[0.0187307531, 0.0690675486, 0.0048374180, 0.0048374180], [0.0048374180, 0.0214027582, 0.3065696597, 0]]
    np.testing.assert_allclose(k3, want, **TOL)
    k2 = [[0.02, 0.06125, 0.005, 0.005], [0.005, 0.02, 0.405, 0]]
    np.testing.assert_allclose(L.k2(l), k2, **TOL)
    slope = jax.grad(lambda l: L.k3(l).sum())(jnp.asarray(l))
    want = [[0.1812692469, -0.4190675486, 0.0951625820, 0.0951625820], [0.0951625820, -0.2214027582, 0.5934303403, 0]]
    np.testing.assert_allclose(slope, want, **TOL)
    means = [float(f(l)[MASK].mean()) for f in (L.k1, L.k2, L.k3)]
    np.testing.assert_allclose(means, [0.1214285714, 0.0744642857, 0.0614689962], **TOL)
    np.testing.assert_allclose(L.k3_plus(l), k3, atol=1e-15)
    np.testing.assert_allclose(jax.grad(lambda l: L.k3_plus(l).sum())(jnp.asarray(l)), l, atol=1e-15)


def test_kl_in_the_loss():
    gradient = [
        [-0.1552919991, -0.1118178536, 0.0013594655, -0.1414976774],
        [0.0886025196, -0.0031628965, 0.3285982242, 0],
    ]
    metrics = check(composed(penalties=(L.kl_penalty(0.1),)), -0.118773561020, gradient)
    assert metrics["loss/kl_ref"] == pytest.approx(0.0614689962)
    assert metrics["loss/policy"] == pytest.approx(-0.124920460644)


REVERSE = (0.0851228260, [0.1759445875, -0.0981175868, -0.0778270007])
FORWARD_GRADIENT = [0.2, -0.1, -0.1]


@pytest.mark.parametrize(
    ("penalty", "value", "gradient"),
    [
        (L.kl_penalty(1.0, L.k1), REVERSE[0], [0, 0, 0]),
        (L.kl_penalty(1.0, L.k2), 0.0800875942, REVERSE[1]),
        (L.kl_penalty(1.0, L.k3), REVERSE[0], FORWARD_GRADIENT),
        (L.kl_penalty(1.0, L.k3_plus), REVERSE[0], REVERSE[1]),
        (L.importance_corrected_kl(1.0, L.k3), REVERSE[0], REVERSE[1]),
    ],
)
def test_expected_value_and_gradient_of_kl_penalties_over_three_tokens(penalty, value, gradient):
    policy, ref = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
    rows = fixture_rows(L.token_sum)
    rows = type(rows)(
        loss_mask=np.ones((1, 3), bool),
        loss_weights=policy[None],  # token t of the row is outcome t: the weighted sum is the expectation
        token_count=np.array(3.0),
        advantages=np.zeros((1, 3)),
        behavior_logprobs=np.log(policy)[None],
        old_logprobs=np.log(policy)[None],
        source=np.zeros(1, np.int32),
        ref_logprobs=np.log(ref)[None],
    )
    loss = composed(penalties=(penalty,))

    def expected(logits):
        return loss.loss(jax.nn.log_softmax(logits)[None], jnp.zeros((1, 3)), rows)[0]

    got, slope = jax.value_and_grad(expected)(jnp.log(policy))
    np.testing.assert_allclose(got, value, **TOL)
    np.testing.assert_allclose(slope, gradient, **TOL)


def test_reverse_and_forward_kl_reference_numbers():
    policy, ref = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(np.sum(policy * np.log(policy / ref)), REVERSE[0], **TOL)
    slope = policy * (np.log(policy / ref) - REVERSE[0])
    np.testing.assert_allclose(slope, REVERSE[1], atol=1e-9)
    np.testing.assert_allclose(policy - ref, FORWARD_GRADIENT, atol=1e-12)


@pytest.mark.parametrize("extra_rows", [0, 1])
@pytest.mark.parametrize(
    ("aggregate", "want"),
    [(L.token_mean, 10), (L.sequence_mean, 11.25), (L.sequence_sum, 35), (L.fixed_length(4), 8.75), (L.token_sum, 70)],
)
def test_aggregations_with_and_without_a_masked_row_of_nan(aggregate, want, extra_rows):
    values = np.array([[1, 2, 3, 4], [10, 20, 30, 99], [NAN] * 4])[: 2 + extra_rows]
    mask = np.concatenate([MASK, np.zeros((1, 4), bool)])[: 2 + extra_rows]
    weights = np.asarray(aggregate(mask))
    assert (weights[~mask] == 0).all()
    assert np.sum(weights[mask] * values[mask]) == pytest.approx(want)


def test_clipped_value_loss():
    values = jnp.array([[0.5, 0.1, 0.3, 0.9], [0.2, 0.4, 0.35, NAN]])
    old = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.4, 0.3, NAN]]
    returns = [[0.899675, 0.9365, 0.97, 1], [0.4855, 0.49, 0.5, NAN]]
    token_loss = L.clipped_value_loss(values, jnp.array(old), jnp.array(returns), MASK, clip=0.2)
    want = [[0.1798050528, 0.3498661250, 0.22445, 0.08], [0.0407551250, 0.00405, 0.01125, 0]]
    np.testing.assert_allclose(token_loss, want, **TOL)
    assert float(token_loss.sum() / 7) == pytest.approx(0.127168043259, abs=1e-12)
    slope = jax.grad(lambda v: L.clipped_value_loss(v, jnp.array(old), jnp.array(returns), MASK, clip=0.2).sum())(
        values
    )
    assert np.isfinite(slope).all()
