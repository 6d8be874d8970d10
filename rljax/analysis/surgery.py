"""Model Surgery, arXiv 2407.08770: behaviour edited by adding a probe's direction to a few rows of the MLPs' gates.

    probe    P(unwanted | x) = sigmoid(w x + b), x the mean hidden state of a text              (equation 1)
    region   the K neurons, over all layers, whose gates have the most negative cosine with w     (section 3.2)
    edit     v <- v + alpha w of those gates                                                     (equation 3)

Neurons that are silent where the unwanted state occurs then fire there. All functions are pure and take or return
arrays; an edit is a function from params to params. A gate is stored as [in, out], so the paper's row of a neuron is a
column here.

Deviations: the two rows of the paper's softmax are one direction, their difference, which leaves out what both share.
It is found to the minimum by Newton's method, where the paper takes 20 epochs. `gate_directions` scales it to the norm
of the gates that it is added to, so that alpha has a meaning that does not grow with the training of the probe, and
carries it from the final norm, where it was fitted, to the norm before each MLP. Or a probe is fitted to what the gates
of each layer read (`gate_inputs`, `of_each_layer`).
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rljax.models import DecoderConfig, apply_layer, embed, forest_attention, unstack_layers
from rljax.models.config import DENSE_LAYERS, LAYERS, SHARED, UP
from rljax.models.functional import rms_norm
from rljax.models.rope import rotary_tables
from rljax.types import ArrayLike, Params

PAPER_SHARE = 16_384 / 352_256
"""Share of all neurons that the paper edits, in a model of 7 billion parameters."""

NEWTON_STEPS = 50
"""Most steps to a probe; some ten are enough."""

Region = Literal["silent", "firing"]
"""Neurons whose gates point away from the probe's direction, as in the paper, or along it: a control."""


class Probe(NamedTuple):
    """A linear classifier of mean hidden states."""

    direction: Float[np.ndarray, " D"]
    """`w`, float64: towards the label 1."""
    bias: float
    """`b`."""

    def accuracy(self, features: Float[ArrayLike, "N D"], labels: Int[ArrayLike, " N"]) -> float:
        """Share of features on the side of their label."""
        score = np.asarray(features, np.float64) @ self.direction + self.bias
        return float(np.mean((score > 0) == np.asarray(labels, bool)))


def fit_probe(features: Float[ArrayLike, "N D"], labels: Int[ArrayLike, " N"], *, ridge: float = 1e-2) -> Probe:
    """The logistic regression of `labels` (0 or 1) on `features`: the least mean cross-entropy plus `ridge / 2 |w|^2`.

    Host, float64. ValueError unless both labels occur.
    """
    x = np.asarray(features, np.float64)
    y = np.asarray(labels, np.float64)
    if set(np.unique(y)) != {0.0, 1.0}:
        raise ValueError(f"a probe needs texts of both kinds, labels 0 and 1; these are {sorted(set(y.tolist()))}")

    # Centred, so that the ridge holds back no offset of all features.
    mean = x.mean(axis=0)
    design = np.concatenate([x - mean, np.ones((len(x), 1))], axis=1)
    penalty = np.full(design.shape[1], ridge)
    penalty[-1] = 0.0
    weights = np.zeros(design.shape[1])
    for _ in range(NEWTON_STEPS):
        p = 0.5 * (1 + np.tanh(0.5 * (design @ weights)))
        gradient = design.T @ (p - y) / len(x) + penalty * weights
        # The curvature of a saturated fit vanishes along the bias, which has no penalty.
        curvature = (design.T * np.maximum(p * (1 - p), 1e-6)) @ design / len(x) + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-10:
            break
    return Probe(direction=weights[:-1], bias=float(weights[-1] - mean @ weights[:-1]))


def gate_directions(config: DecoderConfig, params: Params, direction: Float[ArrayLike, " D"]) -> Float[Array, "L D"]:
    """What a direction of final-normed hidden states is at the gates of each layer, scaled as by `of_each_layer`.

    Hidden states are `x / rms(x) * final_norm`, gates see `x / rms(x) * mlp_norm`; so a gate `w final_norm / mlp_norm`
    answers a residual stream `x` as `w` answers its final-normed state. Layers without a norm before the MLP see `x`
    itself, up to its size.
    """
    offset = 1.0 if config.norm_offset else 0.0
    seen = jnp.asarray(direction, jnp.float32) * (params["final_norm"].astype(jnp.float32) + offset)
    gate = gate_columns(params)
    if config.pre_norms:
        norm = params[LAYERS]["mlp_norm"].astype(jnp.float32) + offset
        # A dimension that the norm all but removes would have a huge part of the direction, and no effect.
        seen = jnp.where(jnp.abs(norm) > 1e-3, seen / norm, 0.0)
    return of_each_layer(params, jnp.broadcast_to(seen, (gate.shape[0], gate.shape[1])))


def of_each_layer(params: Params, directions: Float[ArrayLike, "L D"]) -> Float[Array, "L D"]:
    """`directions`, one at the gates of each layer, scaled to the median norm of their layer's columns."""
    directions = jnp.asarray(directions, jnp.float32)
    wanted = jnp.median(jnp.linalg.norm(gate_columns(params), axis=1), axis=1, keepdims=True)
    return directions / jnp.linalg.norm(directions, axis=1, keepdims=True) * wanted


