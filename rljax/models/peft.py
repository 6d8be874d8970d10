"""Adapters from and to folders in the format of Hugging Face's PEFT: adapter_config.json and safetensors."""

import itertools
import math
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rljax.models.assemble import assemble, weight_at
from rljax.models.config import DOWN, HEAD, NORM, SHARED, TARGETS, UP, DecoderConfig, Lora
from rljax.models.decoder import abstract_params
from rljax.models.families import Entry, Weight, family_of
from rljax.models.files import SafetensorsFolder, shown, write_safetensors
from rljax.models.huggingface import check_names, check_shape, read_json, to_host, write_json
from rljax.types import Params

ADAPTER_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_ENDS = {DOWN: "lora_A.weight", UP: "lora_B.weight", NORM: "lora_magnitude_vector"}

_RANK = 8
_ALPHA = 8
"""What PEFT takes where a file is silent."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    # The other ways to begin move a part of the base weights into the adapter (PiSSA, OLoRA, CorDA, LoRA-GA) or round
    # them (LoftQ), so that the adapter belongs to other weights than those of the base model.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    # Variants that multiply otherwise, or not for every token.
    **dict.fromkeys(("use_qalora", "use_bdlora"), (False, None)),
    **dict.fromkeys(
        ("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config"), (None, [], {})
    ),
}
"""Keys of adapter_config.json that change what a model computes, and the values with which they do not. Those of PEFT
0.21, whose `LoraConfig` is the source."""


def is_peft(folder: str | os.PathLike) -> bool:
    """Whether this is a folder with an adapter."""
    return (Path(folder) / ADAPTER_FILE).is_file()


def read_lora(folder: str | os.PathLike, config: DecoderConfig) -> Lora:
    """The adapter that a folder holds for the decoder `config`, without its weights. ValueError where it is none, or
    one of another kind than is supported."""
    file = Path(folder) / ADAPTER_FILE
    if not file.is_file():
        raise ValueError(f"{folder} has no {ADAPTER_FILE}; give a folder that PEFT or rljax convert has made")
    stored = SafetensorsFolder(Path(folder), single=WEIGHTS_FILE).tensors
    said = read_json(file)
    try:
        lora = described_lora(said, config, stored=stored)
        # Before shapes are made of it: a rank that lies may be beyond what any array can have.
        widest = max(itertools.chain.from_iterable(info.shape for info in stored.values()), default=0)
        if lora.rank > widest:
            raise ValueError(f"r={lora.rank}, but no tensor in {WEIGHTS_FILE} is wider than {widest}")
        return lora
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def described_lora(said: Mapping[str, Any], config: DecoderConfig, *, stored: Container[str] | None = None) -> Lora:
    """The adapter that an adapter_config.json describes for the decoder `config`. `stored` are the tensors that lie
    beside it: they tell what is adapted where `target_modules` is a pattern. ValueError as in `read_lora`."""
    if said.get("peft_type") != "LORA":
        raise ValueError(f"peft_type {said.get('peft_type')!r:.80} is not supported; supported is LORA")
    for name, neutral in _NEUTRAL.items():
        if name in said and said[name] not in neutral:
            raise ValueError(f"{name}={said[name]!r:.80} is not supported; supported is {neutral[0]!r}")

    modules = _modules(said.get("target_modules"))

    def has(weight: Weight) -> bool:
        if stored is not None:
            first = config.stacks[weight.stack][0] if weight.stack else None
            return _file_name(weight, DOWN).format(first, 0) in stored
        return _module(weight) in modules

    matrices = _matrices(config)
    found = [weight for weight in matrices if has(weight)]
    if not found:
        raise ValueError(f"there is no adapter of a {config.family} layer; it belongs to another model")
    # What it names and lacks would count as nothing learned.
    lacking = {_module(weight) for weight in matrices if _module(weight) in modules}
    lacking -= {_module(weight) for weight in found}
    if lacking and not said.get("exclude_modules"):
        raise ValueError(f"target_modules names {min(lacking)}, of which {WEIGHTS_FILE} has no tensor")
    _check_apart(config, found)
    targets = tuple(name for name in TARGETS if name in {_target(weight) for weight in found})
    rank = _number(said, "r", _RANK, int)
    alpha = _number(said, "lora_alpha", _ALPHA, int | float)
    try:
        # JSON writes whole numbers without a point.
        alpha = float(alpha)
    except OverflowError:
        alpha = math.inf
    kinds = {"rank_stabilized": _switch(said, "use_rslora"), "dora": _switch(said, "use_dora")}
    return Lora(rank=rank, alpha=alpha, targets=targets, **kinds)


def load_peft(folder: str | os.PathLike, config: DecoderConfig, *, shardings: Any = None) -> dict[str, Any]:
    """The adapters of a folder in float32, for the decoder `config`, whose `lora` is `read_lora` of it. `shardings` is
    a tree like the params; None puts everything on the default device.

    Raises ValueError naming the tensor when one is missing, left over or of another shape.
    """
    folder = Path(folder)
    stored = SafetensorsFolder(folder, single=WEIGHTS_FILE)
    wanted = adapter_entries(config)
    # PEFT adds them where it adapts the head; they may be others than the base model's.
    if whole := sorted(name for name in stored.tensors if name.endswith(".base_layer.weight")):
        raise ValueError(
            f"{folder} holds {shown(whole[0])} beside its adapters, a weight of the model itself; write it with "
            "save_pretrained(..., save_embedding_layers=False), or leave that tensor out"
        )
    check_names({entry.name for entry in wanted}, set(stored.tensors), set(), str(folder))
    for entry in wanted:
        check_shape(entry, stored.tensors[entry.name].shape, str(folder))
    return assemble(config, wanted, lambda entry, which: stored.open(entry.name)[which], shardings)


def save_peft(folder: str | os.PathLike, config: DecoderConfig, params: Params, *, base: str = "") -> None:
    """Writes the adapters among `params` as a folder that PEFT loads over the model `base`, its name or path.

    In a multi-process run every process must call it; process 0 writes. ValueError for a model without adapters, or
    with several side by side.
    """
    folder = Path(folder)
    wanted = {entry.name: entry for entry in adapter_entries(config)}
    dtypes = {str(weight_at(params, entry.weight.path).dtype) for entry in wanted.values()}
    if len(dtypes) > 1:
        raise ValueError(f"adapters have dtypes {sorted(dtypes)}; cast them all to one")
    dtype = np.dtype(dtypes.pop())

    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        declared = {name: (dtype, entry.shape) for name, entry in wanted.items()}
        write_safetensors(folder / WEIGHTS_FILE, declared, lambda name: to_host(params, wanted[name]))
        write_json(folder / ADAPTER_FILE, described_adapter(config, base))
        return
    # The order in which process 0 asks: gathering is collective.
    for name in sorted(wanted):
        to_host(params, wanted[name])


def described_adapter(config: DecoderConfig, base: str = "") -> dict[str, Any]:
    """What adapter_config.json says of a decoder's adapters, JSON-ready. ValueError as in `save_peft`."""
    lora = _single(config)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(dict.fromkeys(_module(weight) for weight in _targets(config))),
        "use_rslora": lora.rank_stabilized,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def adapter_entries(config: DecoderConfig) -> list[Entry]:
    """The tensors of an adapter's file, layer by layer, and the head's. ValueError as in `save_peft`."""
    shapes = abstract_params(config)
    ends = (DOWN, UP, NORM) if _single(config).dora else (DOWN, UP)

    def adapter_of(weight: Weight, end: str) -> Weight:
        return Weight(f"{weight.path}{end}", _file_name(weight, end), "", transpose=end != NORM)

    def of_matrix(weight: Weight, end: str, layer: int) -> list[Entry]:
        own = adapter_of(weight, end)
        # Behind the axes of layers and experts.
        shape = weight_at(shapes, own.path).shape[-1 if end == NORM else -2 :]
        number = config.stacks[weight.stack][layer]
        # An expert's matrix is a module of its own.
        experts = range(config.experts.count) if config.experts and own.hf.count("{}") == 2 else (None,)
        return [Entry(own.hf.format(number, i), own, layer, shape[::-1], expert=i) for i in experts]

    def of_head() -> list[Entry]:
        own = [adapter_of(weight, end) for weight in _targets(config) if not weight.stack for end in ends]
        return [Entry(weight.hf, weight, None, weight_at(shapes, weight.path).shape[::-1]) for weight in own]

    found = (
        of_matrix(weight, end, layer)
        for stack, layers in config.stacks.items()
        for layer in range(len(layers))
        for weight in _targets(config)
        if weight.stack == stack
        for end in ends
    )
    return [*itertools.chain(*found), *of_head()]


