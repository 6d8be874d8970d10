"""The one description of a decoder-only transformer that every supported family reduces to."""

import dataclasses
import numbers
import sys
import typing
from typing import Any, Literal, NamedTuple

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

Activation = Literal["silu", "gelu_tanh"]
"""What the MLP's gate goes through: `x sigmoid(x)`, or x times the normal distribution, approximated by tanh."""

Rotation = Literal["global", "local", "none"]
"""How a layer rotates queries and keys: by `rope_theta` and `rope_scaling`, by `local_rope_theta`, or not at all."""

_ROPE_TYPES = ", ".join(typing.get_args(RopeType))
_SIZES = (
    "vocab_size",
    "num_layers",
    "embed_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
    "max_position",
)


_FLOAT32_MAX = 3.4028234663852886e38


def _check_whole(name: str, value: Any, *, least: int) -> None:
    # A truth value is a whole number to Python, not to a reader of the file.
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r:.80} must be a whole number of at least {least}")


def _check_real(name: str, value: Any) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    # A whole number may be beyond every float.
    if not (is_number and 0 < value <= sys.float_info.max):
        raise ValueError(f"{name}={value!r:.80} must be a finite number above 0")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts beyond the pretrained one. Fields that a type does not use are
    ignored."""

    type: RopeType = "default"
    """The scaling; `default` is none. `rljax.models.rope` names the papers."""
    factor: float = 1.0
    """How many times longer contexts are than before."""
    original_max_position: int = 0
    """The context length before scaling, in tokens."""
    low_freq_factor: float = 1.0
    """llama3: waves longer than `original_max_position / low_freq_factor` are stretched."""
    high_freq_factor: float = 4.0
    """llama3: waves shorter than `original_max_position / high_freq_factor` stay as they are."""
    beta_fast: float = 32.0
    """yarn: dimensions that rotate more often than this over the original context stay as they are."""
    beta_slow: float = 1.0
    """yarn: dimensions that rotate less often than this are stretched."""
    attention_factor: float | None = None
    """yarn: factor on cosines and sines; None is `0.1 ln(factor) + 1`, or the ratio of the two below."""
    mscale: float | None = None
    """yarn: weight in the numerator of that ratio."""
    mscale_all_dim: float | None = None
    """yarn: weight in its denominator."""
    truncate: bool = True
    """yarn: whether the bounds between the dimensions are whole numbers."""
    short_factor: tuple[float, ...] = ()
    """longrope: what each frequency is divided by, up to the original context."""
    long_factor: tuple[float, ...] = ()
    """longrope: what it is divided by beyond; kept for exports, since longer sequences are refused."""

    def __post_init__(self):
        if self.type not in typing.get_args(RopeType):
            raise ValueError(f"rope type {self.type!r:.80} is not supported; choose one of {_ROPE_TYPES}")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            _check_real(f"rope scaling's {name}", getattr(self, name))
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                _check_real(f"rope scaling's {name}", getattr(self, name))
        _check_whole("rope scaling's original_max_position", self.original_max_position, least=0)
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope scaling's low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        for name in ("short_factor", "long_factor"):
            for value in getattr(self, name):
                _check_real(f"rope scaling's {name}", value)


LAYERS = "layers"
DENSE_LAYERS = "dense_layers"
DELTA_LAYERS = "delta_layers"
"""Stacks of layers among the weights: all of them, but for the first of a mixture that have no experts, and for those
with a delta rule in place of attention."""

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
"""Weights of a layer that an adapter may be added to."""

HEAD = "head"
"""The vocabulary's head, where it is not the embedding."""

TARGETS = (*MATRICES, HEAD)
"""Weights that an adapter may be added to."""

DOWN = "_lora_a"
UP = "_lora_b"
NORM = "_lora_norm"
"""What follows a matrix's name in the names of its adapter: A and B of 2106.09685, and the magnitudes of 2402.09353."""
GAIN = "_lora_gain"
"""In the place of the last, in the weights of a decoder: what it multiplies by, which is the same for every token."""


