"""The vocabulary's head: the one place where hidden states become logits, and where gradients come back through them.

Sampler, scorer and studies all call `logits`, so what a logit is (of padding, under a soft cap) is said here once,
beside its derivative in `logits_gradient`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.models.attention_blocks import MASKED
from rljax.models.config import DOWN, HEAD, UP, DecoderConfig
from rljax.types import Params


def head_params(config: DecoderConfig, params: Params) -> dict[str, Any]:
    """The part of `params` that `logits` reads. ValueError when the model has a value head instead."""
    if config.value_head:
        raise ValueError("this model has a value head, not a vocabulary head; its outputs are those of values()")
    name = _name(config)
    adapter = (f"{HEAD}{DOWN}", f"{HEAD}{UP}") if config.adapts_head else ()
    return {name: params[name] for name in (name, *adapter)}


def _name(config: DecoderConfig) -> str:
    return "embedding" if config.tied_embeddings else HEAD


def output_projection(config: DecoderConfig, params: Params) -> Float[Array, "V D"]:
    """The vocabulary head's weight, without its adapter; the embedding itself when they are tied."""
    return head_params(config, params)[_name(config)]


def logits(
    config: DecoderConfig, params: Params, hidden: Float[Array, "*B D"], *, vocab_first: bool = False
) -> Float[Array, "..."]:
    """Float32 logits [*B, V] of final-normed `hidden`; [V, *B] with `vocab_first`, for few states at a time: a CPU
    multiplies a few columns faster with the weights in rows. `params` may be those of `head_params` alone.

    Rows of the head that pad the vocabulary (`config.tokenizer_size`) give -1e30: they take no part in any softmax.
    """
    head = output_projection(config, params).astype(hidden.dtype)
    if not vocab_first:
        out = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
        if config.adapts_head:
            up, narrow = _adapter(config, params, hidden)
            out = out + jnp.einsum("...r,rv->...v", narrow, up, preferred_element_type=jnp.float32)
        return _where_ids(config, _divided(config, out), MASKED, axis=-1)

    few = hidden.reshape(-1, hidden.shape[-1])
    out = jnp.einsum("vd,md->vm", head, few, preferred_element_type=jnp.float32)
    if config.adapts_head:
        up, narrow = _adapter(config, params, few)
        out = out + jnp.einsum("rv,mr->vm", up, narrow, preferred_element_type=jnp.float32)
    out = _where_ids(config, _divided(config, out), MASKED, axis=0)
    return out.reshape(-1, *hidden.shape[:-1])


def logits_gradient(
    config: DecoderConfig, params: Params, hidden: Float[Array, "R C D"], d_logits: Float[Array, "R C V"]
) -> tuple[Float[Array, "R C D"], dict[str, Float[Array, "..."]]]:
    """Cotangents (float32) of `hidden` and of `head_params(config, params)`, given those of `logits`.

    Products are taken in the dtype of `hidden` and summed in float32, as the forward product is.
    """
    head = output_projection(config, params).astype(hidden.dtype)
    d_logits = _where_ids(config, _divided(config, d_logits).astype(hidden.dtype), 0.0, axis=-1)
    d_hidden = jnp.einsum("rcv,vd->rcd", d_logits, head, preferred_element_type=jnp.float32)
    d_head = jnp.einsum("rcv,rcd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
    if not config.adapts_head:
        return d_hidden, {_name(config): d_head}

    # Of `narrow up`, where `narrow` is `scale hidden down`.
    assert config.lora is not None
    up, narrow = _adapter(config, params, hidden)
    down = params[f"{HEAD}{DOWN}"].astype(hidden.dtype)
    d_narrow = jnp.einsum("rcv,nv->rcn", d_logits, up, preferred_element_type=jnp.float32)
    d_narrow = (config.lora.scale * d_narrow).astype(hidden.dtype)
    d_hidden = d_hidden + jnp.einsum("rcn,dn->rcd", d_narrow, down, preferred_element_type=jnp.float32)
    d_down = jnp.einsum("rcd,rcn->dn", hidden, d_narrow, preferred_element_type=jnp.float32)
    d_up = jnp.einsum("rcn,rcv->nv", narrow, d_logits, preferred_element_type=jnp.float32)
    return d_hidden, {_name(config): d_head, f"{HEAD}{DOWN}": d_down, f"{HEAD}{UP}": d_up}


def _adapter(config: DecoderConfig, params: Params, hidden: Array) -> tuple[Array, Array]:
    """(B [rank, V], `scale hidden A` [.., rank]) of the head's adapter, in the dtype of `hidden`."""
    assert config.lora is not None
    down, up = (params[f"{HEAD}{end}"].astype(hidden.dtype) for end in (DOWN, UP))
    narrow = jnp.einsum("...d,dn->...n", hidden, down, preferred_element_type=jnp.float32)
    return up, (config.lora.scale * narrow).astype(hidden.dtype)


def _divided(config: DecoderConfig, x: Array) -> Array:
    return x if config.logits_divisor == 1.0 else x / config.logits_divisor


def _where_ids(config: DecoderConfig, x: Array, other: float, *, axis: int) -> Array:
    """`x`, with `other` in the places of `axis` that pad the vocabulary."""
    if config.num_ids == config.vocab_size:
        return x
    exists = jnp.arange(config.vocab_size) < config.num_ids
    shape = [1] * x.ndim
    shape[axis] = config.vocab_size
    return jnp.where(exists.reshape(shape), x, jnp.asarray(other, x.dtype))
