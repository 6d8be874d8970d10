"""The kernels compute attention over forests and its gradients, and leave alone what is not seen.

On the CPU they run in interpret mode; for accelerators they are lowered here, and compared on a GPU by `make test-gpu`.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from test_parallel_mesh import run_python

from rljax.batching import build_forest, pad_rows
from rljax.models import (
    DecoderConfig,
    Forward,
    attention,
    attention_tpu,
    forest_attention,
    hidden_states,
    init_params,
    kernel_attention,
)
from rljax.models.attention_blocks import visible_blocks
from rljax.models.attention_kernel import forest_attention_kernel

ALL = 1 << 30
"""A window that everything is in."""

interpreted = functools.partial(forest_attention_kernel, interpret="gpu")

both_devices = pytest.mark.parametrize("device", ["gpu", "tpu"])
"""Kernels of either device, run as plain operations."""


def forests(length, *, seed=0, rows=2):
    """(positions, subtree_end) `[rows, length]` of random forests, with padding behind them."""
    rng = np.random.default_rng(seed)
    positions, ends = np.zeros((2, rows, length), np.int32)
    for r in range(rows):
        sampled = []
        while True:  # of two letters, so that they share several tokens
            more = [*sampled, rng.integers(0, 2, rng.integers(2, max(4, length // 3)))]
            if len(build_forest(*pad_rows(more)).tokens) > length - min(5, length // 4):
                break
            sampled = more
        forest = build_forest(*pad_rows(sampled))
        count = len(forest.tokens)
        positions[r, :count], ends[r, :count] = forest.positions, forest.subtree_end
    return positions, ends


def chains(length, *lengths):
    """One row of trees without a branch, one after the other, then padding."""
    positions, ends, start = np.zeros(length, np.int32), np.zeros(length, np.int32), 0
    for n in lengths:
        positions[start : start + n], ends[start : start + n] = np.arange(n), start + n
        start += n
    return positions[None], ends[None]


def inputs(rows, length, heads, kv_heads, head_dim, dtype=jnp.float32):
    """q, k, v and a cotangent of the result, for padding too."""
    keys = jax.random.split(jax.random.key(1), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    return [jax.random.normal(key, (rows, length, n, head_dim), dtype) for key, n in zip(keys, counts, strict=True)]


def seen(positions, ends, window):
    index = np.arange(len(ends))
    visible = (index[None] <= index[:, None]) & (index[:, None] < ends[None])
    return visible & (positions[:, None] - positions[None] < window)


def oracle(q, k, v, g, positions, ends, window):
    """(out, d_q, d_k, d_v) by the definition, head by head in float64; a query that sees nothing gives 0."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    out, d_q, d_k, d_v = (np.zeros_like(x) for x in (q, q, k, v))
    group, scale = q.shape[2] // k.shape[2], 1 / np.sqrt(q.shape[3])
    for r in range(len(q)):
        visible = seen(positions[r], ends[r], window)
        for h in range(q.shape[2]):
            keys, values = k[r, :, h // group], v[r, :, h // group]
            weights = np.where(visible, np.exp(q[r, :, h] @ keys.T * scale), 0)
            weights /= np.maximum(weights.sum(1, keepdims=True), 1e-300)
            out[r, :, h] = weights @ values
            d_weights = g[r, :, h] @ values.T
            d_scores = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True)) * scale
            d_q[r, :, h] = d_scores @ keys
            d_k[r, :, h // group] += d_scores.T @ q[r, :, h]
            d_v[r, :, h // group] += weights.T @ g[r, :, h]
    return out, d_q, d_k, d_v


def value_and_gradients(attend, q, k, v, g, *rest):
    @jax.jit
    def run(q, k, v, g):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *rest), q, k, v)
        return out, *pull(g)

    return run(q, k, v, g)


