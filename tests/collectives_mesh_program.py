"""Run by test_collectives.py on 64 virtual devices: prints JSON of what programs send between them, and compute."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from compiled_collectives import collectives
from jax.sharding import NamedSharding, PartitionSpec

from rljax.models import DecoderConfig
from rljax.parallel import batch_sharding, make_mesh, use_mesh
from rljax.sampling import sampling_params
from rljax.sampling.score import score_hidden

ROWS, LENGTH, DIM, VOCAB = 64, 16, 64, 1024
HEAD = DecoderConfig(  # of which the head alone is used
    vocab_size=VOCAB, num_layers=1, embed_dim=DIM, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8
)
MESHES = {"8": (1, 8, 1), "2x2x2": (2, 2, 2), "64": (1, 64, 1), "4x8x2": (4, 8, 2)}
HEADS = [
    ("8", 2, "own"),
    ("8", LENGTH, "own"),
    ("2x2x2", 2, "truncated"),
    ("2x2x2", LENGTH, "own"),
    ("64", 2, "own"),
    ("4x8x2", 2, "own"),
]
"""Mesh, tokens of a row in a chunk, distribution."""


def mesh_of(name):
    shape = MESHES[name]
    return make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def head_arguments(rows=ROWS):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(rows, LENGTH, DIM)).astype(np.float32)
    head = rng.normal(size=(VOCAB, DIM)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (rows, LENGTH)).astype(np.int32)
    # The last chunk holds nothing, and devices have other numbers of tokens.
    wanted = np.arange(LENGTH) < rng.integers(1, LENGTH - 4, (rows, 1))
    return head, hidden, targets, wanted, rng.normal(size=(2, rows, LENGTH)).astype(np.float32)


def head_gradients(head, hidden, targets, wanted, by, *, sampling, chunk, config=HEAD):
    """Gradients by head and hidden states, log-probs and entropies."""

    def objective(head, hidden):
        logprobs, entropies = score_hidden(config, {"head": head}, hidden, targets, wanted, sampling, chunk=chunk)
        return jnp.sum(logprobs * by[0] + entropies * by[1]), (logprobs, entropies)

    return jax.grad(objective, argnums=(0, 1), has_aux=True)(head, hidden)


def head_on(mesh, arguments, **how):
    """(collectives, results) of the compiled gradients under `mesh`."""
    rows = batch_sharding(mesh)
    by_rows = batch_sharding(mesh, axis=1)
    where = (NamedSharding(mesh, PartitionSpec("tensor", "fsdp")), rows, rows, rows, by_rows)
    arguments = jax.device_put(arguments, where)
    with use_mesh(mesh):
        program = jax.jit(lambda *args: head_gradients(*args, **how), out_shardings=((where[0], rows), None))
        compiled = program.lower(*arguments).compile()
        return collectives(compiled.as_text()), compiled(*arguments)


def largest_gap(got, want):
    """Of any number, as a share of the largest of its array."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b))) for a, b in pairs)


def heads():
    """What the vocabulary's head sends, by mesh and chunk, and how far its gradients are from those of one device."""
    found = {}
    arguments = head_arguments()
    samplings = {"own": None, "truncated": sampling_params(0.8, top_p=0.9)}
    want = {
        name: jax.device_get(jax.jit(functools.partial(head_gradients, sampling=sampling, chunk=ROWS))(*arguments))
        for name, sampling in samplings.items()
    }
    for mesh_name, steps, name in HEADS:
        mesh = mesh_of(mesh_name)
        own_rows = ROWS // (mesh.shape["data"] * mesh.shape["fsdp"])
        sent, got = head_on(mesh, arguments, sampling=samplings[name], chunk=own_rows * steps)
        found[f"{mesh_name}, chunks of {steps}, {name}"] = {
            "sent": sent,
            "gap": largest_gap(got, want[name]),
            "head": VOCAB // mesh.shape["tensor"] * DIM,
            "states": own_rows * steps * DIM,
        }
    return found


if __name__ == "__main__":
    assert jax.device_count() == 64
    print(json.dumps({"heads": heads()}))
