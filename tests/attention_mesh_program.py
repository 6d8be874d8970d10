"""Run by test_models_attention_kernel.py in a process with four virtual devices: prints a JSON object."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from rljax.models.attention import forest_attention, on_own_heads
from rljax.models.attention_kernel import forest_attention_kernel
from rljax.parallel import RULES, make_mesh, named_sharding, use_mesh

WINDOW = 7
HEADS = ("batch", None, "kv_heads", None)


def measure(shape, arrays, positions, ends, want):
    parts = []

    def kernel(q, *rest):
        parts.append(q.shape)
        return forest_attention_kernel(q, *rest, block_q=16, block_k=16, interpret="tpu")

    def gradients(q, k, v, g, positions, ends):
        out, pull = jax.vjp(lambda q, k, v: on_own_heads(kernel)(q, k, v, positions, ends, jnp.int32(WINDOW)), q, k, v)
        return out, *pull(g)

    mesh = make_mesh(*shape)

    def put(x, axes):
        try:
            return jax.device_put(x, named_sharding(mesh, axes, x.shape, RULES))
        except ValueError:  # does not divide
            return x

    with use_mesh(mesh):
        placed = [put(x, HEADS) for x in arrays] + [put(x, ("batch", None)) for x in (positions, ends)]
        compiled = jax.jit(gradients).lower(*placed).compile()
        got = compiled(*placed)
    difference = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(got, want, strict=True))
    return {"difference": difference, "gathers": compiled.as_text().count("all-gather("), "part": parts[0]}


def main():
    rows, length = 2, 48
    arrays = [jax.random.normal(jax.random.key(i), (rows, length, n, 8)) for i, n in enumerate((4, 2, 2, 4))]
    positions = jnp.broadcast_to(jnp.concatenate([jnp.arange(30), jnp.arange(18)]), (rows, length))
    ends = jnp.broadcast_to(jnp.where(jnp.arange(length) < 30, 30, length), (rows, length))
    plain = functools.partial(forest_attention, positions=positions, subtree_end=ends, window=WINDOW)
    out, pull = jax.vjp(plain, *arrays[:3])
    want = (out, *pull(arrays[3]))
    meshes = {name: tuple(map(int, name.split("x"))) for name in sys.argv[1:]}
    print(json.dumps({name: measure(shape, arrays, positions, ends, want) for name, shape in meshes.items()}))


if __name__ == "__main__":
    main()
