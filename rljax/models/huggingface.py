"""Import from and export to Hugging Face folders: config.json and safetensors."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils

from rljax.models.assemble import assemble, weight_at
from rljax.models.config import DecoderConfig, is_wide
from rljax.models.families import (
    DTYPES,
    Entry,
    config_from_hf,
    config_to_hf,
    entries,
    family_of,
    in_file,
    text_part,
)
from rljax.models.files import INDEX_FILE, SINGLE_FILE, SafetensorsFolder, shown, split_into_files, write_safetensors
from rljax.models.mxfp4 import BLOCK, BLOCKS, SCALES, dequantised, is_mxfp4
from rljax.types import Params

_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # a buffer that old checkpoints carry
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_IMAGES = re.compile(r"model\.visual\.")
"""The encoder of images, of folders that hold one beside a language model."""
_AHEAD = re.compile(r"mtp\.")
"""Layers that predict further tokens, beside those of a hybrid."""
_JOINED_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up|down)_proj$")
_GENERATION_FILE = "generation_config.json"
_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@runtime_checkable
class Saveable(Protocol):
    """A tokenizer, as far as an export cares. It may have `stop_ids`, `bos_id` and `pad_id` too."""

    def save(self, folder: Path) -> None: ...


class Metadata(NamedTuple):
    """What a folder says of a model beside its weights and the tokenizer's own files, JSON-ready."""

    config: dict[str, Any]
    """config.json."""
    generation: dict[str, Any]
    """generation_config.json: what ends a completion, and recommended settings of sampling."""


def read_metadata(path: str | os.PathLike) -> Metadata:
    """The metadata of a Hugging Face folder; empty where there are no such files, and for a GGUF file. ValueError for
    a file that is no JSON object."""
    found = [Path(path) / name for name in ("config.json", _GENERATION_FILE)]
    config, generation = (read_json(file) if file.is_file() else {} for file in found)
    return Metadata(dict(text_part(config)), generation)


