"""One decoder for all families of `rljax.models.families`.

Each weight is declared once, in a Flax NNX module, with shape, logical axes and initialiser; initialisation, sharding
and the import and export tables derive from that. The modules hold no arrays: `params` is a nested dict, the layers
stacked on a leading `layers` axis, and every function here is pure.

How a layer attends is an argument: the trainer passes attention over forests, the decoder attention over its cache.
Both therefore run the same layer.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rljax.models.attention import Attention, forest_attention
from rljax.models.attention_blocks import SAVED, score_divisor
from rljax.models.config import (
    DELTA_LAYERS,
    DENSE_LAYERS,
    DOWN,
    GAIN,
    HEAD,
    LAYERS,
    LAYOUTS,
    MATRICES,
    NORM,
    SCALE,
    SCALE_DTYPE,
    SHARED,
    UP,
    DecoderConfig,
    Experts,
    Layout,
    Lora,
    Rotation,
    is_wide,
)
from rljax.models.delta import forest_recall, parents
from rljax.models.dora import dora_gain, with_norms
from rljax.models.experts import (
    BIAS_AXES,
    EXPERT_AXES,
    SCALE_AXES,
    Choose,
    Gated,
    apply_experts,
    recorded_experts,
    route,
)
from rljax.models.functional import clamped_swiglu, geglu, linear, rms_norm, swiglu
from rljax.models.quantized import dequantize, matrices_of, quantized_product
from rljax.models.rope import RotaryTable, apply_rotary, rotary_tables
from rljax.parallel import constrain, split_axes
from rljax.types import Params

Attend = Callable[..., tuple[Array, Any]]
"""`attend(q [..., H, hd], k [..., KV, hd], v [..., KV, hd]) -> (out [..., H, hd], aux)`; rotary is applied already. A
layer with sinks gives them as `sinks=` [H]. A layer with a delta rule asks what tokens remember instead, see
`Recall`."""

Recall = Callable[..., tuple[Array, Any]]
"""`recall(mixed [..., C], kernel [C, 1, W], g [..., H], beta [..., H]) -> (out [..., H, e], aux)`, all but `mixed` in
float32: queries, keys and values of the delta rule (2412.06464) side by side, before their convolution."""

Remat = Literal["none", "products_saved", "attention_saved", "full"]
"""What of a layer the backward pass computes again. `full`: all of it, so that its input alone is kept.
`attention_saved`: all but the attention itself, whose result and log-sum-exp are kept too. `products_saved`: norms,
rotations and the like; all products with weights are kept besides. `none`: nothing."""

PRODUCT = "product"
"""Name by which a remat policy keeps what a layer's weights are multiplied to."""

Product = Callable[[Array, Array], Array]
"""`product(x [..., D], weight) -> [..., E]`; `weight` is [D, E] unless the caller's params hold it otherwise. Adapters
that stand side by side (`Lora.count`) come as they are, [N, D, E]."""


@dataclasses.dataclass(frozen=True)
class Forward:
    """How packed sequences go through a model. None of it says what comes out, but for rounding. ValueError for
    another `remat`."""

    remat: Remat = "none"
    """What of a layer the backward pass computes again."""
    attention: Attention = forest_attention
    """`forest_attention`, or something that computes the same. It alone minds the order of the positions, which is also
    that of the result."""
    recall: Recall | None = None
    """What tokens recall in layers with a delta rule, where the order of the positions is not that of packed forests;
    None is `recall_of`."""
    counts_load: bool = False
    """Whether the gradient of a `selection_bias` is how many tokens, but for padding, each expert computed for."""

    def __post_init__(self):
        if self.remat not in get_args(Remat):
            raise ValueError(f"remat={self.remat!r} must be one of {', '.join(map(repr, get_args(Remat)))}")


PLAIN = Forward()
"""With nothing computed twice, and attention as it is defined."""


def _weight(shape: tuple[int, ...], axes: tuple[str | None, ...], *, dtype: str, init: str = "normal") -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), axes=axes, init=init)


GATED = {"silu": swiglu, "gelu_tanh": geglu}
"""What the MLP makes of its gate and what that gates, by `DecoderConfig.activation`."""


