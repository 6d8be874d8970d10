"""Import of GGUF files of the architectures in `ARCHITECTURES`, dequantised by `gguf.quants`."""

import functools
import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from rljax.gguf_header import GGUFHeader, GGUFTensor, read_gguf_header
from rljax.models.assemble import assemble
from rljax.models.config import DecoderConfig, Experts, RopeScaling
from rljax.models.families import FAMILIES, Entry, Family, entries, pattern
from rljax.models.files import shown
from rljax.models.huggingface import check_names, check_shape, with_dtypes
from rljax.models.rope import llama3_divisors

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3_text",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "granite": "granite",
}
"""The family of each architecture that can be read."""

INTERLEAVED = ("llama", "smollm3", "granite")
"""Architectures of which llama.cpp rotates neighbours in queries and keys; its converter reorders rows for it."""

_ROPE_FACTORS = "rope_freqs.weight"  # how llama.cpp stores llama3 scaling: one divisor per frequency

# Keys behind the architecture's name that change no number that the decoder computes.
_INERT = ("vocab_size", "tensor_data_layout", "pooling_type", "rope.scaling.finetuned")

# Keys that are harmless at these values alone: those at which llama.cpp computes what it does without the key.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}


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
    config = with_dtypes(_read_config(path, metadata, tensors, data), dtype, param_dtype)

    wanted = entries(config, "gguf")
    check_names({entry.name for entry in wanted}, set(tensors), {_ROPE_FACTORS}, str(path))
    for entry in wanted:
        check_shape(entry, tensors[entry.name].shape, str(path))

    interleaved = metadata["general.architecture"] in INTERLEAVED

    def fetch(entry: Entry, which: slice) -> np.ndarray:
        value = _dequantise(quants, data, _matrices_of(tensors[entry.name], which))
        if config.norm_offset and entry.weight.is_norm:
            # The converter adds the one that the decoder adds.
            return value - np.float32(1.0)
        if interleaved and entry.weight.heads is not None:
            return _undo_interleaving(value, getattr(config, entry.weight.heads))
        return value

    return config, assemble(config, wanted, fetch, shardings)


def load_gguf_config(path: str | os.PathLike) -> DecoderConfig:
    """The config alone, in float32; no weight is read. Errors as in `load_gguf`."""
    path = Path(path)
    metadata, tensors = read_header(path)
    return _read_config(path, metadata, tensors, np.memmap(path, dtype=np.uint8, mode="r"))


