"""Divergences of whole distributions, and the head over two models that computes them a chunk at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import float64

from rljax.algorithms import GKD
from rljax.losses import forward_kl, jensen_shannon, reverse_kl
from rljax.models import DecoderConfig, head_params, init_params
from rljax.sampling import sampling_params
from rljax.sampling.divergence import DivergenceHead, States, TopTokens, divergence_hidden, top_tokens

P = np.array([0.6, 0.25, 0.1, 0.05])
Q = np.array([0.4, 0.1, 0.3, 0.2])
EACH = {"forward": forward_kl(), "reverse": reverse_kl(), "jsd": jensen_shannon(0.3)}


def slopes_of(found, q):
    """By a student's logits."""
    return np.asarray(np.asarray(q) * (found.slopes - found.mean_slope[..., None]))


@pytest.mark.parametrize(
    ("divergence", "value", "gradient"),
    [
        (forward_kl(), 0.2931758009, [-0.2, -0.15, 0.2, 0.15]),
        (reverse_kl(), 0.3530274424, [-0.3033970202, -0.1269318174, 0.2236754539, 0.2066533837]),
        (jensen_shannon(0.1), 0.0264939770, None),
        (jensen_shannon(0.5), 0.0769268372, None),
        (jensen_shannon(0.9), 0.0305741001, None),
    ],
)
def test_divergences_are_the_worked_ones_and_their_slopes_finite_differences(divergence, value, gradient):
    with float64():
        z = np.log(Q)

        def at(z):
            return float(divergence(jnp.log(P), jax.nn.log_softmax(jnp.asarray(z))).value)

        found = divergence(jnp.log(P), jnp.log(Q))
        step = 1e-6 * np.eye(4)
        differences = [(at(z + step[i]) - at(z - step[i])) / 2e-6 for i in range(4)]
        assert float(found.value) == pytest.approx(value, abs=1e-9)
        np.testing.assert_allclose(slopes_of(found, Q), differences, atol=1e-8)
        if gradient:
            np.testing.assert_allclose(slopes_of(found, Q), gradient, atol=1e-9)


def test_jensen_shannon_tends_to_either_kl():
    with float64():
        p, q = jnp.log(P), jnp.log(Q)
        assert float(jensen_shannon(1e-7)(p, q).value) / 1e-7 == pytest.approx(0.2931758009, abs=1e-6)
        assert float(jensen_shannon(1 - 1e-7)(p, q).value) / 1e-7 == pytest.approx(0.3530274424, abs=1e-6)
    with pytest.raises(ValueError, match=r"beta=1.0 must be between 0 and 1"):
        jensen_shannon(1.0)


@pytest.mark.parametrize(
    ("beta", "loss", "slopes"),
    [
        (0.0, 1.591904201195755, [0.0263753323, 0.0887798233, 0.4533148299, -0.0891943116, -0.4792756739]),
        (0.3, 0.28076881759510725, [0.0029411070, 0.0107370306, 0.0539692337, -0.0285203459, -0.0391270255]),
        (1.0, 1.9979459365646939, [0.0004701460, 0.1014966134, 0.3620338086, -0.3105711067, -0.1534294613]),
    ],
)
def test_gkd_has_the_divergence_of_trl(beta, loss, slopes):
    """TRL 1.16's `generalized_jsd_loss` at temperature 0.7, the second of three tokens left out, as
    benchmarks/parity/peer_trl.py calls it."""
    x = np.arange(15).reshape(3, 5)
    with float64():
        log_p, log_q = (jax.nn.log_softmax(jnp.asarray(z) / 0.7) for z in (2 * np.cos(0.9 * x), np.sin(1.7 * x)))
        found = GKD(beta=beta).divergence()(log_p, log_q)
        assert float(found.value[0] + found.value[2]) / 2 == pytest.approx(loss, abs=1e-12)
        np.testing.assert_allclose(slopes_of(found, np.exp(log_q))[2] / 0.7 / 2, slopes, atol=1e-9)


ROWS, LENGTH, VOCAB = 2, 11, 13
STUDENT = DecoderConfig(
    vocab_size=VOCAB + 3,
    tokenizer_size=VOCAB,  # the last three rows of the head pad it
    num_layers=1,
    embed_dim=6,
    num_heads=1,
    num_kv_heads=1,
    head_dim=6,
    mlp_dim=8,
    max_position=16,
    tied_embeddings=True,
)
TEACHER = DecoderConfig(
    vocab_size=VOCAB,
    num_layers=1,
    embed_dim=4,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=8,
    max_position=16,
    tied_embeddings=False,
)
TEMPERED = sampling_params(temperature=0.7)
WANTED = np.arange(LENGTH) < np.array([[LENGTH - 1], [4]])


