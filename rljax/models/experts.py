"""Experts in place of an MLP: a router chooses a few of them for each token, and these compute alone.

Tokens are sorted by expert, so that every matrix meets all its tokens in one grouped product (2211.15841). None is
dropped, however many choose the same expert. On a mesh each device computes what its experts add to the tokens of all
devices along `expert`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rljax.models.config import DOWN, SCALE, UP, Experts, Format
from rljax.models.functional import swiglu
from rljax.models.quantized import grouped_quantized_product
from rljax.parallel import split_axes

EXPERT_AXES = {
    "gate": ("experts", "expert_embed", "mlp"),
    "up": ("experts", "expert_embed", "mlp"),
    "down": ("experts", "mlp", "expert_embed"),
}
"""Logical axes of the matrices of all experts of a layer."""

BIAS_AXES = {"gate_bias": ("experts", "mlp"), "up_bias": ("experts", "mlp"), "down_bias": ("experts", None)}
"""Those of their biases, where a family has them."""

SCALE_AXES = {f"{name}{SCALE}": axes for name, axes in EXPERT_AXES.items()}
"""Those of the scales of matrices that are kept in few bits: as of the matrices, so that a device has the scales of its
codes."""

Gated = Callable[[Array, Array], Array]
"""`gated(gate, up)`: what an expert makes of its gate and what that gates."""


class Routing(NamedTuple):
    """Which experts compute for each token."""

    experts: Int[Array, "*B K"]
    """Their numbers, the best first."""
    weights: Float[Array, "*B K"]
    """Factors (float32) of what they compute."""


Choose = Callable[[Float[Array, "*B E"]], Int[Array, "*B K"]]
"""`choose(scores) -> experts`: which of all experts compute for each token."""


def best_experts(config: Experts) -> Choose:
    """Takes those with the highest scores."""
    return lambda scores: jax.lax.top_k(scores, config.per_token)[1].astype(jnp.int32)


def recorded_experts(config: Experts, recorded: Int[Array, "*B K"]) -> Choose:
    """Takes those of a record, whatever scores high now (rollout routing replay, 2510.11370), and the best where it has
    -1. Their weights are the router's of now, and it gets their gradient."""

    def choose(scores: Array) -> Array:
        given = recorded.astype(jnp.int32)
        return jnp.where(given >= 0, given, best_experts(config)(scores))

    return choose


def route(
    config: Experts,
    logits: Float[Array, "*B E"],
    choose: Choose | None = None,
    bias: Float[Array, " E"] | None = None,
    counted: Bool[Array, "*B"] | None = None,
) -> Routing:
    """The experts of each token, of the router's `logits`. `choose` None takes the best. `bias` is that of
    `Experts.selection_bias`: it is added to what is chosen by, and has no gradient.

    With `counted` it brings home the loads in a gradient's place: of each expert how many of these tokens it computed
    for, whatever is differentiated. So loads are added up over microbatches and devices as gradients are.
    """
    logits = logits.astype(jnp.float32)
    scores = jax.nn.sigmoid(logits) if config.selection_bias else jax.nn.softmax(logits, axis=-1)
    wanted = scores if bias is None else scores + bias.astype(jnp.float32)
    choose = best_experts(config) if choose is None else choose
    experts = choose(_of_best_groups(config, jax.lax.stop_gradient(wanted)))

    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if counted is not None and bias is not None:
        weights = _with_loads(weights, bias, experts, counted)
    if config.normalized:
        # Sigmoids may all be 0, and then so are the weights.
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Routing(experts, weights if config.weight_scale == 1.0 else weights * config.weight_scale)


@jax.custom_vjp
def _with_loads(weights: Array, bias: Array, experts: Array, counted: Array) -> Array:
    """`weights` as they are; the gradient of `bias` [E] is the number of `counted` tokens that pass each expert."""
    return weights


def _with_loads_backward(residuals, g):
    bias, experts, counted = residuals
    passes = (experts[..., None] == jnp.arange(bias.shape[0])) & counted[..., None, None]
    loads = jnp.sum(passes, axis=tuple(range(passes.ndim - 1)), dtype=jnp.float32)
    return g, loads.astype(bias.dtype), None, None


_with_loads.defvjp(lambda weights, *others: (weights, others), _with_loads_backward)


