"""Attention over forests on accelerators: one Pallas kernel forward, two backward, blocks that see nothing left out.

Scores exist for one block of queries times one of keys at a time (2205.14135). Each kernel walks over a list, made
beforehand, of the blocks that its own one sees or is seen by, so that keys of other trees and branches are neither read
nor multiplied. Accumulation is float32. `attention_tpu` and `attention_triton` hold the kernels of each kind of device.

The tests run both in interpret mode, and compile them for TPU (Mosaic) and GPU (Triton, which jax deprecates from 0.12
on). None has been timed. `make test-gpu` compares those for a GPU with the XLA form.
"""

import functools
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.models import attention_tpu, attention_triton
from rljax.models.attention_blocks import Options, mean_gradient, named, with_sinks


def forest_attention_kernel(
    q: Float[Array, "R Q H hd"],
    k: Float[Array, "R S KV hd"],
    v: Float[Array, "R S KV hd"],
    positions: Int[Array, "R S"],
    subtree_end: Int[Array, "R S"],
    window: Int[Array, ""] | int,
    *,
    query_start: Int[Array, ""] | int | None = None,
    sinks: Float[Array, " H"] | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    interpret: Literal["gpu", "tpu"] | None = None,
) -> Float[Array, "R Q H hd"]:
    """`forest_attention` as kernels for TPU and GPU. On a CPU, or where `interpret` names a kind of device, the kernels
    for that kind (a GPU, if it names none) run as plain operations.

    A query that sees no key (padding) yields 0 and passes no gradient on. Blocks are `block_q` queries times `block_k`
    keys, powers of two from 16 (from 128 on a TPU); None is the device's own choice. Any length: rows are padded to
    whole blocks here. ValueError for other block sizes, for query heads that do not divide over key heads, and for
    fewer queries than keys without a `query_start`.
    """
    for name, size in {"block_q": block_q, "block_k": block_k}.items():
        if size is not None and (size < 16 or size & (size - 1)):
            raise ValueError(f"{name}={size} must be a power of two, at least 16; None is the device's own choice")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide over {k.shape[2]} key heads; give a multiple")
    if query_start is None and q.shape[1] != k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries of {k.shape[1]} positions need query_start=, where the first stands")
    options = Options(block_q, block_k, interpret)
    start = jnp.asarray(0 if query_start is None else query_start, jnp.int32)
    out, normaliser = _attend(options, q, k, v, positions, subtree_end, jnp.asarray(window, jnp.int32), start)
    return out if sinks is None else with_sinks(out, normaliser.swapaxes(1, 2), sinks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, q, k, v, positions, subtree_end, window, start) -> tuple[Array, Array]:
    """q [R, Q, H, hd]; k, v [R, S, KV, hd] -> (out [R, Q, H, hd], log-sum-exps [R, H, Q])."""
    return _attend_forward(options, q, k, v, positions, subtree_end, window, start)[0]


def _attend_forward(options, q, k, v, positions, subtree_end, window, start):
    arrays = (q, k, v, positions, subtree_end, window, start)
    out, normaliser = named(*_on_device("forward", options, *arrays))
    return (out, normaliser), (*arrays, out, normaliser)


def _attend_backward(options, residuals, cotangents):
    *arrays, out, normaliser = residuals
    d_out, d_normaliser = cotangents
    means = mean_gradient(out, d_out, d_normaliser.swapaxes(1, 2)).swapaxes(1, 2)
    grads = _on_device("backward", options, *arrays, d_out, normaliser, means)
    return *grads, None, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _on_device(name: str, options: Options, *arrays):
    """Function `name` of the module for the device that the program is compiled for."""

    def run(module: ModuleType, options: Options):
        return functools.partial(getattr(module, name), options)

    if options.interpret is not None:
        return run({"tpu": attention_tpu, "gpu": attention_triton}[options.interpret], options)(*arrays)
    gpu = run(attention_triton, options)
    tpu = run(attention_tpu, options)
    interpreted = run(attention_triton, options._replace(interpret="gpu"))
    return jax.lax.platform_dependent(*arrays, cpu=interpreted, cuda=gpu, rocm=gpu, tpu=tpu)
