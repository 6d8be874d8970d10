"""What is sampled from is the distribution that a float64 sort would give, and it is sampled exactly."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.sampling import compile_count, process_logits, sampling_params
from rljax.sampling.generate import token_uniforms
from rljax.sampling.logits import MASKED, block_size, rules_of, sample_tokens


def oracle(logits, temperature, top_k, top_p, min_p):
    """float64, sorted: (log-probs with -inf for removed tokens, distance of top-p's boundary from p)."""
    rows, margin = [], np.inf
    for z in np.float64(logits) / temperature:
        order = np.argsort(-z, kind="stable")
        keep = np.zeros(len(z), bool)
        keep[order[: top_k or len(z)]] = True
        p = np.where(keep, np.exp(z - z.max()), 0)
        p /= p.sum()
        if top_p < 1:
            before = np.cumsum(p[order]) - p[order]
            keep[order] &= before < top_p
            margin = min(margin, np.abs(before - top_p).min())
        keep &= p >= min_p * p.max()
        rows.append(np.where(keep, z - np.log(np.exp(z[keep]).sum()), -np.inf))
    return np.array(rows), margin


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=(5, 600)).astype(np.float32) * 3


CASES = list(itertools.product((0.7, 1.0, 1.9), (0, 1, 40), (1.0, 0.9, 0.3), (0.0, 0.02, 1.0)))


@pytest.mark.parametrize("axis", [-1, 0])
def test_truncation_equals_a_sort_in_float64(logits, axis):
    process = jax.jit(lambda z, params: process_logits(z, params, axis=axis))
    z = jnp.asarray(logits if axis else logits.T)
    process(z, sampling_params(*CASES[0]))
    compiled = 0
    for values in CASES:
        want, margin = oracle(logits, *values)
        assert margin > 1e-6  # float32 sums could not tell which side of p they fall on
        params, before = sampling_params(*values), compile_count()
        got = process(z, params)
        compiled += compile_count() - before
        got = np.asarray(jax.nn.log_softmax(got, axis=axis))
        got = got if axis else got.T
        kept = np.isfinite(want)
        assert ((got > MASKED / 2) == kept).all(), values
        np.testing.assert_allclose(got[kept], want[kept], atol=2e-5)
    assert compiled == 0  # values are traced


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_program_that_is_told_what_is_on_removes_the_same_tokens(logits, kind, monkeypatch):
    """And so does the search that tries 15 thresholds a pass, which is that of accelerators."""
    want = {values: np.asarray(process_logits(jnp.asarray(logits), sampling_params(*values))) for values in CASES[::4]}
    monkeypatch.setattr("rljax.sampling.logits.platform", lambda: kind)
    process = jax.jit(
        lambda z, params, rules: process_logits(z, params, rules=rules),
        static_argnums=2,
    )
    for values in [*CASES[::4], (0.0, 3, 0.1, 0.5)]:
        params = sampling_params(*values)
        got = process(jnp.asarray(logits), params, rules_of(params))
        np.testing.assert_array_equal(got, want.get(values, logits))


@pytest.mark.parametrize("kind, passes", [("cpu", 32), ("gpu", 8)])
def test_there_is_no_search_for_what_is_off(logits, kind, passes, monkeypatch):
    monkeypatch.setattr("rljax.sampling.logits.platform", lambda: kind)

    def lengths(**values):
        params = sampling_params(**values)
        text = str(jax.make_jaxpr(lambda z: process_logits(z, params, rules=rules_of(params)))(logits))
        assert "cond[" not in text
        return [int(x) for x in re.findall(r"length=(\d+)", text)]

    assert lengths() == lengths(min_p=0.5) == lengths(temperature=0.0, top_k=3) == []
    assert lengths(top_p=0.5) == lengths(top_k=3) == [passes] and lengths(top_k=3, top_p=0.5) == [passes] * 2


def test_tokens_tied_with_the_last_one_kept_are_kept():
    z = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2]]))

    def kept(**values):
        return (np.asarray(process_logits(z, sampling_params(**values))) > MASKED / 2).tolist()[0]

    assert kept(top_k=2) == [True] * 4
    assert kept(top_k=1) == [True, False, False, False]
    assert kept(top_p=0.5) == [True] * 4
    assert kept(top_p=0.3) == [True, False, False, False]
    assert kept(min_p=0.5) == [True] * 4


