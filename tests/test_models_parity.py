"""Our decoder against Hugging Face transformers: the same logits from the same weights, in both directions.

Needs torch, which the ordinary test environment leaves out:
    pip install torch==2.13.0 transformers==5.23.0
"""

import dataclasses
import filecmp
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs torch; pip install torch==2.13.0")
transformers = pytest.importorskip("transformers", reason="parity needs transformers; pip install transformers")

from rljax.models import (  # noqa: E402
    DecoderConfig,
    RopeScaling,
    config_from_hf,
    config_to_hf,
    find_smollm2,
    hidden_states,
    init_params,
    load_hf,
    load_model,
    logits,
    read_metadata,
    save_hf,
    value_config,
    values,
)
from rljax.sampling import Request, Sampler, SamplerSpec, sampling_params  # noqa: E402

LENGTH = 40
TOLERANCE = 1e-4

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that attention is far from uniform, and a wrong angle or mask shows
    "pad_token_id": None,  # some families' default is an id behind this vocabulary
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 48,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}

CASES = {
    "llama": ("llama", {}),
    "llama_multi_query": ("llama", {"num_key_value_heads": 1, "head_dim": 12}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3_scaling": ("llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "linear_scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "dynamic_scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 16},
    ),
    "yarn_scaling": ("llama", {"rope_parameters": YARN}),
    "yarn_untruncated": ("qwen3", {"rope_parameters": YARN | {"truncate": False, "beta_fast": 16.0, "beta_slow": 2.0}}),
    "yarn_mscale": ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
    # 1.2: a larger factor sharpens the softmax until either side is 5e-5 from float64 by rounding alone.
    "yarn_attention_factor": ("llama", {"rope_parameters": YARN | {"attention_factor": 1.2}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3_layer_types": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        | {"norm_topk_prob": True},
    ),
    "qwen3_moe_weights_as_they_are": (
        "qwen3_moe",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "sliding_window": 6}
        | {"use_sliding_window": True},
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3_chosen": ("smollm3", {"no_rope_layers": [0, 1, 1], "attention_bias": True, "mlp_bias": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.7,
        },
    ),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi3_longrope": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 48,
            "hidden_size": 64,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 6, "num_hidden_layers": 4, "rope_parameters": {"full_attention": YARN}}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "rope_parameters": YARN | {"truncate": False, "beta_fast": 8.0, "beta_slow": 1.0},
            # So low that the random model's gates go beyond it.
            "swiglu_limit": 1.0,
            "swiglu_alpha": 1.3,
        },
    ),
    "gpt_oss_plain": (
        "gpt_oss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 3, "attention_bias": False, "sliding_window": 5}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "glm4_moe": (
        "glm4_moe",
        {"head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
        | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "n_shared_experts": 2, "use_qk_norm": True},
    ),
    # As GLM-4.5-Air is; all layers have experts, and heads rotate by a quarter.
    "glm4_moe_ungrouped": (
        "glm4_moe",
        {"head_dim": 16, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        | {"attention_bias": True, "norm_topk_prob": False, "first_k_dense_replace": 0}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25}},
    ),
    # Few layers, and 0.1: keys of length one and norms of what is read amplify rounding, until with eight layers and
    # 0.3 either side is 1e-3 to 1e-2 from float64.
    "qwen3_5": (
        "qwen3_5_text",
        {"head_dim": 16, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 12, "linear_value_head_dim": 10, "initializer_range": 0.1}
        | {"layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "qwen3_5_chosen": (
        "qwen3_5_text",
        {"head_dim": 8, "linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 6, "linear_conv_kernel_dim": 3, "attention_bias": True}
        | {"layer_types": ["full_attention", "linear_attention", "linear_attention"]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {"head_dim": 16, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 12, "linear_value_head_dim": 10, "initializer_range": 0.1}
        | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        | {"shared_expert_intermediate_size": 40, "layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "qwen3_next": (
        "qwen3_next",
        {"head_dim": 16, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 6}
        | {"linear_key_head_dim": 12, "linear_value_head_dim": 10, "initializer_range": 0.1}
        | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": False}
        | {"shared_expert_intermediate_size": 20, "layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "gemma3_plain": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}),
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
    "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
    "olmo3": (transformers.Olmo3Config, transformers.Olmo3ForCausalLM),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    "glm4_moe": (transformers.Glm4MoeConfig, transformers.Glm4MoeForCausalLM),
    "qwen3_5_text": (transformers.Qwen3_5TextConfig, transformers.Qwen3_5ForCausalLM),
    "qwen3_5_moe_text": (transformers.Qwen3_5MoeTextConfig, transformers.Qwen3_5MoeForCausalLM),
    "qwen3_next": (transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}


def random_model(case: str, **overrides):
    family, settings = CASES[case]
    make_config, make_model = CLASSES[family]
    torch.manual_seed(0)
    model = make_model(make_config(**(SHAPE | settings | overrides))).eval()
    with torch.no_grad():  # biases and norms begin at 0 and 1, where a swap would not show
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            assert parameter.dtype == torch.float32, name
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # As large as the scores, so that it decides.
                buffer.copy_(0.5 * torch.randn_like(buffer))
    return model


def tokens(rows: int = 2, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).integers(0, SHAPE["vocab_size"], (rows, length))


def their_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def our_logits(config, params, ids: np.ndarray) -> np.ndarray:
    rows, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    hidden = hidden_states(config, params, jnp.asarray(ids), positions, jnp.full((rows, length), length))
    return np.asarray(logits(config, params, hidden))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_imported_weights_give_the_logits_of_transformers(case, tied, tmp_path):
    model = random_model(case, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    config, params = load_hf(tmp_path)
    assert config.tied_embeddings == tied
    reference = their_logits(model, tokens())
    assert np.abs(reference).max() > 1  # the comparison is about something
    assert np.abs(our_logits(config, params, tokens()) - reference).max() < TOLERANCE


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_exported_weights_give_our_logits_in_transformers(case, tied, tmp_path):
    config = config_from_hf(random_model(case, tie_word_embeddings=tied).config.to_dict())
    params = init_params(config, jax.random.key(3))
    params = jax.tree.map(
        lambda x: 10 * x if x.ndim > 2 else x + 0.1 * jnp.arange(x.size).reshape(x.shape) % 0.7, params
    )
    save_hf(tmp_path, config, params, max_shard_bytes=30_000, hf_config={"pad_token_id": None})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(model) is CLASSES[CASES[case][0]][1]
    ours = our_logits(config, params, tokens())
    assert np.abs(ours).max() > 1
    assert np.abs(their_logits(model, tokens()) - ours).max() < TOLERANCE


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma3", "qwen3_5"])
def test_a_reward_model_gives_the_scores_of_transformers_both_ways(case, tmp_path):
    """The number behind the last token of rows of unequal length."""
    make_config, make_model = CLASSES[CASES[case][0]]
    text = "Text" if case in ("gemma3", "qwen3_5") else ""
    name = f"{make_model.__name__[:-11]}{text}ForSequenceClassification"
    torch.manual_seed(0)
    settings = make_config(**(SHAPE | CASES[case][1] | {"num_labels": 1, "pad_token_id": 0}))
    model = getattr(transformers, name)(settings).eval()
    with torch.no_grad():
        model.score.weight.mul_(10)
    model.save_pretrained(tmp_path / "theirs")

    config, params = load_hf(tmp_path / "theirs")
    assert config.value_head and not config.value_bias and "head" not in params
    ids = 1 + tokens() % (SHAPE["vocab_size"] - 1)
    ids[1, 30:] = 0
    theirs = their_logits(model, ids)[:, 0]
    np.testing.assert_allclose(our_scores(config, params, ids, [40, 30]), theirs, rtol=0, atol=TOLERANCE)
    assert np.abs(theirs).max() > 0.1

    save_hf(tmp_path / "ours", config, params)
    assert filecmp.cmp(
        tmp_path / "theirs" / "model.safetensors", tmp_path / "ours" / "model.safetensors", shallow=False
    )
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", pad_token_id=0).eval()
    np.testing.assert_array_equal(their_logits(again, ids)[:, 0], theirs)


def our_scores(config, params, ids: np.ndarray, ends: list[int]) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    stop = jnp.where(positions < jnp.array(ends)[:, None], jnp.array(ends)[:, None], 0)
    found = values(config, params, hidden_states(config, params, jnp.asarray(ids), positions, stop))
    return np.asarray(found)[np.arange(len(ends)), np.array(ends) - 1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id2label": {"0": "no", "1": "yes"}}, "LlamaForSequenceClassification with 2 labels is a classifier"),
        ({"id2label": None}, "LlamaForSequenceClassification with 2 labels is a classifier"),
        ({"architectures": ["LlamaForTokenClassification"]}, "'LlamaForTokenClassification' is not supported"),
    ],
)
def test_a_classifier_is_no_reward_model(change, says):
    config = value_config(config_from_hf(random_model("llama").config.to_dict()), bias=False)
    assert config_from_hf(config_to_hf(config)) == config
    with pytest.raises(ValueError, match=says):
        config_from_hf(config_to_hf(config) | change)
    with pytest.raises(ValueError, match="cannot express value_bias=True"):
        config_to_hf(dataclasses.replace(config, value_bias=True))


# transformers never parts the experts of a layer, whatever size it is told: files that it did not write do so.
SHARDS = [(case, size) for case in ("llama", "qwen2", "qwen3_biases") for size in (10**9, 10_000)]


WHOLE = [(case, 10**9) for case in ("qwen3_moe", "gpt_oss", "glm4_moe", "qwen3_5", "qwen3_5_moe", "qwen3_next")]


@pytest.mark.parametrize(("case", "max_shard"), [*SHARDS, *WHOLE])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_of_transformers_comes_back_byte_for_byte(case, max_shard, dtype, tmp_path):
    model = random_model(case).to(getattr(torch, dtype))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            # As it is where transformers has loaded such a model, and in released files.
            buffer.data = buffer.data.float()
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard)
    config, params = load_hf(tmp_path / "theirs")
    assert config.param_dtype == dtype
    save_hf(tmp_path / "ours", config, params, max_shard_bytes=max_shard)
    files = sorted(path.name for path in (tmp_path / "theirs").glob("model*"))
    assert len(files) == 1 if max_shard > 10_000 else len(files) > 5
    assert files == sorted(path.name for path in (tmp_path / "ours").glob("model*"))
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


@pytest.mark.parametrize("case", CASES)
def test_config_survives_transformers(case, tmp_path):
    config = config_from_hf(random_model(case).config.to_dict())
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config) | {"pad_token_id": None}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    assert config_from_hf(json.loads((tmp_path / "again" / "config.json").read_text())) == config


@pytest.mark.parametrize("case", ["qwen3_5", "qwen3_5_moe"])
def test_a_folder_with_an_encoder_of_images_gives_its_language_model(case, tmp_path):
    """As Qwen3.5 is released: its text model under another name, all experts of a layer in one tensor, and beside it
    what is left out."""
    from safetensors.torch import load_file, save_file

    model = random_model(case, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "text")
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    tensors |= {name: tensor.contiguous() for name, tensor in model.state_dict().items() if ".experts." in name}
    named = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    other = {"model.visual.patch_embed.proj.bias": torch.zeros(3), "mtp.fc.weight": torch.zeros(2, 2)}
    text = json.loads((tmp_path / "text" / "config.json").read_text())
    del text["tie_word_embeddings"], text["architectures"]
    kind = type(model).__name__.replace("ForCausalLM", "ForConditionalGeneration")
    whole = {"model_type": case, "architectures": [kind], "text_config": text}
    whole |= {"vision_config": {"depth": 2}, "tie_word_embeddings": True, "image_token_id": 5}
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    save_file(named | other, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})

    config, params = load_hf(tmp_path / "whole")
    wanted_config, wanted = load_hf(tmp_path / "text")
    assert config == wanted_config
    jax.tree.map(np.testing.assert_array_equal, params, wanted)

    # What it is exported as is the language model alone.
    save_hf(tmp_path / "ours", config, params, hf_config=read_metadata(tmp_path / "whole").config)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(their_logits(again, tokens()), their_logits(model, tokens()))
    assert "vision_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())


def test_weights_in_mxfp4_are_those_that_transformers_unpacks(tmp_path):
    """Blocks and scales at random, in place of the experts' matrices; biases and the rest stay as they are."""
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random_model("gpt_oss", intermediate_size=64).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, rows, columns = tensors[name].shape
        shape = (count, columns, rows // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(118, 127, shape, dtype=torch.uint8)
        tensors[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
        assert tensors[name].shape == (count, rows, columns)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        del packed[name]

    (tmp_path / "packed").mkdir()
    save_file(tensors, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((tmp_path / "plain" / "config.json").read_text())
    quantised = described | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(quantised))

    config, params = load_hf(tmp_path / "packed")
    wanted_config, wanted = load_hf(tmp_path / "plain")
    assert config == wanted_config
    jax.tree.map(np.testing.assert_array_equal, params, wanted)

    # Bytes without that word are no weights.
    (tmp_path / "packed" / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"has dtype 'U8'; supported are F32, F16, BF16, F64\. Dequantise the model"):
        load_hf(tmp_path / "packed")


def test_older_spelling_of_rotary_settings_reads_the_same(tmp_path):
    old = {
        **SHAPE,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "float32",
        "rope_theta": 500.0,
        "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
    }
    new = random_model("llama3_scaling").config
    ours = config_from_hf(old)
    assert (ours.rope_theta, ours.rope_scaling) == (new.rope_parameters["rope_theta"], _scaling(new))
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters == new.rope_parameters


def _scaling(config) -> RopeScaling:
    return config_from_hf(config.to_dict()).rope_scaling


def test_bfloat16_logits_are_as_near_as_those_of_transformers(tmp_path):
    model = random_model("llama3_scaling", initializer_range=0.1)
    model.save_pretrained(tmp_path)
    exact = their_logits(model, tokens())
    theirs = np.abs(their_logits(model.to(torch.bfloat16), tokens()) - exact).mean()
    config, params = load_model(tmp_path, dtype="bfloat16")
    ours = np.abs(our_logits(config, params, tokens()) - exact).mean()
    assert 0 < ours < 1.2 * theirs


PROMPTS = [
    "The capital of France is",
    "3 + 4 =",
    "Once upon a time, there was",
    "def fibonacci(n):",
    "Water boils at",
    "The largest planet of the solar system",
    "List three colours:",
    "My favourite book is",
    "In 1969, the first",
    "Translate to German: good morning",
    "The opposite of hot is",
    "Ein Haus ist",
    "import numpy as np\n",
    "Question: what is 12 * 12? Answer:",
    "Dear Sir or Madam,",
    "The quick brown fox",
    "To make bread, you need",
    "She opened the door and",
    "1, 1, 2, 3, 5, 8,",
    "A short poem about rain:",
]


@pytest.mark.slow
def test_smollm2_decodes_greedily_token_for_token_like_transformers(tmp_path):
    """20 prompts x 64 tokens. Where the two part, both candidates must be a tie within rounding."""
    gguf = pytest.importorskip("gguf", reason="reads the tokenizer of the GGUF file")
    config, params = load_model(find_smollm2())
    save_hf(tmp_path, config, params)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    encode = _gguf_tokenizer(gguf, find_smollm2())
    new, prompts = 64, [encode(text) for text in PROMPTS]
    sampler = Sampler(config, SamplerSpec(prompt_buckets=(32,), max_new_tokens=new, prompt_slots=10, sample_slots=1))
    sampler.set_params(params)
    requests = [Request(prompt=ids, prompt_id=i, sample_ids=(0,)) for i, ids in enumerate(prompts)]
    groups = sampler.generate(requests, sampling_params(temperature=0.0), seed=0, step=0)
    for ids, text, [sample] in zip(prompts, PROMPTS, groups, strict=True):
        reference = model.generate(
            torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(ids) :].numpy()
        assert len(sample.tokens) == len(reference) == new
        for step in np.flatnonzero(sample.tokens != reference)[:1]:
            scores = _last_logits(config, params, np.array([[*ids, *reference[:step]]]))[0, -1]
            gap = float(scores.max() - scores[reference[step]])
            print(f"{text!r} step {step}: ours {sample.tokens[step]}, theirs {reference[step]}, logit gap {gap:.2e}")
            assert gap < 2 * TOLERANCE


def _last_logits(config: DecoderConfig, params, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return logits(config, params, hidden_states(config, params, ids, positions, jnp.full(ids.shape, ids.shape[1])))


def _gguf_tokenizer(gguf, path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(path).fields
    vocabulary = {text: i for i, text in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(line.split(" ")) for line in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return lambda text: tokenizer.encode(text).ids
