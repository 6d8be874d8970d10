"""Weights in and out of files: what comes back, and what is said about a file that is not right."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rljax.models import (
    FAMILIES as KNOWN,
)
from rljax.models import (
    DecoderConfig,
    Experts,
    RopeScaling,
    abstract_params,
    config_from_hf,
    config_to_hf,
    fresh_config,
    init_params,
    load_config,
    load_hf,
    load_model,
    save_hf,
)
from rljax.models.files import SafetensorsFolder, write_safetensors

TINY = DecoderConfig(
    vocab_size=62, num_layers=3, embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=40, max_position=64
)
FAMILIES = {
    "llama": TINY,
    "llama_scaled": dataclasses.replace(
        TINY,
        tied_embeddings=True,
        rope_scaling=RopeScaling(type="llama3", factor=8.0, original_max_position=16),
    ),
    "mistral": dataclasses.replace(TINY, family="mistral", sliding_window=9),
    "qwen2": dataclasses.replace(TINY, family="qwen2", attention_bias=True, tied_embeddings=True),
    "qwen3": dataclasses.replace(
        TINY, family="qwen3", qk_norm=True, sliding_window=5, sliding_layers=(False, True, True)
    ),
    "glm4_moe": dataclasses.replace(
        TINY,
        family="glm4_moe",
        rotary_dim=4,
        experts=Experts(count=4, per_token=2, mlp_dim=12, selection_bias=True, shared=1, dense_layers=1),
    ),
}


def weights(config):
    params = init_params(config, jax.random.key(1))
    return jax.tree.map(lambda x: (x + 0.01 * np.arange(x.size).reshape(x.shape)).astype(x.dtype), params)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


@pytest.fixture
def folder(tmp_path):
    save_hf(tmp_path, TINY, weights(TINY), max_shard_bytes=8000)
    return tmp_path


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_export_import_export_is_byte_equal(name, param_dtype, tmp_path):
    config = dataclasses.replace(FAMILIES[name], dtype=param_dtype, param_dtype=param_dtype)
    params = weights(config)
    extra = {"eos_token_id": 2, "bos_token_id": 1, "rope_theta": 3.0}  # the last is ours to write, not the caller's
    save_hf(tmp_path / "a", config, params, max_shard_bytes=8000, hf_config=extra)
    again, loaded = load_hf(tmp_path / "a")
    assert again == config
    assert same(loaded, params)
    save_hf(
        tmp_path / "b",
        again,
        loaded,
        max_shard_bytes=8000,
        hf_config=json.loads((tmp_path / "a/config.json").read_text()),
    )
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "generation_config.json" in names and "model.safetensors.index.json" in names
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for file in names:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_files_equal_those_of_the_reference_library(dtype, tmp_path):
    config = dataclasses.replace(FAMILIES["qwen2"], param_dtype=np.dtype(dtype).name)
    save_hf(tmp_path, config, weights(config))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "reference", metadata={"format": "pt"})
    assert (tmp_path / "reference").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert tensors["model.layers.2.mlp.down_proj.weight"].shape == (config.embed_dim, config.mlp_dim)


def test_headers_of_every_length_are_padded_like_the_reference_library(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    for length in range(1, 9):
        name = "x" * length
        write_safetensors(tmp_path / "ours", {name: (value.dtype, value.shape)}, lambda _: value)
        save_file({name: value}, tmp_path / "reference", metadata={"format": "pt"})
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "reference").read_bytes()


def test_exporting_over_another_export_leaves_nothing_of_it(folder):
    save_hf(folder, TINY, weights(TINY))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_dtypes_are_chosen_by_the_caller(folder):
    assert load_hf(folder)[0].param_dtype == "float32"
    config, params = load_model(folder, dtype="bfloat16", param_dtype="float32")
    assert (config.dtype, config.param_dtype, params["embedding"].dtype) == ("bfloat16", "float32", np.float32)
    config, params = load_model(folder, dtype="bfloat16")
    assert (config.param_dtype, params["embedding"].dtype) == ("bfloat16", ml_dtypes.bfloat16)
    assert np.array_equal(params["layers"]["q"], weights(TINY)["layers"]["q"].astype(ml_dtypes.bfloat16))
    with pytest.raises(ValueError, match="dtype='int8' is not supported; choose one of float32, bfloat16, float16"):
        load_model(folder, dtype="int8")


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the tensors of an export, as one file."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    """As GLM-4.5 has one behind its last; a config.json that we write says that there is none."""
    config = FAMILIES["glm4_moe"]
    save_hf(tmp_path, config, weights(config))
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": np.ones((2, 2), np.float32)}))
    assert same(load_hf(tmp_path)[1], weights(config))
    assert config_to_hf(config)["num_nextn_predict_layers"] == 0
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": np.ones((2, 2), np.float32)}))
    with pytest.raises(ValueError, match=r"holds tensor model.layers.2.eh_proj.weight \(1 left over in all\)"):
        load_hf(tmp_path)
    with pytest.raises(ValueError, match="transformers has no Glm4MoeForSequenceClassification"):
        config_to_hf(dataclasses.replace(config, value_head=True, value_bias=False))


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks tensor model\.layers\.1\.mlp\.up_proj\.weight \(1 missing"):
        load_hf(folder)


def test_an_extra_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": np.zeros((1, 1), np.float32)}))
    with pytest.raises(ValueError, match=r"holds tensor model\.layers\.3\.mlp\.up_proj\.weight \(1 left over"):
        load_hf(folder)


def test_a_misshapen_tensor_is_named(folder):
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].T)}))
    with pytest.raises(ValueError, match=r"self_attn\.k_proj\.weight is \[24, 16\], the config implies \[16, 24\]"):
        load_hf(folder)


def test_harmless_leftovers_are_tolerated(tmp_path):
    config = dataclasses.replace(TINY, tied_embeddings=True)
    params = weights(config)
    save_hf(tmp_path, config, params)
    rewrite(
        tmp_path,
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors["model.embed_tokens.weight"],
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
            }
        ),
    )
    assert same(load_hf(tmp_path)[1], params)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": 2 * tensors["lm_head.weight"]}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight; set tie_word"):
        load_hf(tmp_path)


def test_broken_folders_are_told_apart(folder, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights\.bin is neither a Hugging Face folder nor a \.gguf file"):
        load_model(tmp_path / "weights.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(tmp_path / "empty")
    shutil.copy(folder / "config.json", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_model(tmp_path / "empty")
    shard = sorted(folder.glob("model-*"))[3]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated or corrupt at tensor model\.layers"):
        load_model(folder)
    shard.write_bytes(whole[:40])
    with pytest.raises(ValueError, match=rf"{shard.name} is not a safetensors file, or it is truncated"):
        load_model(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} is missing"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(folder)


def write_raw(path, header, data=b"", length=None):
    """A safetensors file of exactly this header, whether right or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def tensor(start, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": tensor(-8, 0), "b": tensor(0, 16)}, r"tensor a has shape \[2\] and data_offsets \[-8, 0\]"),
        ({"a": tensor(0, 8), "b": tensor(4, 16)}, "tensor b begins at byte 4 of the data, where 8 is due"),
        ({"a": tensor(0, 8), "b": tensor(12, 16)}, "tensor b begins at byte 12 of the data, where 8 is due"),
        ({"a": tensor(0, 8)}, "8 bytes at its end belong to no tensor"),
        ({"a": tensor(0, 16), "b": tensor(16, 20)}, "truncated or corrupt at tensor b"),
        ({"a": tensor(0, 16, shape=[2**32, 2**32])}, "truncated or corrupt at tensor a"),  # 0 in 64 bits
        ({"a": tensor(0, 16, shape=[-2, -2])}, r"shape \[-2, -2\] and data_offsets"),
        ({"a": tensor(0, 16, shape=[4.0])}, r"shape \[4\.0\] and data_offsets"),
        ({"a": tensor(0, 16, dtype="F31")}, "dtype 'F31'; supported are F32, F16, BF16, F64"),
        ({"a": tensor(0, 16, dtype=["F32"])}, r"dtype \['F32'\]; supported are"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, "two of them offsets"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "lacks dtype, shape or data_offsets"),
        ({"a": [1, 2]}, "lacks dtype, shape or data_offsets"),
        ({"a\nb": tensor(0, 8)}, "8 bytes at its end"),
        ([], "holds no JSON object"),
        (b'{"a": 1, "a": 2}', "a name stands there twice"),
        (b"[" * 100_000, "not a safetensors file"),
        (b'{"a": "\xff"}', "not a safetensors file"),
    ],
)
def test_a_header_that_lies_is_refused_in_one_line(header, message, tmp_path):
    path = tmp_path / "model.safetensors"
    write_raw(path, header, bytes(16))
    with pytest.raises(ValueError, match=message) as caught:
        SafetensorsFolder(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_longer_than_the_file_or_the_format_allows_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    for length in (2**63, 10**8 + 1, 17):
        write_raw(path, b"{}", bytes(8), length=length)
        with pytest.raises(ValueError, match=f"its header of {length} bytes does not fit"):
            SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a valid index"),
        ("[]", "holds no JSON object"),
        ("{}", "has no object weight_map"),
        ('{"weight_map": {"a": 3}}', "into 3, which is no name of a file"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "which is no name of a file in its folder"),
    ],
)
def test_an_index_that_lies_is_named(index, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message) as caught:
        SafetensorsFolder(tmp_path)
    assert "model.safetensors.index.json" in str(caught.value)


