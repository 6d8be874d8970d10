"""LightSAM (2505.24399): sharpness-aware minimisation whose ascent and descent are both normalised by accumulated
gradient statistics, so that neither radius nor learning rate needs to be small for it to converge.

    s = grad f(theta),  w = theta + rho * normalise(s),  g = grad f(w) on the same minibatch,  direction = normalise(g)

The three functions are optax transformations from s to the direction, to be followed by weight decay and the learning
rate. Their `update` takes `grad_fn`, which gives the gradient at other params; it is called once, so a step costs two
gradients. Statistics of s and of g are kept apart, in float32. `max_grad_norm` bounds the global norm of s and of g
each (0 is no clipping); a clip chained before would reach s alone.

Raises ValueError, in `update`, without `grad_fn` or params. `rho` 0 leaves AdaGrad-Norm, AdaGrad and Adam.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rljax.ops import as_float


class LightSAMState(NamedTuple):
    """`ascent` and `descent` accumulate squares of s and g; `momentum` averages g, or is None."""

    count: jax.Array  # type: ignore[assignment]  # the name optax uses
    ascent: Any
    descent: Any
    momentum: Any = None


class Normaliser(NamedTuple):
    """How squares accumulate, and what divides: `init(params)`, `update(second, gradient)`, and
    `divide(gradient, second, count)` with the count of updates so far, this one included."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], Any]
    divide: Callable[[Any, Any, jax.Array], Any]


def scale_by_lightsam_norm(
    rho: float = 0.05, *, eps: float = 1e-8, max_grad_norm: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """LightSAM-I (AdaGrad-Norm): `u += |s|^2`, `normalise(s) = s / sqrt(u)`; one scalar each, from `eps^2`."""

    def update(second: jax.Array, gradient: Any) -> jax.Array:
        return second + sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(gradient))

    def divide(gradient: Any, second: jax.Array, count: jax.Array) -> Any:
        return jax.tree.map(lambda x: x / jnp.sqrt(second), gradient)

    scalar = Normaliser(lambda params: jnp.asarray(eps**2, jnp.result_type(float)), update, divide)
    return _lightsam(scalar, rho, None, max_grad_norm)


def scale_by_lightsam_adagrad(
    rho: float = 0.05, *, eps: float = 1e-8, max_grad_norm: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """LightSAM-II (AdaGrad): as I, for every coordinate of its own."""

    def divide(gradient: Any, second: Any, count: jax.Array) -> Any:
        return jax.tree.map(lambda x, u: x / jnp.sqrt(u), gradient, second)

    each = Normaliser(
        lambda params: jax.tree.map(lambda p: jnp.full_like(as_float(p), eps**2), params),
        lambda second, gradient: jax.tree.map(lambda u, x: u + jnp.square(x), second, gradient),
        divide,
    )
    return _lightsam(each, rho, None, max_grad_norm)


def scale_by_lightsam_adam(
    rho: float = 0.05, *, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-8, max_grad_norm: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """LightSAM-III (Adam): exponential averages of the squares, `s / (sqrt(u / (1 - b2^t)) + eps)`, and of g (`b1`).

    Where the paper's text leaves it open: the momentum is on the descent side alone, since on the ascent it would look
    in a stale direction, and the averages are corrected for their start, without which the first look would be
    `1 / sqrt(1 - b2)` times too far.
    """

    def divide(gradient: Any, second: Any, count: jax.Array) -> Any:
        return jax.tree.map(lambda x, u: x / (jnp.sqrt(u / (1 - b2**count)) + eps), gradient, second)

    def update(second: Any, gradient: Any) -> Any:
        return jax.tree.map(lambda u, x: b2 * u + (1 - b2) * x * x, second, gradient)

    averaged = Normaliser(_zeros, update, divide)
    return _lightsam(averaged, rho, b1, max_grad_norm)


def _lightsam(
    normaliser: Normaliser, rho: float, b1: float | None, max_grad_norm: float
) -> optax.GradientTransformationExtraArgs:
    def init(params: Any) -> LightSAMState:
        momentum = None if b1 is None else _zeros(params)
        return LightSAMState(jnp.zeros((), jnp.int32), normaliser.init(params), normaliser.init(params), momentum)

    def update(
        updates: Any, state: LightSAMState, params: Any = None, *, grad_fn: Any = None, **extra: Any
    ) -> tuple[Any, LightSAMState]:
        if grad_fn is None or params is None:
            raise ValueError(
                "LightSAM looks at a second point: call update(grads, state, params, grad_fn=...) with a function "
                "from params to their gradient on the same minibatch"
            )
        count = optax.safe_increment(state.count)
        steps = count.astype(jnp.result_type(float))

        # Up: to the point of the second look, by the statistics of the first gradient alone.
        s = _bounded(updates, max_grad_norm)
        ascent = normaliser.update(state.ascent, s)
        look = normaliser.divide(s, ascent, steps)
        elsewhere = jax.tree.map(lambda p, d: (p + rho * d).astype(p.dtype), params, look)

        # Down: from the weights themselves, by the gradient found there and statistics of its own.
        g = _bounded(grad_fn(elsewhere), max_grad_norm)
        descent = normaliser.update(state.descent, g)
        momentum = state.momentum
        direction = g
        if b1 is not None:
            momentum = jax.tree.map(lambda m, x: b1 * m + (1 - b1) * x, momentum, g)
            direction = jax.tree.map(lambda m: m / (1 - b1**steps), momentum)
        return normaliser.divide(direction, descent, steps), LightSAMState(count, ascent, descent, momentum)

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.zeros_like(as_float(p)), params)


def _bounded(gradient: Any, max_norm: float) -> Any:
    """The gradient in float32, scaled down where its global norm exceeds `max_norm`."""
    gradient = jax.tree.map(as_float, gradient)
    if not max_norm:
        return gradient
    norm = optax.tree_utils.tree_norm(gradient)
    factor = jnp.where(norm > max_norm, max_norm / jnp.where(norm > 0, norm, 1), 1)
    return jax.tree.map(lambda x: x * factor, gradient)
