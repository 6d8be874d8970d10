"""Sensitivity-aware task vectors (STV), arXiv 2511.08246: demonstrations replaced by a few attention-head outputs.

    where    Delta[l, h] = 1/T sum_t |A_c[t, l, h] - A_q[t, l, h]|, the K largest
    what     of each place one centroid of its activations behind many demonstrations, drawn by softmax(alpha_k)
    learn    - sum_i sum_k log p_k[i_k] (r_i - mean r) / (std r + eps), r_i minus the task loss of draw i

A_c are outputs behind demonstrations and a query, A_q behind the query alone. A head's output is taken, and
overwritten, at one position of each row, before the output projection. Weights stay as they are. Everything is an array
with a static shape, so that one program serves every choice.

Deviations: rewards are compared within the draws of one example, not over the batch, where how hard examples are would
decide; `group=None` is the paper's form. The paper does not say how it seeds the clusters: k-means++ here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rljax.models import DecoderConfig, apply_layer, embed, final_norm, forest_attention, logits, unstack_layers
from rljax.models.rope import rotary_tables
from rljax.types import ArrayLike, Params

EPSILON = 1e-8
"""Added to standard deviations and norms that are divided by."""


class Override(NamedTuple):
    """Head outputs to put in place of a model's own."""

    heads: Float[ArrayLike, "B L H hd"]
    """What stands there instead."""
    mask: Bool[ArrayLike, "L H"]
    """Of which heads; the others keep their own."""


def read_heads(
    config: DecoderConfig,
    params: Params,
    tokens: Int[ArrayLike, "B T"],
    places: Int[ArrayLike, " B"],
    override: Override | None = None,
) -> tuple[Float[Array, "B V"], Float[Array, "B L H hd"]]:
    """Logits behind the token at `places` of each row, and the output of every head there (query heads, before the
    output projection), after `override`.

    Rows are padded on the right. With a mask that is nowhere True the logits are those without an override, bit for
    bit. Later positions of a row see what was overwritten through the keys and values of the layers behind, as they do
    in a decoder that overwrites in its prefill alone. Pure, so `jax.jit` applies. ValueError for a model with a delta
    rule.
    """
    config.check_attends("overwriting of heads")
    tokens = jnp.asarray(tokens)
    places = jnp.asarray(places)
    rows = jnp.arange(tokens.shape[0])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    end = jnp.full(tokens.shape, tokens.shape[1])
    tables = rotary_tables(config, positions)
    x = embed(config, params, tokens)
    found = []
    layers = zip(unstack_layers(config, params)["layers"], config.rotations, config.windows, strict=True)
    for index, (layer, rotation, window) in enumerate(layers):

        def attend(q, k, v, sinks=None, index=index, window=window):
            out = forest_attention(q, k, v, positions, end, window, sinks=sinks)
            own = out[rows, places]
            if override is not None:
                given = jnp.asarray(override.heads)[:, index].astype(own.dtype)
                own = jnp.where(jnp.asarray(override.mask)[index, :, None], given, own)
                out = out.at[rows, places].set(own)
            return out, own

        x, own = apply_layer(config, layer, x, tables[rotation], attend)
        found.append(own)
    states = final_norm(config, params, x)[rows, places]
    return logits(config, params, states), jnp.stack(found, axis=1)


def sensitivity(
    with_context: Float[ArrayLike, "T L H hd"], alone: Float[ArrayLike, "T L H hd"], *, relative: bool = False
) -> Float[Array, "L H"]:
    """How far demonstrations move each head: the mean over queries of the norm of the difference (not the norm of the
    mean). `relative` divides by the norm of the head alone, so that heads with large outputs do not come first for
    that."""
    alone = jnp.asarray(alone)
    moved = jnp.linalg.norm(jnp.asarray(with_context) - alone, axis=-1)
    if relative:
        moved = moved / (jnp.linalg.norm(alone, axis=-1) + EPSILON)
    return moved.mean(axis=0)


def top_heads(delta: Float[ArrayLike, "L H"], count: int) -> Int[np.ndarray, "K 2"]:
    """Layer and head of the `count` largest values, largest first; of equal ones the first. ValueError for a count
    that is not positive or beyond all heads."""
    flat = np.asarray(delta).reshape(-1)
    if not 0 < count <= flat.size:
        raise ValueError(f"{count} heads cannot be chosen; a number from 1 to {flat.size} can")
    order = np.argsort(-flat, kind="stable")[:count]
    return np.stack(np.unravel_index(order, np.shape(delta)), axis=1)


