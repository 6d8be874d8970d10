"""Run by test_models_experts.py in a process with eight virtual devices: prints a JSON object of what it found."""

import dataclasses
import json

import jax
import numpy as np
import sharded_program

from rljax.models import Experts, init_params
from rljax.models.layout import param_shardings
from rljax.parallel import make_mesh, put_batch, use_mesh
from rljax.sampling import Request, Sampler, SamplerSpec, compile_count, sampling_params

CONFIG = dataclasses.replace(sharded_program.CONFIG, experts=Experts(count=8, per_token=2, mlp_dim=24))


def main():
    sharded_program.CONFIG = CONFIG
    loss = jax.jit(lambda params, data: sharded_program.loss(params, data, "attention_saved"))
    step = jax.jit(jax.value_and_grad(lambda params, data: sharded_program.loss(params, data)[0]))
    params = jax.tree.map(np.asarray, init_params(CONFIG, jax.random.key(0)))
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
    return {
        "loss": abs(float(value - want)),
        "gradient": sharded_program.difference(gradient, want_gradient),
        "decoded": sharded_program.difference(decoded, sample(params, None)[0]),
        "one_row": sharded_program.difference(one_row, want_scores[:1]),
        "gate_shape": sharded["layers"]["gate"].addressable_shards[0].data.shape,
        "decoder_gate_shape": decoder_gate,
        "compiles": compiles,
    }


def sample(params, mesh):
    """(log-probs of what a decoder samples, shape of a device's part of its experts, programs compiled after its
    warm-up)."""
    spec = SamplerSpec(prompt_buckets=(4,), max_new_tokens=4, prompt_slots=4, sample_slots=1)
    sampler = Sampler(CONFIG, spec, mesh=mesh)
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
