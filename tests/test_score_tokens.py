"""Scoring equals the dense log-softmax in float64, and so do its gradients, whatever the chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward import row_logprobs

from rljax.batching import build_forest, pad_rows
from rljax.models import DecoderConfig, init_params
from rljax.sampling import sampling_params
from rljax.sampling.score import score_hidden, score_tokens
from rljax.types import Packed

ROWS, LENGTH, DIM, VOCAB = 2, 13, 8, 37
HEAD = DecoderConfig(  # of which the head alone is used
    vocab_size=VOCAB, num_layers=1, embed_dim=DIM, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8
)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    wanted = np.ones((ROWS, LENGTH), bool)
    wanted[0, 9:] = wanted[1, 4:] = False
    return dict(
        hidden=rng.normal(size=(ROWS, LENGTH, DIM)).astype(np.float32),
        head=rng.normal(size=(VOCAB, DIM)).astype(np.float32),
        targets=rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        wanted=wanted,
        by_logprob=rng.normal(size=(ROWS, LENGTH)),
        by_entropy=rng.normal(size=(ROWS, LENGTH)),
    )


def dense(hidden, head, targets, wanted, temperature, keep):
    """float64 log-probs, entropies; `keep` masks the vocabulary (truncation)."""
    z = np.einsum("rkd,vd->rkv", np.float64(hidden), np.float64(head)) / temperature
    z = np.where(keep, z, -np.inf)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    p = np.exp(log_p)
    lp = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    h = -np.where(p > 0, p * np.where(p > 0, log_p, 0), 0).sum(-1)
    return np.where(wanted, lp, 0), np.where(wanted, h, 0), log_p, p, h


def dense_gradients(case, temperature, keep):
    """By hand: dlp/dz = onehot - p, dH/dz = -p (log p + H)."""
    *_, log_p, p, h = dense(case["hidden"], case["head"], case["targets"], case["wanted"], temperature, keep)
    onehot = np.eye(VOCAB)[case["targets"]]
    by_lp, by_h = (np.where(case["wanted"], case[k], 0)[..., None] for k in ("by_logprob", "by_entropy"))
    dz = by_lp * (onehot - p) - by_h * p * (np.where(p > 0, log_p, 0) + h[..., None])
    dz /= temperature
    head, hidden = np.float64(case["head"]), np.float64(case["hidden"])
    return np.einsum("rkv,vd->rkd", dz, head), np.einsum("rkv,rkd->vd", dz, hidden)


@pytest.mark.parametrize("chunk", [1, 2, 6, 10, 26, 1000])
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_equals_dense_float64(case, chunk, temperature):
    sampling = None if temperature is None else sampling_params(temperature)
    keep = np.ones((ROWS, LENGTH, VOCAB), bool)

    def objective(hidden, head):
        lp, h = score_hidden(HEAD, {"head": head}, hidden, case["targets"], case["wanted"], sampling, chunk=chunk)
        return jnp.sum(lp * case["by_logprob"] + h * case["by_entropy"]), (lp, h)

    gradients, (lp, h) = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(
        jnp.asarray(case["hidden"]), jnp.asarray(case["head"])
    )
    want_lp, want_h, *_ = dense(case["hidden"], case["head"], case["targets"], case["wanted"], temperature or 1.0, keep)
    np.testing.assert_allclose(lp, want_lp, atol=3e-6)
    np.testing.assert_allclose(h, want_h, atol=3e-6)
    for got, want in zip(gradients, dense_gradients(case, temperature or 1.0, keep), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_truncation_keeps_the_scored_token_and_ignores_the_rest(case, chunk):
    z = np.einsum("rkd,vd->rkv", np.float64(case["hidden"]), np.float64(case["head"]))
    ranks = (-z).argsort(-1).argsort(-1)
    keep = (ranks < 5) | np.eye(VOCAB, dtype=bool)[case["targets"]]
    sampling = sampling_params(1.3, top_k=5)

    def objective(hidden, head):
        lp, h = score_hidden(HEAD, {"head": head}, hidden, case["targets"], case["wanted"], sampling, chunk=chunk)
        return jnp.sum(lp * case["by_logprob"] + h * case["by_entropy"]), (lp, h)

    gradients, (lp, h) = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(
        jnp.asarray(case["hidden"]), jnp.asarray(case["head"])
    )
    want_lp, want_h, *_ = dense(case["hidden"], case["head"], case["targets"], case["wanted"], 1.3, keep)
    np.testing.assert_allclose(lp, want_lp, atol=3e-6)
    np.testing.assert_allclose(h, want_h, atol=3e-6)
    for got, want in zip(gradients, dense_gradients(case, 1.3, keep), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def tiny():
    return DecoderConfig(vocab_size=61, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24)


def packed_forest(rows):
    forest = build_forest(*pad_rows(rows))
    index = np.arange(len(forest.tokens))
    packed = Packed(
        tokens=forest.tokens[None],
        positions=forest.positions[None],
        predecessor=forest.predecessor[None],
        subtree_end=forest.subtree_end[None],
        score_index=np.where(forest.predecessor >= 0, index, -1)[None].astype(np.int32),
    )
    return packed, forest


def test_token_t_is_scored_by_the_token_before_it_on_its_own_path():
    config = tiny()
    params = jax.tree.map(lambda x: x * 5 if x.ndim > 2 else x, init_params(config, jax.random.key(0)))
    rows = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 7, 8, 6, 5], [4, 4]]
    packed, forest = packed_forest(rows)
    logprobs, _ = jax.jit(lambda p, x: score_tokens(config, p, x, chunk=4))(params, packed)
    for b, row in enumerate(rows):
        want = row_logprobs(config, params, row)[1:]
        np.testing.assert_allclose(logprobs[0, forest.row_index[b, 1 : len(row)]], want, atol=1e-5)


def test_peak_memory_falls_with_the_chunk():
    vocab, length, dim = 4096, 512, 16

    def peak(chunk):
        def objective(hidden, head, targets, wanted):
            return score_hidden(HEAD, {"head": head}, hidden, targets, wanted, chunk=chunk)[0].sum()

        shapes = [
            ((1, length, dim), "float32"),
            ((vocab, dim), "float32"),
            ((1, length), "int32"),
            ((1, length), "bool"),
        ]
        arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        compiled = jax.jit(jax.grad(objective, argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    peaks = {chunk: peak(chunk) for chunk in (512, 128, 32)}
    assert peaks[512] >= vocab * length * 4
    assert peaks[128] < 0.3 * peaks[512] and peaks[32] < 0.3 * peaks[128]


def test_a_chunk_below_one_is_refused():
    with pytest.raises(ValueError, match="chunk=0"):
        score_tokens(tiny(), {}, packed_forest([[1, 2]])[0], chunk=0)
