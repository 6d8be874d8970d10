"""Generalised advantage estimation against the worked examples and a backward loop."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from objectives import MASK, NAN, float64

from rljax.advantages import generalized_advantage_estimation as gae
from rljax.ops import masked_whiten

REWARDS = np.array([[0, 0, 0, 1], [0, 0, 0.5, NAN]])
VALUES = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.4, 0.3, NAN]])


@pytest.fixture(autouse=True)
def _double_precision():
    with float64():
        yield


def test_worked_example_and_its_whitening():
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages, [[0.799675, 0.7365, 0.67, 0.6], [-0.0145, 0.09, 0.2, 0]], atol=1e-12)
    np.testing.assert_allclose(returns, [[0.899675, 0.9365, 0.97, 1], [0.4855, 0.49, 0.5, 0]], atol=1e-12)
    want = [[1.0657663050, 0.8784455029, 0.6812657111, 0.4737080356], [-1.3483518443, -1.0384978859, -0.7123358244, 0]]
    np.testing.assert_allclose(masked_whiten(advantages, MASK), want, atol=2e-10)


def test_lambda_1_returns_the_final_reward_everywhere():
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(advantages, [[0.9, 0.8, 0.7, 0.6], [0, 0.1, 0.2, 0]], atol=1e-12)
    np.testing.assert_allclose(returns, np.where(MASK, [[1.0], [0.5]], 0), atol=1e-12)


@pytest.mark.parametrize("at_gap", [5.0, -100.0, NAN])
def test_a_gap_is_stepped_over_whatever_its_value(at_gap):
    mask = np.array([[1, 0, 1, 1]], bool)
    values = np.array([[0.1, at_gap, 0.3, 0.4]])
    advantages, _ = gae(np.array([[0, 0, 0, 1.0]]), values, mask, gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages, [[0.8365, 0, 0.67, 0.6]], atol=1e-12)


@given(
    hnp.arrays(np.float64, (2, 3, 5), elements=st.floats(-3, 3, width=32)),
    hnp.arrays(bool, (3, 5)),
    st.floats(0, 1),
    st.floats(0, 1),
)
@settings(max_examples=20, deadline=None)
def test_equals_the_backward_loop_over_unmasked_positions(arrays, mask, gamma, lam):
    rewards, values = arrays
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for b in range(3):
        after_value = after_advantage = 0.0
        for t in reversed(range(5)):
            if not mask[b, t]:
                assert advantages[b, t] == returns[b, t] == 0
                continue
            delta = rewards[b, t] + gamma * after_value - values[b, t]
            after_advantage = delta + gamma * lam * after_advantage
            after_value = values[b, t]
            np.testing.assert_allclose(advantages[b, t], after_advantage, atol=1e-10)
            np.testing.assert_allclose(returns[b, t], after_advantage + values[b, t], atol=1e-10)
