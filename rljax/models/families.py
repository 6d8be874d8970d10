"""The supported model families: one table each, from which import and export both derive.

A table row pairs one of our weights with its name in a Hugging Face folder and in a GGUF file. Which rows a model has
follows from its `DecoderConfig`: a row counts when the decoder declares that weight. Rows stand in the order of a
PyTorch state dict, which decides how an export is split into files.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from rljax.models.config import DELTA_LAYERS, DENSE_LAYERS, LAYERS, DecoderConfig, Delta, Experts, RopeScaling
from rljax.models.decoder import abstract_params


class Weight(NamedTuple):
    """One weight. `{}` in a name stands for the layer, and a second one for the expert: without it one tensor holds the
    matrices of all experts."""

    path: str
    """Its path in `params`."""
    hf: str
    """Its name in a Hugging Face folder."""
    gguf: str
    """Its name in a GGUF file."""
    transpose: bool = False
    """Theirs is [.., out, in], ours [.., in, out]."""
    heads: str | None = None
    """The config's count of heads that shapes its rows, which are rotated, and interleaved in GGUF's llama layout."""
    is_row: bool = False
    """Theirs is [1, n], ours [n]."""
    is_norm: bool = False
    """Whether it is the weight of a norm: GGUF files hold it whole where `DecoderConfig.norm_offset` stores it less
    one."""
    alternates: bool = False
    """Whether weights of one tensor take turns along its last dimension, instead of lying one behind the other."""
    by_head: bool = False
    """Whether its rows take turns with those of the other weights of a tensor: first all of the delta rule's first key
    head, and so on."""

    @property
    def stack(self) -> str:
        """The stack of layers that it is of; empty for what is not a layer."""
        return self.path.rpartition("/")[0]


def _linear(path: str, hf: str, gguf: str, heads: str | None = None) -> tuple[Weight, ...]:
    hf = f"model.layers.{{}}.{hf}"
    gguf = f"blk.{{}}.{gguf}"
    return (
        Weight(f"layers/{path}", f"{hf}.weight", f"{gguf}.weight", transpose=True, heads=heads),
        Weight(f"layers/{path}_bias", f"{hf}.bias", f"{gguf}.bias", heads=heads),
    )


def _norm(path: str, hf: str, gguf: str) -> tuple[Weight, ...]:
    return (Weight(f"layers/{path}", f"model.layers.{{}}.{hf}.weight", f"blk.{{}}.{gguf}.weight", is_norm=True),)


_EMBEDDING = (Weight("embedding", "model.embed_tokens.weight", "token_embd.weight"),)
_ATTENTION = (
    *_linear("q", "self_attn.q_proj", "attn_q", heads="num_heads"),
    *_linear("k", "self_attn.k_proj", "attn_k", heads="num_kv_heads"),
    *_linear("v", "self_attn.v_proj", "attn_v"),
    *_linear("o", "self_attn.o_proj", "attn_output"),
)
_QK_NORM = (
    *_norm("q_norm", "self_attn.q_norm", "attn_q_norm"),
    *_norm("k_norm", "self_attn.k_norm", "attn_k_norm"),
)
_MLP = (
    *_linear("gate", "mlp.gate_proj", "ffn_gate"),
    *_linear("up", "mlp.up_proj", "ffn_up"),
    *_linear("down", "mlp.down_proj", "ffn_down"),
)
_EXPERTS = (
    Weight("layers/router", "model.layers.{}.mlp.gate.weight", "blk.{}.ffn_gate_inp.weight", transpose=True),
    *(
        Weight(
            f"layers/{path}",
            f"model.layers.{{}}.mlp.experts.{{}}.{path}_proj.weight",
            f"blk.{{}}.ffn_{path}_exps.weight",
            transpose=True,
        )
        for path in ("gate", "up", "down")
    ),
)


def _shared(hf: str) -> tuple[Weight, ...]:
    """The MLP of all shared experts."""
    paths = ("gate", "up", "down")
    return tuple(row for path in paths for row in _linear(f"shared_{path}", f"{hf}.{path}_proj", f"ffn_{path}_shexp"))


_SHARED_EXPERT = _shared("mlp.shared_experts")
_SCORED_EXPERT = (
    *_shared("mlp.shared_expert"),
    Weight(
        "layers/shared_score",
        "model.layers.{}.mlp.shared_expert_gate.weight",
        "blk.{}.ffn_gate_inp_shexp.weight",
        is_row=True,
    ),
)
_SELECTION = (
    Weight("layers/selection_bias", "model.layers.{}.mlp.gate.e_score_correction_bias", "blk.{}.exp_probs_b.bias"),
)
_SINKS = (Weight("layers/sinks", "model.layers.{}.self_attn.sinks", "blk.{}.attn_sinks.weight"),)
_BIASED_EXPERTS = (
    *_linear("router", "mlp.router", "ffn_gate_inp"),
    *(
        Weight(
            f"layers/{path}{end}",
            f"model.layers.{{}}.mlp.experts.{tensor}_proj{end}",
            f"blk.{{}}.ffn_{path}_exps.{kind}",
            alternates=tensor != path,
        )
        for tensor, paths in (("gate_up", ("gate", "up")), ("down", ("down",)))
        for end, kind in (("", "weight"), ("_bias", "bias"))
        for path in paths
    ),
)
_FADES = (
    Weight("layers/fade_shift", "model.layers.{}.linear_attn.dt_bias", "blk.{}.ssm_dt.bias"),
    Weight("layers/fade_rate", "model.layers.{}.linear_attn.A_log", "blk.{}.ssm_a"),
    Weight("layers/kernel", "model.layers.{}.linear_attn.conv1d.weight", "blk.{}.ssm_conv1d.weight"),
)
_READ = (
    *_norm("read_norm", "linear_attn.norm", "ssm_norm"),
    *_linear("o", "linear_attn.out_proj", "ssm_out"),
)
_DELTA = (
    *_FADES,
    *_READ,
    *_linear("q", "linear_attn.in_proj_qkv", "attn_qkv"),
    *_linear("k", "linear_attn.in_proj_qkv", "attn_qkv"),
    *_linear("v", "linear_attn.in_proj_qkv", "attn_qkv"),
    *_linear("read_gate", "linear_attn.in_proj_z", "attn_gate"),
    *_linear("correct", "linear_attn.in_proj_b", "ssm_beta"),
    *_linear("fade", "linear_attn.in_proj_a", "ssm_alpha"),
)
_NORMS = (
    *_norm("attention_norm", "input_layernorm", "attn_norm"),
    *_norm("mlp_norm", "post_attention_layernorm", "ffn_norm"),
)
_POST_NORMS = (
    *_norm("attention_post_norm", "post_attention_layernorm", "post_attention_norm"),
    *_norm("mlp_post_norm", "post_feedforward_layernorm", "post_ffw_norm"),
)
_FOUR_NORMS = (
    *_norm("attention_norm", "input_layernorm", "attn_norm"),
    *_norm("attention_post_norm", "post_attention_layernorm", "post_attention_norm"),
    *_norm("mlp_norm", "pre_feedforward_layernorm", "ffn_norm"),
    *_norm("mlp_post_norm", "post_feedforward_layernorm", "post_ffw_norm"),
)
_HEAD = (
    Weight("final_norm", "model.norm.weight", "output_norm.weight", is_norm=True),
    Weight("head", "lm_head.weight", "output.weight"),
    Weight("value_head", "score.weight", "cls.output.weight", is_row=True),
)

# Rows of one tensor lie in it one behind the other, in this order.
_JOINED = (
    *_linear("o", "self_attn.o_proj", "attn_output"),
    *_linear("q", "self_attn.qkv_proj", "attn_qkv"),
    *_linear("k", "self_attn.qkv_proj", "attn_qkv"),
    *_linear("v", "self_attn.qkv_proj", "attn_qkv"),
    *_linear("gate", "mlp.gate_up_proj", "ffn_up"),
    *_linear("up", "mlp.gate_up_proj", "ffn_up"),
    *_linear("down", "mlp.down_proj", "ffn_down"),
)


_HEADED_DELTA = (
    *_FADES,
    *(
        Weight(
            f"layers/{path}",
            f"model.layers.{{}}.linear_attn.in_proj_{joined}.weight",
            f"blk.{{}}.ssm_{theirs}.weight",
            transpose=True,
            by_head=True,
        )
        for joined, theirs, paths in (
            ("qkvz", "in", ("q", "k", "v", "read_gate")),
            ("ba", "beta_alpha", ("correct", "fade")),
        )
        for path in paths
    ),
    *_READ,
)


def _of(stack: str, *rows: Weight) -> tuple[Weight, ...]:
    """The rows of layers, for those of another stack."""
    return tuple(row._replace(path=row.path.replace(LAYERS, stack)) for row in rows)


LLAMA_WEIGHTS = (*_EMBEDDING, *_ATTENTION, *_MLP, *_NORMS, *_HEAD)
QWEN3_WEIGHTS = (*_EMBEDDING, *_ATTENTION, *_QK_NORM, *_MLP, *_NORMS, *_HEAD)
QWEN3_MOE_WEIGHTS = (*_EMBEDDING, *_ATTENTION, *_QK_NORM, *_EXPERTS, *_NORMS, *_HEAD)
GEMMA3_WEIGHTS = (*_EMBEDDING, *_ATTENTION, *_QK_NORM, *_MLP, *_FOUR_NORMS, *_HEAD)
OLMO_WEIGHTS = (*_EMBEDDING, *_ATTENTION, *_QK_NORM, *_MLP, *_POST_NORMS, *_HEAD)
GPT_OSS_WEIGHTS = (*_EMBEDDING, *_SINKS, *_ATTENTION, *_BIASED_EXPERTS, *_NORMS, *_HEAD)
GLM4_MOE_WEIGHTS = (
    *_EMBEDDING,
    *_of(DENSE_LAYERS, *_ATTENTION, *_QK_NORM, *_MLP, *_NORMS),
    *_ATTENTION,
    *_QK_NORM,
    *_EXPERTS,
    *_SELECTION,
    *_SHARED_EXPERT,
    *_NORMS,
    *_HEAD,
)
QWEN3_5_WEIGHTS = (
    *_EMBEDDING,
    *_of(DELTA_LAYERS, *_DELTA, *_MLP, *_NORMS),
    *_ATTENTION,
    *_QK_NORM,
    *_MLP,
    *_NORMS,
    *_HEAD,
)
QWEN3_5_MOE_WEIGHTS = (
    *_EMBEDDING,
    *_of(DELTA_LAYERS, *_DELTA, *_EXPERTS, *_SCORED_EXPERT, *_NORMS),
    *_ATTENTION,
    *_QK_NORM,
    *_EXPERTS,
    *_SCORED_EXPERT,
    *_NORMS,
    *_HEAD,
)
QWEN3_NEXT_WEIGHTS = (
    *_EMBEDDING,
    *_of(DELTA_LAYERS, *_HEADED_DELTA, *_EXPERTS, *_SCORED_EXPERT, *_NORMS),
    *_ATTENTION,
    *_QK_NORM,
    *_EXPERTS,
    *_SCORED_EXPERT,
    *_NORMS,
    *_HEAD,
)
PHI3_WEIGHTS = (*_EMBEDDING, *_JOINED, *_NORMS, *_HEAD)


class Number(NamedTuple):
    """A factor that config.json states."""

    field: str
    """Of `DecoderConfig`."""
    key: str
    """Of config.json."""
    read: Callable[[float], float] = float
    """The field's value, of the key's."""
    write: Callable[[float], float] = float
    """The key's value, of the field's."""


class Family(NamedTuple):
    """What tells one family from another."""

    architecture: str
    """The class in transformers."""
    weights: tuple[Weight, ...]
    """Rows in the order of its state dict."""
    defaults: Mapping[str, Any]
    """Keys that a config.json may leave out."""
    fixed: Mapping[str, Any] = MappingProxyType({})
    """Fields of `DecoderConfig` that all its models have alike."""
    bias_keys: tuple[str, ...] = ()
    """config.json's switches of biases that it knows."""
    biased_output: bool = True
    """Whether the switch of attention's biases is of the output projection's too."""
    qk_norm_key: str = ""
    """config.json's switch of norms on queries and keys, where models differ in it."""
    numbers: tuple[Number, ...] = ()
    """config.json's factors that it knows."""
    neutral: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
    """Keys of config.json that are supported at these values alone."""
    activation_key: str = "hidden_act"
    """config.json's name of the activation."""
    sliding: str = "none"
    """Which layers slide: "none", "all", "switched" (all of them, by `use_sliding_window`), "chosen" by it and
    `layer_types`, or "typed" by these types alone."""
    full_every: int = 0
    """typed: without `layer_types`, every such layer sees all."""
    local_rope: bool = False
    """Whether sliding layers have rotary settings of their own."""
    unrotated: bool = False
    """Whether config.json's `no_rope_layers` leaves layers unrotated."""
    partial_rotary: bool = False
    """Whether config.json's `partial_rotary_factor` may leave part of a head unrotated."""
    root_embedding: bool = False
    """Whether embeddings are multiplied by the root of their width."""
    experts: Mapping[str, tuple[str, ...]] | None = None
    """config.json's keys of the fields of `Experts` that it knows, each under all its names; None where layers have an
    MLP."""
    fixed_experts: Mapping[str, Any] = MappingProxyType({})
    """Fields of `Experts` that all its models have alike."""
    shared_width_key: str = ""
    """config.json's width of the MLP that shared experts are, where it says no number of them."""
    delta: Mapping[str, str] | None = None
    """config.json's keys of the fields of `Delta`, where `layer_types` names layers of linear attention; None where all
    layers attend."""
    delta_every: int = 0
    """Without `layer_types`, every such layer attends."""
    joined_as: str = ""
    """The `model_type` of folders that hold a model of the family beside an encoder of images, which is left out: its
    config.json is their `text_config`."""
    predicts_ahead: bool = False
    """Whether files may have layers behind the last, which predict further tokens. They are left out."""
    has_scorer: bool = True
    """Whether transformers has its class of a reward model."""

    @property
    def scorer(self) -> str:
        """The class of a reward model: the same layers with one number, `score`, in place of the vocabulary's head."""
        stem = self.architecture.removesuffix("ForCausalLM")
        return f"{_SCORERS.get(stem, stem)}ForSequenceClassification"


