"""Run by test_parallel_collectives.py on 64 virtual devices: prints JSON of what programs send, and compute."""

import contextlib
import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rljax.models import DecoderConfig, abstract_params
from rljax.models.cache import PREFIX_AXES, SUFFIX_AXES, init_cache, resize_prompts
from rljax.models.decoder import embed_split
from rljax.parallel import batch_sharding, collectives, make_mesh, partition_spec, use_mesh
from rljax.parallel.hlo import dimensions
from rljax.sampling import Sampler, SamplerSpec, sampling_params
from rljax.sampling.conversations import (
    Moves,
    copy_conversations,
    extend,
    init_conversations,
    keep_turns,
    lay_conversations,
)
from rljax.sampling.generate import copy_prompt, draw, prefill
from rljax.sampling.logits import rules_of
from rljax.sampling.score import score_hidden
from rljax.sampling.weights import decode_shardings, decode_weights

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


def sent_by(compiled):
    """(kind, elements on a device, whether it stands in a loop) of every array that a program sends."""
    return [
        (one.kind, math.prod(dimensions(shape)), one.times > 1)
        for one in collectives(compiled, data_loops=(2,))
        for shape in one.shapes
    ]


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
        return sent_by(compiled), compiled(*arguments)


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


def embeddings():
    """What embedding tokens and its gradient send, and what they compute beside one device."""
    config = dataclasses.replace(HEAD, vocab_size=VOCAB)
    rng = np.random.default_rng(1)
    table = rng.normal(size=(VOCAB, DIM)).astype(np.float32)
    # Few tokens, so that many places share one.
    tokens = rng.choice(VOCAB, 9)[rng.integers(0, 9, (ROWS, LENGTH))].astype(np.int32)
    by = rng.normal(size=(ROWS, LENGTH, DIM)).astype(np.float32)

    def gradient(table, tokens, by):
        x, back = jax.vjp(lambda table: embed_split(config, {"embedding": table}, tokens), table)
        return x, *back(by)

    want = jax.device_get(jax.jit(gradient)(table, tokens, by))
    found = {}
    for mesh_name in MESHES:
        mesh = mesh_of(mesh_name)
        rows = batch_sharding(mesh)
        split = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
        arguments = jax.device_put((table, tokens, by), (split, rows, rows))
        with use_mesh(mesh):
            compiled = jax.jit(gradient, out_shardings=(rows, split)).lower(*arguments).compile()
            x, d_table = compiled(*arguments)
        found[mesh_name] = {
            "sent": sent_by(compiled),
            "equal": bool(np.array_equal(x, want[0])),
            "gap": largest_gap(d_table, want[1]),
            "table": VOCAB * DIM,
            "tokens": ROWS * LENGTH,
            "states": ROWS * LENGTH * DIM,
            **mesh.shape,
        }
    return found


DECODER = DecoderConfig(vocab_size=96, num_layers=1, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64)
SLOTS, COLUMNS, TOKENS = 128, 64, 16


