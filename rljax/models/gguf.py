"""Import of GGUF files of the llama, qwen2 and qwen3 architectures, dequantised.

The header is read here, since the reader of the `gguf` package spends seconds on the tokenizer's tables, which are of
no use to weights; block formats are left to `gguf.quants`.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rljax.models.assemble import assemble
from rljax.models.config import DecoderConfig, RopeScaling
from rljax.models.families import Entry, entries
from rljax.models.huggingface import check_names, check_shape, with_dtypes
from rljax.models.rope import llama3_divisors

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ROPE_FACTORS = "rope_freqs.weight"  # how llama.cpp stores llama3 scaling: one divisor per frequency


class GGUFTensor(NamedTuple):
    shape: tuple[int, ...]  # rows first
    type: int
    start: int


def load_gguf(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    shardings: Any = None,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Config and params of a GGUF file. Arguments as in `load_hf`, except that None stands for float32.

    Needs the `gguf` package. Raises ValueError for another architecture, for a missing, extra or misshapen tensor, and
    for a truncated file.
    """
    path = Path(path)
    quants = _gguf_package()
    metadata, tensors = read_header(path)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    config = with_dtypes(_read_config(quants, metadata, tensors, data), dtype, param_dtype)

    wanted = entries(config, "gguf")
    check_names({entry.name for entry in wanted}, set(tensors), {_ROPE_FACTORS}, str(path))
    for entry in wanted:
        check_shape(entry, tensors[entry.name].shape, str(path))

    # llama.cpp reorders the rows of queries and keys in this architecture alone.
    interleaved = metadata["general.architecture"] == "llama"

    def fetch(entry: Entry) -> np.ndarray:
        value = _dequantise(quants, data, tensors[entry.name])
        if interleaved and entry.weight.heads is not None:
            return _undo_interleaving(value, getattr(config, entry.weight.heads))
        return value

    return config, assemble(config, wanted, fetch, shardings)


def load_gguf_config(path: str | os.PathLike) -> DecoderConfig:
    """The config alone, in float32; no weight is read. Errors as in `load_gguf`."""
    metadata, tensors = read_header(Path(path))
    return _read_config(_gguf_package(), metadata, tensors, np.memmap(path, dtype=np.uint8, mode="r"))


def _read_config(quants, metadata: dict[str, Any], tensors: dict[str, GGUFTensor], data: np.ndarray) -> DecoderConfig:
    divisors = _dequantise(quants, data, tensors[_ROPE_FACTORS]) if _ROPE_FACTORS in tensors else None
    return config_from_gguf(metadata, tensors, divisors)


def _gguf_package():
    try:
        from gguf import quants
    except ImportError as error:
        raise ValueError("reading a GGUF file needs the gguf package: pip install 'rljax[gguf]'") from error
    return quants