def states(config, seed):
    """Weights, and hidden states that give logits of some size."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = jax.tree.map(lambda x: 20 * x, init_params(config, keys[0]))
    return params, jax.random.normal(keys[1], (ROWS, LENGTH, config.embed_dim))


def numpy_divergence(name, log_p, log_q):
    p, q = np.exp(log_p), np.exp(log_q)
    if name == "forward":
        return (p * (log_p - log_q)).sum(-1)
    if name == "reverse":
        return (q * (log_q - log_p)).sum(-1)
    m = 0.3 * p + 0.7 * q
    return 0.3 * (p * (log_p - np.log(m))).sum(-1) + 0.7 * (q * (log_q - np.log(m))).sum(-1)


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reference(name, support, student, hidden, teacher, teacher_hidden):
    """In float64 NumPy, whole arrays at once: the sum over wanted tokens of weights 1, 2, 3 and so on."""
    log_q = log_softmax(hidden @ student[:VOCAB].T / 0.7)
    log_p = log_softmax(teacher_hidden @ teacher.T / 0.7)
    if support:
        top = np.argsort(-log_p, axis=-1)[..., :support]
        cells = []
        for x in (log_p, log_q):
            inside = np.take_along_axis(x, top, -1)
            rest = np.log(np.exp(x).sum(-1) - np.exp(inside).sum(-1))
            cells.append(np.concatenate([inside, rest[..., None]], -1))
        log_p, log_q = cells
    return (np.where(WANTED, numpy_divergence(name, log_p, log_q), 0) * weights()).sum()


def weights():
    return 1.0 + np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)


def through_the_head(name, support, chunk):
    """Value, and gradients of the student's head and hidden states."""
    params, hidden = states(STUDENT, 0)
    teacher, teacher_hidden = states(TEACHER, 1)
    how = DivergenceHead(EACH[name], None if support else TEACHER, chunk)
    if support:
        said = top_tokens(TEACHER, teacher, teacher_hidden, TEMPERED, count=support, chunk=chunk)
    else:
        said = States(teacher_hidden, head_params(TEACHER, teacher))

    def total(params, hidden):
        return jnp.sum(weights() * divergence_hidden(STUDENT, params, hidden, said, WANTED, TEMPERED, how=how))

    value, (d_params, d_hidden) = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(params, hidden)
    arrays = (params["embedding"], hidden, teacher["head"], teacher_hidden)
    return value, np.asarray(d_params["embedding"]), np.asarray(d_hidden), [np.asarray(x, np.float64) for x in arrays]


@pytest.mark.parametrize("support", [0, 4])
@pytest.mark.parametrize("name", EACH)
def test_value_and_gradient_are_those_of_numpy_in_any_chunks(name, support):
    value, d_head, d_hidden, arrays = through_the_head(name, support, chunk=2 * LENGTH)
    assert value == pytest.approx(reference(name, support, *arrays), rel=2e-5)

    def difference(argument, index):
        moved = []
        for sign in (1, -1):
            own = [x.copy() for x in arrays]
            own[argument][index] += sign * 1e-6
            moved.append(reference(name, support, *own))
        return (moved[0] - moved[1]) / 2e-6

    for index in [(0, 1), (5, 3), (12, 0)]:
        assert d_head[index] == pytest.approx(difference(0, index), rel=1e-3, abs=1e-3)
    for index in [(0, 0, 2), (1, 3, 5)]:
        assert d_hidden[index] == pytest.approx(difference(1, index), rel=1e-3, abs=1e-3)
    assert not d_head[VOCAB:].any() and not d_hidden[~WANTED].any()

    for part, whole in zip(through_the_head(name, support, chunk=6)[:3], (value, d_head, d_hidden), strict=True):
        np.testing.assert_allclose(part, whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", EACH)
def test_equal_distributions_give_value_and_gradient_exactly_0(name):
    log_p = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (50, 9)))
    found = EACH[name](log_p, log_p)
    assert not np.asarray(found.value).any()
    assert not np.asarray(jnp.exp(log_p) * (found.slopes - found.mean_slope[..., None])).any()


@pytest.mark.parametrize("support", [0, 4])
def test_a_teacher_that_is_the_student_is_no_further_away_than_two_products_are_rounded_apart(support):
    params, hidden = states(STUDENT, 0)
    how = DivergenceHead(EACH["reverse"], None if support else STUDENT, 6)
    said = States(hidden, head_params(STUDENT, params))
    if support:
        said = top_tokens(STUDENT, params, hidden, TEMPERED, count=support, chunk=6)

    def total(params, hidden):
        return jnp.sum(divergence_hidden(STUDENT, params, hidden, said, WANTED, TEMPERED, how=how))

    value, gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(params, hidden)
    for x in (value, *jax.tree.leaves(gradient)):
        np.testing.assert_allclose(x, 0, atol=2e-5)


def test_a_support_of_all_tokens_but_one_is_the_whole_divergence():
    whole = through_the_head("reverse", 0, 6)[0]
    assert through_the_head("reverse", VOCAB - 1, 6)[0] == pytest.approx(float(whole), rel=2e-5)
    params, hidden = states(TEACHER, 1)
    with pytest.raises(ValueError, match="support=13 must be above 0 and below the 13 tokens"):
        top_tokens(TEACHER, params, hidden, None, count=VOCAB, chunk=6)


def test_what_is_left_out_counts_as_one_cell():
    """The worked example: the teacher's two best of four tokens, and the rest."""
    with float64():
        cells = [jnp.log(jnp.asarray([x[0], x[1], x[2] + x[3]])) for x in (P, Q)]
        assert float(forward_kl()(*cells).value) == pytest.approx(0.2917558272, abs=1e-9)
        assert float(reverse_kl()(*cells).value) == pytest.approx(0.3481712857, abs=1e-9)


def test_distributions_without_overlap_stay_finite():
    far = jnp.asarray([[0.0, -1000.0, -jnp.inf]]), jnp.asarray([[-1000.0, 0.0, -jnp.inf]])
    for divergence in EACH.values():
        assert all(np.isfinite(x).all() for x in divergence(*far))


def test_the_rest_is_a_number_where_it_is_empty():
    said = TopTokens(np.array([[[0, 1]]]), np.log([[[0.5, 0.5]]]).astype(np.float32), np.array([[-np.inf]], np.float32))
    params, hidden = states(STUDENT, 0)
    how = DivergenceHead(reverse_kl(), None, 8)
    one = np.ones((1, 1), bool)
    value = divergence_hidden(STUDENT, params, hidden[:1, :1], said, one, None, how=how)
    assert np.isfinite(value).all()
