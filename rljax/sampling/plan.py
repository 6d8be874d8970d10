"""A decoder in shapes: what it holds, to plan memory by and to compile for where nothing can run."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from rljax.models.config import DecoderConfig
from rljax.models.decoder import abstract_params
from rljax.models.layout import param_shardings
from rljax.parallel import spread_mesh, use_mesh
from rljax.sampling.weights import decode_shardings, decode_weights, weights_program


@dataclasses.dataclass(frozen=True)
class DecoderPlan:
    """What one decoder holds. Trees are of `jax.ShapeDtypeStruct`s with shardings."""

    weights: Any
    """Its copy of the weights."""
    cache: Any
    """Keys and values, for the longest prompts."""
    keeps_cache: bool
    """Whether keys and values stay allocated between rollouts."""
    rows: int
    """Tokens of one step of decoding, over all devices."""
    prefill: tuple[int, int]
    """Prompts, or conversations, that one call computes at most, and tokens of each, padding included."""


def abstract_weights(config: DecoderConfig, mesh: Mesh | None) -> Any:
    """The copy of the weights that a decoder on `mesh` holds."""
    shapes = jax.eval_shape(lambda params: decode_weights(config, params), abstract_params(config))
    return shapes if mesh is None else _placed(shapes, decode_shardings(config, mesh))


def lower_weights(config: DecoderConfig, mesh: Mesh | None) -> jax.stages.Lowered:
    """The program that copies a trainer's weights for decoding."""
    params = abstract_params(config)
    if mesh is not None:
        params = _placed(params, param_shardings(config, mesh))
    return weights_program(config, mesh).lower(params)


def lower_copies(config: DecoderConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The program that leaves a copy of the weights of a trainer on `mesh` in each of its processes."""
    params = _placed(abstract_params(config), param_shardings(config, mesh))
    everywhere = spread_mesh(mesh)
    with use_mesh(everywhere):
        return weights_program(config, everywhere).lower(params)


def abstract_result(lowered: jax.stages.Lowered) -> Any:
    """What a program returns, laid out as the compiler has it; it is compiled for this."""
    return _placed(lowered.out_info, lowered.compile().output_shardings)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
