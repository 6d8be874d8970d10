"""Parts of a layer with gradients of their own: the values are the plain ones, the backward pass saves fewer arrays
and transposes only small ones."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.parallel import split_axes


@jax.custom_vjp
def linear(x: Float[Array, "*B D"], weight: Float[Array, "D E"]) -> Float[Array, "*B E"]:
    """`x @ weight`, in the dtype of `x`. The weight's gradient is summed in float32."""
    return x @ weight.astype(x.dtype)


def _linear_forward(x, weight):
    return linear(x, weight), (x, weight)


def _linear_backward(residuals, g):
    x, weight = residuals
    d_x = jnp.einsum("...e,de->...d", g, weight.astype(g.dtype))

    equation = "na,nb->ab"
    if x.ndim == 3 and split_axes("positions", x.shape[1]):
        # Flattened with the rows, positions that several devices share would have to be gathered.
        equation = "rna,rnb->ab"
    else:
        x = x.reshape(-1, x.shape[-1])
        g = g.reshape(-1, g.shape[-1])
    product = functools.partial(jnp.einsum, equation, preferred_element_type=jnp.float32)
    # A product contracted over tokens transposes its left operand: that should be the narrow one.
    d_weight = product(x, g) if x.shape[-1] <= g.shape[-1] else product(g, x).T
    return d_x, d_weight.astype(weight.dtype)


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def swiglu(gate: Float[Array, "*B"], up: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`silu(gate) * up` (2002.05202). The backward pass keeps the two inputs alone."""
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(residuals, g):
    gate, up = residuals
    s = jax.nn.sigmoid(gate)
    silu = gate * s
    return g * up * (s + silu * (1 - s)), g * silu


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def geglu(gate: Float[Array, "*B"], up: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`gelu(gate) * up` (2002.05202), gelu approximated by tanh. The backward pass keeps the two inputs alone."""
    return _geglu(gate, up)


def _geglu(gate, up):
    return jax.nn.gelu(gate, approximate=True) * up


def _geglu_backward(residuals, g):
    return jax.vjp(_geglu, *residuals)[1](g)


geglu.defvjp(lambda gate, up: (_geglu(gate, up), (gate, up)), _geglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def clamped_swiglu(gate: Float[Array, "*B"], up: Float[Array, "*B"], limit: float, slope: float) -> Float[Array, "*B"]:
    """`gate sigmoid(slope gate) (up + 1)`, the gate at most `limit` and `up` between both its signs (2508.10925). The
    backward pass keeps the two inputs alone."""
    return _clamped_swiglu(gate, up, limit, slope)


def _clamped_swiglu(gate, up, limit, slope):
    gate = jnp.minimum(gate, limit)
    return gate * jax.nn.sigmoid(slope * gate) * (jnp.clip(up, -limit, limit) + 1)


def _clamped_swiglu_backward(limit, slope, residuals, g):
    return jax.vjp(lambda gate, up: _clamped_swiglu(gate, up, limit, slope), *residuals)[1](g)


clamped_swiglu.defvjp(
    lambda gate, up, limit, slope: (_clamped_swiglu(gate, up, limit, slope), (gate, up)), _clamped_swiglu_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square norm (1910.07467), computed in float32; the dtype of `x` is kept."""
    wide = x.astype(jnp.float32)
    return (wide * _inverse_rms(wide, eps) * scale.astype(jnp.float32)).astype(x.dtype)


def _inverse_rms(wide: Array, eps: float) -> Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


def _rms_norm_forward(x, scale, eps):
    return rms_norm(x, scale, eps), (x, scale)


def _rms_norm_backward(eps, residuals, g):
    x, scale = residuals
    wide = x.astype(jnp.float32)
    g = g.astype(jnp.float32)
    inverse = _inverse_rms(wide, eps)
    unit = wide * inverse
    scaled = g * scale.astype(jnp.float32)
    d_x = inverse * (scaled - unit * jnp.mean(scaled * unit, axis=-1, keepdims=True))
    d_scale = jnp.sum(g * unit, axis=tuple(range(g.ndim - 1)))
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