def test_the_most_probable_token_survives_every_truncation():
    z = jnp.asarray(np.random.default_rng(1).normal(size=(64, 50)).astype(np.float32)) * 1e3
    for values in ({"top_p": 1e-30}, {"min_p": 1.0}, {"top_k": 1}, {"temperature": 1e-5, "top_p": 0.5}):
        processed = process_logits(z, sampling_params(**values))
        assert (processed.argmax(-1) == z.argmax(-1)).all()
        assert (processed.max(-1) > MASKED / 2).all()


def test_logprobs_and_entropies_are_those_of_the_truncated_distribution(logits):
    values = (0.8, 30, 0.95, 0.01)
    want, _ = oracle(logits, *values)
    p = np.exp(want)
    want_entropy = -np.where(p > 0, p * np.where(p > 0, want, 0), 0).sum(-1)
    processed = process_logits(jnp.asarray(logits), sampling_params(*values))
    uniform = jnp.linspace(0.05, 0.95, len(logits))
    tokens, logprobs, entropies = sample_tokens(processed.T, uniform, jnp.bool_(False))
    np.testing.assert_allclose(logprobs, want[np.arange(len(want)), tokens], atol=2e-6)
    np.testing.assert_allclose(entropies, want_entropy, atol=5e-6)


def test_greedy_takes_the_best_token_and_reports_the_models_own_logprob(logits):
    processed = process_logits(jnp.asarray(logits), sampling_params(0.0, top_k=3, top_p=0.1))
    want, _ = oracle(logits, 1.0, 0, 1.0, 0.0)
    tokens, logprobs, entropies = sample_tokens(processed.T, jnp.full(len(logits), 0.99), jnp.bool_(True))
    assert tokens.tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(logprobs, want.max(-1), atol=5e-6)
    np.testing.assert_allclose(entropies, -(np.exp(want) * want).sum(-1), atol=5e-6)


def test_gradients_flow_through_kept_logits_alone(logits):
    params = sampling_params(0.5, top_k=7)
    z = jnp.asarray(logits[:2])
    tokens = z.argmax(-1)

    def chosen(z):
        logprobs = jax.nn.log_softmax(process_logits(z, params))
        return jnp.take_along_axis(logprobs, tokens[:, None], axis=1).sum()

    grad = jax.grad(chosen)(z)
    want, _ = oracle(logits[:2], 0.5, 7, 1.0, 0.0)
    by_hand = (np.eye(z.shape[1])[tokens] - np.exp(want)) / 0.5
    np.testing.assert_allclose(grad, by_hand, atol=1e-5)
    assert (np.asarray(grad)[~np.isfinite(want)] == 0).all()


@pytest.mark.parametrize("vocab", [3, 512, 600, 997])  # one block, one block, three of 200, padded
def test_an_even_grid_of_uniforms_draws_every_token_its_share_of_times(vocab):
    draws = 20_000
    z = np.random.default_rng(vocab).normal(size=vocab).astype(np.float32) * 2
    z[::7] = MASKED
    uniform = jnp.asarray((np.arange(draws) + 0.5) / draws, jnp.float32)
    columns = jnp.broadcast_to(jnp.asarray(z)[:, None], (vocab, draws))
    tokens, _, _ = jax.jit(sample_tokens)(columns, uniform, jnp.bool_(False))
    p = np.exp(np.float64(z) - z.max())
    p /= p.sum()
    counts = np.bincount(tokens, minlength=vocab)
    assert np.abs(counts - draws * p).max() <= 1.1  # an interval of length p holds N p points, give or take one
    assert counts[::7].sum() == 0
    assert (np.diff(tokens) >= 0).all()  # it is the inverse of one CDF


