"""Weights on the token loss: future KL, one-way, rare tokens, divergence. Worked examples of the method sheets, closed
forms and finite differences, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import ADVANTAGES, LOGPROBS, MASK, NAN, OLD, REF, fixture_rows, float64, make_rows, term, value_and_grad

from rljax import losses as L

TOL = {"rtol": 0, "atol": 2e-10}  # the sheets print ten digits
DAPO_LOSS, DAPO_GRADIENT = (
    -0.124920460644,
    [[-0.1578815597, -0.1058311744, 0, -0.1428571429], [0.0872430542, 0, 0.3201206479, 0]],
)


@pytest.fixture(autouse=True)
def _double_precision():
    with float64():
        yield


def composed(*weight_fns, dual_clip=10.0, **parts):
    surrogate = L.clipped(clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)
    return L.policy_loss(L.token_ratio, surrogate, L.token_mean, weight_fns=weight_fns, **parts)


def check(loss, rows, logprobs, value, gradient):
    got, metrics, slope = value_and_grad(loss, rows, logprobs)
    np.testing.assert_allclose(got, value, rtol=0, atol=2e-12)
    np.testing.assert_allclose(slope, gradient, **TOL)
    return metrics


def check_gradient(weight_fn, rows, logprobs, step=1e-6):
    """The gradient against central differences of the loss in which the weights stand still, and against the closed
    form: the weight times DAPO's."""
    logprobs = np.asarray(logprobs, np.float64)
    slope = value_and_grad(composed(weight_fn), rows, logprobs)[2]
    weights = term(weight_fn, jnp.asarray(logprobs), rows)
    frozen = composed(lambda *_: weights)
    for index in np.ndindex(*logprobs.shape):
        ends = []
        for sign in (1, -1):
            shifted = logprobs.copy()
            shifted[index] += sign * step
            ends.append(value_and_grad(frozen, rows, shifted)[0])
        np.testing.assert_allclose(slope[index], (ends[0] - ends[1]) / (2 * step), rtol=0, atol=1e-9)
    plain = value_and_grad(composed(), rows, logprobs)[2]
    np.testing.assert_allclose(slope, plain * np.asarray(weights), rtol=0, atol=1e-14)


# FIPO ----------------------------------------------------------------------------------------------------------------

FIPO_OLD = np.array([[-1.2, -0.4, -2.3, -0.10], [-0.7, -3.2, -1.5, -9.0]])
FIPO_NEW = np.array([[-1.1, -0.7, -1.9, -0.05], [-1.2, -0.7, -0.9, -1.0]])
FIPO_GRADIENT = [[-0.16701692, -0.10583117, 0, -0.15788156], [0, 0, 0.15618161, 0]]
UPPER = {"low": 1.0, "high": 1.2, "safety_ratio": 10.0}
BOTH = {"low": 0.8, "high": 1.2, "safety_ratio": 3.0}


def fipo_rows(**changes):
    given = {"old": FIPO_OLD, "advantages": ADVANTAGES} | changes
    return make_rows(MASK, aggregate=L.token_mean, **given)


@pytest.mark.parametrize(
    ("half_life", "want"),
    [
        (1.0, [[0.05625, -0.0875, 0.425, 0.05], [-0.35, 0.3, 0.6, 0]]),
        (32.0, [[0.2363238845, 0.1393089889, 0.4489286031, 0.05], [0.0745619684, 0.5871432373, 0.6, 0]]),
    ],
)
def test_future_log_ratio(half_life, want):
    got = L.future_log_ratio(jnp.asarray(FIPO_NEW), fipo_rows(), half_life=half_life)
    np.testing.assert_allclose(got, want, **TOL)


def test_future_log_ratio_without_participation_mask():
    got = L.future_log_ratio(jnp.asarray(FIPO_NEW), fipo_rows(), half_life=1.0, max_ratio=1e8)
    np.testing.assert_allclose(got[1], [0.9, 2.8, 0.6, 0], **TOL)


