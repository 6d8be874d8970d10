"""Matrices in few bits: the codes by NumPy, and a model of them beside the model that they stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import (
    DecoderConfig,
    Experts,
    Lora,
    abstract_params,
    base_config,
    cast_params,
    dequantized_params,
    hidden_states,
    init_params,
    logits,
    merged_params,
    quantized_params,
    with_adapters,
)
from rljax.models.quantized import _NF4, dequantize, grouped_quantized_product, quantize
from rljax.sampling import Request, Sampler, SamplerSpec, sampling_params

PLAIN = DecoderConfig(
    vocab_size=24, num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128, max_position=64
)
# First layers without experts, and experts that all tokens share.
MIXTURE = dataclasses.replace(
    PLAIN,
    num_layers=3,
    experts=Experts(count=5, per_token=2, mlp_dim=64, selection_bias=True, shared=1, dense_layers=1),
)
# Biases, other activations, and no width but the experts'.
BIASED = dataclasses.replace(
    PLAIN, mlp_dim=100, experts=Experts(count=4, per_token=2, mlp_dim=192, biases=True, limit=7.0, slope=1.702)
)
LORA = Lora(rank=3, alpha=6.0)
KINDS = ("int8", "nf4")
BASE = init_params(PLAIN, jax.random.key(0))
MODELS = {"plain": PLAIN, "mixture": MIXTURE, "biased": BIASED}
IDS = np.arange(14).reshape(2, 7) % PLAIN.vocab_size


def kept(kind, lora=LORA, model=PLAIN):
    return dataclasses.replace(model, quantized=kind, lora=lora)


def adapters(lora=LORA, model=PLAIN):
    """Those of a config, moved away from where they begin."""
    fresh = init_params(dataclasses.replace(model, lora=lora), jax.random.key(1))
    return {
        stack: {
            name: x + 0.1 * jax.random.normal(jax.random.key(len(name)), x.shape)
            for name, x in fresh[stack].items()
            if "lora" in name
        }
        for stack in model.stacks
    }


@functools.partial(jax.jit, static_argnums=0)
def outputs(config, params):
    positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    hidden = hidden_states(config, params, jnp.asarray(IDS), positions, jnp.full(IDS.shape, IDS.shape[1]))
    return logits(config, params, hidden)


def rounded(kind, column):
    """A column's values as a format has them, one after the other, in float64."""
    block = {"int8": 32, "nf4": 64}[kind]
    out = []
    for first in range(0, len(column), block):
        part = [float(x) for x in column[first : first + block]]
        largest = np.float32(max(abs(x) for x in part))
        scale = float(jnp.bfloat16(largest / np.float32(127) if kind == "int8" else largest))
        for x in part:
            step = x / scale if scale else 0.0
            level = (
                max(-127, min(127, round(step))) if kind == "int8" else min(_NF4.tolist(), key=lambda y: abs(y - step))
            )
            out.append(level * scale)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_of_the_nearest_levels_and_become_the_same_codes_again(kind):
    matrix = np.random.default_rng(0).normal(size=(2, 128, 3)).astype(np.float32)
    matrix[0, :64, 1] = 0.0
    # Such as are left of neurons that died.
    matrix[1, :64] *= 1e-7
    codes, scales = quantize(kind, jnp.asarray(matrix))
    bits = 8 * (codes.nbytes + scales.nbytes) / matrix.size
    assert bits == {"int8": 8.5, "nf4": 4.25}[kind]

    got = dequantize(kind, codes, scales, jnp.float32)
    for layer, column in np.ndindex(2, 3):
        np.testing.assert_allclose(got[layer, :, column], rounded(kind, matrix[layer, :, column]), rtol=1e-6)
    again = quantize(kind, got)
    jax.tree.map(np.testing.assert_array_equal, again, (codes, scales))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_meet_the_matrix_of_their_group(kind):
    """Against float64 loops, with an empty group; and only codes are kept for the gradient."""
    rng = np.random.default_rng(3)
    matrices = rng.normal(size=(4, 128, 6)).astype(np.float32)
    codes, scales = quantize(kind, jnp.asarray(matrices))
    for group in range(4):
        alone = quantize(kind, jnp.asarray(matrices[group]))
        jax.tree.map(np.testing.assert_array_equal, alone, (codes[group], scales[group]))

    sizes = [3, 0, 4, 2]
    x = rng.normal(size=(9, 128)).astype(np.float32) / 16
    cotangent = rng.normal(size=(9, 6)).astype(np.float32)
    product = functools.partial(grouped_quantized_product, kind, codes=codes, scales=scales, sizes=jnp.asarray(sizes))
    got, pull = jax.vjp(lambda x: product(x), jnp.asarray(x))
    (got_gradient,) = pull(jnp.asarray(cotangent))
    assert max(a.nbytes for a in jax.tree.leaves(pull)) <= max(codes.nbytes, x.nbytes)

    rows = iter(range(9))
    for group, size in enumerate(sizes):
        matrix = np.stack([rounded(kind, matrices[group, :, column]) for column in range(6)], axis=1)
        for row in [next(rows) for _ in range(size)]:
            np.testing.assert_allclose(got[row], x[row].astype(np.float64) @ matrix, atol=1e-6)
            want = matrix @ cotangent[row].astype(np.float64)
            np.testing.assert_allclose(got_gradient[row], want, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "dora"), [("plain", False), ("plain", True), ("mixture", False), ("biased", False)])
