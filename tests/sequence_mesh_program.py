"""Run by test_models_sequence_mesh.py on 8 virtual devices: prints JSON of what shared sequences compute and send."""

import dataclasses
import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from test_training_critic import VALUED, weights
from test_training_learner import CONFIG, params, rollout

from rljax.batching import PackConfig, layout, loss_mask
from rljax.models import Experts, Forward, fresh_config, init_params, param_shardings
from rljax.parallel import batch_sharding, collectives, decoding_mesh, make_mesh, replicated, use_mesh
from rljax.parallel.hlo import dimensions
from rljax.sampling.score import score_tokens, score_values

# Every layer has a rotation of its own, and norms go over what `tensor` splits.
OTHERWISE = dataclasses.replace(
    CONFIG,
    num_layers=3,
    sliding_window=5,
    sliding_layers=(True, False, False),
    local_rope_theta=100.0,
    rotated_layers=(True, True, False),
    qk_norm=True,
    qk_norm_whole=True,
    post_norms=True,
    norm_offset=True,
    activation="gelu_tanh",
    embed_scale=4.0,
    score_scale=0.7,
    logits_divisor=0.5,
)
# Two heads of keys in two layers of three, and experts.
HYBRID = fresh_config(
    "qwen3_5_moe_text",
    vocab_size=CONFIG.vocab_size,
    num_layers=4,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=16,
    max_position=64,
    experts=Experts(count=4, per_token=2, mlp_dim=16),
)
PACKINGS = {
    "forest": PackConfig(pack_length=64, microbatch_size=4, length_buckets=(64,)),
    "flat": PackConfig(pack_length=64, microbatch_size=4, length_buckets=(64,), share_prefixes=False),
}


def objective(score, config, remat, tree, packed, by):
    scored = score(config, tree, packed, chunk=16, forward=Forward(remat))
    return sum(jnp.sum(x * y) for x, y in zip(scored, by, strict=True)), scored


def compiled(mesh, packing, what, remat):
    """(program, its results): loss, scores and gradients."""
    batch, _ = rollout()
    packed = jax.tree.map(lambda x: x[0], layout(batch, loss_mask(batch), PACKINGS[packing]).packed)
    by = np.random.default_rng(1).normal(size=(2, *packed.score_index.shape)).astype(np.float32)
    models = {
        "tokens": (score_tokens, CONFIG, params()),
        "values": (score_values, VALUED, weights()),
        "otherwise": (score_tokens, OTHERWISE, init_params(OTHERWISE, jax.random.key(0))),
        "hybrid": (score_tokens, HYBRID, init_params(HYBRID, jax.random.key(0))),
    }
    score, config, tree = models[what]

    fn = jax.value_and_grad(functools.partial(objective, score, config, remat), has_aux=True)
    if mesh is None:
        return None, jax.jit(fn)(tree, packed, by)
    layouts = param_shardings(config, mesh)
    arguments = jax.device_put((tree, packed, by), (layouts, batch_sharding(mesh), replicated(mesh)))
    with use_mesh(mesh):
        out = (None, layouts)
        program = jax.jit(fn, out_shardings=out).lower(*arguments).compile()
    return program, program(*arguments)


def measure(shape, packing, what, remat):
    _, ((loss, scores), grads) = compiled(None, packing, what, "none")
    mesh = make_mesh(*shape)
    program, ((own_loss, own_scores), own_grads) = compiled(mesh, packing, what, remat)

    largest = max(float(np.max(np.abs(x))) for x in jax.tree.leaves(grads))
    pairs = zip(jax.tree.leaves(own_grads), jax.tree.leaves(grads), strict=True)
    sent = [(one.kind, math.prod(dimensions(text)), one.times) for one in collectives(program) for text in one.shapes]
    rows = PACKINGS[packing].microbatch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    return {
        "loss": abs(float(own_loss) - float(loss)) / abs(float(loss)),
        "scores": max(float(np.max(np.abs(np.asarray(a) - b))) for a, b in zip(own_scores, scores, strict=True)),
        "gradients": max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in pairs) / largest,
        "sent": sent,
        "keys": rows * 64 * CONFIG.num_kv_heads * CONFIG.head_dim // mesh.shape["tensor"],
        "states": rows * 64 * CONFIG.embed_dim,
        "weight": CONFIG.embed_dim * CONFIG.mlp_dim // mesh.shape["tensor"],
    }


def main(cases):
    assert jax.device_count() == 8
    found = {}
    for case in cases:
        shape, packing, what, *rest = case.split()
        found[case] = measure([int(n) for n in shape.split("x")], packing, what, *(rest or ["none"]))

    mesh = make_mesh(1, 2, 2, 2)
    decoding = decoding_mesh(mesh)
    order = [x.id for x in decoding.devices.flat] == [x.id for x in mesh.devices.flat]
    print(json.dumps({"cases": found, "decoding": [dict(decoding.shape), order]}))


if __name__ == "__main__":
    main(sys.argv[1:])
