"""Two models at once: shifts, divergences and extrapolation against the sheets' numbers, decoding against loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.analysis import two_models as M
from rljax.analysis.shifts import Shifts, summarize_shifts, token_shifts
from rljax.models import DecoderConfig, hidden_states, init_params, logits
from rljax.sampling import process_logits, sampling_params

CONFIG = DecoderConfig(
    vocab_size=12, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16, tied_embeddings=True
)
PLAIN = sampling_params()


def params(seed):
    return jax.tree.map(lambda x: x * 20 if x.ndim > 1 else x, init_params(CONFIG, jax.random.key(seed)))


def log(p):
    return jnp.log(jnp.asarray(p, jnp.float32))


BASE, POLICY = [0.5, 0.3, 0.15, 0.05], [0.7, 0.2, 0.02, 0.08]


def test_signed_shift_and_extrapolation():
    shift = M.signed_shift(log(BASE), log(POLICY))
    np.testing.assert_allclose(shift, [0.3364722366, -0.4054651081, -2.0149030205, 0.4700036292], rtol=2e-6)
    for gamma, want in [
        (0.1, [0.7124079980, 0.1889899946, 0.0160894727, 0.0825125347]),
        (1.0, [0.7877813505, 0.1071811361, 0.0021436227, 0.1028938907]),
        (0.0, POLICY),
    ]:
        np.testing.assert_allclose(jax.nn.softmax(M.extrapolated(gamma)(log(BASE), log(POLICY))), want, rtol=2e-6)


def test_extrapolation_of_tokens_that_one_model_excludes_stays_finite():
    mixed = M.extrapolated(0.1)(log([1.0, 0.0, 0.0]), log([0.0, 1.0, 0.0]))
    assert np.isfinite(np.asarray(mixed)).all()
    np.testing.assert_allclose(jax.nn.softmax(mixed), [0, 1, 0], atol=1e-6)


JS_BASE = [
    [[0.6, 0.3, 0.1], [0.5, 0.5, 0], [0.98, 0.01, 0.01], [1, 0, 0]],
    [[0.4, 0.4, 0.2], [0.72, 0.18, 0.1], [0.1, 0.8, 0.1], [0, 0, 1]],
]
JS_POLICY = [
    [[0.6, 0.3, 0.1], [0.1, 0.9, 0], [0.97, 0.02, 0.01], [0, 1, 0]],
    [[0.8, 0.1, 0.1], [0.65, 0.25, 0.1], [0.1, 0.75, 0.15], [0, 0, 1]],
]


@pytest.mark.parametrize(
    ("sampling", "want", "switches"),
    [
        (
            PLAIN,
            [0, 0.1017492251, 0.0008623158, 0.6931471806, 0.0906609485, 0.0037561053, 0.0029202350],
            [0, 1, 0, 1, 0, 0, 0],
        ),
        (
            sampling_params(top_p=0.7),
            [0, 0.2157615543, 0, 0.6931471806, 0.2157615543, 0.1075202347, 0],
            [0, 1, 0, 1, 1, 1, 0],
        ),
    ],
)
def test_jensen_shannon_and_the_switch_mask(sampling, want, switches):
    seen = [process_logits(log(p), sampling).reshape(8, 3) for p in (JS_BASE, JS_POLICY)]
    got = np.asarray(M.jensen_shannon(*seen))[:7]
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-7)
    assert got[3] <= np.log(2) + 1e-7
    first, second = (log(p).reshape(8, 3) for p in (JS_BASE, JS_POLICY))
    uniforms = jnp.full((2, 8), 0.5)
    choice = M.switch_where(M.divergence_above(0.1), sampling)(first, second, uniforms, jnp.zeros(8, int))
    np.testing.assert_array_equal(choice.intervened[:7], np.array(switches, bool))
    spent = M.switch_where(M.divergence_above(0.1), sampling, budget=2)(first, second, uniforms, jnp.arange(8))
    np.testing.assert_array_equal(spent.intervened[:7], np.array(switches, bool) & (np.arange(7) < 2))


def test_jensen_shannon_against_float64():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(9), 40), rng.dirichlet(np.ones(9) * 0.1, 40)
    p[:20, :5] = 0
    p /= p.sum(axis=1, keepdims=True)
    mix = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        want = sum(np.where(x > 0, x * np.log(x / mix), 0).sum(axis=1) for x in (p, q)) / 2
    np.testing.assert_allclose(M.jensen_shannon(log(p), log(q)), want, atol=2e-6)


def draws(choose, first, second, count=4000):
    u = jax.random.uniform(jax.random.key(0), (2, count))
    choose = jax.jit(choose)
    rows = [jnp.broadcast_to(log(p), (count, len(p))) for p in (first, second)]
    return choose(*rows, u, jnp.zeros(count, jnp.int32))


def shares(tokens, size):
    return np.bincount(np.asarray(tokens), minlength=size) / len(tokens)


def test_replacement_and_extrapolation_draw_from_the_distributions_they_name():
    """Of the base's tokens, 1 and 2 lie below tau; what they weigh goes to the other distribution."""
    for redraw, target in [
        (M.policy, np.array(POLICY)),
        (M.extrapolated(0.1), np.array([0.712408, 0.18899, 0.0160895, 0.0825125])),
    ]:
        choice = draws(M.redraw_where_shifted(PLAIN, tau=-0.3, redraw=redraw), BASE, POLICY, 40_000)
        want = np.array([0.5, 0, 0, 0.05]) + 0.45 * target
        np.testing.assert_allclose(shares(choice.tokens, 4), want, atol=0.01)
        assert np.mean(choice.intervened) == pytest.approx(0.45, abs=0.01)
        assert np.mean(choice.changed) < np.mean(choice.intervened)
    drafts = draws(M.redraw_where_shifted(PLAIN, tau=-1.0, draft=M.policy), BASE, POLICY, 40_000)
    np.testing.assert_allclose(
        shares(drafts.tokens, 4), np.array(POLICY) - [0, 0, 0.02, 0] + 0.02 * np.array(POLICY), atol=0.01
    )
    assert not np.any(draws(M.redraw_where_shifted(PLAIN, tau=-3.0), BASE, POLICY).intervened)