_SCORERS = {"Gemma3": "Gemma3Text", "Qwen3_5": "Qwen3_5Text"}
"""Where the class is not named after that of the language model."""


def pattern(every: int, count: int) -> tuple[bool, ...] | None:
    """All of `count` layers but every `every`-th, as the config has what differs by layer: None where all are alike,
    so that equal models have equal configs."""
    chosen = tuple((layer + 1) % every != 0 for layer in range(count))
    return None if all(chosen) else chosen


_BESIDE_DELTA = {"qk_norm": True, "norm_offset": True, "gated_attention": True}
_ONE_SCORED = {"shared": 1, "shared_score": True}
_DELTA_KEYS = {
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "kernel": "linear_conv_kernel_dim",
}
_DELTA_SIZES = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_OF_SCALE = Number("score_scale", "attention_multiplier")
_OF_SCALAR = Number("score_scale", "query_pre_attn_scalar", lambda x: x**-0.5, lambda x: round(x**-2))


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        LLAMA_WEIGHTS,
        {"max_position_embeddings": 2048},
        bias_keys=("attention_bias", "mlp_bias"),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        LLAMA_WEIGHTS,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
        },
        bias_keys=("attention_bias", "mlp_bias"),
        neutral={"use_sliding_window": (None, False)},
        unrotated=True,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        LLAMA_WEIGHTS,
        {
            "max_position_embeddings": 2048,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        bias_keys=("attention_bias", "mlp_bias"),
        numbers=(
            Number("embed_scale", "embedding_multiplier"),
            Number("residual_scale", "residual_multiplier"),
            Number("logits_divisor", "logits_scaling"),
            _OF_SCALE,
        ),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        PHI3_WEIGHTS,
        {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        sliding="all",
        partial_rotary=True,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        OLMO_WEIGHTS,
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        fixed={"qk_norm": True, "qk_norm_whole": True, "pre_norms": False, "post_norms": True},
        bias_keys=("attention_bias",),
        neutral={"clip_qkv": (None,)},
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        OLMO_WEIGHTS,
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 500_000.0},
        fixed={"qk_norm": True, "qk_norm_whole": True, "pre_norms": False, "post_norms": True},
        bias_keys=("attention_bias",),
        neutral={"clip_qkv": (None,)},
        sliding="typed",
        full_every=4,
        local_rope=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        GEMMA3_WEIGHTS,
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "tie_word_embeddings": True,
        },
        fixed={"qk_norm": True, "post_norms": True, "norm_offset": True, "activation": "gelu_tanh"},
        bias_keys=("attention_bias",),
        numbers=(_OF_SCALAR,),
        neutral={
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (None, False),
        },
        activation_key="hidden_activation",
        sliding="typed",
        full_every=6,
        local_rope=True,
        root_embedding=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        LLAMA_WEIGHTS,
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        sliding="all",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        LLAMA_WEIGHTS,
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        fixed={"attention_bias": True},
        sliding="chosen",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        QWEN3_WEIGHTS,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        bias_keys=("attention_bias",),
        fixed={"qk_norm": True},
        sliding="chosen",
    ),
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        QWEN3_5_WEIGHTS,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "partial_rotary_factor": 0.25,
            **_DELTA_SIZES,
        },
        fixed=_BESIDE_DELTA,
        bias_keys=("attention_bias",),
        neutral={"attn_output_gate": (None, True)},
        partial_rotary=True,
        delta=_DELTA_KEYS,
        delta_every=4,
        joined_as="qwen3_5",
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        QWEN3_NEXT_WEIGHTS,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "intermediate_size": 5632,
            "partial_rotary_factor": 0.25,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            **_DELTA_SIZES,
        },
        fixed=_BESIDE_DELTA,
        bias_keys=("attention_bias",),
        partial_rotary=True,
        experts={
            "count": ("num_experts",),
            "per_token": ("num_experts_per_tok",),
            "mlp_dim": ("moe_intermediate_size",),
            "normalized": ("norm_topk_prob",),
        },
        fixed_experts=_ONE_SCORED,
        shared_width_key="shared_expert_intermediate_size",
        delta=_DELTA_KEYS,
        delta_every=4,
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM",
        QWEN3_5_MOE_WEIGHTS,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 2,
            "head_dim": 256,
            # Of no layer.
            "intermediate_size": 512,
            "partial_rotary_factor": 0.25,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            **_DELTA_SIZES,
        },
        fixed=_BESIDE_DELTA,
        bias_keys=("attention_bias",),
        neutral={"attn_output_gate": (None, True)},
        partial_rotary=True,
        experts={
            "count": ("num_experts",),
            "per_token": ("num_experts_per_tok",),
            "mlp_dim": ("moe_intermediate_size",),
        },
        fixed_experts=_ONE_SCORED,
        shared_width_key="shared_expert_intermediate_size",
        delta=_DELTA_KEYS,
        delta_every=4,
        joined_as="qwen3_5_moe",
        has_scorer=False,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        QWEN3_MOE_WEIGHTS,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "sliding_window": 4096,
        },
        bias_keys=("attention_bias",),
        fixed={"qk_norm": True},
        sliding="switched",
        experts={
            # transformers 5 writes the second name alone, and other readers know the first alone.
            "count": ("num_experts", "num_local_experts"),
            "per_token": ("num_experts_per_tok",),
            "mlp_dim": ("moe_intermediate_size",),
            "normalized": ("norm_topk_prob",),
        },
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        GLM4_MOE_WEIGHTS,
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
        bias_keys=("attention_bias",),
        biased_output=False,
        qk_norm_key="use_qk_norm",
        partial_rotary=True,
        experts={
            "count": ("n_routed_experts",),
            "per_token": ("num_experts_per_tok",),
            "mlp_dim": ("moe_intermediate_size",),
            "normalized": ("norm_topk_prob",),
            "groups": ("n_group",),
            "kept_groups": ("topk_group",),
            "weight_scale": ("routed_scaling_factor",),
            "shared": ("n_shared_experts",),
            "dense_layers": ("first_k_dense_replace",),
        },
        fixed_experts={"selection_bias": True},
        predicts_ahead=True,
        has_scorer=False,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        GPT_OSS_WEIGHTS,
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
            "attention_bias": True,
            "sliding_window": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        bias_keys=("attention_bias",),
        fixed={"sinks": True},
        sliding="typed",
        full_every=2,
        experts={
            "count": ("num_local_experts",),
            "per_token": ("num_experts_per_tok",),
            "mlp_dim": ("intermediate_size",),
            "limit": ("swiglu_limit",),
            "slope": ("swiglu_alpha",),
        },
        fixed_experts={"biases": True},
    ),
}

