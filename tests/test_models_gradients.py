"""The hand-written gradients equal those that autodiff derives from the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.batching import build_forest, pad_rows
from rljax.models import attention
from rljax.models.attention import forest_attention
from rljax.models.functional import linear, rms_norm, swiglu


def compare(fn, plain, *inputs, tolerance=2e-5):
    out, pull = jax.vjp(fn, *inputs)
    want, pull_plain = jax.vjp(plain, *inputs)
    np.testing.assert_allclose(out, want, atol=tolerance)
    g = jax.random.normal(jax.random.key(9), out.shape)
    for got, expected in zip(pull(g), pull_plain(g), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, atol=tolerance * max(1.0, float(jnp.abs(expected).max())))


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


@pytest.mark.parametrize("wide", [3, 17])
def test_linear(wide):
    compare(linear, lambda x, w: x @ w, normal(0, 2, 5, 8), normal(1, 8, wide))


def test_swiglu():
    compare(swiglu, lambda a, b: a / (1 + jnp.exp(-a)) * b, normal(0, 4, 6) * 3, normal(1, 4, 6))


def test_rms_norm():
    def plain(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale

    compare(lambda x, s: rms_norm(x, s, 1e-5), plain, normal(0, 3, 4, 8), normal(1, 8))


def dense_attention(q, k, v, positions, subtree_end, window):
    """The definition, over all pairs, for one row."""
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    index = jnp.arange(length)
    visible = (index[None] <= index[:, None]) & (index[:, None] < subtree_end[0][None])
    visible &= positions[0][:, None] - positions[0][None] < window
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("rqhd,rshd->rhqs", q, k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    return jnp.einsum("rhqs,rshd->rqhd", weights, v)


@pytest.mark.parametrize("window", [1 << 30, 4])
@pytest.mark.parametrize("block", [3, 8, 128])
def test_forest_attention(monkeypatch, block, window):
    """Blocks that divide the length, that do not, and a single one; a forest with padding behind it."""
    monkeypatch.setattr(attention, "MIN_BLOCK", block)
    monkeypatch.setattr(attention, "MAX_BLOCKS", 100)
    forest = build_forest(*pad_rows([[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9], [1, 2, 7], [4, 4, 4, 4, 4]]))
    count, length = len(forest.tokens), 24
    pad = [(0, length - count)]
    positions, ends = (jnp.asarray(np.pad(x, pad))[None] for x in (forest.positions, forest.subtree_end))
    real = (jnp.arange(length) < count)[None, :, None, None]  # what padding queries see is of no account

    def masked(fn):
        return lambda q, k, v: jnp.where(real, fn(q, k, v, positions, ends, window), 0.0)

    inputs = normal(0, 1, length, 6, 4), normal(1, 1, length, 2, 4), normal(2, 1, length, 2, 4)
    compare(jax.jit(masked(forest_attention)), masked(dense_attention), *inputs)
