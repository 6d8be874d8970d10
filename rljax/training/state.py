"""What a training step changes: how it is made, and where it lies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rljax.models import DecoderConfig, abstract_params, cast_params, param_shardings
from rljax.parallel import RULES, Rules, replicated
from rljax.training.trainable import EVERYTHING, Subtree
from rljax.types import Params, TrainState


def create_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    reference: bool = False,
    shardings: Any = None,
    subtree: Subtree = EVERYTHING,
) -> TrainState:
    """A state at step 0. `params` become part of it (what is trained is donated by the first update); the reference is
    a copy of what is trained. What is frozen is not copied where it has its dtype and place already.

    What is trained is float32 whatever the dtype of `params`, and so are the moments made of it: in bfloat16 a step of
    less than 1/256 of a weight is lost, and a decay of 0.999 is 1.

    `shardings` is a `TrainState` of shardings, as `state_shardings` makes it; None leaves everything where it is.
    """

    def build(trainable):
        trainable = jax.tree.map(_as_master, trainable)
        return TrainState(
            trainable=trainable,
            opt_state=optimizer.init(trainable),
            step=jnp.int32(0),
            skipped=jnp.int32(0),
            ref_trainable=jax.tree.map(jnp.copy, trainable) if reference else None,
        )

    trainable, _ = subtree.split(params)
    if shardings is None:
        return with_base(build(trainable), frozen_base(params, subtree))
    base = frozen_base(params, subtree, shardings=shardings.base)
    placed = jax.device_put(trainable, shardings.trainable)
    # A buffer can only be handed on to one of its own dtype.
    is_master = all(x.dtype == jnp.promote_types(x.dtype, jnp.float32) for x in jax.tree.leaves(placed))
    made = jax.jit(build, out_shardings=with_base(shardings, None), donate_argnums=(0,) if is_master else ())(placed)
    return with_base(made, base)


def frozen_base(params: Params, subtree: Subtree, *, shardings: Any = None) -> Any:
    """The frozen part of `params`, in the dtype that the subtree keeps it in and laid out by `shardings`; None where
    all is trained."""
    _, base = subtree.split(params)
    if base is None:
        return None
    if subtree.base_dtype is not None:
        base = cast_params(base, subtree.base_dtype)
    return base if shardings is None else jax.device_put(base, shardings)


def abstract_state(
    config: DecoderConfig,
    optimizer: optax.GradientTransformation,
    *,
    reference: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    subtree: Subtree = EVERYTHING,
) -> TrainState:
    """A `TrainState` of `jax.ShapeDtypeStruct`s with shardings: what a checkpoint is restored into.

    Without a mesh everything lies on the first device.
    """
    state = _abstract_arrays(config, optimizer, reference, subtree)
    where = state_shardings(config, optimizer, reference=reference, mesh=mesh, rules=rules, subtree=subtree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)


def state_shardings(
    config: DecoderConfig,
    optimizer: optax.GradientTransformation,
    *,
    reference: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    subtree: Subtree = EVERYTHING,
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

    trainable, base = subtree.split(by_param)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda value, sharding: value if _is_left_out(value) else sharding,
        jax.eval_shape(optimizer.init, subtree.split(params)[0]),
        trainable,
        transform_non_params=lambda _: everywhere,
        is_leaf=_is_left_out,
    )
    fields = {
        "trainable": trainable,
        "opt_state": opt_state,
        "step": everywhere,
        "skipped": everywhere,
        "base": base,
        "ref_trainable": trainable if reference else None,
    }

    # By path rather than by order: the optimizer's states pair up with their shardings whatever they are made of.
    by_path = {_name(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(fields)}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: by_path[_name(path)], _abstract_arrays(config, optimizer, reference, subtree)
    )


def with_critic(state: TrainState, critic: TrainState | None) -> TrainState:
    """The state with that of its critic, arrays and `jax.ShapeDtypeStruct`s alike."""
    return _replaced(state, critic=critic)


def with_pushed(state: TrainState, pushed: Any) -> TrainState:
    """The state, arrays and `jax.ShapeDtypeStruct`s alike, with `pushed` for the weights that rollouts have."""
    return _replaced(state, pushed=pushed)


def with_before(state: TrainState, before: Any) -> TrainState:
    """The state, arrays and `jax.ShapeDtypeStruct`s alike, with `before` for the weights that rollouts had before."""
    return _replaced(state, before=before)


def with_base(state: TrainState, base: Any) -> TrainState:
    """The state, arrays and `jax.ShapeDtypeStruct`s alike, over the frozen weights `base`."""
    return _replaced(state, base=base)


def _as_master(weight: Any) -> Any:
    """A weight in the dtype that it is trained in; the array itself where it has that already."""
    wanted = jnp.promote_types(weight.dtype, jnp.float32)
    return weight if weight.dtype == wanted else weight.astype(wanted)


def _replaced(state: TrainState, **fields: Any) -> TrainState:
    leaves, structure = jax.tree.flatten((state, fields))
    # A struct checks what it is made of, and admits arrays alone; so it is made of their numbers.
    numbered, own = jax.tree.unflatten(structure, [np.array(i, np.int32) for i in range(len(leaves))])
    return jax.tree.map(lambda i: leaves[int(i)], numbered.replace(**own))


def _abstract_arrays(
    config: DecoderConfig, optimizer: optax.GradientTransformation, reference: bool, subtree: Subtree
) -> TrainState:
    return jax.eval_shape(
        lambda params: create_state(params, optimizer, reference=reference, subtree=subtree), abstract_params(config)
    )


def _is_left_out(value: Any) -> bool:
    """Whether this part of an optimizer has no state for the weight: another part has."""
    return isinstance(value, optax.MaskedNode)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
