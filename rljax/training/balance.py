"""Balance of experts without an auxiliary loss (DeepSeek-V3, 2412.19437, section 2.1.2; 2408.15664).

Experts are chosen by a score plus a bias of their own. After each update the bias of an expert that computed for more
tokens than the mean goes down by a fixed step, and that of one that computed for fewer goes up. No gradient reaches it.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.models import DecoderConfig, abstract_params
from rljax.models.config import LAYERS
from rljax.training.objective import Metrics
from rljax.training.trainable import Subtree

_BIAS = "selection_bias"


def counts_load(config: DecoderConfig, subtree: Subtree) -> bool:
    """Whether a gradient by what is trained has room for the loads: the model chooses by a bias that is not frozen."""
    trainable, _ = subtree.split(abstract_params(config))
    return _BIAS in trainable.get(LAYERS, {})


def check_balance(rate: float, config: DecoderConfig, subtree: Subtree) -> None:
    """ValueError for a rate that has nothing to move."""
    if not rate or counts_load(config, subtree):
        return
    remedy = "set it to 0"
    if config.experts is None or not config.experts.selection_bias:
        why = f"this {config.family} model has none"
        remedy = f"{remedy}, or take a family that has (glm4_moe)"
    else:
        why = "beneath adapters it is frozen"
    raise ValueError(f"balance_rate={rate} moves the bias that experts are chosen by, and {why}; {remedy}")


def take_loads(grads: Any) -> tuple[Any, Float[Array, "L E"]]:
    """A gradient, with zeros where the loads lay that it brought home (`Forward.counts_load`), and these:
    of each layer's experts how many tokens of the minibatch they computed for."""
    layers = grads[LAYERS]
    loads = layers[_BIAS]
    return {**grads, LAYERS: {**layers, _BIAS: jnp.zeros_like(loads)}}, loads


def with_balance(updates: Any, loads: Float[Array, "L E"], rate: float) -> Any:
    """An optimizer's updates, with the steps of the biases: `rate sign(mean load - load)`, within each layer."""
    layers = updates[LAYERS]
    missing = jnp.mean(loads, axis=-1, keepdims=True) - loads
    steps = (rate * jnp.sign(missing)).astype(layers[_BIAS].dtype)
    return {**updates, LAYERS: {**layers, _BIAS: steps}}


def load_metrics(loads: Float[Array, "L E"]) -> Metrics:
    """How far the loads are from equal ones."""
    mean = jnp.maximum(jnp.mean(loads, axis=-1), 1e-9)
    return {
        "loss/expert_load_max": jnp.max(jnp.max(loads, axis=-1) / mean),
        "loss/idle_experts": jnp.mean((loads == 0).astype(jnp.float32)),
    }