def test_future_log_ratio_is_the_dense_product_with_distances_in_positions():
    rng = np.random.default_rng(0)
    mask = rng.random((3, 17)) < 0.7  # tokens of a tool between those of the policy
    difference = rng.normal(size=mask.shape) * 2
    rows = make_rows(mask, aggregate=L.token_mean, old=np.zeros(mask.shape), advantages=np.ones(mask.shape))
    taken = np.where(mask & (np.exp(difference) <= 10), difference, 0)
    t = np.arange(17)
    decay = np.where(t[:, None] <= t, 2.0 ** (-(t - t[:, None]) / 5.0), 0)  # [t, k]
    got = L.future_log_ratio(jnp.asarray(np.where(mask, difference, NAN)), rows, half_life=5.0)
    np.testing.assert_allclose(got, np.einsum("tk,bk->bt", decay, taken), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("influence", "weights", "value", "gradient"),
    [
        (UPPER, [[1.0578621162, 1, 1.2, 1.0512710964], [1, 1.0, 1.2]], 0.277451956472, FIPO_GRADIENT),
        (
            BOTH,
            [[1.0578621162, 0.9162188717, 1.2, 1.0512710964], [0.8, 1.0, 1.2]],
            0.274890040248,
            [[-0.16701692, -0.09696452, 0, -0.15788156], FIPO_GRADIENT[1]],
        ),
        (
            BOTH | {"safety_ratio": None},
            [[1.0578621162, 0.9162188717, 1.2, 1.0512710964], [0.8, 1.2, 1.2]],
            0.417747183105,
            [[-0.16701692, -0.09696452, 0, -0.15788156], FIPO_GRADIENT[1]],
        ),
        ({"low": 1.0, "high": 1.0}, [[1, 1, 1, 1], [1, 1, 1]], 0.304828452152, None),
    ],
)
def test_fipo(influence, weights, value, gradient):
    weight_fn = L.future_kl_weights(half_life=1.0, **influence)
    loss, rows = composed(weight_fn), fipo_rows()
    np.testing.assert_allclose(term(weight_fn, jnp.asarray(FIPO_NEW), rows)[MASK], np.concatenate(weights), **TOL)
    got, _, slope = value_and_grad(loss, rows, FIPO_NEW)
    np.testing.assert_allclose(got, value, rtol=0, atol=2e-12)
    if gradient is not None:
        np.testing.assert_allclose(slope, gradient, rtol=0, atol=1e-8)
    check_gradient(weight_fn, rows, FIPO_NEW)


def test_fipo_of_width_0_is_dapo_bit_for_bit():
    plain = value_and_grad(composed(), fipo_rows(), FIPO_NEW)
    flat = value_and_grad(composed(L.future_kl_weights(low=1.0, high=1.0)), fipo_rows(), FIPO_NEW)
    assert flat[0] == plain[0]
    np.testing.assert_array_equal(flat[2], plain[2])


def test_fipo_is_dapo_before_the_policy_moves():
    rows = fipo_rows()
    same = jnp.asarray(FIPO_OLD)
    np.testing.assert_array_equal(L.future_log_ratio(same, rows), 0)
    np.testing.assert_array_equal(term(L.future_kl_weights(low=0.8, high=1.2), same, rows), 1)


def test_fipo_report():
    report = term(L.future_kl_report(half_life=1.0, **BOTH), jnp.asarray(FIPO_NEW), fipo_rows())
    flags = {name: np.argwhere(value & MASK).tolist() for name, value in report.items() if value.dtype == bool}
    assert flags["loss/influence_low"] == [[1, 0]] and flags["loss/influence_high"] == [[0, 2], [1, 1], [1, 2]]
    assert flags["loss/future_kl_excluded"] == flags["loss/influence_safety"] == [[1, 1]]
    loss = composed(L.future_kl_weights(half_life=1.0, **BOTH), report_fns=[L.future_kl_report(half_life=1.0, **BOTH)])
    metrics = value_and_grad(loss, fipo_rows(), FIPO_NEW)[1]
    assert metrics["loss/influence_high"] == pytest.approx(3 / 7)
    assert metrics["loss/advantage_mean"] == pytest.approx(2.5 / 7)
    assert metrics["loss/future_kl"] == pytest.approx((0.05625 - 0.0875 + 0.425 + 0.05 - 0.35 + 0.3 + 0.6) / 7)