def config_from_gguf(
    metadata: dict[str, Any], tensors: dict[str, GGUFTensor], rope_divisors: np.ndarray | None = None
) -> DecoderConfig:
    """The `DecoderConfig` that a GGUF header describes, in float32. Raises ValueError naming what is not supported."""
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"GGUF architecture {arch!r} is not supported; supported are {', '.join(ARCHITECTURES)}")

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if value is None:
            raise ValueError(f"GGUF metadata lacks {arch}.{key}")
        # Some writers repeat a number for every layer.
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise ValueError(f"GGUF metadata {arch}.{key} differs by layer, which no supported family does")
        return value

    if get("expert_count", 0):
        raise ValueError(f"GGUF file has {get('expert_count')} experts; mixtures of experts are not supported")

    heads = get("attention.head_count")
    embed_dim = get("embedding_length")
    head_dim = get("attention.key_length", embed_dim // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"GGUF {arch}.rope.dimension_count={get('rope.dimension_count')} must equal {head_dim=}")
    if "token_embd.weight" not in tensors:
        raise ValueError("GGUF file lacks tensor token_embd.weight")

    # What no key says, the tensors that are there do.
    context = get("context_length")
    theta = float(get("rope.freq_base", 10_000.0))
    return DecoderConfig(
        family=arch,
        vocab_size=tensors["token_embd.weight"].shape[0],
        num_layers=get("block_count"),
        embed_dim=embed_dim,
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_dim=get("feed_forward_length"),
        rope_theta=theta,
        rope_scaling=_scaling(get, context, theta, head_dim, rope_divisors),
        norm_eps=_shortest(get("attention.layer_norm_rms_epsilon")),
        tied_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=arch == "qwen3",
        max_position=context,
    )


def _shortest(value: float) -> float:
    """A float32 such as 9.99999974738e-06 as the decimal that was meant, 1e-05."""
    return float(str(np.float32(value)))


def _scaling(get, context: int, theta: float, head_dim: int, divisors: np.ndarray | None) -> RopeScaling:
    # No key says llama3: only the tensor does, and it goes before whatever the keys say.
    if divisors is not None:
        return _llama3_from_divisors(divisors, theta, head_dim)

    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return RopeScaling()
    factor = float(get("rope.scaling.factor"))
    if kind == "linear":
        return RopeScaling(type="linear", factor=factor)
    if kind != "yarn":
        raise ValueError(f"GGUF rope scaling {kind!r} is not supported; supported are none, linear, yarn and llama3")

    # The file's factor multiplies yarn's own, which is what None stands for.
    attention = _shortest(get("rope.scaling.attn_factor", 1.0))
    return RopeScaling(
        type="yarn",
        factor=factor,
        original_max_position=get("rope.scaling.original_context_length", context),
        beta_fast=float(get("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=float(get("rope.scaling.yarn_beta_slow", 1.0)),
        attention_factor=None if attention == 1.0 else attention * (0.1 * math.log(factor) + 1.0),
    )


def _llama3_from_divisors(divisors: np.ndarray, theta: float, head_dim: int) -> RopeScaling:
    """The llama3 settings that give these divisors. All released models use bands 1 and 4 of 8192 positions."""
    scaling = RopeScaling(
        type="llama3",
        factor=float(divisors.max()),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )
    if not np.allclose(llama3_divisors(scaling, theta, head_dim), divisors, rtol=1e-4):
        raise ValueError(
            f"GGUF tensor {_ROPE_FACTORS} is not llama3 scaling with low_freq_factor 1, high_freq_factor 4 and 8192 "
            "original positions; convert the model from its Hugging Face folder instead"
        )
    return scaling


def _undo_interleaving(value: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours, (0, 1), (2, 3), ..; the decoder rotates halves. Rows are reordered within heads."""
    rows = value.shape[0]
    return value.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)


_PIECE = 1 << 16  # elements: gguf.quants works on 16 rows at a time, and is fastest on rows of about this length


def _dequantise(quants, data: np.ndarray, tensor: GGUFTensor) -> np.ndarray:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(tensor.type)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    count = math.prod(tensor.shape)
    raw = data[tensor.start : tensor.start + count // block * block_bytes]
    if kind == GGMLQuantizationType.F32:
        return raw.view(np.float32).reshape(tensor.shape)
    if kind == GGMLQuantizationType.F16:
        return raw.view(np.float16).astype(np.float32).reshape(tensor.shape)
    blocks = count // block
    per_row = math.gcd(blocks, max(1, _PIECE // block))
    return quants.dequantize(raw.reshape(blocks // per_row, per_row * block_bytes), kind).reshape(tensor.shape)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata (less the tokenizer's arrays) and tensor table of a GGUF file of version 2 or 3."""
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): item for kind, item in GGML_QUANT_SIZES.items()}
    length = path.stat().st_size
    data: np.ndarray = np.memmap(path, dtype=np.uint8, mode="r") if length else np.empty(0, np.uint8)
    try:
        metadata, tensors = _parse_header(data.data)
    except (struct.error, IndexError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"{path} is truncated or corrupt: its GGUF header ends early ({error})") from error

    # The table is at the front: of a download that broke off, only the end of the data shows it.
    for name, tensor in tensors.items():
        if tensor.type not in sizes:
            raise ValueError(f"{path}: tensor {name} has unknown GGUF type {tensor.type}; update the gguf package")
        block, size = sizes[tensor.type]
        if tensor.start + math.prod(tensor.shape) // block * size > length:
            raise ValueError(f"{path} is truncated: tensor {name} ends behind the file; copy or download it again")
    return metadata, tensors


def _parse_header(data: memoryview) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    if bytes(data[:4]) != b"GGUF":
        raise ValueError("not a GGUF file: it does not begin with the letters GGUF")
    (version,) = struct.unpack_from("<I", data, 4)
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not supported (2 and 3 are, little-endian); convert the file")

    # The readers below move `at`, the place in the file, behind what they have read.
    tensor_count, field_count = struct.unpack_from("<QQ", data, 8)
    at = 24

    def string() -> str:
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        at += 8 + length
        return str(data[at - length : at], "utf-8")

    def scalar(kind: int) -> Any:
        nonlocal at
        code = _SCALARS[kind]
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def array(skip: bool) -> list | None:
        nonlocal at
        kind, length = struct.unpack_from("<IQ", data, at)
        at += 12
        # A vocabulary has a hundred thousand entries; nobody asks for it here.
        if kind in _SCALARS and skip:
            at += length * struct.calcsize("<" + _SCALARS[kind])
        elif kind == _STRING and skip:
            for _ in range(length):
                at += 8 + struct.unpack_from("<Q", data, at)[0]
        else:
            return [string() if kind == _STRING else scalar(kind) for _ in range(length)]
        return None

    metadata: dict[str, Any] = {}
    for _ in range(field_count):
        key = string()
        kind = scalar(4)
        # Strings and arrays have a length of their own, so each value must be read, wanted or not, to find the next.
        value: Any
        if kind == _STRING:
            value = string()
        elif kind == _ARRAY:
            value = array(skip=key.startswith("tokenizer."))
        else:
            value = scalar(kind)
        if value is not None:
            metadata[key] = value

    table = []
    for _ in range(tensor_count):
        name = string()
        rank = scalar(4)
        # The fastest dimension comes first in the file.
        shape = tuple(scalar(10) for _ in range(rank))[::-1]
        kind = scalar(4)
        offset = scalar(10)
        table.append((name, shape, kind, offset))

    # Offsets count from the first aligned place behind the header.
    alignment = metadata.get("general.alignment", 32)
    begin = -(-at // alignment) * alignment
    return metadata, {name: GGUFTensor(shape, kind, begin + offset) for name, shape, kind, offset in table}