def assert_close(got, want, tolerance):
    for name, x, y in zip(("out", "d_q", "d_k", "d_v"), got, want, strict=True):
        y = np.asarray(y, np.float64)
        bound = tolerance * max(1.0, np.abs(y).max())
        np.testing.assert_allclose(np.asarray(x, np.float64), y, atol=bound, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("length", "block_q", "block_k", "heads", "kv_heads", "head_dim", "window"),
    [
        (64, 16, 16, 2, 2, 16, ALL),
        (61, 16, 32, 4, 2, 8, ALL),
        (100, 32, 16, 3, 1, 24, 5),
        (7, 16, 16, 2, 1, 8, ALL),
        (90, None, None, 2, 1, 16, 20),
    ],
)
@both_devices
def test_values_and_gradients_are_those_of_the_definition(
    device, length, block_q, block_k, heads, kv_heads, head_dim, window
):
    """Lengths that fill blocks and that do not, grouped heads, windows, padding with a gradient coming in."""
    positions, ends = forests(length, seed=length)
    arrays = inputs(2, length, heads, kv_heads, head_dim)
    attend = functools.partial(interpreted, block_q=block_q, block_k=block_k, interpret=device)
    got = value_and_gradients(attend, *arrays, jnp.asarray(positions), jnp.asarray(ends), window)
    assert_close(got, oracle(*arrays, positions, ends, window), 5e-6)


@pytest.mark.parametrize("form", ["plain", "streamed", "gpu", "tpu"])
def test_sinks_are_one_score_more_whose_value_is_zero(form):
    """Values, and gradients to the sinks too, by the definition: a column beside the scores, left out of the sum."""
    positions, ends = forests(45, seed=3)
    q, k, v, g = inputs(2, 45, 4, 2, 8)
    sinks = jnp.array([-1.0, 0.5, 2.0, 4.0])
    rest = jnp.asarray(positions), jnp.asarray(ends), 9
    attend = {
        "plain": forest_attention,
        "streamed": functools.partial(forest_attention, query_start=0),
        "gpu": functools.partial(interpreted, block_q=16, block_k=16),
        "tpu": functools.partial(interpreted, block_q=16, block_k=16, interpret="tpu"),
    }[form]
    visible = np.stack([seen(*row, 9) for row in zip(positions, ends, strict=True)])

    def definition(q, k, v, sinks):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("rqhd,rshd->rhqs", q, k) / np.sqrt(8)
        scores = jnp.where(visible[:, None], scores, -jnp.inf)
        column = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
        return jnp.einsum("rhqs,rshd->rqhd", weights, v)

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, q, k, v, sinks):
        out, pull = jax.vjp(attend, q, k, v, sinks)
        return out, *pull(g)

    got = run(lambda q, k, v, sinks: attend(q, k, v, *rest, sinks=sinks), q, k, v, sinks)
    want = run(definition, q, k, v, sinks)
    assert np.abs(want[4]).min() > 0.1
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=5e-6 * max(1.0, float(np.abs(y).max())), rtol=0)


