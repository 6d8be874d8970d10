"""Adapters beside a model's weights: added, taken out, merged, and several of them side by side.

They are weights like any other, declared by `rljax.models.decoder` where `DecoderConfig.lora` says so, and named after
their matrix: `layers/q_lora_a [L, in, rank]` and `layers/q_lora_b [L, rank, out]`, and with DoRA `layers/q_lora_norm
[L, out]`. The first layers of a mixture that have no experts have theirs in their own stack, and the vocabulary's head
has `head_lora_a` and `head_lora_b` beside it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rljax.models.config import DOWN, HEAD, NORM, UP, DecoderConfig, Lora
from rljax.models.decoder import init_params
from rljax.models.dora import dora_gain, with_norms
from rljax.models.quantized import dequantized_params
from rljax.types import Params


def is_adapter(path: str) -> bool:
    """Whether a weight's path, such as `layers/q_lora_a`, is an adapter's."""
    return path.endswith((DOWN, UP, NORM))


def adapters_of(params: Params) -> dict[str, Any]:
    """The adapters among `params` alone, as a tree of the same shape; nothing is copied."""
    return _chosen(params, is_adapter)


def base_params(params: Params) -> dict[str, Any]:
    """`params` without adapters: the model as it is with all of them switched off. Nothing is copied."""
    return _chosen(params, lambda name: not is_adapter(name))


def _chosen(tree: Mapping[str, Any], keep: Callable[[str], bool]) -> dict[str, Any]:
    """The leaves whose names `keep` holds of; a stack of which none is left is left out."""
    stacks = {name: _chosen(x, keep) for name, x in tree.items() if isinstance(x, Mapping)}
    leaves = {name: x for name, x in tree.items() if name not in stacks and keep(name)}
    return {name: x for name, x in stacks.items() if x} | leaves


def base_config(config: DecoderConfig) -> DecoderConfig:
    """The config of `base_params`, of weights that are not quantised."""
    return dataclasses.replace(config, lora=None, quantized=None)


def with_adapters(params: Params, adapters: Params) -> dict[str, Any]:
    """`params` with the adapters of another tree, in the place of any of its own. Nothing is copied."""
    whole = base_params(params)
    for name, x in adapters_of(adapters).items():
        whole[name] = whole[name] | x if isinstance(x, Mapping) else x
    return whole


def init_adapters(config: DecoderConfig, key: Array, base: Params | None = None) -> dict[str, Any]:
    """Fresh adapters, which add nothing yet: those of `init_params`, over the weights `base`, which DoRA's lengths are
    of. `key` is consumed. ValueError for DoRA without `base`."""
    adapters = adapters_of(init_params(config, key))
    if config.lora is None or not config.lora.dora:
        return adapters
    if base is None:
        raise ValueError(
            "dora=True begins with the lengths of the columns of the model's matrices; give it base=params"
        )
    whole = dequantized_params(config, base, only=config.lora.targets)
    return {stack: with_norms(config.lora, own, whole[stack]) for stack, own in adapters.items()}


def merged_params(config: DecoderConfig, params: Params) -> dict[str, Any]:
    """`base_params` with what the adapters add taken into each matrix, `W + scale A B`, with DoRA's gain on it.

    The sum is taken in float32 and rounded to the dtype of the matrix: in bfloat16 a change of less than 1/256 of a
    weight is lost, so merge into float32 where that matters. Quantised matrices become float32. ValueError for
    adapters side by side.
    """
    params = dequantized_params(config, params)
    lora = config.lora
    if lora is None:
        return dict(params)
    if lora.count:
        raise ValueError(f"{lora.count} adapters side by side cannot be merged into one model; take one of them out")

    merged = base_params(params)
    for stack in config.stacks:
        for name in [name for name in merged[stack] if f"{name}{DOWN}" in params[stack]]:
            down, up = (params[stack][f"{name}{end}"].astype(jnp.float32) for end in (DOWN, UP))
            norm = params[stack][f"{name}{NORM}"] if lora.dora else None
            merged[stack][name] = _merged(merged[stack][name], down, up, lora.scale, norm)
    if config.adapts_head:
        # It is [out, in], and a layer's matrix [in, out].
        down, up = (params[f"{HEAD}{end}"].astype(jnp.float32) for end in (DOWN, UP))
        merged[HEAD] = _merged(merged[HEAD], up.T, down.T, lora.scale)
    return merged


@functools.partial(jax.jit, static_argnums=3)
def _merged(matrix: Array, down: Array, up: Array, scale: float, norm: Array | None = None) -> Array:
    added = jnp.einsum("...ir,...ro->...io", down, up, precision="highest")
    whole = matrix.astype(jnp.float32) + scale * added
    if norm is not None:
        whole = whole * dora_gain(norm, matrix, down, up, scale)[..., None, :]
    return whole.astype(matrix.dtype)


def side_by_side(adapters: Sequence[tuple[Lora, Params]]) -> tuple[Lora, dict[str, Any]]:
    """Several adapters as one tree of which each row of a decoder has one: entry `i` of the axis behind the layers is
    the i-th of them.

    They may differ in everything: narrower ones are filled up with zeros, a target that one lacks is zero in it, and
    each keeps its own scale. ValueError for none, for what is side by side already, for DoRA, and for one of the
    vocabulary's head.
    """
    if not adapters or any(lora.count for lora, _ in adapters):
        raise ValueError("give at least one adapter, each of them a single one (count=0)")
    if any(lora.dora for lora, _ in adapters):
        raise ValueError(
            "adapters side by side are plain ones, and one has dora=True; merge it into a model of its own"
        )
    if any(HEAD in lora.targets for lora, _ in adapters):
        raise ValueError("adapters side by side are of layers, and lora's target head is of none; leave it out")

    rank = max(lora.rank for lora, _ in adapters)
    targets = tuple(dict.fromkeys(name for lora, _ in adapters for name in lora.targets))
    # With alpha = rank the common scale is 1; each adapter's own goes into its B.
    whole = Lora(rank=rank, alpha=float(rank), targets=targets, count=len(adapters))

    trees = [(lora, adapters_of(params)) for lora, params in adapters]
    stacks = dict.fromkeys(stack for _, tree in trees for stack in tree)
    return whole, {
        stack: _stack_side_by_side([(lora, tree.get(stack, {})) for lora, tree in trees]) for stack in stacks
    }


def _stack_side_by_side(adapters: Sequence[tuple[Lora, Params]]) -> dict[str, Any]:
    """The adapters of one stack of layers."""
    rank = max(lora.rank for lora, _ in adapters)
    layers: dict[str, Any] = {}
    for name in dict.fromkeys(own.removesuffix(DOWN) for _, tree in adapters for own in tree if own.endswith(DOWN)):
        downs = []
        ups = []
        like = next(tree for _, tree in adapters if f"{name}{DOWN}" in tree)
        for lora, tree in adapters:
            down, up = (tree.get(f"{name}{end}") for end in (DOWN, UP))
            down = jnp.zeros_like(like[f"{name}{DOWN}"]) if down is None else down
            up = jnp.zeros_like(like[f"{name}{UP}"]) if up is None else lora.scale * up
            missing = rank - down.shape[-1]
            downs.append(jnp.pad(down, ((0, 0), (0, 0), (0, missing))))
            ups.append(jnp.pad(up, ((0, 0), (0, missing), (0, 0))))
        layers[f"{name}{DOWN}"] = jnp.stack(downs, axis=1)
        layers[f"{name}{UP}"] = jnp.stack(ups, axis=1)
    return layers
