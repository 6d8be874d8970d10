"""Run by test_sampling_hybrid.py in a process with eight virtual devices: prints a JSON object of what it found."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from packed_trees import depths, ends, random_parents

from rljax.models import Forward, fresh_config, hidden_states, init_params, logits, sequence_shares
from rljax.models.cache import init_cache
from rljax.models.decoder import abstract_params, recall_of
from rljax.models.layout import param_shardings
from rljax.parallel import collectives, make_mesh, partition_spec, put_batch, use_mesh
from rljax.sampling import Fork, Request, Sampler, SamplerSpec, Turn, TurnDecoder, TurnDecoderSpec, sampling_params
from rljax.sampling.conversations import (
    Marks,
    Moves,
    copy_conversations,
    extend,
    init_conversations,
    keep_turns,
    lay_conversations,
)
from rljax.sampling.path_memories import PathTokens, recall_paths
from rljax.sampling.weights import decode_weights

LENGTH = 40
FRESH = fresh_config(
    "qwen3_5_text",
    vocab_size=96,
    num_layers=4,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    max_position=64,
    tied_embeddings=True,
)
# A layer of each kind.
CONFIG = dataclasses.replace(FRESH, num_layers=2, delta=dataclasses.replace(FRESH.delta, layers=(True, False)))


def forests():
    """Eight packed rows of trees, each with padding behind."""
    parents = [random_parents(seed, LENGTH - 4) for seed in range(8)]
    return {
        "tokens": np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, LENGTH)),
        "positions": np.stack([depths(parent, padding=4) for parent in parents]),
        "end": np.stack([ends(parent, padding=4) for parent in parents]),
    }


def loss(params, data):
    forward = Forward("attention_saved")
    hidden = hidden_states(CONFIG, params, data["tokens"], data["positions"], data["end"], forward=forward)
    logprobs = jax.nn.log_softmax(logits(CONFIG, params, hidden))[..., 3]
    return jnp.where(data["end"] > 0, logprobs, 0).mean()


def largest(tree):
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(tree))


def trained_on(params, data, want, shape):
    """How far the gradient on a mesh is from that of one device, of the largest entry, and what is gathered for it."""
    mesh = make_mesh(*shape)
    layout = param_shardings(CONFIG, mesh)
    with use_mesh(mesh):
        sharded, split = jax.device_put(params, layout), put_batch(mesh, data)
        program = jax.jit(jax.grad(loss), out_shardings=layout).lower(sharded, split).compile()
        got = program(sharded, split)
    gap = largest(jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), got, want)) / largest(want)
    gathered = [one for one in collectives(program) if one.kind == "all-gather"]
    return {"gradient": gap, "gathered": [shape for one in gathered for shape in one.shapes]}


def sampled_on(params, shape):
    mesh = None if shape is None else make_mesh(*shape)
    spec = SamplerSpec(prompt_buckets=(8,), max_new_tokens=6, prompt_slots=8, sample_slots=2, path_slots=3)
    sampler = Sampler(CONFIG, spec, mesh=mesh)
    sampler.set_params(params)
    rng = np.random.default_rng(1)

    def rounds(samples):
        return [Fork(i, 1 + i, 10 + i) for i in range(3)] if len(samples) == 3 else []

    # More prompts than slots, and more samples than rows, so that both are used again.
    requests = [
        Request(rng.integers(0, CONFIG.vocab_size, length).tolist(), i, (0, 1, 2), rounds=rounds)
        for i, length in enumerate((1, 5, 8, 3, 7, 2, 4, 6, 8))
    ]
    groups = sampler.generate(requests, sampling_params(), seed=0, step=0)
    return [[sample.tokens.tolist() for sample in group] for group in groups]


def spoken_on(params, shape):
    """What is said in eight conversations of two turns, and in a fork at the second, on the devices of another one."""
    mesh = None if shape is None else make_mesh(*shape)
    spec = TurnDecoderSpec(conversations=16, rows=8, context_length=40, max_new_tokens=5, prefill_chunks=(4, 8))
    decoder = TurnDecoder(CONFIG, spec, mesh=mesh)
    decoder.set_params(params)
    decoder.begin(sampling_params(), seed=0, step=0)
    rng = np.random.default_rng(2)
    said = [rng.integers(0, CONFIG.vocab_size, 1 + i).tolist() for i in range(8)]

    def finish(turns):
        for turn in turns:
            decoder.submit(turn)
        ended = {}
        while decoder.num_open:
            ended |= {one.turn.conversation: one.tokens.tolist() for one in decoder.run()}
        return ended

    for turn in range(2):
        begun = [list(tokens) for tokens in said]
        for i, tokens in finish([Turn(i, list(tokens), i, i, turn) for i, tokens in enumerate(said)]).items():
            said[i] += [*tokens, 1 + i, 2 + i]
    forks = finish([Turn(15 - i, begun[i], i, 20 + i, 1, prefix_of=i) for i in range(8)])
    return [said, forks, decoder.stats["copied_tokens"]]


def sent_by_stores():
    """Arrays that eight devices send when sixteen conversations and rows are moved and computed, by the program."""
    mesh = make_mesh(1, 8, 1)
    split, whole = (NamedSharding(mesh, partition_spec(axes)) for axes in (("batch",), ()))

    def placed(tree, where):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    some, tokens = (jax.ShapeDtypeStruct((16, *sizes), jnp.int32, sharding=split) for sizes in ((), (8,)))
    params = placed(jax.eval_shape(lambda p: decode_weights(CONFIG, p), abstract_params(CONFIG)), whole)
    cache = placed(jax.eval_shape(lambda: init_cache(CONFIG, 16, 1, 48, 16)), split)
    kept = placed(jax.eval_shape(lambda: init_conversations(CONFIG, 16, 48, 2)), split)
    moves = placed(Moves(conversation=some, other=some, start=some, column=some, mark=some, count=number), whole)
    marks = Marks(source=some, target=some, length=some)
    paths = PathTokens(tokens=tokens, length=some, slot=some, row=some, prefix_length=some)
    programs = {
        "copy": (copy_conversations, kept, moves, moves),
        "lay": (lay_conversations, cache, kept, moves),
        "keep": (keep_turns, kept, cache, moves),
        "extend": (functools.partial(extend, CONFIG, (24, 48)), params, kept, tokens, some, some, marks),
        "recall": (functools.partial(recall_paths, CONFIG), params, cache, paths),
    }
    with use_mesh(mesh):
        compiled = {name: jax.jit(fn).lower(*arguments).compile() for name, (fn, *arguments) in programs.items()}
    return {name: [shape for one in collectives(x) for shape in one.shapes] for name, x in compiled.items()}


def recalled_on(shape):
    """How far what is recalled on devices that share sequences is from what one recalls, and a gradient of it."""
    delta = FRESH.delta
    data = forests()
    channels = sum(delta.widths)
    rng = np.random.default_rng(3)

    def normal(*sizes):
        return jnp.asarray(rng.normal(size=sizes), jnp.float32)

    mixed, kernel = normal(8, LENGTH, channels), normal(channels, 1, delta.kernel)
    g, beta = -jnp.exp(normal(8, LENGTH, delta.value_heads)), jax.nn.sigmoid(normal(8, LENGTH, delta.value_heads))
    by = normal(8, LENGTH, delta.value_heads, delta.value_dim)
    counts = jnp.asarray(data["end"] > 0)[..., None, None]

    def of_one(mixed, kernel, g, beta):
        out, _ = recall_of(FRESH, jnp.asarray(data["end"]))(mixed, kernel, g, beta)
        return jnp.sum(jnp.where(counts, out * by, 0))

    def of_shares(mixed, kernel, g, beta):
        shares = sequence_shares(8, LENGTH)
        recall = shares.recall(delta, jnp.asarray(data["end"]))
        out, _ = recall(shares.in_shares(mixed), kernel, shares.in_shares(g), shares.in_shares(beta))
        return jnp.sum(jnp.where(counts, shares.in_order(out) * by, 0))

    want = jax.jit(jax.value_and_grad(of_one, (0, 1, 2, 3)))(mixed, kernel, g, beta)
    with use_mesh(make_mesh(*shape)):
        got = jax.jit(jax.value_and_grad(of_shares, (0, 1, 2, 3)))(mixed, kernel, g, beta)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(largest(np.asarray(a) - np.asarray(b)) / largest(b) for a, b in pairs)


def main():
    params = jax.tree.map(lambda x: np.asarray(4 * x if x.ndim == 3 else x), init_params(CONFIG, jax.random.key(0)))
    data = forests()
    want = jax.jit(jax.grad(loss))(params, data)
    whole, spoken = sampled_on(params, None), spoken_on(params, None)
    return {
        "trained": {
            "x".join(map(str, shape)): trained_on(params, data, want, shape) for shape in ((1, 8, 1), (2, 2, 2))
        },
        # Two heads of keys.
        "recalled": {"2": recalled_on((1, 4, 1, 2)), "4": recalled_on((1, 2, 1, 4))},
        "sent": sent_by_stores(),
        "sampled": sampled_on(params, (2, 2, 2)) == whole,
        "spoken": spoken[-1] > 0 and spoken_on(params, (2, 2, 2)) == spoken,
    }


if __name__ == "__main__":
    print(json.dumps(main()))