def test_rows_whose_lists_overflow_scalar_memory_go_one_by_one(monkeypatch):
    positions, ends = forests(60, seed=9, rows=3)
    arrays = inputs(3, 60, 2, 1, 8)
    rest = jnp.asarray(positions), jnp.asarray(ends), ALL
    attend = functools.partial(interpreted, block_q=16, block_k=16, interpret="tpu")
    of_three_rows = 3 * 4 * (64 // 16) ** 2

    def rows_of_a_call():
        program = str(jax.make_jaxpr(lambda *x: attend(*x, *rest))(*arrays[:3]))
        return 1 if "scan[" in program else 3

    monkeypatch.setattr(attention_tpu, "LISTS", of_three_rows)
    assert rows_of_a_call() == 3
    monkeypatch.setattr(attention_tpu, "LISTS", of_three_rows - 1)
    assert rows_of_a_call() == 1
    got = value_and_gradients(attend, *arrays, *rest)
    assert_close(got, oracle(*arrays, positions, ends, ALL), 5e-6)


@both_devices
def test_padding_gives_zero_and_takes_no_gradient(device):
    positions, ends = chains(40, 20)
    arrays = inputs(1, 40, 2, 1, 8)
    attend = functools.partial(interpreted, block_q=16, block_k=16, interpret=device)
    for x in value_and_gradients(attend, *arrays, jnp.asarray(positions), jnp.asarray(ends), ALL):
        np.testing.assert_array_equal(x[:, 20:], 0)
        assert np.abs(x[:, :20]).max() > 0.1


@both_devices
def test_bfloat16_accumulates_in_float32(device):
    positions, ends = forests(150, seed=3)
    arrays = inputs(2, 150, 4, 2, 16, jnp.bfloat16)
    attend = functools.partial(interpreted, block_q=32, block_k=16, interpret=device)
    got = value_and_gradients(attend, *arrays, jnp.asarray(positions), jnp.asarray(ends), ALL)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    assert_close(got, oracle(*arrays, positions, ends, ALL), 2**-7)
    # no further from the definition than the form that multiplies everything at once
    want = oracle(*arrays, positions, ends, ALL)
    real = ends[..., None, None] > 0
    masked = [np.where(real, x, 0) for x in arrays]
    plain = value_and_gradients(forest_attention, *masked, jnp.asarray(positions), jnp.asarray(ends), ALL)
    for x, y, exact in zip(got, plain, want, strict=True):
        error, usual = (np.abs(np.where(real, np.asarray(a, np.float64) - exact, 0)).max() for a in (x, y))
        assert error <= 1.5 * usual


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize("window", [ALL, 6])
def test_blocks_that_are_left_out_hold_no_visible_pair(block_q, block_k, window):
    positions, ends = forests(192, seed=5, rows=4)
    got = visible_blocks(
        jnp.asarray(positions), jnp.asarray(positions), jnp.asarray(ends), window, block_q=block_q, block_k=block_k
    )
    pairs = np.stack([seen(p, e, window) for p, e in zip(positions, ends, strict=True)])
    blocks = pairs.reshape(4, 192 // block_q, block_q, 192 // block_k, block_k).any(axis=(2, 4))
    assert not (blocks & ~np.asarray(got)).any()
    if window == ALL and block_q >= block_k:  # two integers a key are enough to tell
        np.testing.assert_array_equal(got, blocks)
    causal = np.tri(192 // block_q, 192 // block_k).sum() * 4 if block_q == block_k else np.inf
    assert got.sum() < causal


@both_devices
def test_blocks_that_nobody_sees_are_not_touched(device):
    """Trees side by side: what is not a number in one reaches nothing of another, forward or backward."""
    positions, ends = (jnp.asarray(x) for x in chains(80, 32, 32))
    attend = functools.partial(interpreted, block_q=16, block_k=16, interpret=device)
    clean = value_and_gradients(attend, *inputs(1, 80, 2, 1, 8), positions, ends, ALL)
    for poisoned, other in (
        (slice(0, 32), slice(32, 80)),
        (slice(32, 64), slice(0, 32)),
        (slice(64, 80), slice(0, 64)),
    ):
        arrays = [x.at[:, poisoned].set(jnp.nan) for x in inputs(1, 80, 2, 1, 8)]
        got = value_and_gradients(attend, *arrays, positions, ends, ALL)
        for x, y in zip(got, clean, strict=True):
            np.testing.assert_array_equal(x[:, other], y[:, other])
            assert poisoned.start == 64 or np.isnan(x[:, poisoned]).all()


@both_devices
def test_keys_out_of_the_window_are_not_touched(device):
    positions, ends = (jnp.asarray(x) for x in chains(80, 80))
    attend = functools.partial(interpreted, block_q=16, block_k=16, interpret=device)
    arrays = [x.at[:, :16].set(jnp.nan) for x in inputs(1, 80, 2, 1, 8)]
    for x in value_and_gradients(attend, *arrays, positions, ends, 16):
        assert np.isfinite(x[:, 32:]).all()


MODEL = DecoderConfig(
    vocab_size=32,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    tied_embeddings=True,
    sliding_window=8,
    sliding_layers=(True, False),
)


@pytest.mark.parametrize(("device", "options"), [("gpu", {}), ("tpu", {}), ("tpu", {"remat": "attention_saved"})])
def test_a_model_has_the_same_gradient_with_the_kernels(device, options):
    positions, ends = (jnp.asarray(x) for x in forests(70, seed=2))
    tokens = jax.random.randint(jax.random.key(0), positions.shape, 0, MODEL.vocab_size)
    params = init_params(MODEL, jax.random.key(1))
    readout = jnp.where(ends[..., None] > 0, jax.random.normal(jax.random.key(2), (*tokens.shape, 32)), 0.0)

    def gradient(attend):
        def loss(params):
            how = Forward(attention=attend, **options)
            return jnp.sum(hidden_states(MODEL, params, tokens, positions, ends, forward=how) * readout)

        return jax.jit(jax.grad(loss))(params)

    want = gradient(forest_attention)
    got = gradient(functools.partial(interpreted, block_q=16, block_k=16, interpret=device))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * max(1.0, float(jnp.abs(y).max())))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_the_kernels_lower_for_accelerators(platform, dtype):
    """One call forward and two backward, from a machine without the device; a head size that is no power of two."""
    arrays = [jax.ShapeDtypeStruct((2, 1000, heads, 80), dtype) for heads in (6, 2, 2)]
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 1000), (2, 1000), ())]

    def loss(*args):
        return jnp.sum(forest_attention_kernel(*args).astype(jnp.float32))

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), abstract_device=device)
    with use_abstract_mesh(mesh if platform == "cuda" else AbstractMesh((1,), ("data",))):
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(*arrays, *integers)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count({"tpu": "@tpu_custom_call", "cuda": "@__gpu$xla.gpu.triton"}[platform]) == 3