HF = config_to_hf(TINY)
GEMMA = {"model_type": "gemma3_text", "architectures": None}
SMOLLM3 = {"model_type": "smollm3", "architectures": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            r"model_type='gpt2' is not supported; supported are llama \(LlamaForCausalLM\), smollm3",
        ),
        ({"architectures": ["LlamaModel"]}, r"architecture 'LlamaModel' is not supported; supported are llama"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (
            {"rope_parameters": {"rope_type": "proportional"}},
            "rope type 'proportional' is not supported; supported are default",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope type linear needs a factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs low_freq_factor, high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters differ by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"vocab_size": None}, "vocab_size missing"),
        ({"vocab_size": "62"}, "vocab_size='62' must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be a whole number from 1 to 10000"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta=None must be a finite number above 0"),
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta=None must be a finite number above 0"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta=-1 must be a finite number above 0"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor='4' must be a finite number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0 must be a finite number above 0"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}}, "must be above 1 for yarn"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a finite number"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] is not supported"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"dtype": "float8"}, "dtype='float8' is not supported"),
        (
            {"model_type": "qwen3", "architectures": None, "layer_types": ["chunked_attention"] * 3},
            "'chunked_attention'",
        ),
        (
            {"model_type": "qwen3", "architectures": None, "layer_types": ["full_attention"]},
            "has 1 entries for num_hidd",
        ),
        ({"rope_scaling": {"type": "longrope", "short_factor": 2.0}}, "short_factor=2.0 must be a list of numbers"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor has 1 entries for 4 frequencies",
        ),
        (GEMMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported; it must be None"),
        (GEMMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        (GEMMA | {"hidden_activation": "silu"}, "gemma3_text has gelu_pytorch_tanh alone"),
        (GEMMA | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 must be a finite number above 0"),
        (
            GEMMA | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope type 'linear' of sliding layers is not supported",
        ),
        (GEMMA | {"rope_parameters": {"chunked_attention": {}}}, "'chunked_attention', which is no supported layer"),
        (SMOLLM3 | {"no_rope_layers": [1, 2]}, r"no_rope_layers=\[1, 2\] must be a list of 0 and 1"),
        (SMOLLM3 | {"use_sliding_window": True}, "use_sliding_window=True is not supported; it must be None"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**HF, **change})


SIZES = {"vocab_size": 62, "num_layers": 4, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
SIZES |= {"mlp_dim": 48}


@pytest.mark.parametrize("family", KNOWN)
def test_a_new_model_of_every_family_can_be_written(family):
    """`config_to_hf` refuses what its family cannot say. Of four layers of Gemma 3 all slide."""
    known = KNOWN[family]
    # The width of an expert, which gpt-oss has no other beside.
    sizes = SIZES | ({"experts": Experts(count=4, per_token=2, mlp_dim=12), "mlp_dim": 12} if known.experts else {})
    if known.sliding != "none":
        sizes["sliding_window"] = 5
    config = fresh_config(family, **sizes)
    assert config_from_hf(config_to_hf(config)) == config
    assert config.family == family and {5 in config.windows} == {known.sliding != "none"}


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("gpt", {}, "family='gpt' is not supported; choose one of llama"),
        ("llama", {"sliding_window": 4}, "sliding_window=4 needs a family whose layers slide; llama has none"),
        ("qwen3_moe", {}, "family='qwen3_moe' needs experts"),
        (
            "llama",
            {"experts": Experts(count=4, per_token=2, mlp_dim=12)},
            "family='llama' has no experts; of 4 take a family of .*qwen3_moe, glm4_moe, gpt_oss",
        ),
    ],
)
def test_a_new_model_that_no_family_has_is_refused(family, more, message):
    with pytest.raises(ValueError, match=message):
        fresh_config(family, **SIZES, **more)


def test_a_bad_value_in_config_json_names_the_folder(folder):
    (folder / "config.json").write_text(json.dumps(HF | {"rope_parameters": {"rope_theta": None}}))
    with pytest.raises(ValueError, match=rf"{folder}: config\.json: rope_theta=None") as caught:
        load_config(folder)
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object"):
        load_model(folder)
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(HF).encode())  # Windows writes the mark
    assert load_config(folder) == TINY