def written_metadata(config: DecoderConfig, source: Metadata, tokenizer: Any = None) -> Metadata:
    """The metadata of an export of `config`: that of the model that the weights came from, with our own keys of the
    decoder, and the tokenizer's ids where the source names none.

    What ends a completion is the source's list and behind it the tokenizer's `stop_ids`, so that `generate` ends where
    sampling does. ValueError as in `config_to_hf`.
    """
    described = {key: value for key, value in source.config.items() if key not in _OWNED} | config_to_hf(config)
    generation = {key: value for key, value in source.generation.items() if key not in _OWNED_GENERATION}
    ends = generation.get("eos_token_id", described.get("eos_token_id"))
    stops = _as_list(ends) + [i for i in getattr(tokenizer, "stop_ids", ()) if i not in _as_list(ends)]
    ids = {
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "bos_token_id": getattr(tokenizer, "bos_id", None),
        "pad_token_id": getattr(tokenizer, "pad_id", None),
    }

    # config.json stays as it is where it says something: only generation_config.json is read for what ends a text.
    for key, value in ids.items():
        said = described.get(key) if generation.get(key) is None else generation[key]
        chosen = value if said is None or key == "eos_token_id" else said
        if chosen is not None:
            generation[key] = chosen
            described[key] = chosen if described.get(key) is None else described[key]
    return Metadata(described, generation)


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def load_hf(
    folder: str | os.PathLike,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    shardings: Any = None,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Config and params of a folder with config.json and (sharded) safetensors.

    `dtype` (activations) and `param_dtype` (weights) are "float32", "bfloat16" or "float16"; None keeps the file's.
    Tensors are read lazily, each process its own shards alone; weights in MXFP4 are dequantised. Raises ValueError
    naming the tensor when one is missing, left over or of another shape than config.json implies.
    """
    folder = Path(folder)
    config = with_dtypes(read_config(folder), dtype, param_dtype)
    stored = SafetensorsFolder(folder, packed=(BLOCKS, SCALES) if is_mxfp4(read_json(folder / "config.json")) else ())
    if family_of(config).joined_as:
        stored.rename("model.language_model.", "model.")
        _part_experts(stored)
    wanted = entries(config)
    names = {name for entry in wanted for name in _parts(stored, entry)}
    check_names(names, set(stored.tensors), _tolerated(config, stored), str(folder))
    for entry in wanted:
        shapes = [stored.tensors[name].shape for name in _parts(stored, entry)]
        check_shape(entry, shapes[0] if len(shapes) == 1 else _unpacked_shape(*shapes), str(folder))
    return config, assemble(config, wanted, lambda entry, which: _fetched(stored, entry, which), shardings)


def _part_experts(stored: SafetensorsFolder) -> None:
    """Has the matrices of a layer's experts stand by themselves, where they lie in one tensor for all."""
    for name, info in list(stored.tensors.items()):
        found = _JOINED_EXPERTS.match(name)
        if not found or len(info.shape) != 3:
            continue
        stem, kind = found.groups()
        own = ("gate", "up") if kind == "gate_up" else ("down",)
        rows = info.shape[1] // len(own)
        experts = range(info.shape[0] if rows * len(own) == info.shape[1] else 0)
        if experts:
            stored.part(name, [(f"{stem}.{i}.{path}_proj.weight", rows) for i in experts for path in own])


def _parts(stored: SafetensorsFolder, entry: Entry) -> list[str]:
    """The names under which a folder holds a tensor: its own, or those of its two parts in MXFP4."""
    if f"{entry.name}{BLOCKS}" not in stored.tensors:
        return [entry.name]
    return [f"{entry.name}{BLOCKS}", f"{entry.name}{SCALES}"]


def _unpacked_shape(blocks: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor in parts of these shapes; that of the blocks where they do not belong together."""
    if len(blocks) != 4 or blocks != (*scales, BLOCK // 2):
        return blocks
    # Their rows are what our columns are.
    return (blocks[0], blocks[2] * BLOCK, blocks[1])


def _fetched(stored: SafetensorsFolder, entry: Entry, which: slice) -> np.ndarray:
    parts = [stored.open(name)[which] for name in _parts(stored, entry)]
    if len(parts) > 1:
        return dequantised(*parts).swapaxes(-1, -2)
    tensor = parts[0]
    return tensor[0] if entry.weight.is_row else tensor


def read_config(folder: Path) -> DecoderConfig:
    """The config of a folder with config.json. ValueError that names the file for all that is wrong with it."""
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} has no config.json; give a Hugging Face model folder")
    try:
        return config_from_hf(read_json(file))
    except ValueError as error:
        # What the decoder's own checks say does not name the file.
        message = str(error)
        raise ValueError(message if str(file) in message else f"{folder}: {message}") from None


def _tolerated(config: DecoderConfig, stored: SafetensorsFolder) -> set[str]:
    tolerated = {name for name in stored.tensors if _IGNORED.search(name)}
    if family_of(config).joined_as:
        tolerated |= {name for name in stored.tensors if _IMAGES.match(name)}
    if family_of(config).delta is not None:
        tolerated |= {name for name in stored.tensors if _AHEAD.match(name)}
    if family_of(config).predicts_ahead:
        numbers = {name: _LAYER.match(name) for name in stored.tensors}
        tolerated |= {name for name, found in numbers.items() if found and int(found[1]) >= config.num_layers}
    if config.tied_embeddings and "lm_head.weight" in stored.tensors and "model.embed_tokens.weight" in stored.tensors:
        head = stored.open("lm_head.weight")
        embedding = stored.open("model.embed_tokens.weight")
        if not np.array_equal(head, embedding):
            raise ValueError(
                "config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight; "
                "set tie_word_embeddings to false, or take lm_head.weight out"
            )
        tolerated.add("lm_head.weight")
    return tolerated


def save_hf(
    folder: str | os.PathLike,
    config: DecoderConfig,
    params: Params,
    *,
    tokenizer: Saveable | None = None,
    max_shard_bytes: int = 5 * 10**9,
    hf_config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    on_every_process: bool = False,
) -> None:
    """Writes config.json, safetensors (with an index when there are several files) and the tokenizer's files.

    `hf_config` and `generation_config` hold further keys of config.json and generation_config.json: what
    `read_metadata` gives for the folder that the weights came from; `written_metadata` says what becomes of them.
    Weights are written in the dtype of `params`, what experts are chosen by in float32, gathered one tensor at a time;
    equal weights give equal bytes. In a multi-process run every process must call it; process 0 writes. With
    `on_every_process` each that calls it writes a folder of its own, of weights that are on its own devices.
    """
    folder = Path(folder)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {str(leaf.dtype) for path, leaf in leaves if not is_wide(path[-1].key)}
    if len(found) != 1 or not found <= set(DTYPES):
        raise ValueError(f"params have dtypes {sorted(found)}; cast them all to one of {', '.join(DTYPES)}")
    dtype = np.dtype(found.pop())

    # Everything that can be wrong is found before the first file is touched.
    source = Metadata(dict(hf_config or {}), dict(generation_config or {}))
    written = written_metadata(dataclasses.replace(config, param_dtype=str(dtype)), source, tokenizer)
    wanted: dict[str, list[Entry]] = {}
    for entry in entries(config):
        wanted.setdefault(entry.name, []).append(entry)
    for parts in wanted.values():
        shapes = [_stored_shape(part, _weight(params, part)) for part in parts]
        along = -1 if parts[0].weight.alternates else 0
        whole = list(shapes[0])
        if whole:
            whole[along] = sum(shape[along] for shape in shapes)
        check_shape(parts[0], tuple(whole), "params")

    # Files of another split would be read along with the new ones.
    writes = on_every_process or jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob("model*.safetensors"), folder / INDEX_FILE, folder / _GENERATION_FILE]:
            old.unlink(missing_ok=True)

    # Every process makes the same split, so that all gather the same tensors in the same order.
    sizes = {name: int(np.prod(parts[0].shape, dtype=np.int64)) for name, parts in wanted.items()}
    dtypes = {name: np.dtype(np.float32) if is_wide(parts[0].weight.path) else dtype for name, parts in wanted.items()}
    files = split_into_files(((name, n * dtypes[name].itemsize) for name, n in sizes.items()), max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        if writes:
            declared = {name: (dtypes[name], wanted[name][0].shape) for name in names}
            write_safetensors(folder / file, declared, lambda name: tensor_to_host(params, wanted[name]))
        else:
            # The order in which process 0 asks: gathering is collective.
            for name in sorted(names):
                tensor_to_host(params, wanted[name])
    if not writes:
        return

    if len(files) > 1:
        total_size = sum(n * dtypes[name].itemsize for name, n in sizes.items())
        total = {"total_parameters": sum(sizes.values()), "total_size": total_size}
        write_json(folder / INDEX_FILE, {"metadata": total, "weight_map": weight_map})
    if tokenizer is not None:
        tokenizer.save(folder)
    write_json(folder / "config.json", written.config)
    if written.generation:
        write_json(folder / _GENERATION_FILE, written.generation)


# Keys that an imported config.json may hold and that only config_to_hf may write.
_OWNED = frozenset(
    {
        "attention_bias",
        "decoder_sparse_step",
        "attention_multiplier",
        "dtype",
        "first_k_dense_replace",
        "embedding_multiplier",
        "hidden_act",
        "hidden_activation",
        "full_attention_interval",
        "layer_types",
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_value_head_dim",
        "logits_scaling",
        "max_window_layers",
        "mlp_bias",
        "mlp_only_layers",
        "moe_intermediate_size",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
        "num_nextn_predict_layers",
        "no_rope_layer_interval",
        "no_rope_layers",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "quantization_config",
        "query_pre_attn_scalar",
        "residual_multiplier",
        "rope_local_base_freq",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "routed_scaling_factor",
        "shared_expert_intermediate_size",
        "sliding_window",
        "sliding_window_pattern",
        "swiglu_alpha",
        "swiglu_limit",
        "topk_group",
        "torch_dtype",
        "use_qk_norm",
        "use_sliding_window",
    }
)


# With it transformers takes what ends a text from config.json, which may name one id of several.
_OWNED_GENERATION = frozenset({"_from_model_config"})


def _weight(params: Params, entry: Entry) -> jax.Array | np.ndarray:
    return weight_at(params, entry.weight.path)


def _stored_shape(entry: Entry, value: jax.Array | np.ndarray) -> tuple[int, ...]:
    indices = (entry.layer is not None) + (entry.expert is not None)
    shape = value.shape[indices:]
    if entry.weight.is_row:
        return (1, *shape)
    return in_file(shape) if entry.weight.transpose else shape


@jax.jit
def _take(stacked: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    for i in index:
        stacked = jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False)
    return stacked


def tensor_to_host(params: Params, parts: list[Entry]) -> np.ndarray:
    """One tensor in the file's layout, of the weights that it holds, and 0 elsewhere; collective as `to_host`."""
    weights = [to_host(params, part) for part in parts]
    if parts[0].part is None:
        return weights[0]
    whole = np.zeros(parts[0].shape, weights[0].dtype)
    for part, weight in zip(parts, weights, strict=True):
        whole[part.part] = weight
    return whole


def to_host(params: Params, entry: Entry) -> np.ndarray:
    """One weight in the file's layout; collective when its shards live in several processes."""
    value = _weight(params, entry)
    if entry.layer is not None:
        # On devices a traced index: one program for all layers.
        index = (entry.layer,) if entry.expert is None else (entry.layer, entry.expert)
        value = value[index] if isinstance(value, np.ndarray) else _take(value, tuple(map(np.int32, index)))
    if isinstance(value, jax.Array) and not value.is_fully_addressable and not value.is_fully_replicated:
        value = multihost_utils.process_allgather(value, tiled=True)
    host = np.asarray(value)
    if entry.weight.is_row:
        return host[None]
    return host.swapaxes(-1, -2) if entry.weight.transpose else host


def with_dtypes(config: DecoderConfig, dtype: str | None, param_dtype: str | None) -> DecoderConfig:
    """The config with other dtypes; None keeps one. ValueError for a name that is not in `families.DTYPES`."""
    for field, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if value is not None and value not in DTYPES:
            raise ValueError(f"{field}={value!r} is not supported; choose one of {', '.join(DTYPES)}")
    return dataclasses.replace(config, dtype=dtype or config.dtype, param_dtype=param_dtype or config.param_dtype)


def check_names(wanted: set[str], stored: set[str], tolerated: set[str], where: str) -> None:
    """ValueError naming the tensors that `where` lacks, or holds without the config asking for them."""
    if missing := sorted(wanted - stored):
        raise ValueError(
            f"{where} lacks tensor {shown(missing[0])} ({len(missing)} missing in all); the file is incomplete"
        )
    if extra := sorted(stored - wanted - tolerated):
        raise ValueError(
            f"{where} holds tensor {shown(extra[0])} ({len(extra)} left over in all), which its config does not "
            "describe; importing would drop it"
        )


def check_shape(entry: Entry, shape: tuple[int, ...], where: str) -> None:
    """ValueError when a tensor's shape is not the one that the config implies."""
    if tuple(shape) != tuple(entry.shape):
        raise ValueError(f"{where}: tensor {entry.name} is {list(shape)}, the config implies {list(entry.shape)}")


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; a byte order mark is tolerated. ValueError, naming the file, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {content!r:.80}")
    return content


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
