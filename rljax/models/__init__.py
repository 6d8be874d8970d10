"""Decoder-only language models as pure functions over a nested dict of weights."""

from rljax.models.attention import KERNEL_DEVICES, KERNEL_LENGTH, Attention, forest_attention, kernel_attention
from rljax.models.config import LAYOUTS, MATRICES, TARGETS, DecoderConfig, Experts, Format, Lora, RopeScaling
from rljax.models.decoder import (
    PLAIN,
    Forward,
    Remat,
    abstract_params,
    apply_layer,
    cast_params,
    count_weights,
    embed,
    final_norm,
    hidden_states,
    init_params,
    logical_axes,
    unstack_layers,
)
from rljax.models.families import FAMILIES, config_from_hf, config_to_hf, fresh_config
from rljax.models.gguf import load_gguf
from rljax.models.head import head_params, logits, logits_gradient, output_projection
from rljax.models.huggingface import Metadata, load_hf, read_json, read_metadata, save_hf, written_metadata
from rljax.models.layout import param_shardings
from rljax.models.load import find_smollm2, load_config, load_model
from rljax.models.lora import (
    adapters_of,
    base_config,
    base_params,
    init_adapters,
    is_adapter,
    merged_params,
    side_by_side,
    with_adapters,
)
from rljax.models.peft import ADAPTER_FILE, described_adapter, described_lora, is_peft, load_peft, read_lora, save_peft
from rljax.models.quantized import dequantized_params, quantized_params
from rljax.models.sequence import Shares, sequence_shares
from rljax.models.value_head import value_config, value_params, values

__all__ = [
    "ADAPTER_FILE",
    "FAMILIES",
    "KERNEL_DEVICES",
    "KERNEL_LENGTH",
    "LAYOUTS",
    "MATRICES",
    "PLAIN",
    "TARGETS",
    "Attention",
    "DecoderConfig",
    "Experts",
    "Format",
    "Forward",
    "Lora",
    "Metadata",
    "Remat",
    "RopeScaling",
    "Shares",
    "abstract_params",
    "adapters_of",
    "apply_layer",
    "base_config",
    "base_params",
    "cast_params",
    "config_from_hf",
    "config_to_hf",
    "count_weights",
    "dequantized_params",
    "described_adapter",
    "described_lora",
    "embed",
    "final_norm",
    "find_smollm2",
    "forest_attention",
    "fresh_config",
    "head_params",
    "hidden_states",
    "init_adapters",
    "init_params",
    "is_adapter",
    "is_peft",
    "kernel_attention",
    "load_config",
    "load_gguf",
    "load_hf",
    "load_model",
    "load_peft",
    "logical_axes",
    "logits",
    "logits_gradient",
    "merged_params",
    "output_projection",
    "param_shardings",
    "quantized_params",
    "read_json",
    "read_lora",
    "read_metadata",
    "save_hf",
    "save_peft",
    "sequence_shares",
    "side_by_side",
    "unstack_layers",
    "value_config",
    "value_params",
    "values",
    "with_adapters",
    "written_metadata",
]
