"""The attention kernels compiled for TPUs and for GPUs: `make test-aot`."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from machines import machine

from rljax.models.attention_kernel import forest_attention_kernel

pytestmark = [
    pytest.mark.aot,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]

CALL = {"tpu": 'custom_call_target="tpu_custom_call"', "gpu": 'custom_call_target="__gpu$xla.gpu.triton"'}


@pytest.mark.parametrize("name", ["v5e:1x1", "v5p:2x2x1", "v6e:1x1", "h100:1"])
@pytest.mark.parametrize(
    ("length", "queries", "rows", "dtype"),
    [
        (4096, 4096, 8, "float32"),
        (32768, 32768, 2, "bfloat16"),
        (131072, 131072, 1, "bfloat16"),
        (131072, 8192, 1, "bfloat16"),
    ],
)
def test_a_row_of_any_length_fits_the_memory_of_a_core(name, length, queries, rows, dtype):
    """Forward and backward, with the heads of Qwen3-0.6B; what overflows vector, scalar or shared memory does not
    compile. The last case is what one of eight devices does that share a sequence."""
    device = machine(name)[0]
    where = SingleDeviceSharding(device)

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    q = shaped((rows, queries, 16, 128), dtype)
    k = shaped((rows, length, 8, 128), dtype)
    of_tokens = shaped((rows, length), jnp.int32)
    start = shaped((), jnp.int32)

    def loss(q, k, v, positions, subtree_end, start):
        window = jnp.int32(1 << 30)
        out = forest_attention_kernel(q, k, v, positions, subtree_end, window, query_start=start)
        return jnp.sum(out.astype(jnp.float32))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, of_tokens, of_tokens, start).compile()
    assert compiled.as_text().count(CALL[device.platform]) == 3

    # A few copies of the arrays, and nothing that grows with the square of a length.
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < 4 * (q.size + 2 * k.size) * jnp.dtype(dtype).itemsize