DTYPES = ("float32", "bfloat16", "float16")


class Entry(NamedTuple):
    """One tensor of a file."""

    name: str
    """Its name in the file."""
    weight: Weight
    """The weight that it holds."""
    layer: int | None
    """The layer of it, of its stack; None for what is not a layer."""
    shape: tuple[int, ...]
    """In the file: [.., out, in] for matrices."""
    part: tuple[Any, ...] | None = None
    """The index of this one in a tensor that holds several weights; None is all of a tensor of its own."""
    expert: int | None = None
    """The expert of it; None for what is of none, or holds all experts of the layer."""


def entries(config: DecoderConfig, kind: str = "hf") -> list[Entry]:
    """The tensors that a file of this model holds, in state dict order. `kind` is "hf" or "gguf". A tensor that holds
    several weights has an entry for each of them."""
    tree = abstract_params(config)
    declared = {name: leaf.shape for name, leaf in tree.items() if name not in config.stacks}
    for stack in config.stacks:
        declared |= {f"{stack}/{name}": leaf.shape[1:] for name, leaf in tree[stack].items()}

    # A family lists what its models may have; the config decides which of it this one has.
    rows = [weight for weight in family_of(config).weights if weight.path in declared]

    joined: dict[tuple[str, str], list[Weight]] = {}
    for weight in rows:
        joined.setdefault((weight.stack, getattr(weight, kind)), []).append(weight)

    def entry(weight: Weight, layer: int | None, expert: int | None = None) -> Entry:
        name = getattr(weight, kind)
        together = joined[weight.stack, name]
        if layer is not None:
            # Files count through the layers of all stacks.
            name = name.format(config.stacks[weight.stack][layer], expert)
        shape = declared[weight.path] if expert is None else declared[weight.path][1:]
        shape = (1, *shape) if weight.is_row else in_file(shape) if weight.transpose else shape
        if len(together) == 1:
            return Entry(name, weight, layer, shape, expert=expert)

        number = together.index(weight)
        if weight.alternates:
            own = (..., slice(number, None, len(together)))
            return Entry(name, weight, layer, (*shape[:-1], shape[-1] * len(together)), own)

        # Ours are [in, out], so what are rows to the file are our last dimension.
        sizes = [declared[other.path][-1] for other in together]
        start = sum(sizes[:number])
        if weight.by_head:
            heads = config.delta.key_heads if config.delta else 1
            of_head = slice(start // heads, (start + shape[0]) // heads)
            rows_of = np.arange(sum(sizes)).reshape(heads, -1)[:, of_head].ravel()
            return Entry(name, weight, layer, (sum(sizes), *shape[1:]), (rows_of,))
        return Entry(name, weight, layer, (sum(sizes), *shape[1:]), (slice(start, start + shape[0]),))

    # A state dict goes layer by layer, with what is not a layer before and behind.
    stacked = [weight for weight in rows if weight.stack]
    first = rows[: rows.index(stacked[0])]
    last = rows[rows.index(stacked[-1]) + 1 :]
    middle: list[Entry] = []
    stacks = config.stacks
    for stack, layer in ((stack, stacks[stack].index(number)) for number, stack in enumerate(config.kinds)):
        own = [weight for weight in stacked if weight.stack == stack]
        of_experts = [weight for weight in own if getattr(weight, kind).count("{}") == 2]
        for weight in own:
            if weight not in of_experts:
                middle.append(entry(weight, layer))
            elif weight is of_experts[0]:
                # Expert by expert, each with all its matrices.
                count = config.experts.count if config.experts else 0
                middle += [entry(each, layer, expert) for expert in range(count) for each in of_experts]
    return [entry(weight, None) for weight in first] + middle + [entry(weight, None) for weight in last]


def in_file(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix, or of several, with its last two dimensions exchanged."""
    return (*shape[:-2], shape[-1], shape[-2])


def fresh_config(
    family: str, *, sliding_window: int | None = None, experts: Experts | None = None, **sizes: Any
) -> DecoderConfig:
    """The config of a new model: what all models of the family have alike, the `sizes` given (fields of
    `DecoderConfig`), and the window of those layers that slide where no file says which. Heads of a delta rule are as
    many and as wide as those of attention. ValueError for an unknown family, for a window in a family without any, for
    experts where the family has an MLP or the reverse, and for too few layers to have both kinds."""
    known = _known(family)
    if (experts is None) != (known.experts is None):
        having = ", ".join(name for name, one in FAMILIES.items() if one.experts is not None)
        said = "needs experts" if experts is None else f"has no experts; of {experts.count} take a family of {having}"
        raise ValueError(f"family={family!r} {said}")

    if experts is not None and known.experts is not None:
        # What no size says is the family's.
        factors = {ours: known.defaults[names[0]] for ours, names in known.experts.items() if ours in _OF_THE_FAMILY}
        experts = dataclasses.replace(experts, **known.fixed_experts, **factors)
    fields: dict[str, Any] = {**known.fixed, "experts": experts}

    # What follows from the sizes.
    if known.root_embedding:
        fields["embed_scale"] = sizes["embed_dim"] ** 0.5
    if "partial_rotary_factor" in known.defaults:
        # Rotary embeddings rotate pairs.
        fields["rotary_dim"] = 2 * round(sizes["head_dim"] * known.defaults["partial_rotary_factor"] / 2)
    if known.delta is not None:
        if (count := sizes["num_layers"]) < known.delta_every:
            raise ValueError(
                f"num_layers={count} must be at least {known.delta_every} in {family}: every {known.delta_every}th "
                "layer attends"
            )
        fields["delta"] = Delta(
            layers=pattern(known.delta_every, count) or (),
            key_heads=sizes["num_kv_heads"],
            value_heads=sizes["num_heads"],
            key_dim=sizes["head_dim"],
            value_dim=sizes["head_dim"],
        )
    if known.unrotated:
        fields["rotated_layers"] = pattern(known.defaults["no_rope_layer_interval"], sizes["num_layers"])
    if known.local_rope:
        fields["rope_theta"] = known.defaults["rope_theta"]

    if sliding_window is not None:
        if known.sliding == "none":
            raise ValueError(f"sliding_window={sliding_window} needs a family whose layers slide; {family} has none")
        fields["sliding_window"] = sliding_window
    if sliding_window is not None and known.full_every:
        fields["sliding_layers"] = pattern(known.full_every, sizes["num_layers"])
    if sliding_window is not None and known.local_rope:
        fields["local_rope_theta"] = known.defaults.get("rope_local_base_freq", known.defaults["rope_theta"])
    return DecoderConfig(family=family, **fields, **sizes)


def family_of(config: DecoderConfig) -> Family:
    """The family of a config; ValueError when it is unknown."""
    return _known(config.family)


def _known(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"family={name!r:.80} is not supported; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The `DecoderConfig` that a Hugging Face config.json describes.

    Both spellings of rotary settings are read: `rope_parameters` (transformers 5) and `rope_theta` with
    `rope_scaling`. `dtype` and `param_dtype` are the file's own. Raises ValueError for an unsupported architecture,
    rope type, activation or layer type, and for a missing key.
    """
    hf = text_part(hf)
    name = hf.get("model_type")
    supported = ", ".join(f"{key} ({family.architecture})" for key, family in FAMILIES.items())
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"config.json: model_type={name!r:.80} is not supported; supported are {supported}")

    # The architecture too: a classifier has the same model_type, and no head over the vocabulary.
    family = FAMILIES[name]
    architectures = hf.get("architectures") or [family.architecture]
    architecture = architectures[0] if isinstance(architectures, list) else architectures
    if architecture not in (family.architecture, *((family.scorer,) if family.has_scorer else ())):
        raise ValueError(f"config.json: architecture {architecture!r:.80} is not supported; supported are {supported}")
    is_scorer = architecture == family.scorer and family.has_scorer
    if is_scorer and (count := _labels(hf)) != 1:
        raise ValueError(
            f"config.json: {family.scorer} with {count} labels is a classifier; a reward model has one (id2label)"
        )
    names = _ACTIVATIONS[family.fixed.get("activation", "silu")]
    if (activation := hf.get(family.activation_key, names[0])) not in names:
        raise ValueError(
            f"config.json: {family.activation_key}={activation!r:.80} is not supported; {name} has {names[0]} alone"
        )
    for key, values in family.neutral.items():
        if (value := hf.get(key)) not in values:
            raise ValueError(f"config.json: {key}={value!r:.80} is not supported; it must be {values[0]!r}")

    # A file may leave out what is its family's default.
    get: Callable[..., Any] = {**family.defaults, **hf}.get
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if get(key) is None]:
        raise ValueError(f"config.json: {', '.join(missing)} missing; add it to the file")

    heads = _whole(get, "num_attention_heads")
    hidden = _whole(get, "hidden_size")
    max_position = _whole(get, "max_position_embeddings")
    rope, local_theta = _rope_by_layer(family, hf)
    theta, scaling = _rope_from_hf(rope, max_position, family.defaults.get("rope_theta", 10_000.0))
    window, sliding = _sliding_from_hf(family, get)
    head_dim = _whole(get, "head_dim", hidden // heads)
    numbers: dict[str, Any] = {
        number.field: number.read(_real(number.key, get(number.key))) for number in family.numbers
    }
    # What attention has anyway is not said: equal models have equal configs.
    if math.isclose(numbers.get("score_scale", 0.0), head_dim**-0.5, rel_tol=1e-6):
        numbers["score_scale"] = None
    if family.root_embedding:
        numbers["embed_scale"] = hidden**0.5

    # transformers 5 writes `dtype`, older releases `torch_dtype`.
    dtype = str(get("dtype") or get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"config.json: dtype={dtype!r} is not supported; supported are {', '.join(DTYPES)}")

    # The switch sets all four biases of attention; a family without it may still have those of q, k and v.
    attention_bias = "attention_bias" in family.bias_keys and bool(get("attention_bias"))
    fields = dict(family.fixed) | numbers
    fields["attention_bias"] = attention_bias or fields.get("attention_bias", False)
    if family.qk_norm_key:
        fields["qk_norm"] = bool(get(family.qk_norm_key))
    return DecoderConfig(
        family=name,
        vocab_size=_whole(get, "vocab_size"),
        num_layers=_whole(get, "num_hidden_layers", most=_MOST_LAYERS),
        embed_dim=hidden,
        num_heads=heads,
        num_kv_heads=_whole(get, "num_key_value_heads", heads),
        head_dim=head_dim,
        mlp_dim=_whole(get, "intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_real("rms_norm_eps", get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(get("tie_word_embeddings", False)),
        output_bias=attention_bias and family.biased_output,
        mlp_bias="mlp_bias" in family.bias_keys and bool(get("mlp_bias")),
        sliding_window=window,
        sliding_layers=sliding,
        experts=_experts_from_hf(family, get),
        delta=_delta_from_hf(family, get),
        # A window that no layer has leaves nothing for the other base to rotate.
        local_rope_theta=local_theta if window is not None else None,
        rotary_dim=_rotary_dim(family, rope, hf, head_dim),
        rotated_layers=_rotated_from_hf(family, get),
        max_position=max_position,
        dtype=dtype,
        param_dtype=dtype,
        value_head=is_scorer,
        value_bias=not is_scorer,
        **fields,
    )


def text_part(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the language model of a folder that holds it beside an encoder of images; any other as it
    is."""
    kind = hf.get("model_type")
    text = hf.get("text_config")
    name = next((name for name, family in FAMILIES.items() if family.joined_as and family.joined_as == kind), None)
    if name is None or not isinstance(text, Mapping):
        return hf
    said = {key: hf[key] for key in ("tie_word_embeddings", "dtype", "torch_dtype") if key in hf}
    return {**said, **text, "model_type": text.get("model_type", name)}


def _delta_from_hf(family: Family, get: Callable[..., Any]) -> Delta | None:
    if family.delta is None:
        return None
    count = _whole(get, "num_hidden_layers", most=_MOST_LAYERS)
    types = get("layer_types")
    if types is None:
        every = _whole(get, "full_attention_interval", family.delta_every)
        layers = pattern(every, count) or (True,) * count
    else:
        layers = tuple(kind == _LINEAR for kind in types)
    return Delta(layers=layers, **{ours: _whole(get, theirs) for ours, theirs in family.delta.items()})


_LINEAR = "linear_attention"


def _labels(hf: Mapping[str, Any]) -> int:
    """How many numbers a sequence classifier gives."""
    labels = hf.get("id2label")
    # transformers takes two where nothing is said.
    return len(labels) if isinstance(labels, Mapping) else 2


_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}
"""config.json's names of `DecoderConfig.activation`."""

_EXPERT_FACTORS = ("limit", "slope", "weight_scale")
"""Fields of `Experts` that are no counts."""

_OF_THE_FAMILY = (*_EXPERT_FACTORS, "groups", "kept_groups", "shared", "dense_layers")
"""Those that a new model has from its family."""

_MOST_LAYERS = 10_000  # lists of all layers are made of the number before any tensor is looked at


def _whole(get: Callable[..., Any], key: str, default: int | None = None, most: int = 2**31 - 1, least: int = 1) -> int:
    """A count. A key that is null is one that is not there."""
    value = get(key)
    value = default if value is None else value
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"config.json: {key}={value!r:.80} must be a whole number from {least} to {most}")
    return value


def _real(key: str, value: Any) -> float:
    """A finite number above 0."""
    # JSON has whole numbers where a float is meant, and some beyond every float; `True` is none.
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"config.json: {key}={value!r:.80} must be a finite number above 0")
    return float(value)


def _experts_from_hf(family: Family, get: Callable[..., Any]) -> Experts | None:
    if family.experts is None:
        return None
    # The layers are stacked, so all have the same weights.
    if get("decoder_sparse_step", 1) != 1 or get("mlp_only_layers"):
        raise ValueError(
            f"config.json: decoder_sparse_step={get('decoder_sparse_step')!r:.80} with "
            f"mlp_only_layers={get('mlp_only_layers')!r:.80} is not supported; every layer must have experts"
        )

    # Each under the first of its names that the file has.
    flags = {field.name for field in dataclasses.fields(Experts) if field.type in (bool, "bool")}
    fields: dict[str, Any] = {}
    for ours, names in family.experts.items():
        theirs = next((name for name in names if get(name) is not None), names[0])
        if ours in _EXPERT_FACTORS:
            fields[ours] = _real(theirs, get(theirs))
        elif ours in flags:
            fields[ours] = bool(get(theirs))
        else:
            fields[ours] = _whole(get, theirs, least=0 if ours == "dense_layers" else 1)

    # Ours are so many experts, whatever a file says of their width.
    if key := family.shared_width_key:
        width = _whole(get, key)
        fields["shared"], rest = divmod(width, fields["mlp_dim"])
        if rest:
            raise ValueError(
                f"config.json: {key}={width} must be a multiple of {family.experts['mlp_dim'][0]}={fields['mlp_dim']}"
            )
    return Experts(**{**family.fixed_experts, **fields})


def _reals(key: str, values: Any) -> tuple[float, ...]:
    """A list of finite numbers above 0."""
    if not isinstance(values, list | tuple):
        raise ValueError(f"config.json: {key}={values!r:.80} must be a list of numbers")
    return tuple(_real(key, value) for value in values)


def _sliding_from_hf(family: Family, get: Callable[..., Any]) -> tuple[int | None, tuple[bool, ...] | None]:
    window = None if get("sliding_window") is None else _whole(get, "sliding_window")
    count = _whole(get, "num_hidden_layers", most=_MOST_LAYERS)
    types = get("layer_types")
    if types is not None and not isinstance(types, list):
        raise ValueError(f"config.json: layer_types={types!r:.80} must be a list, a name for each layer")
    known = ("full_attention", "sliding_attention" if family.delta is None else _LINEAR)
    if unknown := [kind for kind in types or () if kind not in known]:
        raise ValueError(f"config.json: layer_types has {unknown[0]!r:.80}; supported are {' and '.join(known)}")
    if types is not None and len(types) != count:
        raise ValueError(f"config.json: layer_types has {len(types)} entries for num_hidden_layers={count}")

    # Files may hold a window that their model ignores, so the number alone decides nothing.
    if family.sliding == "none" or window is None:
        return None, None
    if family.sliding == "all":
        if types is not None and "full_attention" in types:
            raise ValueError("config.json: layer_types mixes full_attention into a family whose layers all slide")
        return window, None
    if family.sliding == "chosen" and not get("use_sliding_window"):
        return None, None
    if family.sliding == "switched":
        return window, None

    if types is None and family.sliding == "typed":
        every = _whole(get, "sliding_window_pattern", family.full_every)
        slides = pattern(every, count) or (True,) * count
        types = ["sliding_attention" if own else "full_attention" for own in slides]

    # Older files name the first layer that slides, newer ones the type of each.
    if types is None:
        first = get("max_window_layers")
        if type(first) is not int:
            raise ValueError(f"config.json: max_window_layers={first!r:.80} must be a whole number")
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    sliding = tuple(kind == "sliding_attention" for kind in types)
    if not any(sliding):
        return None, None
    # All layers are None, never a tuple of True: equal models have equal configs.
    return window, None if all(sliding) else sliding


def _rotated_from_hf(family: Family, get: Callable[..., Any]) -> tuple[bool, ...] | None:
    """Which layers rotate queries and keys; None where all do."""
    if not family.unrotated:
        return None
    count = _whole(get, "num_hidden_layers", most=_MOST_LAYERS)
    given = get("no_rope_layers")
    if given is None:
        return pattern(_whole(get, "no_rope_layer_interval"), count)
    if isinstance(given, list) and len(given) == count and all(value in (0, 1) for value in given):
        # Whatever the key is called, 1 stands for a layer that rotates.
        rotated = tuple(bool(value) for value in given)
        return None if all(rotated) else rotated
    raise ValueError(
        f"config.json: no_rope_layers={given!r:.80} must be a list of 0 and 1 for the num_hidden_layers={count}"
    )


def _rotary_dim(family: Family, rope: Mapping[str, Any], hf: Mapping[str, Any], head_dim: int) -> int | None:
    """Width of a head that is rotated; None is all of it."""
    settings = dict(rope.get("rope_scaling") or rope.get("rope_parameters") or {})
    default = hf.get("partial_rotary_factor", family.defaults.get("partial_rotary_factor"))
    partial = settings.get("partial_rotary_factor", default)
    if partial in (None, 1, 1.0):
        return None
    if not family.partial_rotary:
        raise ValueError(
            f"config.json: partial_rotary_factor={partial!r:.80} is not supported; every head rotates whole"
        )
    if (width := int(head_dim * _real("partial_rotary_factor", partial))) > head_dim:
        raise ValueError(f"config.json: partial_rotary_factor={partial!r:.80} must be at most 1")
    return width


def _rope_by_layer(family: Family, hf: Mapping[str, Any]) -> tuple[Mapping[str, Any], float | None]:
    """config.json with the rotary settings of layers that see all, and the base of those that slide; None where it is
    the same. ValueError where sliding layers have more than a base of their own."""
    default_rope = family.defaults.get("rope_parameters")
    if default_rope is not None and not (hf.get("rope_parameters") or hf.get("rope_scaling")):
        hf = {**hf, "rope_parameters": default_rope}
    if not family.local_rope:
        return hf, None

    # Newer files have an object for each kind of layer, and older ones a key of their own for those that slide.
    newer = hf.get("rope_parameters")
    base = hf.get("rope_local_base_freq", family.defaults.get("rope_local_base_freq"))
    if isinstance(newer, Mapping) and any(isinstance(value, Mapping) for value in newer.values()):
        if unknown := sorted(set(newer) - {"full_attention", "sliding_attention"}):
            raise ValueError(f"config.json: rope_parameters has {unknown[0]!r:.80}, which is no supported layer type")
        local = newer.get("sliding_attention") or {}
        full = newer.get("full_attention") or {}
        if not isinstance(local, Mapping) or not isinstance(full, Mapping):
            raise ValueError("config.json: rope_parameters must hold an object for each layer type")
        if (kind := local.get("rope_type", "default")) != "default":
            raise ValueError(f"config.json: rope type {kind!r:.80} of sliding layers is not supported; give default")

        hf = {**hf, "rope_parameters": full, "rope_scaling": None}
        base = local.get("rope_theta", base)
        if base is None:
            base = full.get("rope_theta", hf.get("rope_theta"))

    # Where nothing is said of them they rotate as the others.
    if base is None:
        base = hf.get("rope_theta", family.defaults.get("rope_theta"))
    return hf, _real("rope_theta of sliding layers", base)


_ROPE_KEYS: dict[str, dict[str, str]] = {  # ours -> config.json's, per type
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    },
    "longrope": {
        "factor": "factor",
        "original_max_position": "original_max_position_embeddings",
        "attention_factor": "attention_factor",
        "short_factor": "short_factor",
        "long_factor": "long_factor",
    },
}


