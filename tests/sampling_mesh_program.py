"""Run by test_sampling_mesh.py in a process with eight virtual devices: prints, per mesh, what was sampled."""

import gc
import json
import sys

import jax
import numpy as np

from rljax.experiment.memory import bytes_of
from rljax.models import DecoderConfig, init_params
from rljax.models.layout import param_shardings
from rljax.parallel import make_mesh
from rljax.sampling import (
    Fork,
    Request,
    Sampler,
    SamplerSpec,
    Stops,
    Turn,
    TurnDecoder,
    TurnDecoderSpec,
    compile_count,
    sampling_params,
)

CONFIG = DecoderConfig(
    vocab_size=96, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, tied_embeddings=True
)


def fork_twice(samples):
    return [Fork(i, len(samples[i].tokens) // 2, 10 + i) for i in (0, 2)] if len(samples) == 3 else []


def sample(mesh):
    spec = SamplerSpec(prompt_buckets=(8,), max_new_tokens=6, prompt_slots=4, sample_slots=2, path_slots=3)
    sampler = Sampler(CONFIG, spec, Stops(tokens=(5,)), mesh)
    params = jax.tree.map(lambda x: 4 * np.asarray(x), init_params(CONFIG, jax.random.key(0)))
    if mesh is not None:
        params = jax.device_put(params, param_shardings(CONFIG, mesh))
    talk = converse(params, mesh)
    sampler.set_params(params)
    sampler.warmup()
    before = compile_count()
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(0, 96, 1 + i).tolist(), i, range(3), rounds=fork_twice) for i in range(7)]
    groups = sampler.generate(requests, sampling_params(top_p=0.95), seed=3, step=4)
    flat = [x for group in groups for x in group]

    # Whatever cache a call had is freed; what goes now is the weights.
    gc.collect()
    held = bytes_of(jax.live_arrays())
    sampler.drop_params()
    return {
        "freed": held - bytes_of(jax.live_arrays()),
        "weights": bytes_of(sampler.plan().weights),
        "tokens": [x.tokens.tolist() for x in flat],
        "logprobs": [x.logprobs.tolist() for x in flat],
        "compiles": compile_count() - before,
        "turns": talk,
    }


def converse(params, mesh):
    """Five conversations of three turns on four rows, and what compiled after the warm-up."""
    spec = TurnDecoderSpec(conversations=8, rows=8, context_length=64, max_new_tokens=6, prefill_chunks=(4, 16))
    decoder = TurnDecoder(CONFIG, spec, Stops(tokens=(5,)), mesh)
    decoder.set_params(params)
    decoder.begin(sampling_params(), seed=3, step=4)
    decoder.warmup()
    before, conversations = compile_count(), [[7 + i] * (3 + i) for i in range(5)]
    for turn in range(3):
        for i, tokens in enumerate(conversations):
            decoder.submit(Turn(i, list(tokens), i, i, turn, prefix_of=0))
        while decoder.num_open:
            for said in decoder.run():
                conversations[said.turn.conversation] += [*said.tokens.tolist(), 9, 10 + turn]
    return {"conversations": conversations, "compiles": compile_count() - before}


if __name__ == "__main__":
    meshes = [[int(n) for n in shape.split("x")] for shape in sys.argv[1:]]
    print(json.dumps([sample(None)] + [sample(make_mesh(*shape)) for shape in meshes]))
