"""Run by test_parallel_compiled.py in a process with eight virtual devices: prints a JSON object."""

import dataclasses
import json

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rljax.parallel import collectives, compiled_memory, make_mesh, traffic

MESH = make_mesh(1, 4, 2)
LAYERS = 5


def on(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, PartitionSpec(*spec)))


def manual(x, w, count):
    """Collectives of known kinds and sizes, in loops of known and of unknown length."""

    def gathered(i, x):
        # Of something new in each round, so that the compiler cannot gather it once, before the loops.
        return jnp.sum(jax.lax.all_gather(jnp.sin(w * x), "fsdp", tiled=True), 0)

    def rounds(i, x):
        return jax.lax.fori_loop(0, 3, gathered, x)

    x = jax.lax.fori_loop(0, count, rounds, x)
    total = jax.lax.psum(x, "tensor")
    return jax.lax.psum_scatter(total, "fsdp", tiled=True)


def main():
    split = jax.shard_map(
        manual,
        mesh=MESH,
        in_specs=(PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec()),
        out_specs=PartitionSpec("fsdp"),
        check_vma=False,
    )
    args = on((8,)), on((16, 8), "fsdp"), jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(split).lower(*args).compile()

    def scan(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=LAYERS)[0]

    x = on((8, 16), "fsdp")
    layers = jax.jit(scan, donate_argnums=0, out_shardings=x.sharding).lower(x, on((16, 16), None, "tensor")).compile()
    found = collectives(compiled, data_loops=(7,))
    memory = compiled_memory(layers)
    print(
        json.dumps(
            {
                "manual": [dataclasses.asdict(one) for one in found],
                "once": [one.times for one in collectives(compiled)],
                "traffic": traffic(found),
                "layers": [dataclasses.asdict(one) for one in collectives(layers)],
                "text": collectives(layers.as_text()) == collectives(layers),
                "memory": dataclasses.asdict(memory) | {"peak": memory.peak},
            }
        )
    )


if __name__ == "__main__":
    main()