def test_truncation_acts_after_mixing():
    """top-p 0.5 of the extrapolated distribution is token 0 alone; of the base it would be token 1."""
    base, policy = [0.3, 0.45, 0.25], [0.6, 0.3, 0.1]
    choose = M.redraw_where_shifted(sampling_params(top_p=0.5), tau=-0.3, redraw=M.extrapolated(0.5))
    choice = draws(choose, base, policy)
    drafted = draws(M.redraw_where_shifted(sampling_params(top_p=0.5), tau=-9.0), base, policy)
    assert set(np.asarray(drafted.tokens).tolist()) == {0, 1}  # 0.45 is short of 0.5
    assert set(np.asarray(choice.tokens).tolist()) == {0}  # token 1 has shifted by -0.41 and is drawn again


def test_switching_follows_one_model_or_the_other_and_couples_their_draws():
    never, always = (M.switch_where(M.at_random(share), PLAIN) for share in (0.0, 1.0))
    np.testing.assert_allclose(shares(draws(never, BASE, POLICY, 40_000).tokens, 4), BASE, atol=0.01)
    choice = draws(always, BASE, POLICY, 40_000)
    np.testing.assert_allclose(shares(choice.tokens, 4), POLICY, atol=0.01)
    assert np.asarray(choice.intervened).all()
    same = draws(always, BASE, BASE)
    assert np.asarray(same.intervened).all() and not np.asarray(same.changed).any()
    # With one uniform the tokens differ only where the cumulative sums .5 .8 .95 and .7 .9 .92 disagree.
    assert np.mean(choice.changed) == pytest.approx(0.2 + 0.1 + 0.03, abs=0.01)
    high = M.switch_where(M.entropy_above(1.0), PLAIN)
    assert np.asarray(draws(high, BASE, POLICY).intervened).all()  # 1.14 nats
    assert not np.asarray(draws(high, POLICY, BASE).intervened).any()  # 0.85 nats


