"""The decoder as a value function or a reward model: its own trunk, and a scalar head where the vocabulary's was."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.models.config import DecoderConfig
from rljax.models.decoder import abstract_params
from rljax.types import Params


def value_config(config: DecoderConfig, *, bias: bool = True) -> DecoderConfig:
    """The same decoder with a value head. `init_params`, `param_shardings` and the rest take it as they take any."""
    return dataclasses.replace(config, value_head=True, value_bias=bias)


def value_params(config: DecoderConfig, params: Params) -> dict[str, Any]:
    """A copy of a language model's `params` for the value function `config`: its vocabulary head, if it has one of its
    own, is left out, and the value head is 0, so that every value is."""
    shapes = abstract_params(config)

    def start(name: str) -> Any:
        if name in params:
            return jax.tree.map(jnp.copy, params[name])
        return jnp.zeros(shapes[name].shape, shapes[name].dtype)

    return {name: start(name) for name in shapes}


def values(config: DecoderConfig, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """`hidden . w + b` in float32, of final-normed `hidden`; without b where `config.value_bias` is False. ValueError
    when `config` has no value head."""
    if not config.value_head:
        raise ValueError("this model has a vocabulary head, not a value head; take value_config and value_params")
    found = jnp.sum(hidden.astype(jnp.float32) * params["value_head"].astype(jnp.float32), axis=-1)
    return found + params["value_bias"].astype(jnp.float32) if config.value_bias else found