def _of_best_groups(config: Experts, scores: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """`scores`, with minus infinity for experts of groups that are not kept."""
    if config.kept_groups == config.groups:
        return scores
    grouped = scores.reshape(*scores.shape[:-1], config.groups, -1)
    of_groups = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    kept = jax.lax.top_k(of_groups, config.kept_groups)[1]
    is_kept = jnp.any(kept[..., None] == jnp.arange(config.groups), axis=-2)
    return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _axes_of(name: str) -> tuple[str | None, ...]:
    """Logical axes of a matrix, of its biases or scales, or of a part of its adapter."""
    if name.endswith(DOWN):
        experts, rows, _ = EXPERT_AXES[name.removesuffix(DOWN)]
        return experts, rows, None
    if name.endswith(UP):
        experts, _, columns = EXPERT_AXES[name.removesuffix(UP)]
        return experts, None, columns
    return (EXPERT_AXES | BIAS_AXES | SCALE_AXES)[name]


def apply_experts(
    weights: Mapping[str, Array],
    x: Float[Array, "*B D"],
    routing: Routing,
    *,
    scale: float = 1.0,
    gated: Gated = swiglu,
    quantized: Format | None = None,
) -> Float[Array, "*B D"]:
    """What the experts of each token add up to, weighted. `weights` are those of `EXPERT_AXES` (gate and up [E, D, F],
    down [E, F, D]), in any dtype, biases (`BIAS_AXES`) where there are any, and adapters beside them (`gate_lora_a`
    [E, D, r], `gate_lora_b` [E, r, F]), of which `scale` is the factor. With `quantized` the matrices are codes, and
    their scales are there too (`SCALE_AXES`)."""
    count = weights["down"].shape[0]
    rows = split_axes("batch", x.shape[0])
    positions = split_axes("positions", x.shape[1]) if x.ndim == 3 else ()
    experts = split_axes("experts", count)
    # Of codes, a device has whole blocks.
    inner = split_axes("mlp", weights[f"down{SCALE}" if quantized else "down"].shape[1])
    grouped = functools.partial(_grouped, scale=scale, gated=gated, quantized=quantized)
    own = functools.partial(_own_experts, rows=rows, experts=experts, inner=inner, grouped=grouped)
    if not (rows or positions or experts or inner):
        return own(weights, x, routing)

    # Of weights that are split along other axes too, a device gathers the part that its experts have.
    split: dict[str | None, tuple[str, ...] | None] = {"experts": experts or None, "mlp": inner or None}
    of_weights = {name: PartitionSpec(*(split.get(axis) for axis in _axes_of(name))) for name in weights}
    of_tokens = PartitionSpec(rows or None, *((positions or None,) if x.ndim == 3 else ()))
    run = jax.shard_map(own, in_specs=(of_weights, of_tokens, of_tokens), out_specs=of_tokens)
    return run(dict(weights), x, routing)


def _own_experts(
    weights: Mapping[str, Array],
    x: Array,
    routing: Routing,
    *,
    rows: tuple[str, ...],
    experts: tuple[str, ...],
    inner: tuple[str, ...],
    grouped: Callable[..., Array],
) -> Array:
    """A device's part: its tokens, or those of all devices along `experts`, through its own experts (`grouped`)."""
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    chosen = routing.experts.reshape(-1, routing.experts.shape[-1])
    factors = routing.weights.reshape(chosen.shape)
    count = weights["down"].shape[0]
    shares_tokens = bool(experts) and set(experts) <= set(rows)
    if shares_tokens:
        x, chosen, factors = (jax.lax.all_gather(part, experts, tiled=True) for part in (x, chosen, factors))
    if experts:
        # Experts of other devices come last in the order, in no group.
        chosen = chosen - jax.lax.axis_index(experts) * count
        chosen = jnp.where((chosen >= 0) & (chosen < count), chosen, count)

    if inner and "down_bias" in weights:
        # Devices that share an expert's width add up their parts, of which one has the bias.
        is_first = jax.lax.axis_index(inner) == 0
        weights = {**weights, "down_bias": jnp.where(is_first, weights["down_bias"], 0)}
    out = grouped(weights, x, chosen, factors, is_part=bool(experts))
    if inner:
        out = jax.lax.psum(out, inner)
    if shares_tokens:
        out = jax.lax.psum_scatter(out, experts, tiled=True)
    elif experts:
        out = jax.lax.psum(out, experts)
    return out.reshape(shape)


def _grouped(
    weights: Mapping[str, Array],
    x: Float[Array, "N D"],
    chosen: Int[Array, "N K"],
    factors: Array,
    *,
    is_part: bool,
    scale: float,
    gated: Gated,
    quantized: Format | None,
) -> Float[Array, "N D"]:
    """`is_part`: some of `chosen` are the number of experts, whose tokens get nothing here."""
    count = weights["down"].shape[0]
    per_token = chosen.shape[1]
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    back = jnp.argsort(order)
    sizes = jnp.bincount(flat, length=count + 1)[:count].astype(jnp.int32)

    def grouped(x: Array, name: str) -> Array:
        def product(x: Array, name: str) -> Array:
            return jax.lax.ragged_dot(x, weights[name].astype(x.dtype), group_sizes=sizes)

        if quantized is None:
            out = product(x, name)
        else:
            out = grouped_quantized_product(quantized, x, weights[name], weights[f"{name}{SCALE}"], sizes)
        if f"{name}{DOWN}" in weights:
            out = out + scale * product(product(x, f"{name}{DOWN}"), f"{name}{UP}")
        if f"{name}_bias" in weights:
            # A product with ones: its gradient is a sum by expert, in place of a scatter.
            bias = weights[f"{name}_bias"].astype(x.dtype)[:, None]
            out = out + jax.lax.ragged_dot(jnp.ones((x.shape[0], 1), x.dtype), bias, group_sizes=sizes)
        return out

    h = _permute(jnp.repeat(x, per_token, axis=0), order, back)
    if is_part:
        # Whatever a grouped product leaves in rows of no group, neither it nor its gradient goes anywhere.
        is_own = (flat < count)[order][:, None]
        h = jnp.where(is_own, h, 0)
    out = grouped(gated(grouped(h, "gate"), grouped(h, "up")), "down")
    if is_part:
        out = jnp.where(is_own, out, 0)
    out = _permute(out, back, order).reshape(*chosen.shape, -1)
    return jnp.einsum("nk,nkd->nd", factors, out.astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def _permute(x: Array, order: Array, back: Array) -> Array:
    """`x[order]`, whose gradient is read with `back`, the inverse of `order`, instead of being scattered."""
    return jnp.take(x, order, axis=0, unique_indices=True)


def _permute_forward(x, order, back):
    return _permute(x, order, back), (order, back)


def _permute_backward(residuals, g):
    order, back = residuals
    return _permute(g, back, order), None, None


_permute.defvjp(_permute_forward, _permute_backward)
