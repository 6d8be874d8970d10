"""Rotary position embeddings with the context-extension scalings of the supported families.

RoPE: 2104.09864. linear: position interpolation, 2306.15595. dynamic: NTK-aware, base grows with the length.
yarn: 2309.00071. llama3: wavelength bands, 2407.21783.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rljax.models.config import DecoderConfig, RopeScaling


def rotary_table(
    config: DecoderConfig, positions: Int[Array, "*B"]
) -> tuple[Float[Array, "*B half"], Float[Array, "*B half"]]:
    """Cosines and sines (float32, `half` = head_dim / 2) for integer `positions`.

    With dynamic scaling the base depends on the largest position of the call, so tokens beyond the pretrained context
    depend on how long the sequence is; `rljax.sampling` refuses such lengths.
    """
    frequencies, scale = _frequencies(config, positions)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rotary(
    x: Float[Array, "*B heads head_dim"], cos: Float[Array, "*B half"], sin: Float[Array, "*B half"]
) -> Float[Array, "*B heads head_dim"]:
    """Rotates the two halves of the last axis against each other, in float32; the dtype of `x` is kept."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos = cos[..., None, :]
    sin = sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _frequencies(config: DecoderConfig, positions) -> tuple[Array | np.ndarray, float]:
    """Inverse wavelengths [half] and the factor on cos and sin."""
    scaling = config.rope_scaling
    dim = config.head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / dim

    # On the host wherever positions do not enter: the same bits on every device, and a constant of the program.
    base = np.float32(1.0) / np.float32(config.rope_theta) ** exponents
    match scaling.type:
        case "default":
            return base, 1.0
        case "linear":
            return base / np.float32(scaling.factor), 1.0
        case "dynamic":
            original = scaling.original_max_position or config.max_position
            length = jnp.maximum(jnp.max(positions) + 1, original).astype(jnp.float32)
            # 1 up to the pretrained context, so that short sequences are rotated as in pretraining.
            stretch = scaling.factor * length / original - (scaling.factor - 1)
            theta = config.rope_theta * stretch ** (dim / (dim - 2))
            return 1.0 / theta**exponents, 1.0
        case "llama3":
            return _llama3(base, scaling), 1.0
        case "yarn":
            return _yarn(config, base, scaling)


def llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """What llama3 scaling divides each frequency by, float32 [head_dim / 2]."""
    base = np.float32(1.0) / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    return base / _llama3(base, scaling)


def _llama3(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    original = scaling.original_max_position
    wavelength = 2 * math.pi / base
    low = original / scaling.low_freq_factor
    high = original / scaling.high_freq_factor
    blend = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = (1 - blend) * base / scaling.factor + blend * base
    # Long waves are stretched, short ones left, and between the two bands one goes over into the other.
    stretched = np.where(wavelength > low, base / scaling.factor, np.where(wavelength < high, base, smooth))
    return stretched.astype(np.float32)


def _yarn(config: DecoderConfig, base: np.ndarray, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    dim = config.head_dim
    original = scaling.original_max_position or config.max_position

    def dim_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = dim_of(scaling.beta_fast)
    high = dim_of(scaling.beta_slow)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, dim - 1)

    # Dimensions that rotate often keep their frequency, slow ones are stretched.
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 1e-3), 0, 1)
    keep = 1 - ramp
    frequencies = (base / scaling.factor) * (1 - keep) + base * keep
    return frequencies.astype(np.float32), _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
