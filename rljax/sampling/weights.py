"""The weights as decoding wants them: layers apart, matrices in rows, in the compute dtype, split by `DECODE_RULES`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from rljax.models.config import DOWN, GAIN, NORM, SCALE, UP, DecoderConfig, is_wide
from rljax.models.decoder import Product, unstack_layers
from rljax.models.dora import with_gains
from rljax.models.experts import EXPERT_AXES
from rljax.models.layout import param_shardings
from rljax.parallel import (
    DECODE_RULES,
    hand_over,
    mesh_of,
    num_processes,
    own_mesh,
    own_part,
    platform,
    reshard,
    spread_mesh,
    use_mesh,
)
from rljax.types import ArrayLike, Params


def take_weights(config: DecoderConfig, mesh: Mesh | None, params: Params) -> Params:
    """`decode_weights` of `params` on `mesh`, wherever they lie: on its devices, on others, on the host, or spread over
    several processes, all of which then call this. Call it with the mesh in use. None leaves them where they are."""
    if mesh is None:
        return weights_program(config, mesh)(params)

    if is_apart(mesh, params):
        # All in one program: its copies are what the decoder holds, in the compute dtype.
        everywhere = spread_mesh(mesh_of(params))
        with use_mesh(everywhere):
            copies = weights_program(config, everywhere)(params)
        return reshard(own_part(copies, own_mesh(everywhere)), decode_shardings(config, mesh))

    if not _is_on(mesh, params):
        params = reshard(params, param_shardings(config, mesh, DECODE_RULES))
    return weights_program(config, mesh)(params)


def take_params(config: DecoderConfig, mesh: Mesh | None, params: Params) -> Params:
    """`params` as the model takes them, where a decoder on `mesh` can reach them: a copy where they are spread over
    several processes and the decoder is this one's alone, in which case all processes call this."""
    if mesh is None or not is_apart(mesh, params):
        return params
    return hand_over(params, param_shardings(config, mesh, DECODE_RULES))


def is_apart(mesh: Mesh, params: Params) -> bool:
    """Whether `params` are spread over more processes than `mesh` is."""
    is_spread = any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(params))
    return is_spread and num_processes(mesh) == 1


def _is_on(mesh: Mesh, params: Params) -> bool:
    devices = set(mesh.devices.flat)
    return all(isinstance(x, jax.Array) and x.sharding.device_set == devices for x in jax.tree.leaves(params))


@functools.lru_cache(maxsize=16)
def weights_program(config: DecoderConfig, mesh: Mesh | None):
    layout = None if mesh is None else decode_shardings(config, mesh)
    return jax.jit(functools.partial(decode_weights, config), out_shardings=layout)


def decode_weights(config: DecoderConfig, params: Params) -> dict[str, Any]:
    """A copy of stacked `params` whose layers are a tuple of dicts with matrices [E, D] instead of [D, E]: a step
    multiplies a few vectors by each, and runs faster along rows. Norms, sinks, routers, what chooses experts and what
    a delta rule fades and convolves by keep their dtype, as they are float32 work, and matrices and biases of experts
    [E, ..] their order. In the place of DoRA's lengths stands what they come to (`rljax.models.dora.with_gains`), and
    what is quantised stays as it is."""
    wide = ("norm", "sinks", "router", "kernel", "fade_", GAIN, SCALE)

    def cast(name, value):
        stays = is_wide(name) or any(kind in name for kind in wide)
        return value if stays or jnp.issubdtype(value.dtype, jnp.integer) else value.astype(config.dtype)

    # Copies, also where nothing is cast: the trainer donates its own weights to its next update.
    outer = {name: jnp.copy(cast(name, value)) for name, value in params.items() if name not in config.stacks}
    gained = with_gains(config, params)
    stacks = {stack: {name: cast(name, value) for name, value in gained[stack].items()} for stack in config.stacks}
    turned = (
        {name: _in_rows(x) if _turns(layer, name) else jnp.copy(x) for name, x in layer.items()}
        for layer in unstack_layers(config, stacks)["layers"]
    )
    return {**outer, "layers": tuple(turned)}


def _turns(layer: Params, name: str) -> bool:
    """Whether a weight of a layer is turned: not what experts have, of which each meets its own tokens, not what a
    matrix is made of anew for each product, and not the taps of a convolution."""
    if name == "kernel" or name.endswith(SCALE) or f"{name}{SCALE}" in layer:
        return False
    matrix = name.removesuffix(DOWN).removesuffix(UP).removesuffix("_bias")
    return "router" not in layer or matrix not in EXPERT_AXES


def _in_rows(weight: Array) -> Array:
    """A matrix of a layer, or each of those side by side, turned; a copy of what is none."""
    return jnp.swapaxes(weight, -1, -2) if weight.ndim >= 2 else jnp.copy(weight)


def decode_shardings(config: DecoderConfig, mesh: Mesh) -> dict[str, Any]:
    """Shardings of `decode_weights` on `mesh`."""
    stacked = param_shardings(config, mesh, DECODE_RULES)

    def one_layer(stack, name, sharding):
        if not _turns(stack, name):
            return NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
        # As the axes of `_in_rows` are.
        *apart, last = sharding.spec[1:]
        spec = (*apart[:-1], last, *apart[-1:])
        return NamedSharding(mesh, PartitionSpec(*spec))

    outer = {name: sharding for name, sharding in stacked.items() if name not in config.stacks}
    of_stack = {
        stack: {
            name.replace(NORM, GAIN): one_layer(stacked[stack], name, sharding)
            for name, sharding in stacked[stack].items()
        }
        for stack in config.stacks
    }
    return {**outer, "layers": tuple(of_stack[stack] for stack in config.kinds)}


def product(x: Float[Array, "*B D"], weight: Float[Array, "E D"]) -> Float[Array, "*B E"]:
    """`x @ weight.T` for many vectors `x`."""
    return jnp.einsum("...d,ed->...e", x, weight)


def product_of_few(x: Float[Array, "*B D"], weight: Float[Array, "E D"]) -> Float[Array, "*B E"]:
    """`x @ weight.T` for few vectors `x`.

    A CPU multiplies a fifth faster with the features first. The barrier keeps the compiler from turning the product
    round again.
    """
    if platform() != "cpu":
        return product(x, weight)
    out = jax.lax.optimization_barrier(jnp.einsum("ed,md->em", weight, x.reshape(-1, x.shape[-1])))
    return out.T.reshape(*x.shape[:-1], -1)


def chosen_adapters(product: Product, adapter: Int[ArrayLike, " N"] | None) -> Product:
    """`product` of activations [N, G, D], in which the entries of weights side by side [M, E, D] are chosen: row `n`
    has that of `adapter[n]`. `product` itself where that is None."""
    if adapter is None:
        return product

    def multiply(x: Array, weight: Array) -> Array:
        if weight.ndim == 2:
            return product(x, weight)
        return jnp.einsum("ngd,ned->nge", x, jnp.take(weight, jnp.asarray(adapter), axis=0))

    return multiply
