"""Rotary position embeddings with the context-extension scalings of the supported families.

RoPE: 2104.09864. linear: position interpolation, 2306.15595. dynamic: NTK-aware, base grows with the length.
yarn: 2309.00071. llama3: wavelength bands, 2407.21783. longrope: a divisor for each frequency, 2402.13753.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rljax.models.config import DecoderConfig, RopeScaling, Rotation

RotaryTable = tuple[Array, Array]
"""Cosines and sines, float32 `[..., rotary_width / 2]` each, of some positions."""


def rotary_tables(config: DecoderConfig, positions: Int[Array, "*B"]) -> dict[Rotation, RotaryTable]:
    """The table for integer `positions` of every rotation that some layer has (`config.rotations`).

    With dynamic scaling the base depends on the largest position of the call, so tokens beyond the pretrained context
    depend on how long the sequence is; `rljax.sampling` refuses such lengths.
    """

    def table(rotation: Rotation) -> RotaryTable:
        frequencies, scale = _frequencies(config, rotation, positions)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * scale, jnp.sin(angles) * scale

    return {rotation: table(rotation) for rotation in sorted(set(config.rotations))}


def apply_rotary(
    x: Float[Array, "*B heads head_dim"],
    cos: Float[Array, "*B half"],
    sin: Float[Array, "*B half"],
    scale: float = 1.0,
) -> Float[Array, "*B heads head_dim"]:
    """Rotates the two halves of the first `2 half` dimensions against each other and multiplies all by `scale`, in
    float32; the dtype of `x` is kept, and what lies behind is not rotated."""
    wide = x.astype(jnp.float32)
    if scale != 1.0:
        wide = wide * scale
    width = 2 * cos.shape[-1]
    rest = wide[..., width:]
    first, second = jnp.split(wide[..., :width] if width < x.shape[-1] else wide, 2, axis=-1)
    cos = cos[..., None, :]
    sin = sin[..., None, :]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if width < x.shape[-1]:
        parts.append(rest)
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


def _frequencies(config: DecoderConfig, rotation: Rotation, positions) -> tuple[Array | np.ndarray, float]:
    """Inverse wavelengths [half] and the factor on cos and sin."""
    scaling = config.rope_scaling
    dim = config.rotary_width
    exponents = np.arange(0, dim, 2, dtype=np.float32) / dim
    if rotation == "none":
        # An angle of 0 leaves every number as it is.
        return np.zeros_like(exponents), 1.0

    # On the host wherever positions do not enter: the same bits on every device, and a constant of the program.
    if rotation == "local":
        return np.float32(1.0) / np.float32(config.local_rope_theta) ** exponents, 1.0
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
        case "longrope":
            return _longrope(config, base, scaling)


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
    dim = config.rotary_width
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


def _longrope(config: DecoderConfig, base: np.ndarray, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """Of the original context: `DecoderConfig.longest_sequence` ends with it."""
    frequencies = base / np.asarray(scaling.short_factor, np.float32)
    if scaling.attention_factor is not None:
        return frequencies, scaling.attention_factor
    if scaling.factor <= 1:
        return frequencies, 1.0
    original = scaling.original_max_position or config.max_position
    return frequencies, math.sqrt(1 + math.log(scaling.factor) / math.log(original))


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