def uniforms_beside_edges(p, edges):
    """Uniform numbers as they are drawn, within four cells of where a block or a probable token begins or ends."""
    ends = np.cumsum(p)
    places = np.concatenate([[0.0], ends[edges], (ends - p)[edges], ends[block_size(len(p)) - 1 :: block_size(len(p))]])
    cells = np.round(places * 2**23).astype(int)[:, None] + np.arange(-4, 5)
    return np.unique(np.clip(cells, 0, 2**23 - 1)) / 2**23


@pytest.mark.parametrize("vocab", [512, 997, 12_288])  # one block, four with padding, 48 of 256
def test_a_draw_beside_an_edge_gives_a_token_that_owns_the_place(vocab):
    """Tokens that share 1e-16 of the mass lie between probable ones: rounding must not hand them places of the line."""
    rng = np.random.default_rng(vocab)
    z = rng.normal(size=vocab).astype(np.float32) * 2 - 48
    probable = rng.choice(vocab - 2, 40, replace=False) + 1  # improbable ones at either end
    z[probable] = rng.normal(size=40) * 2
    p = np.exp(np.float64(z) - z.max())
    p /= p.sum()
    uniform = uniforms_beside_edges(p, probable)

    columns = jnp.broadcast_to(jnp.asarray(z)[:, None], (vocab, len(uniform)))
    tokens, _, _ = jax.jit(sample_tokens)(columns, jnp.asarray(uniform, jnp.float32), jnp.bool_(False))

    assert p[tokens].min() >= p[probable].min() > 1e-6
    # The middle of the cell that a uniform number stands for lies in the token's interval, to the rounding of its ends.
    cell = 2.0**-23
    ends = np.cumsum(p)[tokens]
    middle = uniform + cell / 2
    assert (ends - p[tokens] - cell <= middle).all() and (middle <= ends + cell).all()


def test_samples_follow_the_distribution():
    """Chi-square over the uniforms that the decoder really draws."""
    draws, p = 20_000, np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    samples, positions = jnp.arange(200)[:, None], jnp.arange(100)
    uniform = token_uniforms(jnp.int32(3), jnp.int32(1), jnp.int32(17), samples, positions).ravel()
    columns = jnp.broadcast_to(jnp.log(p.astype(np.float32))[:, None], (len(p), draws))
    tokens, _, _ = sample_tokens(columns, uniform, jnp.bool_(False))
    counts = np.bincount(tokens, minlength=len(p))
    statistic = ((counts - draws * p) ** 2 / (draws * p)).sum()
    assert statistic < 20.5  # 0.999 quantile at 5 degrees of freedom


def test_a_token_of_probability_zero_is_never_drawn():
    rng = np.random.default_rng(2)
    z = np.full((1200, 400), MASKED, np.float32)
    for column in range(z.shape[1]):  # few tokens of very unequal weight, anywhere, also at either end
        kept = rng.choice(1200, rng.integers(1, 5), replace=False)
        z[kept, column] = rng.normal(size=len(kept)) * 8
    for uniform in (0.0, 2**-23, 0.5, 1 - 2**-23):
        tokens, logprobs, entropies = sample_tokens(jnp.asarray(z), jnp.full(400, uniform), jnp.bool_(False))
        assert (z[tokens, np.arange(400)] > MASKED / 2).all()
        assert np.isfinite(logprobs).all() and np.isfinite(entropies).all()


def test_the_key_of_a_token_is_the_chain_of_five_integers():
    key = jax.random.key(5)
    for data in (9, 2**31 - 1, 3, 11):
        key = jax.random.fold_in(key, data)
    got = token_uniforms(
        jnp.int32(5), jnp.int32(9), jnp.int32([1, 2**31 - 1])[:, None], jnp.int32([3, 4]), jnp.int32(11)
    )
    assert got.shape == (2, 2) and got[1, 0] == jax.random.uniform(key)
    assert len(set(np.asarray(got).ravel().tolist())) == 4


@pytest.mark.parametrize("vocab", [32_000, 49_152, 128_256, 151_936, 32_768])
def test_real_vocabularies_are_not_padded(vocab):
    assert vocab % block_size(vocab) == 0


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 2.0}],
)
def test_a_value_out_of_range_is_refused_by_name(values):
    [name] = values
    with pytest.raises(ValueError, match=name):
        sampling_params(**values)
