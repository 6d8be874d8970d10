"""Which tokens carry gradient: the rescue near the clip boundary and the selection by entropy, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import ADVANTAGES, LOGPROBS, MASK, NAN, fixture_rows, float64, make_rows, term, value_and_grad

from rljax import losses as L
from rljax.ops import masked_quantile, row_uniforms

TOL = {"rtol": 0, "atol": 2e-10}
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
DAPO_LOSS, DAPO_GRADIENT = (
    -0.124920460644,
    [[-0.1578815597, -0.1058311744, 0, -0.1428571429], [0.0872430542, 0, 0.3201206479, 0]],
)


@pytest.fixture(autouse=True)
def _double_precision():
    with float64():
        yield


def dapo(ratio_fn=L.token_ratio, **parts):
    return L.policy_loss(ratio_fn, L.clipped(**CLIP, dual_clip=10.0), L.token_mean, **parts)


# Rescue --------------------------------------------------------------------------------------------------------------

RATIO = np.array([[1.35, 1.40, 1.70, 1.10], [0.75, 0.70, 1.35, 1.0]])
U = np.array([[0.90, 1.05, 0.81, 0.85], [1.10, 0.95, 0.90, 1.0]])


def rescue_rows(uniforms=(U - 0.8) / 0.4, **changes):
    given = {"old": np.zeros(MASK.shape), "advantages": ADVANTAGES} | changes
    return dataclasses.replace(make_rows(MASK, aggregate=L.token_mean, **given), uniforms=jnp.asarray(uniforms))


def rescued(noise=None, **parts):
    return L.rescue(L.token_ratio, **CLIP, noise=noise or L.two_sided(0.2), **parts)


@pytest.mark.parametrize(
    ("raw", "value", "gradient"),
    [
        (
            False,
            -0.483928571429,
            [[-0.1735714286, 0, 0, -0.1571428571], [0.0589285714, 0, 0.0964285714, 0]],
        ),
        (
            True,
            -0.508571428571,
            [[-0.1928571429, 0, 0, -0.1571428571], [0.0535714286, 0, 0.0964285714, 0]],
        ),
    ],
)
def test_near_boundary_rescue(raw, value, gradient):
    parts = rescued()
    loss = dapo(parts.ratio_fn, weight_fns=[parts.raw_execution] if raw else [], report_fns=[parts.report_fn])
    got, metrics, slope = value_and_grad(loss, rescue_rows(), np.log(RATIO))
    np.testing.assert_allclose(got, value, rtol=0, atol=2e-12)
    np.testing.assert_allclose(slope, gradient, **TOL)
    for index in np.ndindex(*MASK.shape):  # decisions are constant between the two evaluations
        ends = []
        for sign in (1, -1):
            moved = np.log(RATIO)
            moved[index] += sign * 1e-6
            ends.append(value_and_grad(loss, rescue_rows(), moved)[0])
        # raw execution holds 1 / u still as well, so the difference quotient is the gradient in both
        np.testing.assert_allclose(slope[index], (ends[0] - ends[1]) / 2e-6, rtol=0, atol=1e-8)
    shares = [metrics[f"loss/{n}"] for n in ("clip_active", "rescued", "clip_fraction")]
    np.testing.assert_allclose(shares, [5 / 7, 2 / 7, 3 / 7])


def test_without_rescue_it_is_dapo_bit_for_bit():
    plain = value_and_grad(dapo(), rescue_rows(), np.log(RATIO))
    np.testing.assert_allclose(plain[0], -0.495, rtol=0, atol=2e-12)
    np.testing.assert_allclose(plain[2], [[0, 0, 0, -0.1571428571], [0, 0, 0.0964285714, 0]], **TOL)
    for noise in (L.two_sided(0.0), L.inward(0.0)):
        got = value_and_grad(dapo(rescued(noise).ratio_fn), rescue_rows(), np.log(RATIO))
        assert got[0] == plain[0]
        np.testing.assert_array_equal(got[2], plain[2])


@pytest.mark.parametrize(
    ("ratio", "noise", "share", "moment"),
    [
        (1.30, L.two_sided(0.2), 0.4615384615, 0.4118343195),
        (1.40, L.two_sided(0.2), 0.2857142857, 0.2448979592),
        (1.50, L.two_sided(0.2), 0.1333333333, 0.1102222222),
        (1.60 + 1e-9, L.two_sided(0.2), 0, 0),
        (5.0, L.two_sided(0.2), 0, 0),
        (0.75, L.two_sided(0.2), 0.3333333333, 0.3777777778),
        (0.70, L.two_sided(0.2), 0.1428571429, 0.1673469388),
        (1.40, L.inward(0.2), 0.5714285714, 0.4897959184),
        (1.28 + 1e-9, L.inward(0.2), 1, 0.9),
        (0.80 - 1e-9, L.inward(0.2), 1, 1.1),
    ],
)
def test_expected_gradient_decays_with_the_inverse_square(ratio, noise, share, moment):
    """The closed forms of the sheet against the midpoint rule over the uniform number."""
    count = 200_000
    mask = np.ones((1, count), bool)
    rows = make_rows(
        mask, aggregate=L.token_sum, old=np.zeros((1, count)), advantages=np.sign(ratio - 1) * np.ones((1, count))
    )
    rows = dataclasses.replace(rows, uniforms=jnp.asarray((np.arange(count)[None] + 0.5) / count))
    parts = L.rescue(L.token_ratio, **CLIP, noise=noise)
    logprobs = jnp.full((1, count), np.log(ratio))
    hit = np.asarray(term(parts.report_fn, logprobs, rows)["loss/rescued"])
    executed = np.asarray(parts.ratio_fn(logprobs, rows))
    np.testing.assert_allclose([hit.mean(), (executed * hit).mean() / ratio], [share, moment], rtol=0, atol=1e-5)


def test_tokens_that_still_learn_are_left_alone():
    """Inside the interval, and outside on the side where the minimum of PPO keeps the gradient, whatever the noise."""
    ratio = np.array([[0.5, 1.0, 1.27, 0.79], [1.35, 20.0, 1.0, 1.0]])  # A > 0 above, A < 0 below
    for u in (0.0, 0.3, 0.999):
        rows = rescue_rows(uniforms=np.full(MASK.shape, u))
        np.testing.assert_array_equal(rescued().ratio_fn(jnp.log(ratio), rows), L.token_ratio(jnp.log(ratio), rows))


def test_first_minibatch_garbage_and_extremes():
    rng = np.random.default_rng(0)
    uniforms = rng.random(MASK.shape)
    parts = rescued()
    loss = dapo(parts.ratio_fn, weight_fns=[parts.raw_execution])
    zero = np.zeros(MASK.shape)
    first = value_and_grad(loss, rescue_rows(uniforms), zero)
    assert first[0] == value_and_grad(dapo(), rescue_rows(uniforms), zero)[0]
    for shift in (-500.0, 500.0):
        got = value_and_grad(loss, rescue_rows(uniforms), zero + shift)
        plain = value_and_grad(dapo(), rescue_rows(uniforms), zero + shift)
        assert np.isfinite(got[2]).all() and got[0] == plain[0]
    clean = value_and_grad(loss, rescue_rows(uniforms), np.log(RATIO))
    spoilt = value_and_grad(loss, rescue_rows(np.where(MASK, uniforms, NAN)), np.where(MASK, np.log(RATIO), NAN))
    assert spoilt[0] == clean[0]
    np.testing.assert_array_equal(spoilt[2], clean[2])
    with pytest.raises(ValueError, match=r"rows.uniforms, which is None.*RolloutPlan.needs_uniforms"):
        loss.loss(jnp.asarray(zero), jnp.asarray(zero), fixture_rows(L.token_mean))


def test_a_row_is_rescued_as_a_whole_under_a_sequence_ratio():
    mask = np.array([[0, 1, 1, 1], [0, 0, 1, 1]], bool)
    rows = make_rows(mask, aggregate=L.sequence_mean, old=np.zeros(mask.shape), advantages=np.ones(mask.shape))
    uniforms = jnp.asarray([[NAN, 0.0, 1.0, 1.0], [NAN, NAN, 0.9, 0.0]])  # the first loss token decides
    rows = dataclasses.replace(rows, uniforms=jnp.where(mask, uniforms, 0))
    parts = L.rescue(L.sequence_ratio, clip_low=3e-4, clip_high=4e-4, noise=L.two_sided(4e-4), uniform_fn=L.per_row)
    mean = np.array([6e-4, 6e-4])
    logprobs = np.where(mask, mean[:, None] + np.array([[0, 0.1, -0.1, 0], [0, 0, 0.2, -0.2]]), 0)
    ratio = np.asarray(parts.ratio_fn(jnp.asarray(logprobs), rows))
    np.testing.assert_allclose(ratio[0], np.exp(6e-4) * (1 - 4e-4), rtol=1e-12)
    np.testing.assert_allclose(ratio[1], np.exp(6e-4), rtol=1e-12)
    loss = L.policy_loss(parts.ratio_fn, L.clipped(clip_low=3e-4, clip_high=4e-4), L.sequence_mean)
    _, _, slope = value_and_grad(loss, rows, logprobs)
    want = -np.exp(6e-4) * (1 - 4e-4) / 2 / 3
    np.testing.assert_allclose(slope, np.where(mask, [[want] * 4, [0] * 4], 0), rtol=1e-9)


def test_uniforms_belong_to_a_row_and_a_position():
    key = jax.random.key(3)
    whole = np.asarray(row_uniforms(key, np.arange(6), width=9))
    assert ((whole >= 0) & (whole < 1)).all() and len(np.unique(whole)) == 54
    order = np.array([4, 1, 5])
    np.testing.assert_array_equal(row_uniforms(key, order, width=5), whole[order, :5])
    assert abs(np.asarray(row_uniforms(key, np.arange(100), width=100)).mean() - 0.5) < 0.01
    assert not np.any(whole == np.asarray(row_uniforms(jax.random.key(4), np.arange(6), width=9)))


# Entropy -------------------------------------------------------------------------------------------------------------

H = np.array([[0.05, 1.30, 0.70, 0.02], [2.10, 0.40, 0.01, 5.0]])


def on_selected(fraction, mask=MASK, entropies=H, **changes):
    """Rows whose advantages are 0 off the selection, as the learner makes them."""
    selected = L.high_entropy(fraction)(jnp.asarray(entropies), mask)
    return fixture_rows(L.token_mean, advantages=np.where(selected, ADVANTAGES, 0), **changes), np.asarray(selected)


@pytest.mark.parametrize(
    ("fraction", "threshold", "want", "value", "gradient"),
    [
        (
            0.2,
            1.18,
            [[0, 1, 0, 0], [1, 0, 0, 0]],
            -0.0185881202288,
            [[0, -0.1058311744, 0, 0], [0.0872430542, 0, 0, 0]],
        ),
        (
            0.5,
            0.40,
            [[0, 1, 1, 0], [1, 1, 0, 0]],
            -0.144302405943,
            [[0, -0.1058311744, 0, 0], [0.0872430542, 0, 0, 0]],
        ),
        (1.0, 0.01, MASK, DAPO_LOSS, DAPO_GRADIENT),
    ],
)
def test_high_entropy_tokens(fraction, threshold, want, value, gradient):
    np.testing.assert_allclose(masked_quantile(jnp.asarray(H), MASK, 1 - fraction), threshold, rtol=1e-12)
    rows, selected = on_selected(fraction)
    np.testing.assert_array_equal(selected, want)
    got, _, slope = value_and_grad(dapo(), rows)
    np.testing.assert_allclose(got, value, rtol=0, atol=2e-12)
    assert abs(got - -0.252529210400) > 0.1  # the count of selected tokens is the wrong denominator
    np.testing.assert_allclose(slope, gradient, **TOL)


def test_fraction_1_is_dapo_bit_for_bit():
    rows, _ = on_selected(1.0)
    assert value_and_grad(dapo(), rows)[0] == value_and_grad(dapo(), fixture_rows(L.token_mean))[0]


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.37, 0.9, 1.0])
def test_selection_is_pooled_over_all_rows_and_microbatches(fraction):
    rng = np.random.default_rng(2)
    entropies, mask = rng.exponential(size=(3, 4, 11)), rng.random((3, 4, 11)) < 0.6
    want = mask & (entropies >= np.quantile(entropies[mask], 1 - fraction))
    spoilt = np.where(mask, entropies, NAN)
    np.testing.assert_array_equal(L.high_entropy(fraction)(jnp.asarray(spoilt), mask), want)
    parts = np.stack([L.high_entropy(fraction)(jnp.asarray(e), m) for e, m in zip(spoilt, mask, strict=True)])
    assert fraction == 1 or (parts != want).any()  # the thresholds of parts are others
    jitted = jax.jit(L.high_entropy(fraction))(jnp.asarray(spoilt), mask)
    np.testing.assert_array_equal(jitted, want)


def test_equal_entropies_select_all_and_an_empty_mask_nothing():
    select = L.high_entropy(0.2)
    np.testing.assert_array_equal(select(jnp.full(MASK.shape, 0.3), MASK), MASK)
    assert not np.asarray(select(jnp.full(MASK.shape, NAN), np.zeros(MASK.shape, bool))).any()
    np.testing.assert_array_equal(select(jnp.asarray([[0.7]]), np.ones((1, 1), bool)), [[True]])


def test_quantile_in_float32_keeps_its_ties():
    """The threshold of a fraction that falls on a value must not exceed it by rounding."""
    for fraction in (0.1, 0.2, 0.25, 0.5):
        select = jax.jit(L.high_entropy(fraction))
        for count in range(2, 200):
            values = np.random.default_rng(count).random(200).astype(np.float32)
            got = int(np.asarray(select(values, np.arange(200) < count)).sum())
            exact = (count - 1) * fraction
            assert got in {int(np.floor(exact + 1e-6)) + 1, int(np.floor(exact - 1e-6)) + 1}


def test_selection_gives_entropies_no_gradient():
    def loss(entropies):
        selected = L.high_entropy(0.5)(entropies, MASK)
        return jnp.where(selected, entropies * 0 + LOGPROBS, 0).sum() * 0 + selected.sum() * 1.0

    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(H)), 0)
