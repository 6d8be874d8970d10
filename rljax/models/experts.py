"""Experts in place of an MLP: a router chooses a few of them for each token, and these compute alone.

Tokens are sorted by expert, so that every matrix meets all its tokens in one grouped product (2211.15841). None is
dropped, however many choose the same expert. On a mesh each device computes what its experts add to the tokens of all
devices along `expert`.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from rljax.models.config import DOWN, UP, Experts
from rljax.models.functional import swiglu
from rljax.parallel import split_axes

EXPERT_AXES = {
    "gate": ("experts", "expert_embed", "mlp"),
    "up": ("experts", "expert_embed", "mlp"),
    "down": ("experts", "mlp", "expert_embed"),
}
"""Logical axes of the matrices of all experts of a layer."""


class Routing(NamedTuple):
    """Which experts compute for each token."""

    experts: Int[Array, "*B K"]
    """Their numbers, the best first."""
    weights: Float[Array, "*B K"]
    """Factors (float32) of what they compute."""


def route(config: Experts, logits: Float[Array, "*B E"]) -> Routing:
    """The experts of each token, of the router's `logits`."""
    scores = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(scores), config.per_token)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.normalized:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(experts, weights)


def _axes_of(name: str) -> tuple[str | None, ...]:
    """Logical axes of a matrix, or of a part of its adapter."""
    if name.endswith(DOWN):
        experts, rows, _ = EXPERT_AXES[name.removesuffix(DOWN)]
        return experts, rows, None
    if name.endswith(UP):
        experts, _, columns = EXPERT_AXES[name.removesuffix(UP)]
        return experts, None, columns
    return EXPERT_AXES[name]


def apply_experts(
    weights: Mapping[str, Array], x: Float[Array, "*B D"], routing: Routing, *, scale: float = 1.0
) -> Float[Array, "*B D"]:
    """What the experts of each token add up to, weighted. `weights` are those of `EXPERT_AXES` (gate and up [E, D, F],
    down [E, F, D]), in any dtype, and of adapters beside them (`gate_lora_a` [E, D, r], `gate_lora_b` [E, r, F]), of
    which `scale` is the factor."""
    count = weights["down"].shape[0]
    rows = split_axes("batch", x.shape[0])
    positions = split_axes("positions", x.shape[1]) if x.ndim == 3 else ()
    experts = split_axes("experts", count)
    inner = split_axes("mlp", weights["down"].shape[1])
    own = functools.partial(_own_experts, rows=rows, experts=experts, inner=inner, scale=scale)
    if not (rows or positions or experts or inner):
        return own(weights, x, routing)

    # Of weights that are split along other axes too, a device gathers the part that its experts have.
    split = {"experts": experts or None, "mlp": inner or None}
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
    scale: float,
) -> Array:
    """A device's part: its tokens, or those of all devices along `experts`, through its own experts."""
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

    out = _grouped(weights, x, chosen, factors, is_part=bool(experts), scale=scale)
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

        out = product(x, name)
        if f"{name}{DOWN}" not in weights:
            return out
        return out + scale * product(product(x, f"{name}{DOWN}"), f"{name}{UP}")

    h = _permute(jnp.repeat(x, per_token, axis=0), order, back)
    if is_part:
        # Whatever a grouped product leaves in rows of no group, neither it nor its gradient goes anywhere.
        is_own = (flat < count)[order][:, None]
        h = jnp.where(is_own, h, 0)
    out = grouped(swiglu(grouped(h, "gate"), grouped(h, "up")), "down")
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