def _rope_from_hf(hf: Mapping[str, Any], max_position: int, default_theta: float) -> tuple[float, RopeScaling]:
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf.get(key) or {}, Mapping):
            raise ValueError(f"config.json: {key}={hf[key]!r:.80} must be an object")
    newer = dict(hf.get("rope_parameters") or {})
    rope = dict(hf.get("rope_scaling") or newer)
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError("config.json: rope_parameters differ by layer type, which no supported family has")
    kind: Any = rope.get("rope_type", rope.get("type", "default"))
    # Names that early files of Phi-3 give to it.
    if kind == "su" or (kind == "yarn" and hf.get("model_type") == "phi3"):
        kind = "longrope"
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ValueError(f"config.json: rope type {kind!r:.80} is not supported; supported are {', '.join(_ROPE_KEYS)}")

    # What the file leaves to be derived. A base that is null is refused: a guess would be another model.
    places = (rope, newer, hf)
    theta = _real("rope_theta", next((place["rope_theta"] for place in places if "rope_theta" in place), default_theta))
    keys = _ROPE_KEYS[kind]
    if "original_max_position" in keys:
        top_level = hf.get("original_max_position_embeddings")
        original = top_level or rope.get("original_max_position_embeddings") or max_position
        rope["original_max_position_embeddings"] = _real("original_max_position_embeddings", original)
    if kind in ("yarn", "longrope") and rope.get("factor") is None:
        rope["factor"] = max_position / rope["original_max_position_embeddings"]
    if kind == "llama3" and (
        missing := [k for k in ("factor", "low_freq_factor", "high_freq_factor") if rope.get(k) is None]
    ):
        raise ValueError(f"config.json: rope type llama3 needs {', '.join(missing)}")
    if "factor" in keys and rope.get("factor") is None:
        raise ValueError(f"config.json: rope type {kind} needs a factor")

    # A key that is absent or null leaves our default.
    values: dict[str, Any] = {}
    for ours, theirs in keys.items():
        value = rope.get(theirs)
        # 0 stands for no weight, as it does in transformers.
        if value is None or (value == 0 and theirs in ("mscale", "mscale_all_dim")):
            continue
        if theirs in ("short_factor", "long_factor"):
            values[ours] = _reals(theirs, value)
        else:
            values[ours] = bool(value) if ours == "truncate" else _real(theirs, value)
    if "original_max_position" in values:
        values["original_max_position"] = int(values["original_max_position"])
    return theta, RopeScaling(**{"type": kind, **values})


