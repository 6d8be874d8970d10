"""Masked reductions, segments and scans against float64 NumPy loops."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from objectives import float64

from rljax import ops

NAN, INF = float("nan"), float("inf")
few = settings(max_examples=15, deadline=None)
values = hnp.arrays(np.float64, (3, 4), elements=st.floats(-50, 50, width=32))
masks = hnp.arrays(bool, (3, 4))


@few
@given(values, masks)
def test_reductions_equal_numpy_on_the_unmasked_values(x, mask):
    dirty = np.where(mask, x, NAN)
    with float64():
        got = [f(dirty, mask) for f in (ops.masked_sum, ops.masked_mean, ops.masked_max, ops.masked_var)]
        unbiased = ops.masked_std(dirty, mask, ddof=1)
    kept = x[mask]
    want = [kept.sum(), kept.mean(), kept.max(), kept.var()] if kept.size else [0, 0, 0, 0]
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(unbiased, kept.std(ddof=1) if kept.size > 1 else 0, rtol=1e-9, atol=1e-9)


@few
@given(values, masks)
def test_reductions_along_an_axis_are_those_of_each_row(x, mask):
    dirty = np.where(mask, x, INF)
    for function in (ops.masked_sum, ops.masked_mean, ops.masked_max, ops.masked_var):
        by_row = [function(dirty[i], mask[i]) for i in range(3)]
        np.testing.assert_allclose(function(dirty, mask, axis=1), by_row, rtol=1e-5, atol=1e-4)
        assert function(dirty, mask, axis=1, keepdims=True).shape == (3, 1)


@pytest.mark.parametrize(
    "function", [ops.masked_sum, ops.masked_mean, ops.masked_max, ops.masked_var, ops.masked_std, ops.masked_whiten]
)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("mask", [[True, False, True], [False, False, False], [True, False, False]])
def test_garbage_in_masked_places_reaches_neither_value_nor_gradient(function, garbage, mask):
    x, mask = jnp.array([1.0, garbage, 3.0]), np.array(mask)
    x = jnp.where(mask, x, garbage)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(function(x, mask) ** 2))(x)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert (gradient[~mask] == 0).all()
    if not mask.any():
        assert value == 0


def test_half_precision_is_summed_in_float32():
    x = jnp.full((4096,), 1.0, jnp.bfloat16)
    total = ops.masked_sum(x, np.ones(4096, bool))
    assert total.dtype == jnp.float32
    assert total == 4096  # bfloat16 would stop at 256


def test_whitening_gives_mean_0_and_variance_1_over_the_mask():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(3, 5, (4, 6)), rng.random((4, 6)) < 0.6
    with float64():
        whitened = np.asarray(ops.masked_whiten(np.where(mask, x, NAN), mask))
    want = (x - x[mask].mean()) / np.sqrt(x[mask].var(ddof=1) + 1e-8)
    np.testing.assert_allclose(whitened, np.where(mask, want, 0), atol=1e-12)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_values_whiten_to_exactly_0(value):
    mask = np.ones((7, 13), bool)
    np.testing.assert_array_equal(ops.masked_whiten(np.full(mask.shape, value, np.float32), mask), 0)


@few
@given(
    hnp.arrays(np.float64, 6, elements=st.floats(-50, 50, width=32)),
    hnp.arrays(np.int32, 6, elements=st.integers(0, 5)),
    hnp.arrays(bool, 6),
)
def test_segment_statistics_equal_a_loop_over_segments(x, group_id, mask):
    dirty = np.where(mask, x, NAN)
    with float64():
        count = ops.segment_count(group_id, mask)
        total, mean = ops.segment_sum(dirty, group_id, mask), ops.segment_mean(dirty, group_id, mask)
        std = ops.segment_std(dirty, group_id, mask, ddof=1)
    for segment in range(6):
        kept = x[mask & (group_id == segment)]
        assert count[segment] == kept.size
        np.testing.assert_allclose(total[segment], kept.sum(), atol=1e-9)
        np.testing.assert_allclose(mean[segment], kept.mean() if kept.size else 0, atol=1e-9)
        np.testing.assert_allclose(std[segment], kept.std(ddof=1) if kept.size > 1 else 0, atol=1e-9)


@given(st.floats(-1e4, 1e4, width=32), st.integers(1, 9))
@few
def test_the_segment_mean_of_equal_values_is_exactly_that_value(value, count):
    x, mask = np.full(9, value, np.float32), np.arange(9) < count
    group_id = np.zeros(9, np.int32)
    assert ops.segment_mean(x, group_id, mask)[0] == np.float32(value)
    assert ops.segment_std(x, group_id, mask)[0] == 0


@few
@given(values, masks, st.floats(0, 1))
def test_scans_equal_a_loop_over_the_unmasked_positions(x, mask, discount):
    dirty = np.where(mask, x, NAN)
    with float64():
        summed, following = ops.discounted_sum(dirty, mask, discount=discount), ops.next_unmasked(dirty, mask)
    for b in range(3):
        state, after = 0.0, 0.0
        for t in reversed(range(4)):
            np.testing.assert_allclose(following[b, t], after, atol=1e-12)
            if mask[b, t]:
                state, after = x[b, t] + discount * state, x[b, t]
            np.testing.assert_allclose(summed[b, t], state if mask[b, t] else 0, atol=1e-9)


def test_no_gradient_flows_through_masked_positions_of_a_scan():
    mask = np.array([[True, False, True]])
    x = jnp.array([[1.0, NAN, 2.0]])
    gradient = jax.grad(lambda x: ops.discounted_sum(x, mask, discount=0.5).sum())(x)
    np.testing.assert_allclose(gradient, [[1, 0, 1.5]])
