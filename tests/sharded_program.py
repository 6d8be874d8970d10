"""Run by test_parallel_mesh.py in a process with eight virtual devices: prints a JSON object of what it found."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from rljax.batching import dense_rows, spread
from rljax.models import DecoderConfig, Forward, abstract_params, hidden_states, init_params, logits, unstack_layers
from rljax.models.layout import param_shardings
from rljax.parallel import DECODE_RULES, constrain, make_mesh, put_batch, replicated, reshard, use_mesh
from rljax.types import RaggedRows, Width

CONFIG = DecoderConfig(
    vocab_size=96, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, tied_embeddings=True
)


def batch():
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 16))
    return {"tokens": tokens, "positions": np.broadcast_to(np.arange(16), (8, 16)), "end": np.full((8, 16), 16)}


def loss(params, data, remat="none"):
    hidden = hidden_states(CONFIG, params, data["tokens"], data["positions"], data["end"], forward=Forward(remat))
    scores = logits(CONFIG, params, hidden)
    picked = jnp.take_along_axis(jax.nn.log_softmax(scores[:, :-1]), data["tokens"][:, 1:, None], -1)
    return -picked.mean(), scores


def difference(a, b):
    a, b = jax.tree.map(np.asarray, (a, b))
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def collectives_of_rows(mesh):
    """Of laying stored rows out and summing each of them, with the gradient by the values."""
    place = np.tile(np.array([1, 2, 9, -1], np.int32), (4, 1))
    zeros = np.zeros(place.shape, np.float32)
    rows = RaggedRows(
        place=place,
        row_index=np.zeros(place.shape, np.int32),
        loss_weights=zeros,
        token_count=np.ones((), np.float32),
        advantages=zeros,
        behavior_logprobs=zeros,
        source=np.zeros((4, 2), np.int32),
        width=Width(8),
    )
    rows = put_batch(mesh, rows)

    def of_rows(values, rows):
        dense = dense_rows(rows)
        return jnp.where(dense.loss_mask, spread(rows, values) * dense.advantages, 0).sum(axis=1)

    def pulled_back(values, rows):
        result, pull = jax.vjp(lambda v: of_rows(v, rows), values)
        return result, pull(result)

    with use_mesh(mesh):
        text = jax.jit(pulled_back).lower(rows.advantages, rows).compile().as_text()
    return sum(text.count(f" {name}(") for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def on_meshes(shapes):
    params = jax.tree.map(np.asarray, init_params(CONFIG, jax.random.key(0)))
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    data = batch()
    (want, want_scores), want_grad = step(params, data)
    found = {}
    for shape in shapes:
        mesh = make_mesh(*shape)
        layout = param_shardings(CONFIG, mesh)
        with use_mesh(mesh):
            sharded = jax.device_put(params, layout)
            (value, scores), grad = step(sharded, put_batch(mesh, data))
            remat = jax.jit(
                jax.value_and_grad(lambda p, d: loss(p, d, "attention_saved")[0]), out_shardings=(None, layout)
            )
            remat_value, remat_grad = remat(sharded, put_batch(mesh, data))
            decode = reshard(sharded, param_shardings(CONFIG, mesh, DECODE_RULES))
            in_decode_layout = jax.jit(
                lambda p, d: logits(CONFIG, p, hidden_states(CONFIG, p, d["tokens"], d["positions"], d["end"]))
            )(decode, put_batch(mesh, data))
        found["x".join(map(str, shape))] = {
            "loss": abs(float(value - want)),
            "scores": difference(scores, want_scores),
            "grad": difference(grad, want_grad),
            "remat": max(abs(float(remat_value - want)), difference(remat_grad, want_grad)),
            "decode_layout": difference(in_decode_layout, want_scores),
            "reshard": difference(decode, params),
            "batch_split": len({str(s.index[0]) for s in scores.addressable_shards}),
            "q_bytes_share": sharded["layers"]["q"].addressable_shards[0].data.nbytes / params["layers"]["q"].nbytes,
            "replicated": jax.device_put(1.0, replicated(mesh)).sharding.is_fully_replicated,
        }
    # the same jitted function outside a mesh afterwards is the unsharded one again
    found["after"] = {"loss": abs(float(step(params, data)[0][0] - want))}
    # activations are split by their logical axes, whatever the layout of what they come from
    mesh = make_mesh(2, 2, 2)
    with use_mesh(mesh):
        spread = jax.jit(lambda x: constrain(2 * x, ("batch", None, "mlp")))(jnp.ones((8, 3, 4)))
    found["constrained"] = [*spread.addressable_shards[0].data.shape]
    # one prompt on many devices is legal: its dimension is left to the compiler
    mesh = make_mesh(1, 8, 1)
    with use_mesh(mesh):
        one = jax.tree.map(lambda x: x[:1], data)
        found["one_row"] = {"scores": difference(jax.jit(loss)(params, one)[1], want_scores[:1])}
    found["collectives_of_rows"] = collectives_of_rows(make_mesh(2, 2, 2))
    assert jax.tree.structure(unstack_layers(CONFIG, params)) != jax.tree.structure(abstract_params(CONFIG))
    return found


if __name__ == "__main__":
    print(json.dumps(on_meshes([tuple(map(int, arg.split("x"))) for arg in sys.argv[1:]])))