def _read_config(
    path: Path, metadata: dict[str, Any], tensors: dict[str, GGUFTensor], data: np.ndarray
) -> DecoderConfig:
    divisors = _dequantise(_gguf_package(), data, tensors[_ROPE_FACTORS]) if _ROPE_FACTORS in tensors else None
    try:
        return config_from_gguf(metadata, tensors, divisors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _gguf_package():
    try:
        from gguf import quants
    except ImportError as error:
        raise ValueError("reading a GGUF file needs the gguf package: pip install 'rljax-lm[gguf]'") from error
    return quants


class _Keys:
    """The keys of one architecture; it remembers which were asked for."""

    def __init__(self, metadata: dict[str, Any], arch: str):
        self.arch = arch
        self.values = {k.removeprefix(f"{arch}."): v for k, v in metadata.items() if k.startswith(f"{arch}.")}
        self.asked: set[str] = set()

    def get(self, key: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of `key`, one of `kinds`. ValueError where there is none and no default."""
        self.asked.add(key)
        value = self.values.get(key, default)
        if value is None:
            raise ValueError(f"GGUF metadata lacks {self.arch}.{key}")
        # Some writers repeat a number for every layer.
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, list):
            raise ValueError(f"GGUF metadata {self.arch}.{key} differs by layer, which no supported family does")
        # A truth value is a whole number to Python, not to the file.
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"GGUF metadata {self.arch}.{key} is {value!r:.80}, which has the wrong type")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        return self.get(key, int, default)

    def real(self, key: str, default: float | None = None) -> float:
        return float(self.get(key, (int, float), default))

    def check_rest(self) -> None:
        """ValueError for a key that nobody asked for and that may change what the model computes."""
        for key, value in self.values.items():
            if key in self.asked or key in _INERT or value in _NEUTRAL.get(key, ()):
                continue
            raise ValueError(
                f"GGUF metadata {self.arch}.{shown(key)}={value!r:.80} is not supported: it may change what the model "
                "computes; take the model's Hugging Face folder"
            )


def config_from_gguf(
    metadata: dict[str, Any], tensors: dict[str, GGUFTensor], rope_divisors: np.ndarray | None = None
) -> DecoderConfig:
    """The `DecoderConfig` that a GGUF header describes, in float32.

    What the file leaves out is what llama.cpp takes (src/llama-model.cpp, `load_hparams`). Raises ValueError naming
    what is not supported, every unknown key of the architecture among it.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"GGUF architecture {arch!r:.80} is not supported; supported are {', '.join(ARCHITECTURES)}")
    keys = _Keys(metadata, arch)
    family = FAMILIES[ARCHITECTURES[arch]]
    if family.experts is None and (experts := keys.whole("expert_count", 0)):
        having = ", ".join(name for name, family in ARCHITECTURES.items() if FAMILIES[family].experts is not None)
        raise ValueError(
            f"GGUF file has {experts} experts, which {arch} is not supported with; supported with experts are {having}"
        )
    if "token_embd.weight" not in tensors:
        raise ValueError("GGUF file lacks tensor token_embd.weight")

    # A header may say anything: lists of layers are made of this number.
    layers = keys.whole("block_count")
    if layers > len(tensors):
        raise ValueError(f"GGUF metadata {arch}.block_count={layers} is more than the {len(tensors)} tensors there are")

    heads = keys.whole("attention.head_count")
    embed_dim = keys.whole("embedding_length")
    head_dim = keys.whole("attention.key_length", embed_dim // max(heads, 1))
    rotated = keys.whole("rope.dimension_count", head_dim)
    # The decoder has one width for queries, keys and values.
    for key, given in (
        ("rope.dimension_count", head_dim if family.partial_rotary else rotated),
        ("attention.value_length", keys.whole("attention.value_length", head_dim)),
    ):
        if given != head_dim:
            raise ValueError(f"GGUF {arch}.{key}={given} must equal {head_dim=}")

    context = keys.whole("context_length")
    window = _window(keys, context)
    # Only Mistral's models have a window in llama's architecture, and only Olmo 3's in Olmo 2's.
    name = {"llama": "mistral", "olmo2": "olmo3"}.get(arch) if window is not None else None
    name = name or ARCHITECTURES[arch]
    theta = keys.real("rope.freq_base", 10_000.0)

    # What no key says, the tensors that are there do.
    config = DecoderConfig(
        family=name,
        vocab_size=tensors["token_embd.weight"].shape[0],
        num_layers=layers,
        embed_dim=embed_dim,
        num_heads=heads,
        num_kv_heads=keys.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_dim=keys.whole("feed_forward_length"),
        rope_theta=theta,
        rope_scaling=_scaling(keys, context, theta, head_dim, rope_divisors),
        norm_eps=_shortest(keys.real("attention.layer_norm_rms_epsilon")),
        tied_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        sliding_window=window,
        experts=_experts(keys, FAMILIES[name]),
        max_position=context,
        rotary_dim=None if rotated == head_dim else rotated,
        **{key: value for key, value in FAMILIES[name].fixed.items() if key != "attention_bias"},
        **_factors(keys, embed_dim, head_dim, heads, layers),
        **_by_layer(keys, FAMILIES[name], layers, theta, window),
    )
    keys.check_rest()
    return config


def _experts(keys: _Keys, family: Family) -> Experts | None:
    """llama.cpp divides the weights of a token's experts by their sum, whatever the file says."""
    if family.experts is None:
        return None
    return Experts(
        count=keys.whole("expert_count"),
        per_token=keys.whole("expert_used_count"),
        mlp_dim=keys.whole("expert_feed_forward_length"),
    )


def _factors(keys: _Keys, embed_dim: int, head_dim: int, heads: int, layers: int) -> dict[str, Any]:
    """The factors that an architecture has, by the fields of `DecoderConfig`."""
    # llama.cpp takes 0 for a scale that is not given.
    scale = _shortest(keys.real("attention.scale", 0.0))
    is_plain = not scale or math.isclose(scale * math.sqrt(max(head_dim, 1)), 1.0, rel_tol=1e-5)
    if keys.arch == "granite":
        found = {
            "embed_scale": _shortest(keys.real("embedding_scale", 1.0)),
            "residual_scale": _shortest(keys.real("residual_scale", 1.0)),
            "logits_divisor": _shortest(keys.real("logit_scale", 1.0)),
        }
        return found | {"score_scale": None if is_plain else scale}
    if not is_plain:
        raise ValueError(f"GGUF {keys.arch}.attention.scale={scale} is not supported; it must be 1 / sqrt({head_dim=})")
    if keys.arch != "gemma3":
        return {}

    # No key says it: llama.cpp knows Gemma 3 27B by its count of layers.
    per_head = embed_dim // max(heads, 1)
    has_own = layers == _LAYERS_27B and per_head != head_dim
    return {"embed_scale": embed_dim**0.5, "score_scale": per_head**-0.5 if has_own else None}


_LAYERS_27B = 62


def _by_layer(keys: _Keys, family: Family, layers: int, theta: float, window: int | None) -> dict[str, Any]:
    """What differs by layer, as far as the architecture says it and not the file."""
    if family.unrotated:
        return {"rotated_layers": pattern(family.defaults["no_rope_layer_interval"], layers)}
    if not family.local_rope or window is None:
        return {}
    every = keys.whole("attention.sliding_window_pattern", family.full_every)
    base = keys.real("rope.freq_base_swa", family.defaults.get("rope_local_base_freq", theta))
    return {"sliding_layers": pattern(every, layers), "local_rope_theta": base}


def _window(keys: _Keys, context: int) -> int | None:
    """The window of the layers that slide; None where all see everything."""
    window = keys.whole("attention.sliding_window", 0)
    if window == 0 or (window >= context and keys.arch == "llama"):
        return None
    if keys.arch not in ("llama", "gemma3", "olmo2", "phi3"):
        raise ValueError(
            f"GGUF {keys.arch}.attention.sliding_window={window} does not say which layers slide; take the model's "
            "Hugging Face folder"
        )
    return window


def _shortest(value: float) -> float:
    """A float32 such as 9.99999974738e-06 as the decimal that was meant, 1e-05."""
    return float(str(np.float32(value)))


def _scaling(keys: _Keys, context: int, theta: float, head_dim: int, divisors: np.ndarray | None) -> RopeScaling:
    # A factor without a type is linear; `scale_linear` is its older name, and 0 stands for none.
    kind = keys.get("rope.scaling.type", str, "linear")
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 0.0))
    factor = 1.0 if kind == "none" or factor == 0.0 else factor
    original = keys.whole("rope.scaling.original_context_length", context)
    attention = _shortest(keys.real("rope.scaling.attn_factor", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"GGUF rope scaling {kind!r:.80} is not supported; supported are none, linear, yarn and llama3"
        )
    if kind != "yarn" and attention != 1.0:
        raise ValueError(f"GGUF rope.scaling.attn_factor={attention} is not supported without yarn; it must be 1")

    # No key says llama3: only the tensor does.
    if divisors is not None:
        if factor != 1.0:
            raise ValueError(f"GGUF rope.scaling.factor={factor} beside tensor {_ROPE_FACTORS} is not supported")
        return _llama3_from_divisors(divisors, theta, head_dim)
    if kind != "yarn":
        return RopeScaling() if factor == 1.0 else RopeScaling(type="linear", factor=factor)

    # The file's factor multiplies yarn's own, which is what None stands for.
    return RopeScaling(
        type="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=keys.real("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.real("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=None if attention == 1.0 else attention * (0.1 * math.log(max(factor, 1.0)) + 1.0),
    )


def _llama3_from_divisors(divisors: np.ndarray, theta: float, head_dim: int) -> RopeScaling:
    """The llama3 settings that give these divisors. All released models use bands 1 and 4 of 8192 positions."""
    if divisors.shape != (head_dim // 2,):
        raise ValueError(f"GGUF tensor {_ROPE_FACTORS} is {list(divisors.shape)}, not the half of {head_dim=}")
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


def _matrices_of(tensor: GGUFTensor, which: slice) -> GGUFTensor:
    """A tensor of some of the matrices of one that holds several, which lie one behind the other."""
    if len(tensor.shape) < 3:
        return tensor
    count, *matrix = tensor.shape
    first, last, _ = which.indices(count)
    block, block_bytes = _block_format(tensor.type, "")
    start = tensor.start + first * (math.prod(matrix) // block) * block_bytes
    return tensor._replace(start=start, shape=(last - first, *matrix))


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


def read_header(path: Path) -> GGUFHeader:
    """Metadata (less the tokenizer's) and tensor table of a GGUF file. ValueError for a tensor of a format that cannot
    be read, outside of the file or in another one's bytes."""
    header = read_gguf_header(path, lambda key: not key.startswith("tokenizer."))
    length = path.stat().st_size
    spans = []
    for name, tensor in header.tensors.items():
        count = math.prod(tensor.shape)
        block, size = _block_format(tensor.type, f"{path}: tensor {shown(name)}")
        # A block lies within a row.
        if (tensor.shape[-1:] or (1,))[0] % block:
            raise ValueError(
                f"{path}: tensor {shown(name)} is {list(tensor.shape)}, whose rows are no blocks of {block}"
            )

        # The table is at the front: of a download that broke off, only the end of the data shows it.
        end = tensor.start + count // block * size
        if end > length:
            raise ValueError(
                f"{path} is truncated: tensor {shown(name)} ends behind the file; copy or download it again"
            )
        spans.append((tensor.start, end, name))

    # A tensor without elements has no place of its own.
    spans = sorted(span for span in spans if span[0] < span[1])
    for (_, end, name), (start, _, following) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(
                f"{path} is corrupt: tensors {shown(name)} and {shown(following)} overlap; download it again"
            )
    return header


@functools.cache
def _readable_formats() -> dict[int, tuple[int, int]]:
    """(elements, bytes) of a block by the number of each format that can be dequantised."""
    from gguf.constants import GGML_QUANT_SIZES

    quants = _gguf_package()
    readable = {}
    for kind, (elements, size) in GGML_QUANT_SIZES.items():
        try:
            quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        readable[int(kind)] = (elements, size)
    return readable


def _block_format(kind: int, where: str) -> tuple[int, int]:
    formats = _readable_formats()
    if kind not in formats:
        raise ValueError(f"{where} has GGUF type {kind}, which cannot be read; update the gguf package, or convert it")
    return formats[kind]
