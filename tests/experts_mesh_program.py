"""Run by test_models_experts.py in a process with eight virtual devices: prints a JSON object of what it found."""

import dataclasses
import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import sharded_program

from rljax.models import (
    Experts,
    Forward,
    Lora,
    adapters_of,
    base_config,
    base_params,
    hidden_states,
    init_params,
    is_adapter,
    load_hf,
    logits,
    quantized_params,
    save_hf,
    with_adapters,
)
from rljax.models.layout import param_shardings
from rljax.parallel import make_mesh, mesh_beside, put_batch, spread_mesh, use_mesh
from rljax.sampling import Request, Sampler, SamplerSpec, compile_count, sampling_params

CONFIG = dataclasses.replace(
    sharded_program.CONFIG, family="qwen3_moe", qk_norm=True, experts=Experts(count=8, per_token=2, mlp_dim=24)
)
# Adapters of all matrices, of the experts' too: they lie, and are sent, as these do.
CONFIG = dataclasses.replace(CONFIG, lora=Lora(rank=2, alpha=2.0))


# Loads come home with the gradient of the bias that chooses.
BIASED = dataclasses.replace(
    sharded_program.CONFIG,
    experts=Experts(
        count=8, per_token=2, mlp_dim=24, selection_bias=True, groups=4, kept_groups=2, shared=1, dense_layers=1
    ),
)


# Codes and scales are split as the matrices are: no width is less than a block a device.
QUANTIZED = dataclasses.replace(
    sharded_program.CONFIG,
    embed_dim=128,
    head_dim=16,
    experts=Experts(count=8, per_token=2, mlp_dim=64, biases=True, shared=1),
    lora=Lora(rank=2, alpha=2.0),
    quantized="int8",
)


def quantized_on(params, mesh):
    """(loss, gradient of the adapters) of the mixture `QUANTIZED`, on a mesh or on one device."""
    data = sharded_program.batch()

    def loss(adapters, params, data):
        whole = with_adapters(params, adapters)
        hidden = hidden_states(QUANTIZED, whole, data["tokens"], data["positions"], data["end"])
        scores = jax.nn.log_softmax(logits(QUANTIZED, whole, hidden)[:, :-1])
        return -jnp.take_along_axis(scores, data["tokens"][:, 1:, None], -1).mean()

    step = jax.jit(jax.value_and_grad(loss))
    if mesh is None:
        return step(adapters_of(params), params, data)
    with use_mesh(mesh):
        return step(adapters_of(params), params, put_batch(mesh, data))


def of_quantized(mesh):
    """How far a mesh is from one device, in a decoder too; and what a device holds."""
    plain = dataclasses.replace(QUANTIZED, quantized=None)
    whole = init_params(plain, jax.random.key(2))
    params = quantized_params(QUANTIZED, whole)
    # Made where the matrices lie, without gathering any.
    in_place = quantized_params(QUANTIZED, jax.device_put(whole, param_shardings(plain, mesh)))
    in_place = {name: in_place["layers"][name] for name in ("gate", "gate_scale", "down", "q")}
    rng = np.random.default_rng(1)
    for name, adapter in params["layers"].items():
        if is_adapter(name):
            params["layers"][name] = adapter + rng.normal(size=adapter.shape).astype(np.float32) / 20

    sharded = jax.device_put(params, param_shardings(QUANTIZED, mesh))
    (want, want_gradient), (value, gradient) = quantized_on(params, None), quantized_on(sharded, mesh)
    decoded, decoder_gate, _ = sample(sharded, mesh, QUANTIZED)
    held = (sharded["layers"][name].addressable_shards[0].data for name in ("gate", "gate_scale", "down_scale"))
    return {
        "quantized_loss": abs(float(value - want)),
        "quantized_gradient": sharded_program.difference(gradient, want_gradient),
        "quantized_decoded": sharded_program.difference(decoded, sample(params, None, QUANTIZED)[0]),
        "quantized_shapes": [part.shape for part in held],
        "quantized_decoder_gate": decoder_gate,
        "quantized_in_place": sharded_program.difference(in_place, {name: params["layers"][name] for name in in_place}),
        "quantized_parts": {name: x.addressable_shards[0].data.size / x.size for name, x in in_place.items()},
    }