@jax.jit
def _last_logits(weights, row):
    at = jnp.arange(row.shape[1])[None]
    hidden = hidden_states(CONFIG, weights, row, at, jnp.full(row.shape, row.shape[1]))
    return logits(CONFIG, weights, hidden[:, -1])


def last_logits(weights, tokens):
    """The model's logits after `tokens`, in one plain forward pass over just these."""
    return _last_logits(weights, np.asarray(tokens, np.int32)[None])


def test_generation_equals_a_loop_over_rows_and_tokens():
    first, second = params(0), params(1)
    prompts = np.array([[3, 1, 4, 0], [5, 0, 0, 0], [2, 7, 0, 0]])
    lengths, new, stop = np.array([3, 1, 2]), 5, 8
    choose = M.switch_where(M.divergence_above(0.05), sampling_params(temperature=1.3), budget=2)
    key = jax.random.key(7)
    spec = M.TwoModelSpec(CONFIG, new, stop_tokens=(stop,))
    generate = jax.jit(lambda rows: M.generate_with_two(spec, first, second, rows, choose, key))
    got = generate(M.Prompts(tokens=prompts, lengths=lengths, ids=np.arange(3)))
    uniforms = np.stack([M.row_uniforms(jax.random.fold_in(key, i), np.arange(3), width=new) for i in (0, 1)])
    one = jax.jit(choose)
    for row in range(3):
        tokens, fired = prompts[row, : lengths[row]].tolist(), []
        for index in range(new):
            seen = [last_logits(weights, tokens) for weights in (first, second)]
            choice = one(*seen, jnp.asarray(uniforms[:, row, index][:, None]), jnp.asarray([sum(fired)]))
            tokens.append(int(choice.tokens[0]))
            fired.append(bool(choice.intervened[0]))
            if tokens[-1] == stop:
                break
        completion = tokens[lengths[row] :]
        assert int(got.lengths[row]) == len(completion)
        assert np.asarray(got.tokens[row])[: len(completion)].tolist() == completion
        assert np.asarray(got.intervened[row])[: len(completion)].tolist() == fired
        assert not np.asarray(got.intervened[row])[len(completion) :].any() and sum(fired) <= 2
        assert not np.asarray(got.tokens[row])[len(completion) :].any()
    assert np.asarray(got.intervened).any()
    order = np.array([2, 0, 1])
    elsewhere = M.Prompts(
        tokens=prompts[order, :3], lengths=lengths[order], ids=order
    )  # narrower padding, other places
    np.testing.assert_array_equal(generate(elsewhere).tokens, np.asarray(got.tokens)[order])


def test_generation_keeps_to_the_real_vocabulary():
    choose = M.switch_where(M.at_random(0.5), PLAIN)
    spec = M.TwoModelSpec(CONFIG, 12, vocab_size=3)
    prompts = M.Prompts(tokens=np.array([[1]]), lengths=np.array([1]), ids=np.array([0]))
    got = M.generate_with_two(spec, params(0), params(1), prompts, choose, jax.random.key(0))
    assert int(np.asarray(got.tokens).max()) < 3 and int(got.lengths[0]) == 12


