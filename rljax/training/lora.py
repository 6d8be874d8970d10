"""Training adapters in place of the weights that they stand beside."""

import dataclasses
from pathlib import Path
from typing import Literal

from rljax.models import MATRICES, TARGETS, DecoderConfig, Format, Lora, is_adapter, read_lora
from rljax.settings import field, placed
from rljax.training.trainable import EVERYTHING, Subtree, subtree_of

_OF_FRESH = ("rank", "alpha", "targets", "rank_stabilized", "dora")


@dataclasses.dataclass
class LoraConfig:
    """Low-rank adapters (LoRA, 2106.09685): they are trained, and the model's own weights are frozen, shared with the
    reference, and in no checkpoint."""

    rank: int = field(default=0, least=0)
    """Width of an adapter; 0 trains all weights. RL needs little: 8 to 32."""

    alpha: float = field(default=32.0, above=0)
    """What the adapters add is multiplied by alpha / rank."""

    targets: tuple[str, ...] = MATRICES
    """Matrices of a layer that have an adapter, all of them unless memory is short, and `head`: the vocabulary's, of a
    model whose embedding is another matrix."""

    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA, 2312.03732), for high ranks."""

    dora: bool = False
    """Train the lengths of the columns of each matrix beside adapters that turn them (DoRA, 2402.09353): more of what
    full training can do at a low rank, for a product of A and B a layer and forward pass. Not for experts or `head`."""

    base_dtype: Literal["auto", "float32", "bfloat16", "int8", "nf4"] = "auto"
    """What the frozen weights are kept in; `auto` is what they are multiplied in, `config.model.dtype`. `int8` (8.5
    bits a weight) and `nf4` (QLoRA, 2305.14314; 4.25 bits) are of the matrices of layers, experts' among them, in
    training and while sampling, and the rest is as with `auto`; adapters learn beside a model that is rounded so."""

    path: str = ""
    """Folder in PEFT's format with adapters to go on from, which says rank, alpha and targets by itself; empty begins
    with fresh ones, which add nothing."""

    def __bool__(self) -> bool:
        return self.rank > 0 or bool(self.path)

    def decoder_of(self, decoder: DecoderConfig) -> DecoderConfig:
        """The decoder with these adapters; itself without any. ValueError for a folder without adapters of its
        family."""
        if not self:
            return decoder
        quantized: Format | None = self.base_dtype if self.base_dtype in ("int8", "nf4") else None
        dtype = decoder.dtype if quantized or self.base_dtype == "auto" else self.base_dtype
        lora = self._lora(decoder)
        with placed("config.lora"):
            return dataclasses.replace(decoder, lora=lora, param_dtype=dtype, quantized=quantized)

    def _lora(self, decoder: DecoderConfig) -> Lora:
        if self.path:
            with placed("config.lora.path"):
                return read_lora(Path(self.path).expanduser(), decoder)
        return Lora(**{name: getattr(self, name) for name in _OF_FRESH})

    def check(self) -> None:
        """ValueError for targets that do not exist, and for what has no effect."""
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets={self.targets} must name some of {', '.join(TARGETS)}, each once")
        if self.path:
            self._refuse_idle(_OF_FRESH, f"path={self.path!r}, whose folder says it")
        elif not self.rank:
            self._refuse_idle((*_OF_FRESH[1:], "base_dtype"), "rank=0")

    def _refuse_idle(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value != getattr(LoraConfig(), name):
                raise ValueError(f"{name}={value!r} has no effect with {why}; leave one of them out")


def trained_of(decoder: DecoderConfig) -> Subtree:
    """What of a decoder's weights is trained: its adapters and the head of a critic, or everything without adapters."""
    if decoder.lora is None:
        return EVERYTHING
    return subtree_of(lambda path: is_adapter(path) or path in ("value_head", "value_bias"))
