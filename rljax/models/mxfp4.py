"""Weights in MXFP4 (OCP Microscaling Formats 1.0), as gpt-oss is released: a byte for two numbers of four bits, and a
power of two for every 32 of them. They are read; nothing is written so."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

BLOCKS = "_blocks"
SCALES = "_scales"
"""What follows a tensor's name in the names of its two parts."""

BLOCK = 32
"""Numbers that share a scale."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-x for x in _MAGNITUDES)], np.float32)
# The two numbers of each byte: its lower half is the first.
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=-1)
_BIAS = 127


def is_mxfp4(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its folder's weights are so."""
    quantization = hf.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4"


def dequantised(
    blocks: UInt8[np.ndarray, "E N G 16"], scales: UInt8[np.ndarray, "E N G"]
) -> Float[np.ndarray, "E N D"]:
    """The numbers in bfloat16, which has all of them: `D = 32 G`."""
    out = np.empty((*scales.shape[:2], scales.shape[2] * BLOCK), ml_dtypes.bfloat16)
    # Matrix by matrix: on the way numbers take four bytes each.
    for own, packed, exponents in zip(out, blocks, scales, strict=True):
        numbers = np.take(_PAIRS, packed, axis=0).reshape(*exponents.shape, BLOCK)
        own[...] = np.ldexp(numbers, exponents.astype(np.int32)[..., None] - _BIAS).reshape(own.shape)
    return out
