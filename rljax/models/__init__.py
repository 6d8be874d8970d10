"""Decoder-only language models as pure functions over a nested dict of weights."""

from rljax.models.config import DecoderConfig, RopeScaling
from rljax.models.decoder import (
    abstract_params,
    apply_layer,
    embed,
    final_norm,
    hidden_states,
    init_params,
    logical_axes,
    logits,
    output_projection,
    unstack_layers,
)

__all__ = [
    "DecoderConfig",
    "RopeScaling",
    "abstract_params",
    "apply_layer",
    "embed",
    "final_norm",
    "hidden_states",
    "init_params",
    "logical_axes",
    "logits",
    "output_projection",
    "unstack_layers",
]
