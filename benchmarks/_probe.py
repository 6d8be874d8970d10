"""The rates that the machine itself reaches, measured through XLA."""

import time

import jax
import jax.numpy as jnp


def probe(dtype, quick=False):
    """The machine's own limits, best of 5: a product of large square matrices, and a sum over a large array. A quick
    probe has small ones, whose rates are no limits."""
    on_cpu = jax.default_backend() == "cpu"
    size = 256 if quick else 3072 if on_cpu else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    big = jnp.ones((64, 2**10 if quick else 2**20 if on_cpu else 2**24), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    total = jax.jit(lambda x: jnp.max(x, axis=1))

    def best(call):
        jax.block_until_ready(call())
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
        return min(times)

    return {
        "matmul_gflops": 2 * size**3 / best(lambda: product(a)) / 1e9,
        "matmul_dtype": jnp.dtype(dtype).name,
        "read_gbs": big.nbytes / best(lambda: total(big)) / 1e9,
        "device": jax.devices()[0].device_kind,
    }