def overlap(first: Int[ArrayLike, "K 2"], second: Int[ArrayLike, "K 2"]) -> float:
    """Jaccard index of two choices of heads: below 0.7 between two halves of the queries, a choice says little."""
    one, other = ({tuple(pair) for pair in np.asarray(x).tolist()} for x in (first, second))
    return len(one & other) / len(one | other)


def centroids(
    points: Float[ArrayLike, "N D"], count: int, rng: np.random.Generator, *, iterations: int = 20
) -> Float[np.ndarray, "M D"]:
    """k-means of `points` from k-means++ seeds, float64. Host; `rng` is moved on.

    Fewer distinct points than `count` are their own centroids, M = their number.
    """
    points = np.asarray(points, np.float64)
    distinct = np.unique(points, axis=0)
    if len(distinct) <= count:
        return distinct
    seeds = [distinct[rng.integers(len(distinct))]]
    while len(seeds) < count:
        nearest = _squared(distinct, np.array(seeds)).min(axis=1)
        seeds.append(distinct[rng.choice(len(distinct), p=nearest / nearest.sum())])
    return lloyd(points, np.array(seeds), iterations=iterations)


def lloyd(
    points: Float[np.ndarray, "N D"], seeds: Float[np.ndarray, "M D"], *, iterations: int = 20
) -> Float[np.ndarray, "M D"]:
    """k-means from given seeds. A cluster without points begins again at the point farthest from its centroid."""
    found = np.array(seeds, np.float64)
    for _ in range(iterations):
        distances = _squared(points, found)
        nearest = distances.argmin(axis=1)
        new = found.copy()
        for cluster in range(len(found)):
            own = points[nearest == cluster]
            new[cluster] = own.mean(axis=0) if len(own) else points[distances.min(axis=1).argmax()]
        if np.array_equal(new, found):
            break
        found = new
    return found


def _squared(points: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Squared distances [N, M]."""
    return ((points[:, None] - to[None]) ** 2).sum(axis=-1)


def selection_loss(
    alpha: Float[ArrayLike, "K M"],
    draws: Int[ArrayLike, "N K"],
    rewards: Float[ArrayLike, " N"],
    *,
    group: int | None = None,
) -> Float[Array, ""]:
    """The REINFORCE loss of the choice among centroids, summed over draws; its gradient in `alpha` is what is wanted.

    Rewards are standardised (population) within each `group` draws in order, those of one example; None is over all of
    them. Draws that are worth the same give no gradient. ValueError if `group` does not divide the draws.
    """
    draws = jnp.asarray(draws)
    rewards = jnp.asarray(rewards, jnp.float32)
    size = group or len(rewards)
    if len(rewards) % size:
        raise ValueError(f"{len(rewards)} draws are no whole number of groups of {size}")
    grouped = rewards.reshape(-1, size)
    centred = grouped - grouped.mean(axis=1, keepdims=True)
    advantages = jax.lax.stop_gradient(centred / (grouped.std(axis=1, keepdims=True) + EPSILON)).reshape(-1)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(jnp.asarray(alpha), axis=-1)[None], draws[:, :, None], axis=-1)
    return -jnp.sum(advantages * chosen[..., 0].sum(axis=1))


def placed(
    bank: Float[ArrayLike, "K M hd"], heads: Int[ArrayLike, "K 2"], draws: Int[ArrayLike, "B K"], shape: tuple[int, int]
) -> Override:
    """An override of `heads`, in a model of `shape` (layers, heads), by the centroids that each row has drawn."""
    bank = jnp.asarray(bank)
    heads = jnp.asarray(heads)
    draws = jnp.asarray(draws)
    given = bank[jnp.arange(bank.shape[0]), draws]  # [B, K, hd]
    full = jnp.zeros((draws.shape[0], *shape, bank.shape[2]), bank.dtype)
    mask = jnp.zeros(shape, bool).at[heads[:, 0], heads[:, 1]].set(True)
    return Override(full.at[:, heads[:, 0], heads[:, 1]].set(given), mask)