def kernels_in(fn, length):
    arrays = [jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32) for heads in (2, 1, 1)]
    integers = [jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2
    return str(jax.make_jaxpr(lambda *a: fn(*a, ALL))(*arrays, *integers)).count("pallas_call")


def test_a_cpu_and_short_rows_keep_the_plain_form():
    assert kernels_in(kernel_attention, 2048) == 0
    for platform in ("gpu", "tpu"):
        device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
        with use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
            assert kernels_in(kernel_attention, attention.KERNEL_LENGTH - 1) == 0
            assert kernels_in(kernel_attention, attention.KERNEL_LENGTH) > 0
            assert kernels_in(forest_attention, 2048) == 0


@pytest.mark.slow
def test_on_a_mesh_each_device_runs_the_kernels_on_its_own_rows_and_heads():
    found = json.loads(run_python("attention_mesh_program.py", "1x2x2", "2x2x1", devices=4))
    for mesh, part in {"1x2x2": [1, 48, 2, 8], "2x2x1": [2, 48, 4, 8]}.items():  # two rows do not divide over 2 x 2
        assert found[mesh]["difference"] < 1e-5
        assert found[mesh]["part"] == part
        assert found[mesh]["gathers"] == 0


def test_wrong_sizes_are_refused():
    q, k, v, _ = inputs(1, 16, 4, 2, 8)
    positions, ends = (jnp.asarray(x) for x in chains(16, 16))
    for size in (8, 48):
        with pytest.raises(ValueError, match=rf"block_q={size} must be a power of two"):
            forest_attention_kernel(q, k, v, positions, ends, ALL, block_q=size)
        with pytest.raises(ValueError, match=rf"block_k={size} must be a power of two"):
            forest_attention_kernel(q, k, v, positions, ends, ALL, block_k=size)
    with pytest.raises(ValueError, match="3 query heads do not divide over 2 key heads"):
        forest_attention_kernel(q[:, :, :3], k, v, positions, ends, ALL)
    with pytest.raises(ValueError, match="8 queries of 16 positions need query_start"):
        forest_attention_kernel(q[:, :8], k, v, positions, ends, ALL)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: make test-gpu")
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 2**-6)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("window", [ALL, 100])
def test_compiled_for_a_gpu_they_equal_the_plain_form(dtype, tolerance, head_dim, window):
    positions, ends = forests(2000, seed=4)
    arrays = inputs(2, 2000, 6, 2, head_dim, dtype)
    arrays[3] = jnp.where(ends[..., None, None] > 0, arrays[3], 0)  # the plain form passes gradients to padding
    rest = jnp.asarray(positions), jnp.asarray(ends), window
    with jax.default_matmul_precision("highest"):
        got = value_and_gradients(kernel_attention, *arrays, *rest)
        want = value_and_gradients(forest_attention, *arrays, *rest)
    real = ends[..., None, None] > 0
    assert_close(
        [jnp.where(real, x, 0) for x in got], [jnp.where(real, x, 0).astype("float32") for x in want], tolerance
    )
