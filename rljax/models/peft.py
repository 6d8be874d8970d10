"""Adapters from and to folders in the format of Hugging Face's PEFT: adapter_config.json and safetensors.

A module of PEFT may hold several of our matrices, as Phi-3's `qkv_proj` does, and has one adapter. PEFT trains one A
for all of them. Ours each have an A of their own, so a file of them has these one behind the other, and a B with a
block for each: the same product, of a rank that is as many times larger.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rljax.models.assemble import assemble, weight_at
from rljax.models.config import DOWN, HEAD, NORM, SHARED, TARGETS, UP, DecoderConfig, Lora
from rljax.models.decoder import abstract_params
from rljax.models.families import Entry, Weight, entries, family_of
from rljax.models.files import SafetensorsFolder, shown, write_safetensors
from rljax.models.huggingface import check_names, check_shape, read_json, tensor_to_host, write_json
from rljax.models.lora import base_config
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
            return _file_name(weight.hf, DOWN).format(first, 0) in stored
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
    _check_modules(found, config)
    targets = tuple(name for name in TARGETS if name in {_target(weight) for weight in found})
    rank = _number(said, "r", _RANK, int)
    alpha = _number(said, "lora_alpha", _ALPHA, int | float)
    try:
        # JSON writes whole numbers without a point.
        alpha = float(alpha)
    except OverflowError:
        alpha = math.inf
    kinds = {"rank_stabilized": _switch(said, "use_rslora"), "dora": _switch(said, "use_dora")}
    lora = Lora(rank=rank, alpha=alpha, targets=targets, **kinds)

    _check_patterns(said, dataclasses.replace(config, lora=lora))
    return lora


def _check_patterns(said: Mapping[str, Any], config: DecoderConfig) -> None:
    """ValueError for ranks or scales of single modules other than `_patterns`."""
    theirs = {name: {} if said.get(name) is None else said[name] for name in ("rank_pattern", "alpha_pattern")}
    if all(value == {} for value in theirs.values()):
        return
    ours = _patterns(config)
    if theirs != ours:
        shown_as = ", ".join(f"{name}={value!r:.80}" for name, value in theirs.items())
        allowed = f"none, or those of modules with several matrices, {ours}" if any(ours.values()) else "none"
        raise ValueError(f"{shown_as} is not supported; supported is {allowed}")


def load_peft(folder: str | os.PathLike, config: DecoderConfig, *, shardings: Any = None) -> dict[str, Any]:
    """The adapters of a folder in float32, for the decoder `config`, whose `lora` is `read_lora` of it. `shardings` is
    a tree like the params; None puts everything on the default device.

    Raises ValueError naming the tensor when one is missing, left over or of another shape.
    """
    folder = Path(folder)
    stored = SafetensorsFolder(folder, single=WEIGHTS_FILE)
    said = read_json(folder / ADAPTER_FILE)
    wanted = adapter_entries(config, shared=not said.get("rank_pattern"))
    # PEFT adds them where it adapts the head; they may be others than the base model's.
    if whole := sorted(name for name in stored.tensors if name.endswith(".base_layer.weight")):
        raise ValueError(
            f"{folder} holds {shown(whole[0])} beside its adapters, a weight of the model itself; write it with "
            "save_pretrained(..., save_embedding_layers=False), or leave that tensor out"
        )
    absent = set() if _single(config).dora else _not_adapted(wanted, said, stored.tensors)
    check_names({entry.name for entry in wanted} - absent, set(stored.tensors), set(), str(folder))
    for entry in wanted:
        if entry.name not in absent:
            check_shape(entry, stored.tensors[entry.name].shape, str(folder))
    _check_blocks([entry for entry in wanted if entry.name not in absent], stored, folder)

    def fetch(entry: Entry, which: slice) -> np.ndarray:
        # Zeros add nothing, and have no gradient: they stay so.
        return (np.zeros(entry.shape, np.float32) if entry.name in absent else stored.open(entry.name))[which]

    return assemble(config, wanted, fetch, shardings)


def _not_adapted(wanted: Sequence[Entry], said: Mapping[str, Any], stored: Container[str]) -> set[str]:
    """The tensors of modules that an adapter leaves as they are, whose kind of matrix it adapts elsewhere: one of a
    hybrid's attention is of its `q`, and has none of its delta rule's."""
    named = _modules(said.get("target_modules"))
    modules: dict[str, set[str]] = {}
    for entry in wanted:
        modules.setdefault(entry.name.partition(".lora_")[0].rpartition(".")[2], set()).add(entry.name)
    return set().union(
        *(names for module, names in modules.items() if module not in named and not any(x in stored for x in names))
    )


def _check_blocks(wanted: Sequence[Entry], stored: SafetensorsFolder, folder: Path) -> None:
    """ValueError for a B that is not 0 outside of what is read of it, which would be lost."""
    parts: dict[str, list[Entry]] = {}
    for entry in wanted:
        if entry.part is not None and entry.weight.path.endswith(UP):
            parts.setdefault(entry.name, []).append(entry)
    for name, own in parts.items():
        rest = np.array(stored.open(name))
        for entry in own:
            rest[entry.part] = 0
        if rest.any():
            read = ", ".join(_target(entry.weight).removesuffix(UP) for entry in own)
            raise ValueError(
                f"{folder}: {shown(name)} adapts more than {read}, and the rest of it would be lost; "
                "merge it into the model with PEFT's merge_and_unload and load that"
            )


def save_peft(folder: str | os.PathLike, config: DecoderConfig, params: Params, *, base: str = "") -> None:
    """Writes the adapters among `params` as a folder that PEFT loads over the model `base`, its name or path.

    In a multi-process run every process must call it; process 0 writes. ValueError for a model without adapters, or
    with several side by side.
    """
    folder = Path(folder)
    wanted: dict[str, list[Entry]] = {}
    for entry in adapter_entries(config):
        wanted.setdefault(entry.name, []).append(entry)
    dtypes = {str(weight_at(params, entry.weight.path).dtype) for own in wanted.values() for entry in own}
    if len(dtypes) > 1:
        raise ValueError(f"adapters have dtypes {sorted(dtypes)}; cast them all to one")
    dtype = np.dtype(dtypes.pop())

    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        declared = {name: (dtype, own[0].shape) for name, own in wanted.items()}
        write_safetensors(folder / WEIGHTS_FILE, declared, lambda name: tensor_to_host(params, wanted[name]))
        write_json(folder / ADAPTER_FILE, described_adapter(config, base))
        return
    # The order in which process 0 asks: gathering is collective.
    for name in sorted(wanted):
        tensor_to_host(params, wanted[name])


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
        **_patterns(config),
    }


def _patterns(config: DecoderConfig) -> dict[str, dict[str, Any]]:
    """PEFT's `rank_pattern` and `alpha_pattern` of modules with several matrices, by module: with both, what is added
    has the scale of all others."""
    lora = _single(config)
    counts = {
        _module(parts[0].weight): len(parts)
        for parts in _parts_of_modules(config)
        if len(parts) > 1 and any(_target(part.weight) in lora.targets for part in parts)
    }
    return {
        "rank_pattern": {module: count * lora.rank for module, count in counts.items()},
        "alpha_pattern": {
            module: lora.alpha * (math.sqrt(count) if lora.rank_stabilized else count)
            for module, count in counts.items()
        },
    }


def adapter_entries(config: DecoderConfig, *, shared: bool = False) -> list[Entry]:
    """The tensors of an adapter's file, layer by layer, and the head's. A tensor of a module with several matrices has
    an entry for each that is adapted: with `shared` one A for all of them, otherwise a block for each, and nothing
    where one is not adapted. ValueError as in `save_peft`."""
    lora = _single(config)
    ends = (DOWN, UP, NORM) if lora.dora else (DOWN, UP)
    _check_modules(_targets(config), config)

    def of_matrix(parts: list[Entry], number: int, end: str) -> Entry:
        part = parts[number]
        own = Weight(f"{part.weight.path}{end}", _file_name(part.weight.hf, end), "", transpose=end != NORM)
        name = _file_name(part.name, end)

        # Theirs are [rank, in] and [out, rank].
        out, width = part.shape
        rank = lora.rank if shared else len(parts) * lora.rank
        shape = {DOWN: (rank, width), UP: (out, rank), NORM: (out,)}[end]
        if part.part is None:
            return Entry(name, own, part.layer, shape, expert=part.expert)

        (rows,) = part.part
        block = slice(0, rank) if shared else slice(number * lora.rank, (number + 1) * lora.rank)
        index = {DOWN: (block,), UP: (rows, block), NORM: (rows,)}[end]
        return Entry(name, own, part.layer, shape, index, expert=part.expert)

    modules = _parts_of_modules(config)
    if lora.dora:
        for parts in modules:
            _check_lengths(parts, lora, config)
    return [
        of_matrix(parts, number, end)
        for parts in modules
        for end in ends
        for number, part in enumerate(parts)
        if _target(part.weight) in lora.targets
    ]


def _parts_of_modules(config: DecoderConfig) -> list[list[Entry]]:
    """The matrices that an adapter may be of, by the module that they lie in."""
    modules: dict[str, list[Entry]] = {}
    for entry in entries(base_config(config)):
        if _target(entry.weight) in TARGETS:
            modules.setdefault(entry.name, []).append(entry)
    return list(modules.values())


def _check_lengths(parts: Sequence[Entry], lora: Lora, config: DecoderConfig) -> None:
    """ValueError where DoRA adapts some rows of a module, whose other rows would need lengths too."""
    adapted = [part for part in parts if _target(part.weight) in lora.targets]
    rows = [np.arange(part.shape[0])[part.part or ...].size for part in adapted]
    if adapted and sum(rows) < adapted[0].shape[0]:
        raise ValueError(
            f"{config.family} keeps {_target(adapted[0].weight)} with others in {_module(adapted[0].weight)}, which "
            "PEFT's DoRA takes whole; write the merged model (rljax convert without --adapter)"
        )


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
    return [weight for weight in _matrices(config) if _target(weight) in wanted]


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


def _check_modules(targets: Sequence[Weight], config: DecoderConfig) -> None:
    """ValueError where the matrices of all experts lie in one parameter, which is the weight of no module."""
    for weight in targets:
        if not weight.hf.endswith(".weight"):
            raise ValueError(
                f"{config.family} keeps {_target(weight)} of all experts in the parameter {_module(weight)}, which is "
                "no module of PEFT's; write the merged model (rljax convert without --adapter)"
            )


def _module(weight: Weight) -> str:
    """What PEFT calls a matrix, in every layer."""
    return weight.hf.removesuffix(".weight").rsplit(".", 1)[-1]


def _file_name(name: str, end: str) -> str:
    return f"{_PREFIX}{name.removesuffix('weight')}{_ENDS[end]}"


def _single(config: DecoderConfig) -> Lora:
    if config.lora is None:
        raise ValueError("the model has no adapters; set config.lora.rank above 0 when it is trained")
    if config.lora.count:
        raise ValueError(f"{config.lora.count} adapters side by side are not one folder; save each of them by itself")
    return config.lora