def test_a_model_computes_with_what_its_codes_stand_for(name, dora, kind):
    """Logits and the gradients of adapters, of experts' too; with DoRA, which looks at the matrices by itself."""
    lora = dataclasses.replace(LORA, dora=dora)
    model = MODELS[name]
    base = init_params(model, jax.random.key(0))
    config = kept(kind, lora, model)
    moved = adapters(lora, model)
    params = with_adapters(quantized_params(config, base), moved)
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), abstract_params(config))
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), params) == shapes

    whole = dequantized_params(config, params)
    plain = dataclasses.replace(model, lora=lora)
    np.testing.assert_allclose(outputs(config, params), outputs(plain, whole), atol=1e-6)
    merged = merged_params(config, params)
    np.testing.assert_allclose(outputs(base_config(config), merged), outputs(plain, whole), atol=2e-6)
    assert np.abs(outputs(plain, whole) - outputs(plain, with_adapters(base, moved))).max() > 1e-4

    cotangent = np.random.default_rng(0).normal(size=(*IDS.shape, model.vocab_size))

    def gradient(config, params):
        return jax.grad(lambda moved: jnp.sum(outputs(config, with_adapters(params, moved)) * cotangent))(moved)

    got, want = gradient(config, params), gradient(plain, whole)
    assert all(np.any(x) for x in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_few_bits_give_a_forest_the_numbers_of_its_rows(kind):
    """Three rows with one beginning, packed as a tree and each alone."""
    config = kept(kind, model=MIXTURE)
    base = init_params(MIXTURE, jax.random.key(0))
    params = with_adapters(quantized_params(config, base), adapters(model=MIXTURE))
    prompt = [1, 2, 3, 4]
    ends = ([5, 6, 7], [8, 9, 10], [11, 12, 13])

    def said(*sequence):
        hidden = hidden_states(config, params, *(jnp.asarray(part, jnp.int32)[None] for part in sequence))
        return logits(config, params, hidden)

    tokens = prompt + [token for end in ends for token in end]
    packed = said(tokens, [0, 1, 2, 3, *(3 * [4, 5, 6])], [13] * 4 + [7] * 3 + [10] * 3 + [13] * 3)
    for i, end in enumerate(ends):
        flat = said(prompt + end, range(7), [7] * 7)
        own = np.r_[0:4, 4 + 3 * i : 7 + 3 * i]
        np.testing.assert_allclose(packed[0, own], flat[0], atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "mixture"])
def test_a_decoder_keeps_them_and_says_the_models_log_probs(name, kind):
    model = MODELS[name]
    config = kept(kind, model=model)
    base = init_params(model, jax.random.key(0))
    params = with_adapters(quantized_params(config, base), adapters(model=model))
    sampler = Sampler(config, SamplerSpec(prompt_slots=1, sample_slots=1, prompt_buckets=(4,), max_new_tokens=4))
    sampler.set_params(params)
    held = sampler._params["layers"][-1]
    for matrix in [own for own in held if f"{own}_scale" in held]:
        assert held[matrix].dtype == params["layers"][matrix].dtype, matrix
        assert held[matrix].nbytes == params["layers"][matrix][-1].nbytes, matrix
    ((sample,),) = sampler.generate([Request([1, 2, 3], 0, [0])], sampling_params(), seed=0, step=0)

    ids = np.zeros(IDS.shape, np.int32)
    ids[0] = [1, 2, 3, *sample.tokens]
    positions = jnp.broadcast_to(jnp.arange(7), ids.shape)
    hidden = hidden_states(config, params, jnp.asarray(ids), positions, jnp.full(ids.shape, 7))
    log_p = jax.nn.log_softmax(logits(config, params, hidden)[0])
    np.testing.assert_allclose(sample.logprobs, log_p[np.arange(2, 6), np.asarray(sample.tokens)], atol=1e-5)


def test_casting_leaves_codes_and_scales_as_they_are():
    params = quantized_params(kept("nf4"), BASE)
    cast = cast_params(params, "bfloat16")
    kept_as = {name: str(cast["layers"][name].dtype) for name in ("q", "q_scale", "attention_norm")}
    assert kept_as == {"q": "uint8", "q_scale": "bfloat16", "attention_norm": "bfloat16"}
    wide = cast_params(params, "float32")["layers"]
    assert (str(wide["q"].dtype), str(wide["q_scale"].dtype)) == ("uint8", "bfloat16")


def test_what_cannot_be_kept_so_is_refused():
    with pytest.raises(ValueError, match="quantized=nf4 has blocks of 64 weights, which do not divide mlp_dim=96"):
        dataclasses.replace(PLAIN, mlp_dim=96, quantized="nf4")
    assert dataclasses.replace(PLAIN, mlp_dim=96, quantized="int8").quantized == "int8"

    # Of a mixture, the width of its experts counts, and that of layers without them where there are any.
    narrow = dataclasses.replace(MIXTURE, experts=dataclasses.replace(MIXTURE.experts, mlp_dim=48))
    with pytest.raises(ValueError, match="blocks of 32 weights, which do not divide experts' mlp_dim=48"):
        dataclasses.replace(narrow, quantized="int8")
    with pytest.raises(ValueError, match="blocks of 64 weights, which do not divide mlp_dim=96"):
        dataclasses.replace(MIXTURE, mlp_dim=96, quantized="nf4")
    assert dataclasses.replace(BIASED, quantized="nf4").mlp_dim == 100