def _number(said: Mapping[str, Any], key: str, default: int, kind: Any) -> Any:
    """A number of adapter_config.json. ValueError for anything else."""
    value = said.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{key}={value!r:.80} must be {what}")
    return value


def _switch(said: Mapping[str, Any], key: str) -> bool:
    """A switch of adapter_config.json, off where it is silent. ValueError for anything else."""
    value = said.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r:.80} must be true or false")
    return value


def _modules(named: Any) -> set[str]:
    """The modules that `target_modules` lists; none where it is left out, or a pattern. ValueError for anything
    else."""
    if named is None or isinstance(named, str):
        return set()
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"target_modules={named!r:.80} must be a list of names of modules")
    # PEFT matches the end of a module's path.
    return {name.rsplit(".", 1)[-1] for name in named}


def _targets(config: DecoderConfig) -> list[Weight]:
    """Rows of the family's table that have an adapter."""
    wanted = _single(config).targets
    targets = [weight for weight in _matrices(config) if _target(weight) in wanted]
    _check_apart(config, targets)
    return targets


def _matrices(config: DecoderConfig) -> list[Weight]:
    """Rows of the family's table that an adapter may be of."""
    tree = abstract_params(config)
    rows = [weight for weight in family_of(config).weights if _target(weight) in TARGETS]

    def exists(weight: Weight) -> bool:
        if weight.path == HEAD:
            return HEAD in tree
        return weight.path.removeprefix(f"{weight.stack}/") in tree.get(weight.stack, ())

    return [weight for weight in rows if exists(weight)]


