"""Matrices of layers kept in fewer bits, for weights that are frozen: codes, and a scale for each block of an input
dimension. A product makes the matrix of them anew, for itself alone.

`int8` are whole numbers of 127ths of the largest of 32 (the blocks of GGUF's Q8_0), 8.5 bits a weight. `nf4` are 16
levels of a normal distribution, relative to the largest of 64 (QLoRA, 2305.14314, appendix E), 4.25 bits.
"""

import functools
from collections.abc import Container, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from rljax.models.config import LAYOUTS, MATRICES, SCALE, SCALE_DTYPE, SHARED, DecoderConfig, Format
from rljax.types import Params

_NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
_BETWEEN = (_NF4[1:] + _NF4[:-1]) / 2


def quantize(kind: Format, matrix: Float[Array, "*L D E"]) -> tuple[Array, Array]:
    """(codes [*L, D / packed, E], scales [*L, D / block, E]). Of two levels as far away `nf4` takes the lower, and
    `int8` the even one. D must be a multiple of the block."""
    block, packed, dtype = LAYOUTS[kind]
    *lead, rows, columns = matrix.shape
    apart = matrix.astype(jnp.float32).reshape(*lead, rows // block, block, columns)
    largest = jnp.max(jnp.abs(apart), axis=-2, keepdims=True)

    # Rounded before anything is divided by it, so that what is made of codes is quantised to the same codes.
    scales = (largest / 127 if kind == "int8" else largest).astype(SCALE_DTYPE)
    wide = scales.astype(jnp.float32)
    steps = apart / jnp.where(wide > 0, wide, 1.0)
    if kind == "int8":
        codes = jnp.clip(jnp.round(steps), -127, 127).astype(dtype)
    else:
        codes = jnp.searchsorted(jnp.asarray(_BETWEEN), steps).astype(dtype)

    codes = codes.reshape(*lead, rows // packed, packed, columns)
    if packed > 1:
        codes = codes[..., 0, :] | (codes[..., 1, :] << 4)
    else:
        codes = codes[..., 0, :]
    return codes, scales[..., 0, :]


def dequantize(kind: Format, codes: Array, scales: Array, dtype: Any) -> Float[Array, "*L D E"]:
    """The matrix that `codes` and `scales` stand for, rounded once to `dtype`."""
    block, packed, _ = LAYOUTS[kind]
    *lead, _, columns = codes.shape
    if packed > 1:
        halves = jnp.stack([codes & 15, codes >> 4], axis=-2)
        values = jnp.asarray(_NF4)[halves.astype(jnp.int32)]
    else:
        values = codes.astype(jnp.float32)
    apart = values.reshape(*lead, -1, block, columns)
    whole = apart * scales.astype(jnp.float32)[..., None, :]
    return whole.reshape(*lead, -1, columns).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantized_product(
    kind: Format, x: Float[Array, "*B D"], codes: Shaped[Array, "P E"], scales: Shaped[Array, "S E"]
) -> Float[Array, "*B E"]:
    """`x @ matrix`, in the dtype of `x`. The matrix is frozen: only `x` has a gradient, for which it is made once more
    instead of being kept."""
    return x @ dequantize(kind, codes, scales, x.dtype)


def _forward(kind, x, codes, scales):
    return quantized_product(kind, x, codes, scales), (codes, scales)


def _backward(kind, residuals, g):
    codes, scales = residuals
    matrix = dequantize(kind, codes, scales, g.dtype)
    return jnp.einsum("...e,de->...d", g, matrix), None, None


quantized_product.defvjp(_forward, _backward)


@functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
def grouped_quantized_product(
    kind: Format,
    x: Float[Array, "N D"],
    codes: Shaped[Array, "G P E"],
    scales: Shaped[Array, "G S E"],
    sizes: Int[Array, " G"],
) -> Float[Array, "N E"]:
    """`jax.lax.ragged_dot(x, matrices, sizes)`, in the dtype of `x`: the first `sizes[0]` rows meet the first matrix,
    and so on. As in `quantized_product` the matrices are frozen, and made once more for the gradient of `x`."""
    # A checkpoint rather than a derivative by hand, which would have to say over which devices of a mesh it is summed.
    matrices = dequantize(kind, codes, jax.lax.stop_gradient(scales), x.dtype)
    return jax.lax.ragged_dot(x, matrices, group_sizes=sizes)


def matrices_of(own: Iterable[str]) -> list[str]:
    """Which of a stack's weights are kept in few bits: all matrices of its layers but routers."""
    names = set(own)
    return [name for prefix in ("", SHARED) for own in MATRICES if (name := f"{prefix}{own}") in names]


def quantized_params(config: DecoderConfig, params: Params) -> dict[str, Any]:
    """`params` with their matrices as `config.quantized` keeps them; what it does not keep so is as it was.

    One matrix after the other, and of this one layer after the other, so that no second copy of all is made: the
    experts of all layers may be nearly all of a model.
    """
    kind = config.quantized
    made = dict(params)
    for stack in config.stacks:
        own = dict(params[stack])
        for name in matrices_of(own) if kind else ():
            own[name], own[f"{name}{SCALE}"] = _quantize(kind, own[name])
        made[stack] = own
    return made


def dequantized_params(
    config: DecoderConfig, params: Params, dtype: Any = jnp.float32, *, only: Container[str] | None = None
) -> dict[str, Any]:
    """`quantized_params` undone, but for what was lost; of the matrices `only`, None is all."""
    kind = config.quantized
    made = dict(params)
    for stack in config.stacks:
        own = dict(params[stack])
        for name in matrices_of(own) if kind else ():
            if only is not None and name not in only:
                continue
            own[name] = _dequantize(kind, own[name], own.pop(f"{name}{SCALE}"), jnp.dtype(dtype).name)
        made[stack] = own
    return made


@functools.partial(jax.jit, static_argnums=0)
def _quantize(kind: Format, stacked: Array) -> tuple[Array, Array]:
    return jax.lax.map(functools.partial(quantize, kind), stacked)


_dequantize = jax.jit(dequantize, static_argnums=(0, 3))
