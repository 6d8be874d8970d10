"""Adapters that turn the columns of a matrix and leave their lengths to weights of their own (DoRA, 2402.09353)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.models.config import DOWN, GAIN, NORM, UP, DecoderConfig, Lora
from rljax.models.quantized import dequantized_params
from rljax.types import Params


def column_norms(matrix: Float[Array, "*L D E"]) -> Float[Array, "*L E"]:
    """The length of each column, in float32 at least."""
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(wide * wide, axis=-2))


def dora_gain(
    norm: Float[Array, "*L E"],
    matrix: Float[Array, "*L D E"],
    down: Float[Array, "*L D N"],
    up: Float[Array, "*L N E"],
    scale: float,
) -> Float[Array, "*L E"]:
    """What `x (matrix + scale down up)` is multiplied by: `norm` over the lengths of the columns (equation 5).

    The lengths count as constants in the gradient (section 4.3 there).
    """
    change = jnp.einsum("...dn,...ne->...de", down, up, precision="highest")
    lengths = column_norms(matrix + scale * change)
    return norm / jax.lax.stop_gradient(lengths)


def with_norms(lora: Lora | None, adapters: Params, base: Params) -> Params:
    """A stack's fresh `adapters` with the lengths of the columns of its matrices `base`, with which they add nothing
    yet; as they are without DoRA."""
    if lora is None or not lora.dora:
        return adapters
    norms = {name: column_norms(base[name.removesuffix(NORM)]) for name in adapters if name.endswith(NORM)}
    return {**adapters, **norms}


def with_gains(config: DecoderConfig, params: Params) -> dict[str, Any]:
    """`params` with `dora_gain` in the place of each `norm`: none of it depends on a token, and a step of decoding
    would read every matrix once more for it. Without DoRA they are as they were."""
    made = dict(params)
    lora = config.lora
    if lora is None or not lora.dora:
        return made

    whole = dequantized_params(config, params, only=lora.targets)
    for name in config.stacks:
        stack = whole[name]
        gains = {}
        for target in [own.removesuffix(NORM) for own in stack if own.endswith(NORM)]:
            norm, matrix, down, up = (stack[f"{target}{end}"] for end in (NORM, "", DOWN, UP))
            gains[f"{target}{GAIN}"] = dora_gain(norm, matrix, down, up, lora.scale)
        made[name] = {own: x for own, x in params[name].items() if not own.endswith(NORM)} | gains
    return made