SHARED = "shared_"
"""What precedes the names of the matrices that all tokens share beside the experts. An adapter of `gate` is of
`shared_gate` too, as PEFT has it."""

Format = Literal["int8", "nf4"]
SCALE = "_scale"
"""What follows a matrix's name in the name of its scales, where it is kept in few bits (`rljax.models.quantized`)."""
SCALE_DTYPE = "bfloat16"
"""As wide in range as float32: beneath float16's, a block of small weights would not become the same codes again."""


class Layout(NamedTuple):
    """How matrices of few bits stand in memory."""

    block: int
    """Weights of a column, one behind the other, that have one scale."""
    packed: int
    """Weights of a column in one code."""
    dtype: str
    """Of codes."""


LAYOUTS: dict[str, Layout] = {"int8": Layout(32, 1, "int8"), "nf4": Layout(64, 2, "uint8")}


def is_wide(path: str) -> bool:
    """Whether a weight is float32 whatever the model's others are cast to, in files too: what experts are chosen by, of
    which a step is less than bfloat16 can tell."""
    return path.endswith("selection_bias")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (2106.09685): beside `x W` of each target stands `scale (x A) B`, with A [in, rank] and B
    [rank, out]. With `dora` their sum is multiplied by `dora_gain` (2402.09353). Hashable, as the config that holds
    it."""

    rank: int
    """Width between A and B."""
    alpha: float
    """Numerator of `scale`."""
    targets: tuple[str, ...] = MATRICES
    """Weights that have an adapter: of `TARGETS`. A value head in place of the vocabulary's has none."""
    rank_stabilized: bool = False
    """Whether `scale` is alpha / sqrt(rank) (2312.03732) instead of alpha / rank."""
    dora: bool = False
    """Whether adapters turn the columns of a matrix alone, and their lengths are weights of their own, [out]."""
    count: int = 0
    """Adapters side by side in one model, of which each row of a decoder has one; 0 is a single one, without an axis
    for them."""

    def __post_init__(self):
        _check_whole("lora's rank", self.rank, least=1)
        _check_real("lora's alpha", self.alpha)
        if self.alpha > _FLOAT32_MAX:
            raise ValueError(f"lora's alpha={self.alpha:.3g} is beyond float32, in which adapters multiply")
        if not self.targets or (unknown := [name for name in self.targets if name not in TARGETS]):
            wrong = unknown[0] if self.targets else ""
            raise ValueError(f"lora's target {wrong!r} is none of {', '.join(TARGETS)}; name at least one of these")
        if self.dora and self.count:
            raise ValueError(
                "adapters side by side are plain ones, and dora=True gives each lengths of its own; merge them"
            )
        if self.dora and HEAD in self.targets:
            raise ValueError(
                "dora=True is of the matrices of layers, and lora's target head is of none; leave head out"
            )

    @property
    def scale(self) -> float:
        """Factor of what the adapters add."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP: a router gives each of them a score for each token, a probability (a
    softmax) unless `selection_bias` says otherwise, and the best few compute. Hashable, as the config that holds it."""

    count: int
    """Experts of a layer."""
    per_token: int
    """Experts that compute for a token."""
    mlp_dim: int
    """Width inside an expert."""
    normalized: bool = True
    """Whether the weights of a token's experts are divided by their sum."""
    biases: bool = False
    """Biases of the router and of all products of the experts."""
    limit: float | None = None
    """What gates are cut off above, and what they gate above and below, for `clamped_swiglu`; None is a plain
    `swiglu`."""
    slope: float = 1.0
    """Factor within that one's sigmoid."""
    selection_bias: bool = False
    """Whether scores are sigmoids, each by itself, and experts are chosen by score plus a bias of their own, which does
    not enter their weights (DeepSeek-V3, 2412.19437, section 2.1.2)."""
    groups: int = 1
    """Groups of equally many neighbours that experts are in. A group scores what its two best experts do together."""
    kept_groups: int = 1
    """Groups, the best, whose experts can be chosen for a token."""
    weight_scale: float = 1.0
    """Factor on the weights of a token's experts."""
    shared: int = 0
    """Experts that compute for every token: one MLP of so many times `mlp_dim`."""
    shared_score: bool = False
    """Whether what these compute is weighted by a sigmoid, of a score that each token gives them."""
    dense_layers: int = 0
    """First layers that have one MLP for all tokens, of the model's own `mlp_dim`, and no experts."""

    def __post_init__(self):
        for name in ("count", "per_token", "mlp_dim", "groups", "kept_groups"):
            _check_whole(f"experts' {name}", getattr(self, name), least=1)
        for name in ("shared", "dense_layers"):
            _check_whole(f"experts' {name}", getattr(self, name), least=0)
        if self.per_token > self.count:
            raise ValueError(f"experts' per_token={self.per_token} must be at most their count={self.count}")
        _check_real("experts' weight_scale", self.weight_scale)
        self._check_groups()
        if self.limit is not None:
            _check_real("experts' limit", self.limit)
        _check_real("experts' slope", self.slope)
        if self.shared_score and not self.shared:
            raise ValueError("experts' shared_score=True is of shared experts, and shared=0 has none")
        if self.limit is None and self.slope != 1.0:
            raise ValueError(f"experts' slope={self.slope} needs a limit: a plain swiglu has the slope 1")

    def _check_groups(self) -> None:
        if self.kept_groups > self.groups:
            raise ValueError(f"experts' kept_groups={self.kept_groups} must be at most their groups={self.groups}")
        if self.groups == 1:
            return
        if self.count % self.groups or self.count < 2 * self.groups:
            raise ValueError(
                f"experts' count={self.count} must be a multiple, of 2 or more, of their {self.groups} groups"
            )
        if self.per_token > (choice := self.count // self.groups * self.kept_groups):
            raise ValueError(
                f"experts' per_token={self.per_token} must be at most the {choice} that the "
                f"kept_groups={self.kept_groups} hold"
            )


@dataclasses.dataclass(frozen=True)
class Delta:
    """A gated delta rule (2412.06464) in place of attention in some layers (`rljax.models.delta`). Hashable, as the
    config that holds it."""

    layers: tuple[bool, ...]
    """Which layers have it."""
    key_heads: int
    """Heads of queries and keys."""
    value_heads: int
    """Heads of values, and of memories; a multiple of `key_heads`."""
    key_dim: int
    """Width of a head of queries or keys."""
    value_dim: int
    """Width of a head of values."""
    kernel: int = 4
    """Tokens that the convolution in front of it sees, the last its own."""

    def __post_init__(self):
        for name in ("key_heads", "value_heads", "key_dim", "value_dim", "kernel"):
            _check_whole(f"delta's {name}", getattr(self, name), least=1)
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"delta's value_heads={self.value_heads} must be a multiple of its key_heads={self.key_heads}"
            )
        if all(self.layers) or not any(self.layers):
            raise ValueError(
                "delta is of some layers, and others attend; a model of one kind alone is none of any family"
            )

    def part(self, parts: int) -> "Delta":
        """One of `parts` of the heads, which divide."""
        return dataclasses.replace(self, key_heads=self.key_heads // parts, value_heads=self.value_heads // parts)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of all heads of queries, of keys, and of values."""
        of_keys = self.key_heads * self.key_dim
        return of_keys, of_keys, self.value_heads * self.value_dim


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and numerics of a decoder. Hashable, so it can be a static argument of `jax.jit`."""

    vocab_size: int
    """Rows of the embedding, padding of the vocabulary included."""
    num_layers: int
    """Transformer layers."""
    embed_dim: int
    """Width of the residual stream."""
    num_heads: int
    """Query heads; a multiple of `num_kv_heads`."""
    num_kv_heads: int
    """Heads of keys and values."""
    head_dim: int
    """Width of a head; even."""
    mlp_dim: int
    """Width inside the MLP; without meaning where `experts` stand in its place."""
    family: str = "llama"
    """Whose files the weights are written as: a name in `rljax.models.FAMILIES`."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = RopeScaling()
    """How these are stretched."""
    norm_eps: float = 1e-5
    """Added to the mean square in norms."""
    tokenizer_size: int | None = None
    """Ids that the tokenizer has. Rows of the embedding behind them are padding, which gets no probability; None where
    all rows are tokens."""
    tied_embeddings: bool = False
    """Whether the embedding is the vocabulary's head too."""
    attention_bias: bool = False
    """Biases on q, k and v."""
    output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    qk_norm: bool = False
    """Norms on queries and keys, before they are rotated."""
    qk_norm_whole: bool = False
    """Whether these go over all heads together instead of each head by itself."""
    gated_attention: bool = False
    """Whether what attention reads is multiplied by the sigmoid of a gate, as wide, which `q` makes behind the query of
    each head."""
    sinks: bool = False
    """Whether every head of attention has a sink: one score more in its softmax, for nothing."""
    pre_norms: bool = True
    """Norms on what attention and MLP read."""
    post_norms: bool = False
    """Norms on what attention and MLP add to the residual stream."""
    norm_offset: bool = False
    """Whether norms are stored less one: `x / rms(x) * (1 + weight)`."""
    activation: Activation = "silu"
    """Of the MLP's gate."""
    embed_scale: float = 1.0
    """Factor on embeddings, in the compute dtype."""
    residual_scale: float = 1.0
    """Factor on what attention and MLP add to the residual stream."""
    score_scale: float | None = None
    """Factor on products of queries and keys; None is `1 / sqrt(head_dim)`."""
    logits_divisor: float = 1.0
    """What logits are divided by."""
    rotary_dim: int | None = None
    """Width of a head that is rotated, from its first dimension on; even. None is all of it."""
    rotated_layers: tuple[bool, ...] | None = None
    """Which layers rotate queries and keys; None means all do."""
    local_rope_theta: float | None = None
    """Base of the rotary frequencies of sliding layers, which `rope_scaling` leaves alone then; None is `rope_theta`,
    scaled."""
    value_head: bool = False
    """A scalar in place of the vocabulary's logits: a critic, or a reward model."""
    value_bias: bool = True
    """Whether a value head adds a bias; a reward model's does not, whose level its pairs leave open."""
    sliding_window: int | None = None
    """How many positions back a sliding layer sees, its own included; None is all."""
    sliding_layers: tuple[bool, ...] | None = None
    """Which layers slide; None means all do when `sliding_window` is set."""
    max_position: int = 2048
    """Longest sequence that the model knows, in tokens."""
    dtype: str = "float32"
    """Type of activations and matrix products; norms, softmax and logits are float32 always."""
    param_dtype: str = "float32"
    """Type of stored weights, but for adapters and those of `is_wide`, which are float32."""
    lora: Lora | None = None
    """Adapters beside its weights; None is none."""
    quantized: Format | None = None
    """What matrices of layers are kept in, which then are frozen (`rljax.models.quantized`); None is `param_dtype`."""
    experts: Experts | None = None
    """Experts in place of the MLP of every layer, or of those behind the first few; None is one MLP for all tokens."""
    delta: Delta | None = None
    """A delta rule in place of attention in some layers; None is attention in all."""

    def __post_init__(self):
        for name in _SIZES:
            _check_whole(name, getattr(self, name), least=1)
        if self.sliding_window is not None:
            _check_whole("sliding_window", self.sliding_window, least=1)
        _check_real("rope_theta", self.rope_theta)
        _check_real("norm_eps", self.norm_eps)
        for name in ("embed_scale", "residual_scale", "logits_divisor", "score_scale", "local_rope_theta"):
            if getattr(self, name) is not None:
                _check_real(name, getattr(self, name))

        # What belongs together.
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}; change one of them"
            )
        if self.tokenizer_size is not None and not 1 <= self.tokenizer_size <= self.vocab_size:
            raise ValueError(
                f"tokenizer_size={self.tokenizer_size} must lie between 1 and vocab_size={self.vocab_size}; "
                "take the tokenizer that belongs to the model"
            )
        if self.activation not in typing.get_args(Activation):
            known = ", ".join(typing.get_args(Activation))
            raise ValueError(f"activation={self.activation!r:.80} is not supported; choose one of {known}")
        if not (self.pre_norms or self.post_norms):
            raise ValueError("pre_norms=False needs post_norms=True: a layer without norms is none of any family")

        self._check_adapters()
        self._check_quantized()
        self._check_experts()
        self._check_delta()
        self._check_rotation()
        for name in ("sliding_layers", "rotated_layers"):
            chosen = getattr(self, name)
            if chosen is not None and len(chosen) != self.num_layers:
                raise ValueError(f"{name} has {len(chosen)} entries for num_layers={self.num_layers}")

    def _check_adapters(self) -> None:
        if self.lora is None or HEAD not in self.lora.targets:
            return
        if self.tied_embeddings:
            raise ValueError(
                f"lora's targets {', '.join(self.lora.targets)}: this model's head is its embedding "
                "(tied_embeddings), and an adapter of one of the two would part them; leave head out"
            )
        if self.lora.count:
            raise ValueError(
                "adapters side by side are of layers, and lora's target head is of none; leave head out, or take one "
                "of them"
            )

    def _check_quantized(self) -> None:
        if self.quantized is None:
            return
        block = LAYOUTS[self.quantized].block
        sizes = {"embed_dim": self.embed_dim, "num_heads * head_dim": self.num_heads * self.head_dim}
        if self.experts is None or self.experts.dense_layers:
            sizes["mlp_dim"] = self.mlp_dim
        if self.experts is not None:
            sizes["experts' mlp_dim"] = self.experts.mlp_dim
        if self.delta is not None:
            sizes["delta's value_heads * value_dim"] = self.delta.widths[-1]
        for name, size in sizes.items():
            if size % block:
                raise ValueError(
                    f"quantized={self.quantized} has blocks of {block} weights, which do not divide {name}={size}"
                )

    def _check_experts(self) -> None:
        own = {"gate", "up", "down"} & {*self.lora.targets} if self.experts and self.lora else set()
        if own and self.lora and (self.lora.count or self.lora.dora):
            what = "adapters side by side are" if self.lora.count else "dora=True is"
            raise ValueError(
                f"{what} of matrices that all tokens share, and lora's targets {', '.join(sorted(own))} are of one "
                "expert each; take q, k, v or o"
            )
        if self.experts is not None and self.experts.dense_layers >= self.num_layers:
            raise ValueError(
                f"experts' dense_layers={self.experts.dense_layers} must be below num_layers={self.num_layers}: the "
                "last layer has experts"
            )

    def _check_delta(self) -> None:
        if self.delta is None:
            return
        if self.experts is not None and self.experts.dense_layers:
            raise ValueError(
                f"experts' dense_layers={self.experts.dense_layers} are no family's that has a delta rule, too: there "
                "all layers have experts"
            )
        if len(self.delta.layers) != self.num_layers:
            raise ValueError(f"delta's layers has {len(self.delta.layers)} entries for num_layers={self.num_layers}")

    def _check_rotation(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings rotate pairs")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise ValueError(f"rotary_dim={self.rotary_dim} must be even, and from 2 to head_dim={self.head_dim}")

        if self.rope_scaling.type == "longrope":
            wanted = self.rotary_width // 2
            for name in ("short_factor", "long_factor"):
                if (count := len(getattr(self.rope_scaling, name))) != wanted:
                    raise ValueError(f"rope scaling's {name} has {count} entries for {wanted} frequencies")
        # yarn counts rotations by the logarithm of the base.
        if self.rope_scaling.type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta={self.rope_theta} must be above 1 for yarn")

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that positions are known for, stretched frequencies counted in.

        yarn covers `factor` times the original context (2309.00071), linear scaling `factor` times `max_position`
        (2306.15595). llama3 states the stretched length as `max_position`, and dynamic scaling rotates anew for every
        length beyond the original context. longrope rotates a whole sequence otherwise once it is longer than the
        original context, so that a token would depend on those behind it: it ends there.
        """
        scaling = self.rope_scaling
        match scaling.type:
            case "longrope":
                return min(self.max_position, scaling.original_max_position or self.max_position)
            case "yarn":
                covered = scaling.factor * (scaling.original_max_position or self.max_position)
            case "linear":
                covered = scaling.factor * self.max_position
            case _:
                covered = 0.0
        # A file may state the stretched length by itself.
        return max(self.max_position, int(min(covered, NO_WINDOW)))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The stack of `params` that each layer is of. Layers of one stack have the same weights."""
        if self.delta is not None:
            return tuple(DELTA_LAYERS if own else LAYERS for own in self.delta.layers)
        dense = self.experts.dense_layers if self.experts is not None else 0
        return (DENSE_LAYERS,) * dense + (LAYERS,) * (self.num_layers - dense)

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """The layers of each stack of `params`, in order."""
        kinds = self.kinds
        return {name: tuple(layer for layer, own in enumerate(kinds) if own == name) for name in dict.fromkeys(kinds)}

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """How layers can be gone through in turn: (size, count) of each stretch, which is a block of `size` layers
        `count` times. Layers of one place in the block are of one stack."""
        kinds = self.kinds
        if self.delta is None:
            return tuple((1, len(layers)) for layers in self.stacks.values())
        count = len(kinds)
        size = next(n for n in range(1, count + 1) if count % n == 0 and kinds == kinds[:n] * (count // n))
        return ((size, count // size),)

    def of_stack(self, stack: str) -> "DecoderConfig":
        """The config of a stack's layers: without experts where these have an MLP."""
        return dataclasses.replace(self, experts=None) if stack == DENSE_LAYERS else self

    def check_attends(self, what: str) -> None:
        """ValueError where some layers have a delta rule in place of attention, which names `what` needs it of all
        layers."""
        if self.delta is not None:
            raise ValueError(
                f"{what} needs a model all of whose layers attend; {sum(self.delta.layers)} of {self.num_layers} here "
                "have a delta rule, whose memory cannot be taken apart into keys and values. Take another model"
            )

    @property
    def attending(self) -> int:
        """How many layers attend."""
        return self.num_layers - (sum(self.delta.layers) if self.delta is not None else 0)

    @property
    def mixing(self) -> int:
        """How many layers have experts."""
        return self.num_layers - self.experts.dense_layers if self.experts is not None else 0

    @property
    def adapts_head(self) -> bool:
        """Whether the vocabulary's head has an adapter."""
        return self.lora is not None and HEAD in self.lora.targets and not self.value_head

    @property
    def num_ids(self) -> int:
        """Ids that exist: from 0 up to here."""
        return self.vocab_size if self.tokenizer_size is None else self.tokenizer_size

    @property
    def rotary_width(self) -> int:
        """Width of a head that is rotated."""
        return self.rotary_dim or self.head_dim

    @property
    def rotations(self) -> tuple[Rotation, ...]:
        """How each layer rotates queries and keys."""
        rotated = self.rotated_layers or (True,) * self.num_layers
        local = self.local_rope_theta is not None
        return tuple(
            "none" if not turns else "local" if local and window != NO_WINDOW else "global"
            for turns, window in zip(rotated, self.windows, strict=True)
        )

    @property
    def windows(self) -> tuple[int, ...]:
        """How many positions back each layer sees; `NO_WINDOW` where it sees all."""
        if self.sliding_window is None:
            return (NO_WINDOW,) * self.num_layers
        sliding = self.sliding_layers or (True,) * self.num_layers
        return tuple(self.sliding_window if s else NO_WINDOW for s in sliding)


NO_WINDOW = 2**30
"""The window of a layer that sees all: longer than any sequence."""
