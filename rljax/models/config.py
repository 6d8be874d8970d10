"""The one description of a decoder-only transformer that every supported family reduces to."""

import dataclasses
from typing import Literal

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts beyond the pretrained one.

    Fields that a type does not use are ignored. `original_max_position` is the context length before scaling.
    """

    type: RopeType = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None = 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and numerics of a decoder. Hashable, so it can be a static argument of `jax.jit`.

    `dtype` is the type of activations and matrix products, `param_dtype` that of stored weights; norms, softmax and
    logits are float32 always. `sliding_layers[i]` tells whether layer `i` attends to the last `sliding_window`
    positions only; None means all layers do when `sliding_window` is set.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    family: str = "llama"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    attention_bias: bool = False  # biases on q, k and v
    output_bias: bool = False  # bias on the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    value_head: bool = False  # a scalar in place of the vocabulary's logits: a critic
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    max_position: int = 2048
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}; change one of them"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings rotate pairs")
        if self.sliding_layers is not None and len(self.sliding_layers) != self.num_layers:
            raise ValueError(f"sliding_layers has {len(self.sliding_layers)} entries for num_layers={self.num_layers}")

    @property
    def windows(self) -> tuple[int, ...]:
        """How many positions back each layer sees; `NO_WINDOW` where it sees all."""
        if self.sliding_window is None:
            return (NO_WINDOW,) * self.num_layers
        sliding = self.sliding_layers or (True,) * self.num_layers
        return tuple(self.sliding_window if s else NO_WINDOW for s in sliding)


NO_WINDOW = 2**30
