"""Losses where it is easy to go wrong: overflow, empty masks, garbage, microbatches, precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import NAN, fixture_rows, float64, make_rows, value_and_grad

from rljax import losses as L

DAPO = dict(clip_low=0.2, clip_high=0.28)


def one_token(difference, advantage, **surrogate):
    loss = L.policy_loss(L.token_ratio, L.clipped(**surrogate), L.token_mean)
    rows = make_rows([[True]], aggregate=L.token_mean, old=np.array([[-1.0]]), advantages=[[advantage]])
    with float64():
        value, _, gradient = value_and_grad(loss, rows, logprobs=np.array([[-1.0 + difference]]))
    return value, gradient[0, 0]


@pytest.mark.parametrize(
    ("difference", "advantage", "dual_clip", "value"),
    [
        (200.0, 1.0, None, -1.28),
        (200.0, -1.0, None, 4.85165195e8),
        (200.0, -1.0, 3.0, 3.0),
        (-200.0, 1.0, None, -2.0611536e-9),
        (-200.0, -1.0, None, 0.8),
    ],
)
def test_extreme_ratios_are_clamped_and_carry_no_gradient(difference, advantage, dual_clip, value):
    got, gradient = one_token(difference, advantage, dual_clip=dual_clip, **DAPO)
    assert got == pytest.approx(value, rel=1e-6)
    assert gradient == 0


def test_first_minibatch_has_ratio_exactly_1():
    old = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    rows = make_rows(np.ones((3, 5), bool), aggregate=L.token_mean, old=old, advantages=np.ones((3, 5)))
    for ratio in (L.token_ratio, L.sequence_ratio, L.sequence_token_ratio, L.geometric_ratio(), L.behavior_ratio):
        np.testing.assert_array_equal(ratio(jnp.asarray(old), rows), 1)


def test_sequence_ratio_is_capped_at_exp_10_in_both_forms_without_gradient():
    rows = make_rows(
        np.ones((1, 3), bool), aggregate=L.token_mean, old=np.full((1, 3), -30.0), advantages=-np.ones((1, 3))
    )
    for ratio in (L.sequence_ratio, L.sequence_token_ratio):
        value, gradient = jax.value_and_grad(lambda x, ratio=ratio: ratio(x, rows).sum())(jnp.full((1, 3), -15.0))
        assert value == pytest.approx(3 * np.exp(10), rel=1e-6)
        np.testing.assert_array_equal(gradient, 0)


EVERY_PART = L.policy_loss(
    L.token_ratio,
    L.clipped(**DAPO, dual_clip=3.0),
    L.token_mean,
    weight_fns=(L.truncated_is(2.0), L.sequence_masked_is(50.0)),
    filter_fns=(L.off_policy_sequence(), L.geometric_band(0.1, 10.0), L.max_behavior_k3(5.0), L.max_ratio(100.0)),
    penalties=(L.kl_penalty(0.1), L.importance_corrected_kl(0.1), L.entropy_bonus(0.01)),
)


def random_rows(rng, rows=6, width=5, garbage=0.0):
    mask = rng.random((rows, width)) < 0.7
    mask[0] = False
    arrays = {n: -rng.exponential(size=mask.shape) for n in ("old", "behavior", "ref")}
    arrays["advantages"] = rng.normal(size=mask.shape)
    arrays = {n: np.where(mask, a, garbage).astype(np.float32) for n, a in arrays.items()}
    logprobs = np.where(mask, arrays["old"] + 0.3 * rng.normal(size=mask.shape), garbage).astype(np.float32)
    entropies = np.where(mask, rng.random(mask.shape), garbage).astype(np.float32)
    return make_rows(mask, aggregate=EVERY_PART.token_weights, **arrays), logprobs, entropies


def gradients(rows, logprobs, entropies):
    function = jax.value_and_grad(EVERY_PART.loss, argnums=(0, 1), has_aux=True)
    return function(jnp.asarray(logprobs), jnp.asarray(entropies), rows)


@pytest.mark.parametrize("garbage", [NAN, float("inf"), -float("inf"), 1e30])
def test_garbage_off_the_loss_mask_changes_nothing(garbage):
    (value, metrics), slopes = gradients(*random_rows(np.random.default_rng(0)))
    (other, other_metrics), other_slopes = gradients(*random_rows(np.random.default_rng(0), garbage=garbage))
    assert value == other
    assert metrics == other_metrics
    for a, b in zip(slopes, other_slopes, strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradient_flows_on_the_loss_mask_alone():
    rows, logprobs, entropies = random_rows(np.random.default_rng(1))
    _, (slope, entropy_slope) = gradients(rows, logprobs, entropies)
    off = ~np.asarray(rows.loss_mask)
    assert np.all(slope[off] == 0)
    assert np.all(entropy_slope[off] == 0)
    assert np.all(entropy_slope[~off] < 0)
    assert np.any(slope[~off] != 0)


def test_advantages_weights_and_old_logprobs_are_constants():
    rows, logprobs, entropies = random_rows(np.random.default_rng(2))

    def of_constants(advantages, behavior, old):
        changed = dataclasses.replace(rows, advantages=advantages, behavior_logprobs=behavior, old_logprobs=old)
        return EVERY_PART.loss(jnp.asarray(logprobs), jnp.asarray(entropies), changed)[0]

    slopes = jax.grad(of_constants, argnums=(0, 1, 2))(rows.advantages, rows.behavior_logprobs, rows.old_logprobs)
    for slope in slopes:
        np.testing.assert_array_equal(slope, 0)


def test_losses_gradients_and_metrics_of_microbatches_add_up():
    rows, logprobs, entropies = random_rows(np.random.default_rng(3))
    (value, metrics), (slope, _) = gradients(rows, logprobs, entropies)
    total, total_metrics, pieces = 0.0, dict.fromkeys(metrics, 0.0), []
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        micro = jax.tree.map(lambda x, part=part: x[part] if np.ndim(x) else x, rows)
        (piece, piece_metrics), (piece_slope, _) = gradients(micro, logprobs[part], entropies[part])
        total += piece
        pieces.append(piece_slope)
        for name, v in piece_metrics.items():
            combine = max if name.endswith("_max") else lambda a, b: a + b
            total_metrics[name] = combine(total_metrics[name], v)
    np.testing.assert_allclose(total, value, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(pieces), slope, rtol=1e-5, atol=1e-7)
    for name in metrics:
        np.testing.assert_allclose(total_metrics[name], metrics[name], rtol=1e-5, err_msg=name)


def test_an_empty_mask_gives_loss_0_gradient_0_and_finite_metrics():
    mask = np.zeros((2, 3), bool)
    garbage = np.full((2, 3), NAN, np.float32)
    rows = make_rows(
        mask, aggregate=EVERY_PART.token_weights, old=garbage, behavior=garbage, ref=garbage, advantages=garbage
    )
    (value, metrics), slopes = gradients(rows, garbage, garbage)
    assert value == 0
    assert all(v == 0 for v in metrics.values()), metrics
    for slope in slopes:
        np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("aggregate", [L.token_mean, L.sequence_mean, L.sequence_sum, L.fixed_length(7), L.token_sum])
def test_aggregation_weights_of_an_empty_mask_are_0(aggregate):
    np.testing.assert_array_equal(aggregate(np.zeros((2, 3), bool)), 0)


def test_bfloat16_logprobs_are_handled_in_float32():
    rows = fixture_rows(EVERY_PART.token_weights)
    logprobs = jnp.asarray(rows.old_logprobs).astype(jnp.bfloat16)
    value, metrics = EVERY_PART.loss(logprobs, jnp.zeros(logprobs.shape, jnp.bfloat16), rows)
    assert value.dtype == jnp.float32
    assert all(v.dtype == jnp.float32 for v in metrics.values())


def test_a_kl_penalty_without_a_reference_says_what_is_missing():
    loss = L.policy_loss(L.token_ratio, L.clipped(), L.token_mean, penalties=(L.kl_penalty(0.1),))
    rows = fixture_rows(loss.token_weights, ref=None)
    with pytest.raises(ValueError, match=r"needs rows\.ref_logprobs.*kl_coef=0"):
        loss.loss(jnp.zeros((2, 4)), jnp.zeros((2, 4)), rows)


def test_k3_is_bounded_for_tokens_the_reference_all_but_excludes():
    assert L.k3(jnp.array(-20.0)) == 10
    assert jax.grad(L.k3)(jnp.array(-20.0)) == 0


def test_zero_advantage_gives_no_gradient_in_any_surrogate():
    surrogates = [L.clipped(**DAPO, dual_clip=3.0), L.unclipped(), L.cispo(max_ratio=5.0), L.soft_gate()]
    for surrogate in surrogates:
        for ratio in (L.token_ratio, L.geometric_ratio()):
            loss = L.policy_loss(ratio, surrogate, L.token_mean)
            rows = fixture_rows(loss.token_weights, advantages=np.zeros((2, 4)))
            value, metrics, gradient = value_and_grad(loss, rows)
            assert value == 0
            assert not gradient.any()
            if surrogate is surrogates[0]:
                assert metrics["loss/clip_fraction"] == 0


@pytest.mark.parametrize(
    ("estimator", "slopes"),
    [
        # 1 - exp(-l) between the bounds of the value, whose gradient is l for k2 and k3_plus.
        (L.k1, [1, 1, 1, 1, 1, 1]),
        (L.k2, [-19, -2.62, -2.6, 10.9, 11.1, 19]),
        (L.k3, [0, 0, 1 - np.exp(2.6), 1 - np.exp(-10.9), 0, 0]),
        (L.k3_plus, [-19, -2.62, -2.6, 10.9, 11.1, 19]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_where_estimators_of_the_kl_lose_their_gradient(estimator, slopes):
    """k3 at its largest value, all of them where the log-ratio is clamped, at 20 nats."""
    ratios = np.array([-19, -2.62, -2.6, 10.9, 11.1, 19])
    with float64():
        for far, want in ((ratios, slopes), (np.array([-20.5, 20.5]), [0, 0])):
            rows = make_rows(
                np.ones((1, len(far)), bool),
                aggregate=L.token_mean,
                old=np.zeros((1, len(far))),
                ref=-far[None],
                advantages=np.zeros((1, len(far))),
            )
            loss = L.policy_loss(L.token_ratio, L.clipped(), L.token_mean, penalties=[L.kl_penalty(1.0, estimator)])
            _, _, slope = value_and_grad(loss, rows, np.zeros((1, len(far))))
            np.testing.assert_allclose(slope[0] * len(far), want, rtol=1e-9, atol=1e-12)