class Layer(nnx.Module):
    """A transformer layer: grouped-query attention, then a gated MLP."""

    def __init__(self, config: DecoderConfig, *, has_gains: bool = False):
        c = config
        norm = functools.partial(_norm_weight, c)
        self.config = c

        # Matrices are [in, out]. The names of the axes say how a mesh splits them; what has None is whole everywhere.
        if c.pre_norms:
            self.attention_norm = norm(c.embed_dim)
            self.mlp_norm = norm(c.embed_dim)
        if c.post_norms:
            self.attention_post_norm = norm(c.embed_dim)
            self.mlp_post_norm = norm(c.embed_dim)
        self._declare_mixer()
        if c.experts is None:
            self._declare_mlp()
        else:
            self._declare_experts(c.experts)
        if c.lora is not None:
            for name in (name for name in c.lora.targets if name in MATRICES):
                self._adapt(name, c.lora, GAIN if has_gains else NORM)
                if hasattr(self, f"{SHARED}{name}"):
                    self._adapt(f"{SHARED}{name}", c.lora, GAIN if has_gains else NORM)
        if c.quantized is not None:
            for name in matrices_of(vars(self)):
                self._quantize(name, LAYOUTS[c.quantized])

    def _declare_mixer(self) -> None:
        """What mixes tokens: attention."""
        c = self.config
        weight = functools.partial(_weight, dtype=c.param_dtype)
        norm = functools.partial(_norm_weight, c)
        q_dim = c.num_heads * c.head_dim
        kv_dim = c.num_kv_heads * c.head_dim
        self.q = weight((c.embed_dim, 2 * q_dim if c.gated_attention else q_dim), ("embed", "heads"))
        self.k = weight((c.embed_dim, kv_dim), ("embed", "kv_heads"))
        self.v = weight((c.embed_dim, kv_dim), ("embed", "kv_heads"))
        self.o = weight((q_dim, c.embed_dim), ("heads", "embed"))

        # A weight that the family lacks is not declared, so no file needs to hold it.
        if c.attention_bias:
            self.q_bias = weight(self.q.get_value().shape[1:], ("heads",), init="zeros")
            self.k_bias = weight((kv_dim,), ("kv_heads",), init="zeros")
            self.v_bias = weight((kv_dim,), ("kv_heads",), init="zeros")
        if c.output_bias:
            self.o_bias = weight((c.embed_dim,), (None,), init="zeros")
        if c.sinks:
            self.sinks = weight((c.num_heads,), ("heads",))
        if c.qk_norm:
            self.q_norm = norm(q_dim, "heads") if c.qk_norm_whole else norm(c.head_dim)
            self.k_norm = norm(kv_dim, "kv_heads") if c.qk_norm_whole else norm(c.head_dim)

    def _declare_mlp(self) -> None:
        c = self.config
        weight = functools.partial(_weight, dtype=c.param_dtype)
        self.gate = weight((c.embed_dim, c.mlp_dim), ("embed", "mlp"))
        self.up = weight((c.embed_dim, c.mlp_dim), ("embed", "mlp"))
        self.down = weight((c.mlp_dim, c.embed_dim), ("mlp", "embed"))
        if c.mlp_bias:
            self.gate_bias = weight((c.mlp_dim,), ("mlp",), init="zeros")
            self.up_bias = weight((c.mlp_dim,), ("mlp",), init="zeros")
            self.down_bias = weight((c.embed_dim,), (None,), init="zeros")

    def _declare_experts(self, experts: Experts) -> None:
        """The matrices of the MLP, one of each for every expert, and the router."""
        width = self.config.embed_dim
        weight = functools.partial(_weight, dtype=self.config.param_dtype)
        self.router = weight((width, experts.count), ("embed", None))
        self.gate = weight((experts.count, width, experts.mlp_dim), EXPERT_AXES["gate"])
        self.up = weight((experts.count, width, experts.mlp_dim), EXPERT_AXES["up"])
        self.down = weight((experts.count, experts.mlp_dim, width), EXPERT_AXES["down"])
        if experts.selection_bias:
            # In float32 whatever the matrices are kept in, as the scores are that it is added to.
            self.selection_bias = _weight((experts.count,), (None,), dtype="float32", init="zeros")
        if experts.shared:
            inner = experts.shared * experts.mlp_dim
            self.shared_gate = weight((width, inner), ("embed", "mlp"))
            self.shared_up = weight((width, inner), ("embed", "mlp"))
            self.shared_down = weight((inner, width), ("mlp", "embed"))
        if experts.shared_score:
            self.shared_score = weight((width,), (None,))
        if experts.biases:
            self.router_bias = weight((experts.count,), (None,), init="zeros")
            self.gate_bias = weight((experts.count, experts.mlp_dim), BIAS_AXES["gate_bias"], init="zeros")
            self.up_bias = weight((experts.count, experts.mlp_dim), BIAS_AXES["up_bias"], init="zeros")
            self.down_bias = weight((experts.count, width), BIAS_AXES["down_bias"], init="zeros")

    def _adapt(self, name: str, lora: Lora, end: str) -> None:
        """Declares the adapter of the matrix `name`, in float32 whatever the matrix is kept in: it is what is
        trained. `end` is what DoRA's third weight is called by."""
        matrix = getattr(self, name)
        *lead, rows, columns = matrix.get_value().shape
        *of_lead, of_rows, of_columns = matrix.get_metadata("axes")
        many = (lora.count,) if lora.count else (*lead,)
        apart = (None,) if lora.count else (*of_lead,)
        weight = functools.partial(_weight, dtype="float32")
        setattr(self, f"{name}{DOWN}", weight((*many, rows, lora.rank), (*apart, of_rows, None), init="fan_in"))
        setattr(self, f"{name}{UP}", weight((*many, lora.rank, columns), (*apart, None, of_columns), init="zeros"))
        if lora.dora:
            setattr(self, f"{name}{end}", weight((columns,), (of_columns,), init="ones"))

    def _quantize(self, name: str, layout: Layout) -> None:
        """Declares codes and scales in the place of the matrix `name`."""
        matrix = getattr(self, name)
        *lead, rows, columns = matrix.get_value().shape
        axes = matrix.get_metadata("axes")
        setattr(self, name, _weight((*lead, rows // layout.packed, columns), axes, dtype=layout.dtype, init="zeros"))
        scales = _weight((*lead, rows // layout.block, columns), axes, dtype=SCALE_DTYPE, init="zeros")
        setattr(self, f"{name}{SCALE}", scales)

    def __call__(
        self,
        x: Array,
        rotary: RotaryTable,
        attend: Attend | Recall,
        product: Product = linear,
        choose: Choose | None = None,
        counted: Array | None = None,
    ) -> tuple[Array, Any]:
        c = self.config
        project = functools.partial(self._project, product)
        out, aux = self._mix(project, self._norm(x, "attention_norm"), rotary, attend)
        x = self._add(x, project(out, "o"), "attention_post_norm")

        h = self._norm(x, "mlp_norm")
        h = self._mlp(project, h) if c.experts is None else self._experts(project, h, choose, counted)
        return self._add(x, h, "mlp_post_norm"), aux

    def _mix(
        self, project: Callable[[Array, str], Array], h: Array, rotary: RotaryTable, attend: Attend | Recall
    ) -> tuple[Array, Any]:
        """What `o` is multiplied to, and the `aux` of `attend`."""
        c = self.config
        q, k, v = (project(h, name) for name in ("q", "k", "v"))
        gate = None
        if c.gated_attention:
            q, gate = jnp.split(q.reshape(*q.shape[:-1], c.num_heads, 2 * c.head_dim), 2, axis=-1)
            q, gate = (x.reshape(*h.shape[:-1], c.num_heads * c.head_dim) for x in (q, gate))
        if c.qk_norm_whole:
            q = self._norm(q, "q_norm")
            k = self._norm(k, "k_norm")
        q = q.reshape(*q.shape[:-1], c.num_heads, c.head_dim)
        k = k.reshape(*k.shape[:-1], c.num_kv_heads, c.head_dim)
        v = v.reshape(*v.shape[:-1], c.num_kv_heads, c.head_dim)
        if not c.qk_norm_whole:
            q = self._norm(q, "q_norm")
            k = self._norm(k, "k_norm")

        # Keys are rotated before they are kept: a cache never rotates again. Attention divides by the root of the
        # width whatever the family; what it wants instead is multiplied in where queries are wide.
        scale = 1.0 if c.score_scale is None else c.score_scale * score_divisor(c.head_dim)
        # By name, so that what knows of no sinks refuses them.
        sinks = {"sinks": self.sinks[...]} if c.sinks else {}
        out, aux = attend(apply_rotary(q, *rotary, scale), apply_rotary(k, *rotary), v, **sinks)
        out = out.reshape(*h.shape[:-1], c.num_heads * c.head_dim)
        return out if gate is None else out * jax.nn.sigmoid(gate), aux

    def _add(self, x: Array, out: Array, norm: str) -> Array:
        """The residual stream with what attention or MLP adds."""
        out = self._norm(out, norm)
        if self.config.residual_scale != 1.0:
            out = (out.astype(jnp.float32) * self.config.residual_scale).astype(x.dtype)
        # Without it the compiler may split the residual otherwise from one layer to the next.
        return constrain(x + out, _axes(x))

    def _mlp(self, project: Callable[[Array, str], Array], x: Array, prefix: str = "") -> Array:
        gate = project(x, f"{prefix}gate")
        up = project(x, f"{prefix}up")
        return project(GATED[self.config.activation](gate, up), f"{prefix}down")

    def _experts(
        self,
        project: Callable[[Array, str], Array],
        x: Array,
        choose: Choose | None,
        counted: Array | None,
    ) -> Array:
        experts = self.config.experts
        assert experts is not None
        # In float32 whatever the rest is computed in: rounding would choose other experts.
        with jax.default_matmul_precision("highest"):
            scores = project(x.astype(jnp.float32), "router")
        bias = self.selection_bias[...] if experts.selection_bias else None
        routing = route(experts, scores, choose, bias, counted)
        kind = self.config.quantized
        names = (*EXPERT_AXES, *(BIAS_AXES if experts.biases else ()), *(SCALE_AXES if kind else ()))
        weights = {name: getattr(self, name)[...] for name in names}
        lora = self.config.lora
        adapted = [] if lora is None else [name for name in lora.targets if name in EXPERT_AXES]
        adapters = {f"{name}{end}": getattr(self, f"{name}{end}")[...] for name in adapted for end in (DOWN, UP)}
        scale = 1.0 if lora is None else lora.scale
        gated: Gated = GATED[self.config.activation]
        if experts.limit is not None:
            gated = functools.partial(clamped_swiglu, limit=experts.limit, slope=experts.slope)
        out = apply_experts(weights | adapters, x, routing, scale=scale, gated=gated, quantized=kind)
        out = checkpoint_name(out, PRODUCT)
        return out + self._shared(project, x, experts) if experts.shared else out

    def _shared(self, project: Callable[[Array, str], Array], x: Array, experts: Experts) -> Array:
        out = self._mlp(project, x, SHARED)
        if not experts.shared_score:
            return out
        score = jnp.einsum("...d,d->...", x, self.shared_score[...], preferred_element_type=jnp.float32)
        return (out * jax.nn.sigmoid(score)[..., None]).astype(x.dtype)

    def _norm(self, x: Array, name: str) -> Array:
        """`x` normed by the weight `name`, or as it is where the family declares no such norm."""
        weight = getattr(self, name, None)
        return x if weight is None else _normed(self.config, x, weight[...])

    def _project(self, product: Product, x: Array, name: str) -> Array:
        weight = getattr(self, name)[...]
        kind = self.config.quantized
        scales = getattr(self, f"{name}{SCALE}", None)
        # A router has none in any model.
        if kind is None or scales is None:
            out = product(x, weight)
        else:
            out = quantized_product(kind, x, weight, scales[...])
        out = checkpoint_name(out, PRODUCT)

        lora = self.config.lora
        if lora is not None and name.removeprefix(SHARED) in lora.targets:
            narrow = checkpoint_name(product(x, getattr(self, f"{name}{DOWN}")[...]), PRODUCT)
            out = out + lora.scale * product(narrow, getattr(self, f"{name}{UP}")[...])
            if lora.dora:
                out = (out * self._gain(name, lora)).astype(out.dtype)
        bias = getattr(self, f"{name}_bias", None)
        return out if bias is None else out + bias[...].astype(x.dtype)

    def _gain(self, name: str, lora: Lora) -> Array:
        gain = getattr(self, f"{name}{GAIN}", None)
        if gain is not None:
            return gain[...]
        matrix = getattr(self, name)[...]
        if self.config.quantized is not None:
            matrix = dequantize(self.config.quantized, matrix, getattr(self, f"{name}{SCALE}")[...], jnp.float32)
        norm, down, up = (getattr(self, f"{name}{end}")[...] for end in (NORM, DOWN, UP))
        return checkpoint_name(dora_gain(norm, matrix, down, up, lora.scale), PRODUCT)


class DeltaLayer(Layer):
    """A layer with a gated delta rule in place of attention (`rljax.models.delta`)."""

    def _declare_mixer(self) -> None:
        c = self.config
        assert c.delta is not None
        delta = c.delta
        weight = functools.partial(_weight, dtype=c.param_dtype)
        # Whole on every device along `tensor`: the convolution and the norms of heads go over all of them.
        for name, width in zip(("q", "k", "v"), delta.widths, strict=True):
            setattr(self, name, weight((c.embed_dim, width), ("embed", None)))
        self.read_gate = weight((c.embed_dim, delta.widths[-1]), ("embed", None))
        self.correct = weight((c.embed_dim, delta.value_heads), ("embed", None))
        self.fade = weight((c.embed_dim, delta.value_heads), ("embed", None))
        self.fade_rate = weight((delta.value_heads,), (None,), init="log_uniform")
        self.fade_shift = weight((delta.value_heads,), (None,), init="ones")
        self.kernel = weight((sum(delta.widths), 1, delta.kernel), (None, None, None), init="taps")
        self.read_norm = weight((delta.value_dim,), (None,), init="ones")
        self.o = weight((delta.widths[-1], c.embed_dim), (None, "embed"))

    def _mix(
        self, project: Callable[[Array, str], Array], h: Array, rotary: RotaryTable, attend: Attend | Recall
    ) -> tuple[Array, Any]:
        mixed = jnp.concatenate([project(h, name) for name in ("q", "k", "v")], axis=-1)
        gate, correct, fade = (project(h, name).astype(jnp.float32) for name in ("read_gate", "correct", "fade"))
        rate, shift, kernel = (x[...].astype(jnp.float32) for x in (self.fade_rate, self.fade_shift, self.kernel))
        g = -jnp.exp(rate) * jax.nn.softplus(fade + shift)
        out, aux = attend(mixed, kernel, g, jax.nn.sigmoid(correct))

        # These norms are stored whole where the others are not.
        out = rms_norm(out, self.read_norm[...], self.config.norm_eps).reshape(gate.shape)
        return (out * jax.nn.silu(gate)).astype(h.dtype), aux


def _norm_weight(config: DecoderConfig, width: int, axis: str | None = None) -> nnx.Param:
    init = "zeros" if config.norm_offset else "ones"
    return _weight((width,), (axis,), dtype=config.param_dtype, init=init)


def _normed(config: DecoderConfig, x: Array, weight: Array) -> Array:
    # In float32, where one more than a small weight is not rounded to one.
    scale = weight.astype(jnp.float32) + 1.0 if config.norm_offset else weight
    return rms_norm(x, scale, config.norm_eps)


def _axes(x: Array) -> tuple[str | None, ...]:
    """Logical axes of a layer's activations [R, S, D], or of those of a decoder's rows."""
    return ("batch", "positions", None) if x.ndim == 3 else ("batch", *(None,) * (x.ndim - 1))


class Decoder(nnx.Module):
    """Everything that is not a layer; `init_params` stacks those (`DecoderConfig.stacks`) beside it."""

    def __init__(self, config: DecoderConfig):
        weight = functools.partial(_weight, dtype=config.param_dtype)
        self.embedding = weight((config.vocab_size, config.embed_dim), ("vocab", "embed"))
        self.final_norm = _norm_weight(config, config.embed_dim)
        if config.value_head:
            self.value_head = weight((config.embed_dim,), (None,), init="zeros")
            if config.value_bias:
                self.value_bias = weight((), (), init="zeros")
        elif not config.tied_embeddings:
            self.head = weight((config.vocab_size, config.embed_dim), ("vocab", "embed"))
        if config.lora is not None and config.adapts_head:
            # As those of layers, [in, rank] and [rank, out], though the head itself is [out, in].
            adapter = functools.partial(_weight, dtype="float32")
            rank = config.lora.rank
            setattr(self, f"{HEAD}{DOWN}", adapter((config.embed_dim, rank), ("embed", None), init="fan_in"))
            setattr(self, f"{HEAD}{UP}", adapter((rank, config.vocab_size), (None, "vocab"), init="zeros"))


def _layer_class(stack: str) -> type[Layer]:
    return DeltaLayer if stack == DELTA_LAYERS else Layer


@functools.lru_cache(maxsize=64)
def _declarations(config: DecoderConfig) -> dict[str, Any]:
    """Nested dict like `params`, of the `nnx.Param` declarations; layers still unstacked."""
    own: dict[str, Any] = {str(path[-1]): param for path, param in nnx.to_flat_state(nnx.state(Decoder(config)))}
    for stack in config.stacks:
        state = nnx.to_flat_state(nnx.state(_layer_class(stack)(config.of_stack(stack))))
        own[stack] = {str(path[-1]): param for path, param in state}
    return own


def _map_declarations(config: DecoderConfig, fn: Callable[[str, nnx.Param, tuple[int, ...]], Any]) -> dict[str, Any]:
    """`fn(path, declaration, shape)` of each weight; the shape begins with the number of layers, if it is of any."""
    mapped: dict[str, Any] = {}
    for name, declared in _declarations(config).items():
        if name not in config.stacks:
            mapped[name] = fn(name, declared, declared.get_value().shape)
            continue
        count = len(config.stacks[name])
        mapped[name] = {
            own: fn(f"{name}/{own}", param, (count, *param.get_value().shape)) for own, param in declared.items()
        }
    return mapped


def abstract_params(config: DecoderConfig) -> dict[str, Any]:
    """The params' tree with `jax.ShapeDtypeStruct` leaves."""

    return _map_declarations(config, lambda _, param, shape: jax.ShapeDtypeStruct(shape, param.get_value().dtype))


def count_weights(config: DecoderConfig) -> int:
    """How many weights a model has, adapters among them; quantised matrices count as those that they stand for."""
    shapes = abstract_params(dataclasses.replace(config, quantized=None))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def logical_axes(config: DecoderConfig) -> dict[str, Any]:
    """The params' tree with a tuple of logical axis names (or None) on each leaf."""

    def leaf(_, param, shape):
        axes = tuple(param.get_metadata("axes"))
        return axes if len(axes) == len(shape) else ("layers", *axes)

    return _map_declarations(config, leaf)


def init_params(config: DecoderConfig, key: Array) -> dict[str, Any]:
    """Random weights: normal with standard deviation 0.02, norms one, biases zero. Of adapters, A is uniform up to one
    over the root of its rows, and B zero, so that they add nothing yet; DoRA's lengths are those of the columns. Delta
    rules begin as where they are trained: fades from a hundredth to 16, taps up to one over the root of their number.
    `key` is consumed.

    A weight's values depend on `key` and its own name alone, not on the order of declarations or on sharding.
    """

    def leaf(name, param, shape):
        value = param.get_value()
        kind = param.get_metadata("init")
        if kind in ("ones", "zeros"):
            return jnp.full(shape, 1.0 if kind == "ones" else 0.0, value.dtype)
        # Python's own hash differs from process to process.
        digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
        own_key = jax.random.fold_in(key, int.from_bytes(digest, "big"))
        if kind == "log_uniform":
            return jnp.log(jax.random.uniform(own_key, shape, minval=0.01, maxval=16.0)).astype(value.dtype)
        if kind in ("fan_in", "taps"):
            bound = value.shape[-2 if kind == "fan_in" else -1] ** -0.5
            return jax.random.uniform(own_key, shape, value.dtype, -bound, bound)
        return (0.02 * jax.random.normal(own_key, shape)).astype(value.dtype)

    params = _map_declarations(config, leaf)
    return params | {stack: with_norms(config.lora, params[stack], params[stack]) for stack in config.stacks}


def cast_params(params: Params, dtype: str) -> dict[str, Any]:
    """`params` in another dtype, but for weights that are float32 always (`is_wide`), and codes and scales. What has
    its dtype is not copied."""

    def cast(path, x):
        name = path[-1].key
        if name.endswith(SCALE) or jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(x)
        return jnp.asarray(x, "float32" if is_wide(name) else dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def unstack_layers(config: DecoderConfig, params: Params) -> dict[str, Any]:
    """Params whose `layers` are a tuple of dicts, one per layer of all stacks, as an unrolled forward pass wants
    them."""
    stacks = config.stacks
    places = ((stack, stacks[stack].index(layer)) for layer, stack in enumerate(config.kinds))
    layers = tuple({name: x[i] for name, x in params[stack].items()} for stack, i in places)
    return {name: x for name, x in params.items() if name not in stacks} | {LAYERS: layers}


def embed(config: DecoderConfig, params: Params, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Token embeddings in the compute dtype, of weights whose rows are whole (`DECODE_RULES`)."""
    table = constrain(params["embedding"], ("vocab", None))
    return _scaled(config, jnp.take(table, tokens, axis=0).astype(config.dtype))


def _scaled(config: DecoderConfig, x: Array) -> Array:
    # The factor is rounded to the dtype of the embeddings, as it is where these models are trained.
    return x if config.embed_scale == 1.0 else x * jnp.asarray(config.embed_scale, x.dtype)


def embed_split(config: DecoderConfig, params: Params, tokens: Int[Array, "R S"]) -> Float[Array, "R S D"]:
    """`embed` of weights that are split as in training (`RULES`), row for row on the devices that have its tokens.

    Neither the table nor its gradient is sent. A device looks its columns up for the tokens of all devices that have
    the other columns, and they exchange what they found; the gradient comes back the same way.
    """
    rows = split_axes("batch", tokens.shape[0])
    positions = split_axes("positions", tokens.shape[1])
    vocab = split_axes("vocab", config.vocab_size)
    width = split_axes("embed", config.embed_dim)
    own = {*rows, *positions}
    if not own or not own.issuperset(width):
        return embed(config, params, tokens)

    def lookup(table: Array, tokens: Array) -> Array:
        if width:
            tokens = jax.lax.all_gather(tokens, width, tiled=True)
        if vocab:
            # Each token is in one part of the vocabulary, so the sum below adds zeros to its embedding.
            tokens = tokens - jax.lax.axis_index(vocab) * table.shape[0]
            is_own = (tokens >= 0) & (tokens < table.shape[0])
            x = jnp.where(is_own[..., None], jnp.take(table, tokens, axis=0, mode="clip"), 0)
        else:
            x = jnp.take(table, tokens, axis=0)

        x = _scaled(config, x.astype(config.dtype))
        if width:
            x = jax.lax.all_to_all(x, width, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(x, vocab)

    split = PartitionSpec(rows, positions)
    in_specs = (PartitionSpec(vocab, width), split)
    return jax.shard_map(lookup, in_specs=in_specs, out_specs=split)(params["embedding"], tokens)


def has_delta(layer_params: Params) -> bool:
    """Whether these are the weights of a layer with a delta rule, which `apply_layer` hands a `Recall`."""
    return "kernel" in layer_params


def apply_layer(
    config: DecoderConfig,
    layer_params: Params,
    x: Float[Array, "*B D"],
    rotary: RotaryTable,
    attend: Attend | Recall,
    product: Product = linear,
    choose: Choose | None = None,
    counted: Bool[Array, "*B"] | None = None,
) -> tuple[Float[Array, "*B D"], Any]:
    """One layer on activations `x`; returns what it makes of them and the `aux` of `attend`, a `Recall` for a layer of
    `DELTA_LAYERS`. `rotary` is the table of its rotation (`rljax.models.rope.rotary_tables`); `choose` says which
    experts compute, None the best, and is not asked where there are none, as in the first layers of some mixtures.
    `counted` marks the tokens whose experts are counted (`rljax.models.experts.route`)."""
    stack = LAYERS if config.experts is None or "router" in layer_params else DENSE_LAYERS
    stack = DELTA_LAYERS if has_delta(layer_params) else stack
    has_gains = any(name.endswith(GAIN) for name in layer_params)
    layer = nnx.merge(_layer_graph(config.of_stack(stack), stack, has_gains), dict(layer_params))
    return layer(x, rotary, attend, product, choose, counted)


@functools.lru_cache(maxsize=64)
def _layer_graph(config: DecoderConfig, stack: str, has_gains: bool):
    return nnx.split(_layer_class(stack)(config, has_gains=has_gains))[0]


def final_norm(config: DecoderConfig, params: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return _normed(config, x, params["final_norm"])


def hidden_states(
    config: DecoderConfig,
    params: Params,
    tokens: Int[Array, "R S"],
    positions: Int[Array, "R S"],
    subtree_end: Int[Array, "R S"],
    *,
    forward: Forward = PLAIN,
    experts: Int[Array, "R S M K"] | None = None,
) -> Float[Array, "R S D"]:
    """Final-normed hidden states of packed forests (see `rljax.types.Packed`).

    Each stack of layers is one `lax.scan`, whose body compiles once; stacks that take turns are scanned together.
    `experts` are those to compute with in each layer that has any, -1 for the best (`rljax.types.Packed`). ValueError
    for several adapters side by side.
    """
    if config.lora is not None and config.lora.count:
        raise ValueError(
            f"packed sequences have one adapter, and this model has {config.lora.count} side by side; take one of them"
        )

    counted = subtree_end > 0 if forward.counts_load else None
    # Made once for all layers: within a scan a table is a constant.
    tables, rotations = _stack_tables(config, rotary_tables(config, positions))
    recall = forward.recall or recall_of(config, subtree_end)

    def body(x, layer):
        layer_params, window, rotation, recorded = layer
        # A layer by itself has its own table picked out of all where layers differ.
        rotary = tables if rotation is None else (tables[0][rotation], tables[1][rotation])

        def attend(q, k, v, sinks=None):
            return forward.attention(q, k, v, positions, subtree_end, window, sinks=sinks), None

        mix = recall if recall is not None and has_delta(layer_params) else attend
        choose = None if recorded is None or config.experts is None else recorded_experts(config.experts, recorded)
        return apply_layer(config, layer_params, x, rotary, mix, choose=choose, counted=counted)

    if forward.remat != "none":
        saved = {"products_saved": (*SAVED, PRODUCT), "attention_saved": SAVED, "full": ()}[forward.remat]
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        # A scan keeps its body apart by itself; barriers against common subexpressions would only cost there.
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)

    x = embed_split(config, params, tokens)
    x = constrain(x, _axes(x))

    by_layer = None if experts is None else jnp.moveaxis(experts, 2, 0)
    done = 0
    for size, count in config.blocks:
        here = slice(done, done + size * count)
        windows = jnp.asarray(config.windows[here])
        own = None if rotations is None else jnp.asarray(rotations[here])
        stack = config.kinds[done]
        # A record is of the layers that have experts.
        recorded = None if stack == DENSE_LAYERS else by_layer
        if size > 1:
            x = _scan_blocks(config, body, x, params, (windows, own, recorded), size)
        else:
            x, _ = jax.lax.scan(body, x, (params[stack], windows, own, recorded))
        done = here.stop
    return final_norm(config, params, x)


def _scan_blocks(config: DecoderConfig, body, x: Array, params: Params, by_layer: tuple, size: int) -> Array:
    """`x` behind blocks of `size` layers of several stacks: one `lax.scan` over the blocks. `by_layer` is what `body`
    takes beside a layer's weights, for all layers."""
    kinds = config.kinds[:size]

    def in_blocks(x):
        return x.reshape(config.num_layers // size, -1, *x.shape[1:])

    def block(x, arrays):
        stacks, of_layers = arrays
        taken = dict.fromkeys(stacks, 0)
        for place, stack in enumerate(kinds):
            layer = {name: weight[taken[stack]] for name, weight in stacks[stack].items()}
            taken[stack] += 1
            x, _ = body(x, (layer, *(None if own is None else own[place] for own in of_layers)))
        return x, None

    stacks = {stack: params[stack] for stack in config.stacks}
    return jax.lax.scan(block, x, jax.tree.map(in_blocks, (stacks, by_layer)))[0]


def recall_of(config: DecoderConfig, subtree_end: Int[Array, "R S"]) -> Recall | None:
    """What tokens of packed forests recall; None where all layers attend."""
    delta = config.delta
    if delta is None:
        return None
    parent = parents(subtree_end)

    def recall(mixed, kernel, g, beta):
        return forest_recall(delta, mixed, kernel, g, beta, subtree_end, parent), None

    return recall


def _stack_tables(config: DecoderConfig, tables: dict[Rotation, RotaryTable]) -> tuple[RotaryTable, tuple | None]:
    """All tables in one, and the number of each layer's; where all layers rotate alike their table, and None."""
    if len(tables) == 1:
        return next(iter(tables.values())), None
    cos, sin = (jnp.stack(x) for x in zip(*tables.values(), strict=True))
    names = list(tables)
    return (cos, sin), tuple(names.index(rotation) for rotation in config.rotations)
