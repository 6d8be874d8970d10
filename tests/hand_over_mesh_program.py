"""Run by test_sampling_mesh.py in a process with eight virtual devices: prints a JSON object.

A sampler on the first four devices is given weights that lie there, on the other four, and on the host.
"""

import json

import jax
import numpy as np

from rljax.models import DecoderConfig, init_params, param_shardings
from rljax.parallel import make_mesh
from rljax.sampling import Request, Sampler, SamplerSpec, Turn, TurnDecoder, TurnDecoderSpec, sampling_params

CONFIG = DecoderConfig(
    vocab_size=96, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, tied_embeddings=True
)


def sample(mesh, params):
    sampler = Sampler(
        CONFIG, SamplerSpec(prompt_buckets=(8,), max_new_tokens=6, prompt_slots=4, sample_slots=2), mesh=mesh
    )
    sampler.set_params(params)
    requests = [Request([3 + i] * (1 + i), i, range(2)) for i in range(4)]
    groups = sampler.generate(requests, sampling_params(), seed=3, step=4)
    return {
        "logprobs": [sample.logprobs.tolist() for group in groups for sample in group],
        "devices": sorted({d.id for leaf in jax.tree.leaves(sampler._params) for d in leaf.devices()}),
    }


def speak(mesh, params):
    spec = TurnDecoderSpec(conversations=8, rows=4, context_length=64, max_new_tokens=6, prefill_chunks=(4, 16))
    decoder = TurnDecoder(CONFIG, spec, mesh=mesh)
    decoder.set_params(params)
    decoder.begin(sampling_params(), seed=3, step=4)
    for i in range(4):
        decoder.submit(Turn(i, [7 + i] * (3 + i), i, i))
    results = []
    while decoder.num_open:
        results += decoder.run()
    return {
        "logprobs": [result.logprobs.tolist() for result in sorted(results, key=lambda r: r.turn.conversation)],
        "devices": sorted({d.id for leaf in jax.tree.leaves(decoder._params) for d in leaf.devices()}),
    }


if __name__ == "__main__":
    own = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    others = make_mesh(2, 2, 1, devices=jax.devices()[4:])
    host = jax.tree.map(lambda x: 4 * np.asarray(x), init_params(CONFIG, jax.random.key(0)))
    trained = jax.device_put(host, param_shardings(CONFIG, others))
    places = {"own": jax.device_put(host, param_shardings(CONFIG, own)), "others": trained, "host": host}
    found = {name: {"sampler": sample(own, p), "turns": speak(own, p)} for name, p in places.items()}
    # The trainer's weights stay where they were, and whole.
    found["kept"] = all(
        leaf.sharding.device_set == set(others.devices.flat) and np.array_equal(leaf, whole)
        for leaf, whole in zip(jax.tree.leaves(trained), jax.tree.leaves(host), strict=True)
    )
    print(json.dumps(found))