@pytest.mark.parametrize(("limit", "dropped"), [(0, [True, True, True]), (1, [False, True, True]), (2, [False] * 3)])
def test_rows_with_too_many_dual_clipped_tokens_are_dropped(limit, dropped):
    """One, two and two capped tokens; a ratio as high with A > 0 or off the mask does not count."""
    difference = np.log([[11, 1, 11, 11], [11, 11, 1, 1], [11, 1, 1, 11]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    advantages = np.array([[-1, -1, 1, -1], [-1, -1, -1, -1], [-1, 1, 1, -1.0]])
    rows = make_rows(mask, aggregate=L.token_mean, old=np.zeros(mask.shape), advantages=advantages)
    keep = term(L.max_dual_clipped(limit), jnp.asarray(difference), rows)
    np.testing.assert_array_equal(~np.asarray(keep).all(axis=1), dropped)
    loss = composed(filter_fns=[L.max_dual_clipped(limit)])
    _, metrics, slope = value_and_grad(loss, rows, difference)
    assert not slope[np.array(dropped)].any()
    assert metrics["loss/kept_fraction"] == pytest.approx(mask[~np.array(dropped)].sum() / 11)


@pytest.mark.parametrize("direction", [-1, 1])
def test_future_kl_stays_finite_over_long_extreme_rows_in_float32(direction):
    """500 tokens of log-ratio +-20 take F to -+930; ratios just below the cutoff to +100."""
    mask = np.ones((2, 500), bool)
    difference = np.stack([np.full(500, direction * 20.0), np.full(500, direction * np.log(9.9))]).astype(np.float32)
    rows = make_rows(
        mask, aggregate=L.token_mean, old=np.zeros(mask.shape, np.float32), advantages=-np.ones(mask.shape)
    )
    for influence in (UPPER, BOTH):
        weights = np.asarray(term(L.future_kl_weights(**influence), jnp.asarray(difference), rows))
        assert np.isfinite(weights).all()
        assert weights.min() >= influence["low"] and weights.max() <= influence["high"]
        _, metrics, slope = value_and_grad(composed(L.future_kl_weights(**influence)), rows, difference)
        assert np.isfinite(slope).all() and all(np.isfinite(v) for v in metrics.values())


# OWPO ----------------------------------------------------------------------------------------------------------------

OWPO_D = np.array([[0.2, -0.35, 0.1, 0.1], [-0.1, 0.2, -0.9, 0]])


def test_owpo_deviation_and_weights():
    rows = fixture_rows(L.token_mean)
    d = L.current_deviation(jnp.asarray(LOGPROBS), rows)
    np.testing.assert_allclose(d, OWPO_D, rtol=0, atol=1e-15)
    want = [[0.8187307531, 1.2, 0.9048374180, 0.9048374180], [1.1051709181, 0.8187307531, 1.2, 1]]
    np.testing.assert_allclose(L.exponential_gate()(d), want, **TOL)
    old = L.old_deviation(jnp.asarray(LOGPROBS), rows)
    np.testing.assert_allclose(old, np.sign(ADVANTAGES) * np.where(MASK, OLD - REF, 0), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("gate", "value", "gradient"),
    [
        (
            {},
            -0.0236304926791,
            [[-0.1292624883, -0.1269974093, 0, -0.1292624883], [0.0964184863, 0, 0.3841447775, 0]],
        ),
        ({"lock": 0.0}, -0.0728871338433, None),
        ({"accelerate": 0.0}, -0.0756638194799, None),
    ],
)
def test_owpo(gate, value, gradient):
    weight_fn, rows = L.one_way_weights(L.exponential_gate(**gate)), fixture_rows(L.token_mean)
    got, _, slope = value_and_grad(composed(weight_fn), rows)
    np.testing.assert_allclose(got, value, rtol=0, atol=2e-12)
    if gradient is not None:
        np.testing.assert_allclose(slope, gradient, **TOL)
    check_gradient(weight_fn, rows, LOGPROBS)


@pytest.mark.parametrize("gate", [L.exponential_gate(), L.sigmoid_gate(), L.linear_gate()])
def test_owpo_right_after_a_refresh_is_dapo(gate):
    rows = fixture_rows(L.token_mean, ref=LOGPROBS)
    check(composed(L.one_way_weights(gate)), rows, LOGPROBS, DAPO_LOSS, DAPO_GRADIENT)
    assert value_and_grad(composed(L.one_way_weights(gate)), rows)[0] == value_and_grad(composed(), rows)[0]


@pytest.mark.parametrize("gate", [L.exponential_gate(), L.sigmoid_gate(), L.linear_gate()])
def test_gates_are_positive_decreasing_and_1_at_0(gate):
    d = jnp.arange(-200, 201)[None] / 10.0
    w = np.asarray(gate(d))
    assert (w > 0).all() and (np.diff(w) <= 0).all() and w[0, 200] == 1
    assert (w[0, :200] > 1).all() and (w[0, 201:] < 1).all()


def test_one_way_weights_never_reverse_where_a_symmetric_pull_does():
    rows = fixture_rows(L.token_mean)
    for kl_coef, want in [(4.0, [[1, 1]]), (2.0, []), (1.0, [])]:
        reversed_ = np.asarray(L.is_reversed(jnp.asarray(LOGPROBS), rows, kl_coef=kl_coef))
        assert np.argwhere(reversed_).tolist() == want
        pulled = np.sign(ADVANTAGES - kl_coef * (LOGPROBS - REF)) != np.sign(ADVANTAGES)
        np.testing.assert_array_equal(reversed_, pulled & MASK)
    w = np.asarray(term(L.one_way_weights(L.exponential_gate()), jnp.asarray(LOGPROBS), rows))
    np.testing.assert_array_equal(np.sign(w * ADVANTAGES), np.sign(ADVANTAGES))
    report = term(L.one_way_report(kl_coef=4.0), jnp.asarray(LOGPROBS), rows)
    assert [int(np.sum(report[f"loss/{n}"])) for n in ("inferior", "superior", "force_reversal")] == [3, 4, 1]


def test_owpo_takes_infinite_reference_log_probs_and_zero_advantages():
    ref = np.array([[-np.inf, -0.35, -2.0, -0.2], [-np.inf, -1.9, -1.4, NAN]])
    rows = fixture_rows(L.token_mean, ref=ref)
    w = np.asarray(term(L.one_way_weights(L.exponential_gate()), jnp.asarray(LOGPROBS), rows))
    assert w[0, 0] == 0.8 and w[1, 0] == 1.2  # far above the reference: superior where A > 0, inferior where A < 0
    value, _, slope = value_and_grad(composed(L.one_way_weights(L.exponential_gate())), rows)
    assert np.isfinite(value) and np.isfinite(slope).all()
    nothing = fixture_rows(L.token_mean, ref=ref, advantages=np.zeros(MASK.shape))
    np.testing.assert_array_equal(term(L.one_way_weights(L.exponential_gate()), LOGPROBS, nothing), 1)


def test_owpo_gives_the_reference_no_gradient_and_asks_for_one():
    loss, rows = composed(L.one_way_weights(L.exponential_gate())), fixture_rows(L.token_mean)

    def by_ref(ref):
        return loss.loss(jnp.asarray(LOGPROBS), jnp.zeros(MASK.shape), dataclasses.replace(rows, ref_logprobs=ref))[0]

    np.testing.assert_array_equal(jax.grad(by_ref)(jnp.asarray(REF)), 0)
    with pytest.raises(ValueError, match=r"ref_logprobs, which is None.*RolloutPlan.needs_ref"):
        loss.loss(jnp.asarray(LOGPROBS), jnp.zeros(MASK.shape), dataclasses.replace(rows, ref_logprobs=None))


# Rare tokens ---------------------------------------------------------------------------------------------------------


def test_rare_token_weights():
    weight_fn = L.rare_token_weights(0.2)
    loss, rows = composed(weight_fn), fixture_rows(L.token_mean)
    want = [1.1397611576, 1.0659359908, 1.1799482313, 1.0190325164, 1.1006829392, 1.1596206964, 1.1729329434]
    np.testing.assert_allclose(np.asarray(term(weight_fn, jnp.asarray(LOGPROBS), rows))[MASK], want, **TOL)
    gradient = [[-0.1799472693, -0.1128092577, 0, -0.1455760738], [0.0960269413, 0, 0.3754800537, 0]]
    metrics = check(loss, rows, LOGPROBS, -0.116323528242, gradient)
    assert metrics["loss/weight_mean"] == pytest.approx(np.mean(want))
    check_gradient(weight_fn, rows, LOGPROBS)


def test_rare_token_weights_stay_in_range_and_vanish_with_alpha():
    rows = fixture_rows(L.token_mean, old=np.array([[1e-4, -1e3, -np.inf, 0], [-1, -1, -1, NAN]]))
    w = np.asarray(term(L.rare_token_weights(0.2), jnp.asarray(LOGPROBS), rows))
    np.testing.assert_allclose(w[0], [1, 1.2, 1.2, 1], rtol=1e-15)
    check(composed(L.rare_token_weights(0.0)), fixture_rows(L.token_mean), LOGPROBS, DAPO_LOSS, DAPO_GRADIENT)


def test_a_token_moves_its_logits_by_twice_what_the_policy_lacks():
    """Why rare tokens carry the update: the 1-norm of the gradient of `lp` by the logits is `2 (1 - p)`."""
    for p, want in [(0.5, 1.0), (0.3, 1.4), (0.15, 1.7), (0.05, 1.9)]:
        logits = jnp.log(jnp.asarray([p, (1 - p) / 3, (1 - p) * 2 / 3]))
        slope = jax.grad(lambda z: jax.nn.log_softmax(z)[0])(logits)
        assert float(jnp.abs(slope).sum()) == pytest.approx(want)


# Divergence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "weights", "value", "gradient"),
    [
        (
            10.0,
            [1.0051697662, 1.0402607705, 1.0858739122, 1, 1.0213214296, 1.0974813345, 1.1999999990],
            -0.0742455363775,
            [[-0.1586977705, -0.1100920190, 0, -0.1428571429], [0.0891032008, 0, 0.3841447771, 0]],
        ),
        (
            -10.0,
            [0.9948302338, 0.9597392295, 0.9141260878, 1, 0.9786785704, 0.9025186655, 0.8000000010],
            -0.175595384911,
            [[-0.1570653490, -0.1015703298, 0, -0.1428571429], [0.0853829075, 0, 0.2560965186, 0]],
        ),
        (0.0, [1] * 7, DAPO_LOSS, DAPO_GRADIENT),
    ],
)
def test_divergence_weights(alpha, weights, value, gradient):
    weight_fn = L.divergence_weights(alpha)
    loss, rows = composed(weight_fn), fixture_rows(L.token_mean)
    np.testing.assert_allclose(np.asarray(term(weight_fn, jnp.asarray(LOGPROBS), rows))[MASK], weights, **TOL)
    check(loss, rows, LOGPROBS, value, gradient)
    check_gradient(weight_fn, rows, LOGPROBS)


@pytest.mark.parametrize("alpha", [-100.0, 100.0])
def test_divergence_weights_are_one_sided_finite_and_exactly_1_on_policy(alpha):
    spread = np.array([[-500.0, -1.0, -1e-4, 0], [500.0, 1.0, 1e-4, NAN]])
    rows = make_rows(MASK, aggregate=L.token_mean, old=np.zeros(MASK.shape, np.float32), advantages=ADVANTAGES)
    w = np.asarray(term(L.divergence_weights(alpha), jnp.asarray(spread, jnp.float32), rows))
    assert np.isfinite(w).all() and w[0, 3] == 1
    assert ((w >= 1) & (w <= 1.2) if alpha > 0 else (w <= 1) & (w >= 0.8)).all()
    np.testing.assert_array_equal(term(L.divergence_weights(alpha), jnp.asarray(OLD), fixture_rows(L.token_mean)), 1)


# All -----------------------------------------------------------------------------------------------------------------

ALL = {
    "future kl": L.future_kl_weights(**BOTH),
    "one way": L.one_way_weights(L.exponential_gate()),
    "rare": L.rare_token_weights(),
    "divergence": L.divergence_weights(),
}


@pytest.mark.parametrize("weight_fn", ALL.values(), ids=ALL)
def test_garbage_off_the_mask_reaches_nothing(weight_fn):
    loss = composed(weight_fn)
    clean = value_and_grad(loss, fixture_rows(L.token_mean))
    for garbage in (NAN, np.inf, -np.inf):
        spoilt = {
            name: np.where(MASK, values, garbage)
            for name, values in {"old": OLD, "advantages": ADVANTAGES, "behavior": OLD, "ref": REF}.items()
        }
        got = value_and_grad(loss, fixture_rows(L.token_mean, **spoilt), np.where(MASK, LOGPROBS, garbage))
        assert got[0] == clean[0]
        np.testing.assert_array_equal(got[2], clean[2])


@pytest.mark.parametrize("weight_fn", ALL.values(), ids=ALL)
def test_an_empty_mask_a_single_token_and_equal_rewards(weight_fn):
    nothing = make_rows(
        np.zeros((2, 3), bool),
        aggregate=L.token_mean,
        old=np.full((2, 3), NAN),
        advantages=np.ones((2, 3)),
        ref=np.full((2, 3), NAN),
    )
    value, metrics, slope = value_and_grad(composed(weight_fn), nothing, np.full((2, 3), NAN))
    assert value == 0 and not slope.any() and all(v == 0 for v in metrics.values())
    one = make_rows([[True]], aggregate=L.token_mean, old=[[-1.0]], advantages=[[2.0]], ref=[[-1.5]])
    value, _, slope = value_and_grad(composed(weight_fn), one, np.array([[-0.9]]))
    weight = float(term(weight_fn, [[-0.9]], one)[0, 0])
    assert value == pytest.approx(-2 * weight * np.exp(0.1)) and slope[0, 0] == pytest.approx(value)
    equal = fixture_rows(L.token_mean, advantages=np.zeros(MASK.shape))
    value, _, slope = value_and_grad(composed(weight_fn), equal)
    assert value == 0 and not slope.any()


def test_weights_filters_and_reports_see_entropies_and_send_no_gradient_into_them():
    """A weight that is the entropy, a filter that drops the lowest, a metric of it."""
    entropies = np.where(MASK, np.arange(1, 9).reshape(2, 4) / 8, NAN)
    loss = composed(
        lambda _, entropies, __: entropies,
        filter_fns=[lambda _, entropies, __: entropies > 0.2],
        report_fns=[lambda _, entropies, __: {"loss/seen": entropies}],
    )
    rows = fixture_rows(L.token_mean)
    function = jax.value_and_grad(loss.loss, argnums=(0, 1), has_aux=True)
    (_, metrics), (slope, entropy_slope) = function(jnp.asarray(LOGPROBS), jnp.asarray(entropies), rows)
    plain = value_and_grad(composed(), rows)[2]
    want = plain * np.where(MASK & (np.nan_to_num(entropies) > 0.2), np.nan_to_num(entropies), 0)
    np.testing.assert_allclose(slope, want, **TOL)
    assert want.any() and not np.asarray(entropy_slope).any()
    np.testing.assert_allclose(metrics["loss/seen"], entropies[MASK].mean(), **TOL)
    np.testing.assert_allclose(metrics["loss/kept_fraction"], 6 / 7, **TOL)