def gate_inputs(config: DecoderConfig, params: Params, tokens: Int[Array, "R S"]) -> Float[Array, "L R S D"]:
    """What the gates of each layer read of `tokens`, rows padded on the right (what stands in the padding is
    meaningless). Pure, so `jax.jit` applies.

    A layer without its MLP returns what the norm before the MLP reads, so that each is run both ways. ValueError for a
    model with a delta rule.
    """
    config.check_attends("surgery")
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    end = jnp.full(tokens.shape, tokens.shape[1])
    tables = rotary_tables(config, positions)
    x = embed(config, params, tokens)
    seen = []
    layers = unstack_layers(config, params)[LAYERS]
    for layer, rotation, window in zip(layers, config.rotations, config.windows, strict=True):

        def attend(q, k, v, sinks=None, window=window):
            return forest_attention(q, k, v, positions, end, window, sinks=sinks), None

        silent = {
            name: jnp.zeros_like(x)
            for name, x in layer.items()
            if name.removeprefix(SHARED) in ("down", "down_bias", f"down{UP}")
        }
        middle, _ = apply_layer(config, {**layer, **silent}, x, tables[rotation], attend)
        if config.pre_norms:
            offset = 1.0 if config.norm_offset else 0.0
            middle = rms_norm(middle, layer["mlp_norm"].astype(jnp.float32) + offset, config.norm_eps)
        seen.append(middle)
        x, _ = apply_layer(config, layer, x, tables[rotation], attend)
    return jnp.stack(seen)


def gate_columns(params: Params) -> Float[Array, "L D F"]:
    """The gates of all layers, float32, those of a layer's experts side by side. ValueError for a mixture whose first
    layers have none, or that has experts which all tokens share."""
    if DENSE_LAYERS in params or f"{SHARED}gate" in params[LAYERS]:
        raise ValueError(
            "first layers without experts, and experts that all tokens share, have gates beside those of a token's own "
            "experts; take a model whose layers are alike"
        )
    gate = params[LAYERS]["gate"].astype(jnp.float32)
    if gate.ndim == 3:
        return gate
    layers, experts, width, inner = gate.shape
    return gate.transpose(0, 2, 1, 3).reshape(layers, width, experts * inner)


def choose_neurons(
    gate: Float[ArrayLike, "L D F"],
    directions: Float[ArrayLike, "L D"],
    count: int,
    *,
    region: Region = "silent",
) -> Int[Array, " K"]:
    """The `count` neurons, over all layers, whose gates have the most negative cosine with their layer's direction (the
    most positive one for `firing`), as `layer * F + neuron`, extreme first. Gates of norm zero are never chosen.

    ValueError for a count that is not positive, or beyond the gates that have a norm.
    """
    gate = jnp.asarray(gate, jnp.float32)
    directions = jnp.asarray(directions, jnp.float32)
    norms = jnp.linalg.norm(gate, axis=1)
    living = int(jnp.sum(norms > 0))
    if not 0 < count <= living:
        raise ValueError(f"{count} neurons cannot be edited; a number from 1 to {living} can")
    dots = jnp.einsum("ldf,ld->lf", gate, directions)
    cosine = dots / jnp.maximum(norms * jnp.linalg.norm(directions, axis=1, keepdims=True), 1e-30)
    rank = jnp.where(norms > 0, cosine if region == "silent" else -cosine, jnp.inf)
    # Stable: of equal cosines the first goes first, on every device.
    return jnp.argsort(rank.reshape(-1), stable=True)[:count]


def add_to_gates(
    gate: Float[ArrayLike, "L D F"],
    directions: Float[ArrayLike, "L D"],
    neurons: Int[ArrayLike, " K"],
    alpha: float,
) -> Float[Array, "L D F"]:
    """`gate` with `alpha` times their layer's direction added to `neurons` (`choose_neurons`); in each layer the
    difference has rank 1. The dtype of `gate` is kept.

    The ranking of neurons changes with an edit, so that it is undone with `-alpha` and the same `neurons` alone.
    """
    gate = jnp.asarray(gate)
    layers, _, width = gate.shape
    mask = jnp.zeros(layers * width, jnp.float32).at[jnp.asarray(neurons)].set(1.0).reshape(layers, 1, width)
    added = alpha * jnp.asarray(directions, jnp.float32)[:, :, None] * mask
    return (gate.astype(jnp.float32) + added).astype(gate.dtype)


def edited(params: Params, directions: Float[ArrayLike, "L D"], neurons: Int[ArrayLike, " K"], alpha: float) -> Params:
    """`params` with `add_to_gates` on its gates; all other leaves are those of `params`. With experts, `neurons` count
    through those of a layer (`gate_columns`)."""
    layers: Mapping[str, Any] = params[LAYERS]
    gate = layers["gate"]
    if gate.ndim == 3:
        new = add_to_gates(gate, directions, neurons, alpha)
    else:
        count, experts, width, inner = gate.shape
        flat = gate.transpose(0, 2, 1, 3).reshape(count, width, experts * inner)
        flat = add_to_gates(flat, directions, neurons, alpha)
        new = flat.reshape(count, width, experts, inner).transpose(0, 2, 1, 3)
    return {**params, LAYERS: {**layers, "gate": new}}