def stores():
    """What moving and computing keys and values sends, and the share of the products that a device makes."""
    found = {}
    params = jax.eval_shape(lambda p: decode_weights(DECODER, p), abstract_params(DECODER))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    some = jax.ShapeDtypeStruct((SLOTS,), jnp.int32)
    moves = Moves(conversation=some, other=some, start=some, column=some, mark=some, count=number)
    tokens = jax.ShapeDtypeStruct((SLOTS, TOKENS), jnp.int32)

    cache = jax.eval_shape(lambda: init_cache(DECODER, SLOTS, 1, COLUMNS, TOKENS))
    kept = jax.eval_shape(lambda: init_conversations(DECODER, SLOTS, COLUMNS, 2))
    programs = {
        "copy_prompt": (copy_prompt, cache, number, number),
        "copy_conversations": (copy_conversations, kept, moves, moves),
        "lay_conversations": (lay_conversations, cache, kept, moves),
        "keep_turns": (keep_turns, kept, cache, moves),
        "resize_prompts": (functools.partial(resize_prompts, 2 * COLUMNS), cache.prefix_k[0]),
        "prefill": (functools.partial(prefill, DECODER), params, cache, tokens, some),
        "extend": (
            functools.partial(extend, DECODER, (COLUMNS // 2, COLUMNS)),
            params,
            kept,
            tokens,
            some,
            some,
        ),
    }
    flops = {}
    for mesh_name in (None, "8", "2x2x2", "64"):
        mesh = mesh_of(mesh_name) if mesh_name else None
        for name, (fn, *arguments) in programs.items():
            if mesh is None and name not in ("prefill", "extend"):
                continue
            if mesh is not None:
                arguments = [on_mesh(mesh, x) for x in arguments]
            with use_mesh(mesh) if mesh else contextlib.nullcontext():
                compiled = jax.jit(fn).lower(*arguments).compile()
            if mesh is None:
                flops[name] = compiled.cost_analysis()["flops"]
                continue
            found[f"{name} on {mesh_name}"] = {
                "sent": sent_by(compiled),
                "one": DECODER.num_kv_heads // mesh.shape["tensor"] * COLUMNS * DECODER.head_dim,
                "states": SLOTS // (mesh.shape["data"] * mesh.shape["fsdp"]) * TOKENS * DECODER.embed_dim,
                "share": compiled.cost_analysis()["flops"] * mesh.size / flops[name] if name in flops else None,
            }
    return found


SAMPLINGS = {
    "greedy": sampling_params(0.0),
    "plain": sampling_params(0.7),
    "top_k": sampling_params(top_k=9),
    "top_p": sampling_params(0.8, top_p=0.9),
    "min_p": sampling_params(min_p=0.05),
    "all": sampling_params(1.1, top_k=20, top_p=0.95, min_p=0.01),
}


DRAW = jax.jit(draw, static_argnums=(3, 4))


def decoding():
    """What drawing from so many tokens sends, by distribution, and what a whole run of steps does in which some tokens
    are suppressed."""
    mesh = mesh_of("2x2x2")
    found = {name: [] for name in (*SAMPLINGS, "decode")}
    for vocab in (VOCAB, 4 * VOCAB):
        own = NamedSharding(mesh, partition_spec(("vocab", "batch", None)))
        logits = jax.ShapeDtypeStruct((vocab, 8, 2), jnp.float32, sharding=own)
        uniform = jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=batch_sharding(mesh))
        for name, sampling in SAMPLINGS.items():
            with use_mesh(mesh):
                found[name].append(sent_by(DRAW.lower(logits, uniform, sampling, rules_of(sampling), 0).compile()))

        config = dataclasses.replace(DECODER, vocab_size=vocab)
        spec = SamplerSpec((8,), max_new_tokens=8, prompt_slots=8, sample_slots=2, suppressed=(3, 5), path_slots=1)
        sampler = Sampler(config, spec, mesh=mesh)
        with use_mesh(mesh):
            lowered = sampler.lower(sampler.plan(), SAMPLINGS["all"])["decode"]
        found["decode"].append(sent_by(lowered.compile()))
    return found


def draws():
    """What parts of a vocabulary draw together, and the whole: tokens, log-probs and entropies."""
    rng = np.random.default_rng(2)
    found = {}
    uniform = rng.integers(0, 2**23, (ROWS, 2)).astype(np.float32) / 2**23
    # Parts of 1024 tokens consist of blocks of the whole, those of 1000 do not.
    for vocab, axis, is_known in ((1024, 0, True), (1000, -1, False)):
        logits = np.moveaxis(3 * rng.normal(size=(vocab, ROWS, 2)).astype(np.float32), 0, axis)
        for name, sampling in SAMPLINGS.items():
            drawn = []
            for parts in (1, 2, 4):
                mesh = make_mesh(1, 1, parts, devices=jax.devices()[:parts])
                with use_mesh(mesh) if parts > 1 else contextlib.nullcontext():
                    made = DRAW(logits, uniform, sampling, rules_of(sampling) if is_known else None, axis)
                drawn.append([np.asarray(x).tolist() for x in made])
            found[f"{vocab}, {name}"] = drawn
    return found


def on_mesh(mesh, tree):
    """Shapes of an argument with the shardings that decoders give it."""
    if isinstance(tree, dict):
        where = decode_shardings(DECODER, mesh)
    else:
        axes = {4: PREFIX_AXES, 5: SUFFIX_AXES}
        where = jax.tree.map(lambda x: NamedSharding(mesh, partition_spec(axes.get(len(x.shape), ()))), tree)
    return jax.tree.map(lambda x, w: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=w), tree, where)


if __name__ == "__main__":
    assert jax.device_count() == 64
    found = {"heads": heads(), "embeddings": embeddings(), "stores": stores(), "decoding": decoding(), "draws": draws()}
    print(json.dumps(found))