def biased_on(mesh):
    """(loss, gradient) of the mixture `BIASED`, on a mesh or on one device."""
    data = sharded_program.batch()
    params = init_params(BIASED, jax.random.key(1))
    params["layers"]["selection_bias"] += np.linspace(-0.01, 0.01, 8, dtype=np.float32)

    def loss(params, data):
        hidden = hidden_states(
            BIASED, params, data["tokens"], data["positions"], data["end"], forward=Forward(counts_load=True)
        )
        scores = jax.nn.log_softmax(logits(BIASED, params, hidden)[:, :-1])
        return -jnp.take_along_axis(scores, data["tokens"][:, 1:, None], -1).mean()

    step = jax.jit(jax.value_and_grad(loss))
    if mesh is None:
        return step(params, data)
    with use_mesh(mesh):
        return step(jax.device_put(params, param_shardings(BIASED, mesh)), put_batch(mesh, data))


def of_biased(mesh):
    """How far a mesh is from one device."""
    (want, want_gradient), (value, gradient) = biased_on(None), biased_on(mesh)
    loads, want_loads = (g["layers"].pop("selection_bias") for g in (gradient, want_gradient))
    return {
        "biased_loss": abs(float(value - want)),
        "biased_gradient": sharded_program.difference(gradient, want_gradient),
        "loads": sharded_program.difference(loads, want_loads),
        "load_sum": float(loads[0].sum()),
    }


def main():
    sharded_program.CONFIG = CONFIG
    loss = jax.jit(lambda params, data: sharded_program.loss(params, data, "attention_saved"))
    step = jax.jit(jax.value_and_grad(lambda params, data: sharded_program.loss(params, data)[0]))
    params = jax.tree.map(np.asarray, init_params(CONFIG, jax.random.key(0)))
    rng = np.random.default_rng(0)
    for name, adapter in params["layers"].items():
        if is_adapter(name):
            params["layers"][name] = adapter + rng.normal(size=adapter.shape).astype(np.float32) / 20
    data = sharded_program.batch()
    want, want_gradient = step(params, data)
    want_scores = loss(params, data)[1]

    mesh = make_mesh(fsdp=2, tensor=2, expert=2)
    with use_mesh(mesh):
        sharded = jax.device_put(params, param_shardings(CONFIG, mesh))
        value, gradient = step(sharded, put_batch(mesh, data))
        one = jax.tree.map(lambda x: x[:1], data)
        one_row = loss(sharded, one)[1]
    decoded, decoder_gate, compiles = sample(sharded, mesh)
    with tempfile.TemporaryDirectory() as folder:
        plain = base_config(CONFIG)
        save_hf(folder, plain, base_params(sharded))
        _, loaded = load_hf(folder, shardings=param_shardings(plain, mesh))
    return {
        **of_biased(mesh),
        **of_quantized(mesh),
        "loss": abs(float(value - want)),
        "gradient": sharded_program.difference(gradient, want_gradient),
        "decoded": sharded_program.difference(decoded, sample(params, None)[0]),
        "one_row": sharded_program.difference(one_row, want_scores[:1]),
        "gate_shape": sharded["layers"]["gate"].addressable_shards[0].data.shape,
        "decoder_gate_shape": decoder_gate,
        "compiles": compiles,
        "loaded": sharded_program.difference(loaded, base_params(params)),
        "loaded_gate_shape": loaded["layers"]["gate"].addressable_shards[0].data.shape,
        "beside": dict(mesh_beside(mesh, jax.devices()[:4]).shape),
        "spread": dict(spread_mesh(mesh).shape),
    }


def sample(params, mesh, config=CONFIG):
    """(log-probs of what a decoder samples, shape of a device's part of its experts, programs compiled after its
    warm-up)."""
    spec = SamplerSpec(prompt_buckets=(4,), max_new_tokens=4, prompt_slots=4, sample_slots=1)
    sampler = Sampler(config, spec, mesh=mesh)
    sampler.set_params(params)
    sampler.warmup()
    before = compile_count()
    requests = [Request(prompt=[7 + i, 3, i], prompt_id=i, sample_ids=(0, 1)) for i in range(4)]
    groups = sampler.generate(requests, sampling_params(), seed=0, step=0)
    logprobs = np.stack([one.logprobs for group in groups for one in group])
    gate = sampler._weights()["layers"][0]["gate"]
    return logprobs, gate.addressable_shards[0].data.shape, compile_count() - before


if __name__ == "__main__":
    print(json.dumps(main()))