@pytest.mark.parametrize(("sampling", "chunk"), [(None, 64), (None, 3), (sampling_params(top_p=0.7), 2)])
def test_token_shifts_equal_dense_ones(sampling, chunk):
    base, policy = params(0), params(1)
    tokens = np.random.default_rng(0).integers(0, 12, (2, 8))
    measure = jax.jit(lambda tokens: token_shifts(CONFIG, base, policy, tokens, sampling, chunk=chunk))
    got = jax.device_get(measure(tokens))
    for row in range(2):
        for t in range(1, 8):
            first, second = (np.asarray(last_logits(w, tokens[row, :t]), np.float64)[0] for w in (base, policy))
            p, q = (x - np.log(np.exp(x).sum()) for x in (first, second))
            assert got.signed[row, t] == pytest.approx(q[tokens[row, t]] - p[tokens[row, t]], abs=2e-4)
            favourite = q.argmax()
            assert int(got.base_rank[row, t]) == np.argsort(np.argsort(-p))[favourite]
            assert got.base_logprob[row, t] == pytest.approx(p[favourite], abs=2e-4)
            if sampling is not None:
                p, q = (np.log(_top_p(np.exp(x), 0.7)) for x in (p, q))
            mix = (np.exp(p) + np.exp(q)) / 2
            want = sum(np.nansum(np.exp(x) * np.where(np.isfinite(x), x - np.log(mix), 0)) for x in (p, q)) / 2
            assert got.divergence[row, t] == pytest.approx(want, abs=1e-4)
    for field in dataclasses.fields(got):
        assert not np.asarray(getattr(got, field.name))[:, 0].any()


def _top_p(p, mass):
    order = np.argsort(-p)
    kept = np.zeros_like(p)
    kept[order] = np.where(np.cumsum(p[order]) - p[order] < mass, p[order], 0)
    with np.errstate(divide="ignore"):
        return np.maximum(kept / kept.sum(), 1e-300)


def test_summary_counts_response_tokens_alone():
    mask = np.array([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0]], bool)
    shifts = Shifts(
        signed=np.array([[9.0, 0.5, -0.5, 1.0, 2.0], [9.0, 9.0, 3.0, 0.0, 9.0]]),
        divergence=np.array([[0.9, 0.2, 0.0, 0.0, 0.6], [0.9, 0.9, 0.3, 0.04, 0.9]]),
        base_rank=np.array([[9, 0, 5, 0, 2], [9, 9, 7, 0, 9]]),
        base_logprob=np.log([[1e-9, 0.5, 0.1, 0.9, 0.2], [1e-9, 1e-9, 0.001, 0.9, 1e-9]]),
    )
    got = summarize_shifts(shifts, mask, bins=2)
    assert got.tokens == 6
    assert got.divergence_mean == pytest.approx((0.2 + 0.6 + 0.3 + 0.04) / 6)
    assert got.high_share == pytest.approx(3 / 6)
    assert (got.same_favourite, got.in_base_top3, got.rare_in_base) == pytest.approx((1 / 3, 2 / 3, 1 / 3))
    assert got.signed_mean == pytest.approx(1.0)
    assert got.signed_quantiles == pytest.approx((-0.375, 0.75, 2.75))
    assert got.profile == pytest.approx([(0.2 + 0.0 + 0.3) / 3, (0.0 + 0.6 + 0.04) / 3])
    # Four tokens and two tokens do not reach the last of ten parts.
    assert summarize_shifts(shifts, mask).profile[-1] is None
    nothing = summarize_shifts(shifts, mask & False)
    assert set(nothing.profile) == {None} and nothing.signed_quantiles == (0.0, 0.0, 0.0)


def test_the_replacement_mask_of_the_sheet():
    new = np.array([[-1.1, -0.7, -1.9, -0.1], [-0.5, -2.1, -0.5, -1.0]])
    base = np.array([[-1.3, -0.35, -2.0, -0.2], [-0.6, -1.9, -1.4, -4.0]])
    rest = [np.log(-np.expm1(x)) for x in (base, new)]  # a second token takes what is left
    shift = M.signed_shift(
        *(jnp.asarray(np.stack([x, r], -1), jnp.float32) for x, r in zip((base, new), rest, strict=True))
    )
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    np.testing.assert_allclose(np.asarray(shift)[..., 0][mask], [0.2, -0.35, 0.1, 0.1, 0.1, -0.2, 0.9], atol=1e-6)
    np.testing.assert_array_equal((np.asarray(shift)[..., 0] <= -0.15) & mask, [[0, 1, 0, 0], [0, 1, 0, 0]])