def test_both_spellings_of_rotary_settings_may_stand_side_by_side():
    rope = {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_theta": 5e5}}
    found = config_from_hf({key: value for key, value in HF.items() if key != "rope_theta"} | rope)
    assert (found.rope_theta, found.rope_scaling) == (5e5, RopeScaling(type="linear", factor=4.0))


def test_defaults_of_each_family_fill_what_old_files_leave_out():
    bare = {
        "vocab_size": 9,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
    }
    llama = config_from_hf({"model_type": "llama", **bare})
    assert (llama.num_kv_heads, llama.head_dim, llama.max_position, llama.sliding_window) == (8, 2, 2048, None)
    mistral = config_from_hf({"model_type": "mistral", **bare})
    assert (mistral.num_kv_heads, mistral.sliding_window, mistral.max_position) == (8, 4096, 131072)
    qwen2 = config_from_hf({"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 4, **bare})
    assert (qwen2.attention_bias, qwen2.output_bias, qwen2.sliding_window) == (True, False, None)
    qwen3 = config_from_hf({"model_type": "qwen3", "num_key_value_heads": 2, **bare})
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.attention_bias) == (128, True, False)


def test_a_config_that_its_family_cannot_express_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match=r"a mistral config\.json cannot express attention_bias=True"):
        save_hf(
            tmp_path, dataclasses.replace(TINY, family="mistral", attention_bias=True), {"x": np.zeros(1, np.float32)}
        )
    with pytest.raises(ValueError, match="family='gpt' is not supported; choose one of llama"):
        config_to_hf(dataclasses.replace(TINY, family="gpt"))
    mixed = {**weights(TINY), "final_norm": np.ones(24, ml_dtypes.bfloat16)}
    with pytest.raises(ValueError, match=r"params have dtypes \['bfloat16', 'float32'\]; cast them"):
        save_hf(tmp_path, TINY, mixed)


def test_the_tokenizer_goes_into_the_folder(tmp_path):
    class Tokenizer:
        def save(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    save_hf(tmp_path, TINY, weights(TINY), tokenizer=Tokenizer())
    assert (tmp_path / "tokenizer.json").exists()


SHARDED = """
import sys, jax, numpy as np
from rljax.models import load_model, param_shardings, save_hf
from rljax.parallel import make_mesh
folder, out = sys.argv[1:]
config, whole = load_model(folder)
mesh = make_mesh(2, 2, 2)
layout = param_shardings(config, mesh)
_, params = load_model(folder, shardings=layout)
assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, params, layout))
assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), params, whole))
assert params["layers"]["gate"].addressable_shards[0].data.shape == (3, 12, 20)
save_hf(out, config, params)
"""


def test_shards_are_read_and_written_in_place(folder, tmp_path):
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", SHARDED, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(load_hf(tmp_path / "out")[1], weights(TINY))


def test_loaded_params_have_the_declared_shapes(folder):
    config, params = load_hf(folder)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, abstract_params(config))
