"""What a training step changes, and the optimizer that changes it."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rljax.models import DecoderConfig, abstract_params, param_shardings
from rljax.parallel import RULES, Rules, replicated
from rljax.types import Params, TrainState


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW (1711.05101) behind a clip of the global gradient norm.

    The learning rate rises linearly over `warmup_steps`, then stays (`constant`) or falls to 0 at `total_steps`
    (`linear`, `cosine`). `max_grad_norm` 0 is no clipping. Weight decay leaves norms and biases out.
    """

    learning_rate: float = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    total_steps: int = 0  # needed by linear and cosine
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by optimizer step. ValueError for values that cannot work."""
    c = config
    if not c.learning_rate >= 0:
        raise ValueError(f"learning_rate={c.learning_rate} must be at least 0")
    if c.schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"schedule={c.schedule!r} must be one of constant, linear, cosine")
    if c.warmup_steps < 0:
        raise ValueError(f"warmup_steps={c.warmup_steps} must be at least 0")
    if c.schedule != "constant" and c.total_steps <= c.warmup_steps:
        raise ValueError(
            f"schedule={c.schedule!r} needs total_steps above warmup_steps={c.warmup_steps}, not {c.total_steps}; "
            "set total_steps to the number of updates of the run"
        )
    decay_steps = c.total_steps - c.warmup_steps
    after: optax.Schedule
    if c.schedule == "linear":
        after = optax.linear_schedule(c.learning_rate, 0.0, decay_steps)
    elif c.schedule == "cosine":
        after = optax.cosine_decay_schedule(c.learning_rate, decay_steps)
    else:
        after = optax.constant_schedule(c.learning_rate)
    if not c.warmup_steps:
        return after
    # The first update already moves: the rate of step s is (s + 1) / (warmup_steps + 1) of the full one.
    start = c.learning_rate / (c.warmup_steps + 1)
    return optax.join_schedules(
        [optax.linear_schedule(start, c.learning_rate, c.warmup_steps), after], [c.warmup_steps]
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer of `config`. ValueError for values that cannot work."""
    if config.max_grad_norm < 0:
        raise ValueError(f"max_grad_norm={config.max_grad_norm} must be at least 0; 0 is no clipping")
    adamw = optax.adamw(
        make_schedule(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw) if config.max_grad_norm else adamw


def decay_mask(params: Params) -> Any:
    """True for weights that decay: all but norms and biases, which their names tell."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(("norm", "bias")), dict(params))


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
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        by_param,
        transform_non_params=lambda _: everywhere,
    )
    fields = {"params": by_param, "opt_state": opt_state, "step": everywhere, "skipped": everywhere}
    if reference:
        fields["ref_params"] = by_param
    by_path = {_name(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(fields)}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: by_path[_name(path)], _abstract_arrays(config, optimizer, reference)
    )


def _abstract_arrays(config: DecoderConfig, optimizer: optax.GradientTransformation, reference: bool) -> TrainState:
    return jax.eval_shape(lambda p: create_state(p, optimizer, reference=reference), abstract_params(config))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