def _rope_parameters(config: DecoderConfig, family: Family, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The newer spelling of rotary settings."""
    full = {**scaling, "rope_theta": config.rope_theta}
    if family.partial_rotary:
        full["partial_rotary_factor"] = config.rotary_width / config.head_dim
    if not family.local_rope:
        return full
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta or config.rope_theta}
    return {"full_attention": full, "sliding_attention": local}


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a `DecoderConfig`, complete for transformers 5 and, by `rope_theta` and `rope_scaling`, 4.

    Raises ValueError when the family cannot express the config (say, biases in Mistral).
    """
    family = family_of(config)
    keys = _ROPE_KEYS[config.rope_scaling.type]
    scaling = {theirs: getattr(config.rope_scaling, ours) for ours, theirs in keys.items()}
    scaling = {key: value for key, value in scaling.items() if value is not None}
    scaling |= {"rope_type": config.rope_scaling.type}
    hf: dict[str, Any] = {
        "architectures": [family.scorer if config.value_head else family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        family.activation_key: _ACTIVATIONS[config.activation][0],
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": _rope_parameters(config, family, scaling),
        "tie_word_embeddings": config.tied_embeddings,
        "dtype": config.param_dtype,
        "use_cache": True,
    }

    if config.value_head and not family.has_scorer:
        raise ValueError(f"transformers has no {family.scorer}, which a value head of {config.family} would be")
    if config.value_head:
        hf |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if keys:
        hf["rope_scaling"] = scaling
    if config.rope_scaling.type == "longrope":
        hf["original_max_position_embeddings"] = config.rope_scaling.original_max_position
    if family.partial_rotary:
        hf["partial_rotary_factor"] = config.rotary_width / config.head_dim

    # What a family has no key for is left out; the check at the end finds what that loses.
    hf |= {key: getattr(config, key) for key in family.bias_keys}
    if family.qk_norm_key:
        hf[family.qk_norm_key] = config.qk_norm
    if family.predicts_ahead:
        hf["num_nextn_predict_layers"] = 0
    for number in family.numbers:
        value = getattr(config, number.field)
        hf[number.key] = number.write(config.head_dim**-0.5 if value is None else value)
    if family.unrotated:
        hf["no_rope_layers"] = [int(rotation != "none") for rotation in config.rotations]
    if family.sliding == "typed":
        sliding = list(config.sliding_layers or (config.sliding_window is not None,) * config.num_layers)
        hf["sliding_window"] = config.sliding_window
        hf["layer_types"] = ["sliding_attention" if s else "full_attention" for s in sliding]
    if "rope_local_base_freq" in family.defaults:
        hf["rope_local_base_freq"] = config.local_rope_theta or config.rope_theta
    if family.sliding == "all":
        hf["sliding_window"] = config.sliding_window
    if family.experts is not None and config.experts is not None:
        hf |= {name: getattr(config.experts, ours) for ours, names in family.experts.items() for name in names}
        hf |= {"decoder_sparse_step": 1, "mlp_only_layers": []} if "decoder_sparse_step" in family.defaults else {}
        if family.shared_width_key:
            hf[family.shared_width_key] = config.experts.shared * config.experts.mlp_dim
    if family.delta is not None and config.delta is not None:
        hf |= {theirs: getattr(config.delta, ours) for ours, theirs in family.delta.items()}
        hf["layer_types"] = [_LINEAR if own else "full_attention" for own in config.delta.layers]
    if family.sliding == "switched":
        hf |= {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    if family.sliding == "chosen":
        sliding = [window == config.sliding_window for window in config.windows]
        hf |= {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            # Older readers know only the first layer that slides.
            "max_window_layers": sliding.index(True) if any(sliding) else config.num_layers,
            "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        }

    # Read back: whatever does not come back as it was cannot be said in this family's file. How many ids there are is
    # said by the tokenizer's files.
    back = dataclasses.replace(config_from_hf(hf), dtype=config.dtype, tokenizer_size=config.tokenizer_size)
    if lost := [f.name for f in dataclasses.fields(config) if getattr(back, f.name) != getattr(config, f.name)]:
        named = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ValueError(f"a {config.family} config.json cannot express {named}; change it or choose another family")
    return hf
