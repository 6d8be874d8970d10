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
from rljax.models.quantized import _NF4, dequantize, quantize
from rljax.sampling import Request, Sampler, SamplerSpec, sampling_params

PLAIN = DecoderConfig(
    vocab_size=24, num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128, max_position=64
)
LORA = Lora(rank=3, alpha=6.0)
KINDS = ("int8", "nf4")
BASE = init_params(PLAIN, jax.random.key(0))
IDS = np.arange(14).reshape(2, 7) % PLAIN.vocab_size


def kept(kind, lora=LORA):
    return dataclasses.replace(PLAIN, quantized=kind, lora=lora)


def adapters(lora=LORA):
    """Those of a config, moved away from where they begin."""
    fresh = init_params(dataclasses.replace(PLAIN, lora=lora), jax.random.key(1))
    return {
        "layers": {
            name: x + 0.1 * jax.random.normal(jax.random.key(len(name)), x.shape)
            for name, x in fresh["layers"].items()
            if "lora" in name
        }
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
def test_a_model_computes_with_what_its_codes_stand_for(kind):
    """Logits and the gradients of adapters, with DoRA too, which looks at the matrices by itself."""
    for lora in (LORA, dataclasses.replace(LORA, dora=True)):
        config = kept(kind, lora)
        params = with_adapters(quantized_params(config, BASE), adapters(lora))
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), abstract_params(config))
        assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), params) == shapes

        whole = dequantized_params(config, params)
        plain = dataclasses.replace(PLAIN, lora=lora)
        np.testing.assert_allclose(outputs(config, params), outputs(plain, whole), atol=1e-6)
        merged = merged_params(config, params)
        np.testing.assert_allclose(outputs(base_config(config), merged), outputs(plain, whole), atol=2e-6)
        assert np.abs(outputs(plain, whole) - outputs(plain, with_adapters(BASE, adapters(lora)))).max() > 1e-4

        cotangent = np.random.default_rng(0).normal(size=(*IDS.shape, PLAIN.vocab_size))

        def gradient(config, params, lora=lora, cotangent=cotangent):
            def loss(moved):
                return jnp.sum(outputs(config, with_adapters(params, moved)) * cotangent)

            return jax.grad(loss)(adapters(lora))

        got, want = gradient(config, params), gradient(plain, whole)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_keeps_them_and_says_the_models_log_probs(kind):
    config = kept(kind)
    params = with_adapters(quantized_params(config, BASE), adapters())
    sampler = Sampler(config, SamplerSpec(prompt_slots=1, sample_slots=1, prompt_buckets=(4,), max_new_tokens=4))
    sampler.set_params(params)
    held = sampler._params["layers"][0]
    assert held["gate"].nbytes == params["layers"]["gate"].nbytes // PLAIN.num_layers
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
    experts = Experts(count=4, per_token=2, mlp_dim=64)
    with pytest.raises(ValueError, match="quantized=int8 is of layers with one MLP, and this model has experts"):
        dataclasses.replace(PLAIN, family="qwen3_moe", qk_norm=True, experts=experts, quantized="int8")
