"""Task vectors: the sheet's numbers, a forward pass that is the decoder's own, and heads that act as they are told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.analysis import task_vectors as V
from rljax.models import DecoderConfig, hidden_states, init_params, logits

CONFIG = DecoderConfig(
    vocab_size=12, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, tied_embeddings=True
)
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 0, 0]])
PLACES = jnp.array([5, 3])


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 10 if x.ndim > 2 else x, init_params(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def plain(params):
    return V.read_heads(CONFIG, params, TOKENS, PLACES)


def test_sensitivity_is_the_mean_of_norms():
    alone = np.array([[(0, 0), (1, 0), (0, 1)], [(0, 0), (0, 1), (1, 1)]], float)[:, None]
    shown = np.array([[(3, 4), (1, 0), (0, 2)], [(0, 1), (0, 1), (1, 4)]], float)[:, None]
    delta = V.sensitivity(shown, alone)
    np.testing.assert_allclose(delta, [[3, 0, 2]])
    assert V.top_heads(delta, 2).tolist() == [[0, 0], [0, 2]]
    relative = V.sensitivity(shown[:, :, 2:], alone[:, :, 2:], relative=True)
    np.testing.assert_allclose(relative, [[(1 + 3 / np.sqrt(2)) / 2]], rtol=1e-6)
    assert V.overlap(np.array([[0, 0], [0, 2]]), np.array([[0, 2], [1, 1]])) == pytest.approx(1 / 3)
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"{count} heads cannot be chosen; a number from 1 to 3 can"):
            V.top_heads(delta, count)


def test_the_choice_among_centroids_has_the_worked_gradient():
    draws = np.array([[0], [1], [1], [2]])
    rewards = np.array([-1, -0.2, -0.4, -2])
    value, gradient = jax.value_and_grad(V.selection_loss)(jnp.zeros((1, 3)), draws, rewards)
    assert value == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(gradient, [[0.142857, -1.714286, 1.571429]], atol=1e-5)
    value, gradient = jax.value_and_grad(V.selection_loss)(jnp.array([[0.5, 0, -0.5]]), draws, rewards)
    assert value == pytest.approx(-0.714286, abs=1e-5)
    np.testing.assert_allclose(gradient, [[0.142857, -1.714286, 1.571429]], atol=1e-5)
    np.testing.assert_array_equal(jax.grad(V.selection_loss)(jnp.zeros((1, 3)), draws, np.ones(4)), 0)


def test_draws_are_compared_with_those_of_their_own_example():
    """An easy example and a hard one, two draws each: of both the better draw is the one to repeat."""
    rewards = np.array([-0.8, -1.2, -2.8, -3.2])
    draws = np.array([[0], [1], [0], [1]])
    own = jax.grad(V.selection_loss)(jnp.zeros((1, 2)), draws, rewards, group=2)
    np.testing.assert_allclose(own, [[-2, 2]], atol=1e-5)
    # Over the batch they stand at 1.1767, .7845, -.7845, -1.1767.
    batch = jax.grad(V.selection_loss)(jnp.zeros((1, 4)), np.arange(4)[:, None], rewards)
    np.testing.assert_allclose(batch, [[-1.1767, -0.7845, 0.7845, 1.1767]], atol=1e-4)
    with pytest.raises(ValueError, match="4 draws are no whole number of groups of 3"):
        V.selection_loss(jnp.zeros((1, 2)), draws, rewards, group=3)


def test_clusters():
    points = np.array([(0, 0), (0, 2), (10, 0), (10, 2)], float)
    np.testing.assert_allclose(V.lloyd(points, points[[0, 2]]), [(0, 1), (10, 1)])
    # The second seed wins no point, and begins again at the one that is farthest from its centroid.
    found = V.lloyd(points, np.array([(0.0, 1.0), (-50.0, 0.0)]))
    np.testing.assert_allclose(sorted(found.tolist()), [(0, 1), (10, 1)])
    found = V.centroids(points, 2, np.random.default_rng(0))
    assert sorted(found.tolist()) in ([[0, 1], [10, 1]], [[5, 0], [5, 2]])
    assert V.centroids(points, 9, np.random.default_rng(0)).tolist() == points.tolist()


def test_logits_are_those_of_the_decoder_and_an_empty_override_changes_no_bit(params, plain):
    positions = jnp.broadcast_to(jnp.arange(6), TOKENS.shape)
    states = hidden_states(CONFIG, params, TOKENS, positions, jnp.full(TOKENS.shape, 6))
    want = logits(CONFIG, params, states[jnp.arange(2), PLACES])
    np.testing.assert_allclose(plain[0], want, atol=1e-5)

    nothing = V.Override(jnp.full((2, 2, 4, 8), jnp.nan), jnp.zeros((2, 4), bool))
    empty = V.read_heads(CONFIG, params, TOKENS, PLACES, nothing)
    for found, own in zip(empty, plain, strict=True):
        np.testing.assert_array_equal(found, own)


def test_a_heads_output_stands_before_the_projection_and_an_override_acts_through_it(params, plain):
    """Overwritten with zeros, a head is one whose part of the output projection is zero, where nothing comes after."""
    last = dataclasses.replace(CONFIG, num_layers=1)
    one = {**params, "layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    mask = jnp.zeros((1, 4), bool).at[0, 2].set(True)
    silenced, heads = V.read_heads(last, one, TOKENS, PLACES, V.Override(jnp.zeros((2, 1, 4, 8)), mask))
    assert not np.asarray(heads[:, 0, 2]).any() and np.asarray(heads[:, 0, 1]).any()
    cut = {**one, "layers": {**one["layers"], "o": one["layers"]["o"].at[:, 16:24].set(0.0)}}
    np.testing.assert_allclose(silenced, V.read_heads(last, cut, TOKENS, PLACES)[0], atol=1e-5)

    # Heads of another row, all of them, make that row's answer of a row with the same last token.
    again = jnp.array([[3, 1, 4, 1, 5, 9], [7, 7, 2, 0, 8, 9]])
    places = jnp.array([5, 5])
    own, heads = V.read_heads(CONFIG, params, again, places)
    swapped, _ = V.read_heads(CONFIG, params, again, places, V.Override(heads[::-1], jnp.ones((2, 4), bool)))
    np.testing.assert_allclose(swapped, own[::-1], atol=1e-4)
    assert np.abs(np.asarray(own[0] - own[1])).max() > 1e-2


def test_each_row_gets_the_centroids_that_it_drew():
    bank = np.arange(12.0).reshape(2, 3, 2)
    override = V.placed(bank, np.array([[0, 1], [1, 0]]), np.array([[2, 0], [1, 1]]), (2, 2))
    assert override.mask.tolist() == [[False, True], [True, False]]
    np.testing.assert_array_equal(override.heads[0, 0, 1], bank[0, 2])
    np.testing.assert_array_equal(override.heads[0, 1, 0], bank[1, 0])
    np.testing.assert_array_equal(override.heads[1, :, :], [[[0, 0], bank[0, 1]], [bank[1, 1], [0, 0]]])


def test_the_estimator_is_the_gradient_of_the_expected_reward():
    """For one place, sum over m of p_m times the gradient of draw m is p_m (r_m - sum_j p_j r_j)."""
    alpha = jnp.array([[0.3, -0.2, 0.5]])
    rewards = np.array([1.0, 0.2, -0.7])
    p = np.asarray(jax.nn.softmax(alpha))[0].astype(np.float64)
    want = p * (rewards - p @ rewards)
    # Of two draws (i, j), standardised within the pair, the better one has advantage 1 and the other -1.
    total = np.zeros(3)
    for i in range(3):
        for j in range(3):
            gradient = jax.grad(V.selection_loss)(alpha, np.array([[i], [j]]), rewards[[i, j]], group=2)
            total -= p[i] * p[j] * np.asarray(gradient[0], np.float64) * abs(rewards[i] - rewards[j]) / 2
    np.testing.assert_allclose(total, want, atol=1e-6)