def _target(weight: Weight) -> str:
    """What `Lora.targets` calls a matrix of a layer: of an expert that all tokens share as of the others."""
    return weight.path.removeprefix(f"{weight.stack}/").removeprefix(SHARED)


def _check_apart(config: DecoderConfig, targets: list[Weight]) -> None:
    """ValueError where a target's matrix lies in one tensor with others, of the layer or of all experts, which PEFT
    adapts as one or not at all."""
    rows = family_of(config).weights
    for weight in targets:
        together = [other for other in rows if (other.stack, other.hf) == (weight.stack, weight.hf)]
        # What is the weight of no module holds the matrices of all experts.
        if len(together) > 1 or not weight.hf.endswith(".weight"):
            raise ValueError(
                f"{config.family} keeps {_target(weight)} with others in {_module(weight)}, which "
                "PEFT adapts as one; write the merged model (rljax convert without --adapter)"
            )


def _module(weight: Weight) -> str:
    """What PEFT calls a matrix, in every layer."""
    return weight.hf.removesuffix(".weight").rsplit(".", 1)[-1]


def _file_name(weight: Weight, end: str) -> str:
    return f"{_PREFIX}{weight.hf.removesuffix('weight')}{_ENDS[end]}"


def _single(config: DecoderConfig) -> Lora:
    if config.lora is None:
        raise ValueError("the model has no adapters; set config.lora.rank above 0 when it is trained")
    if config.lora.count:
        raise ValueError(f"{config.lora.count} adapters side by side are not one folder; save each of them by itself")
    return config.lora
