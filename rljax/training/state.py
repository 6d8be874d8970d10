"""What a training step changes: how it is made, and where it lies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rljax.models import DecoderConfig, abstract_params, param_shardings
from rljax.parallel import RULES, Rules, replicated
from rljax.types import Params, TrainState


def create_state(
    params: Params, optimizer: optax.GradientTransformation, *, reference: bool = False, shardings: Any = None
) -> TrainState:
    """A state at step 0. `params` become part of it (and are donated by the first update); the reference is a copy.

    `shardings` is a `TrainState` of shardings, as `state_shardings` makes it; None leaves everything where it is.
    """

    def build(params):
        return TrainState(
            params=params,
            opt_state=optimizer.init(params),
            step=jnp.int32(0),
            skipped=jnp.int32(0),
            ref_params=jax.tree.map(jnp.copy, params) if reference else None,
        )

    if shardings is None:
        return build(params)
    return jax.jit(build, out_shardings=shardings, donate_argnums=0)(jax.device_put(params, shardings.params))


def abstract_state(
    config: DecoderConfig,
    optimizer: optax.GradientTransformation,
    *,
    reference: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> TrainState:
    """A `TrainState` of `jax.ShapeDtypeStruct`s with shardings: what a checkpoint is restored into.

    Without a mesh everything lies on the first device.
    """
    state = _abstract_arrays(config, optimizer, reference)
    where = state_shardings(config, optimizer, reference=reference, mesh=mesh, rules=rules)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)


def state_shardings(
    config: DecoderConfig,
    optimizer: optax.GradientTransformation,
    *,
    reference: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> TrainState:
    """A `TrainState` of shardings: the moments of a weight lie as the weight does, scalars are replicated."""
    params = abstract_params(config)
    everywhere: jax.sharding.Sharding
    if mesh is None:
        everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        by_param = jax.tree.map(lambda _: everywhere, params)
    else:
        everywhere = replicated(mesh)
        by_param = param_shardings(config, mesh, rules)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda value, sharding: value if _is_left_out(value) else sharding,
        jax.eval_shape(optimizer.init, params),
        by_param,
        transform_non_params=lambda _: everywhere,
        is_leaf=_is_left_out,
    )
    fields = {"params": by_param, "opt_state": opt_state, "step": everywhere, "skipped": everywhere}
    if reference:
        fields["ref_params"] = by_param
    by_path = {_name(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(fields)}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: by_path[_name(path)], _abstract_arrays(config, optimizer, reference)
    )


def with_critic(state: TrainState, critic: TrainState | None) -> TrainState:
    """The state with that of its critic, arrays and `jax.ShapeDtypeStruct`s alike."""
    leaves, structure = jax.tree.flatten((state, critic))
    # A struct checks what it is made of, and admits arrays alone; so it is made of their numbers.
    policy, own = jax.tree.unflatten(structure, [np.array(i, np.int32) for i in range(len(leaves))])
    return jax.tree.map(lambda i: leaves[int(i)], policy.replace(critic=own))


def _abstract_arrays(config: DecoderConfig, optimizer: optax.GradientTransformation, reference: bool) -> TrainState:
    return jax.eval_shape(lambda p: create_state(p, optimizer, reference=reference), abstract_params(config))


def _is_left_out(value: Any) -> bool:
    """Whether this part of an optimizer has no state for the weight: another part has."""
    return isinstance(value, optax.MaskedNode)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
