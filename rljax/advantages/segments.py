"""More ways to turn the values of nodes into credit, each of which differs from the next by one function.

`R` is the reward of a row, `V(s)` the value of node `s` of `rljax.trees.build_tree`: `leaf_mean` or `child_mean`.
As in `group`, rows that are not valid take no part, a result is 0 off `action_mask`, and rows of one prompt with equal
rewards get exactly 0 unless a function says otherwise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.advantages.group import AdvantageFn, _constant, _on_tokens, _valid_tokens
from rljax.advantages.tree import _masked
from rljax.ops import (
    as_float,
    masked_sum,
    masked_whiten,
    segment_mean,
    segment_std,
    segment_whiten,
)
from rljax.trees import (
    Tree,
    build_tree,
    child_mean,
    last_nodes,
    leaf_mean,
    match_owners,
    on_tokens,
    parent_values,
    token_leaf_counts,
)
from rljax.types import ArrayLike, RolloutBatch

ValueFn = Callable[[Tree, ArrayLike], Array]
"""(tree, rewards [B]) -> values of nodes [N]: `leaf_mean` or `child_mean`."""


def ancestor_centered() -> AdvantageFn:
    """`R` less the value of each of its ancestors, on average (TreePO, 2508.17445; whiten it with `whitened`).

        A = mean over the nodes j on the row's path, the root and those with more than one leaf, of (R - V(j))

    A node counts once, however many segments of the sampler it spans.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        tree = build_tree(batch)
        value = leaf_mean(tree, batch.reward)
        reward = jnp.where(batch.is_valid, as_float(batch.reward), 0)
        gain = reward[:, None] - on_tokens(tree, value)
        is_ancestor = jnp.asarray(tree.node_starts) & (token_leaf_counts(tree) > 1)
        below_root = masked_sum(gain, is_ancestor, axis=1)
        from_root = reward - value[jnp.asarray(batch.group_id)]
        return _on_tokens((from_root + below_root) / (1 + jnp.sum(is_ancestor, axis=1)), batch)

    return advantages


def value_gain(*, value_fn: ValueFn = leaf_mean) -> AdvantageFn:
    """`V(s) - V(parent(s))` on every token of node s: SPO-tree with `child_mean` (2505.23564), VinePPO's rule with the
    values of the tree itself (2410.01679). 0 on the prompt and on a trunk that all rows share."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        tree = build_tree(batch)
        value = value_fn(tree, batch.reward)
        return _masked(on_tokens(tree, value - parent_values(tree, value)), batch)

    return advantages


def sibling_normalized(*, value_fn: ValueFn = child_mean, ddof: int = 0, epsilon: float = 1e-6) -> AdvantageFn:
    """`(V(s) - mean) / (std + epsilon)` over the children of one parent (TreeRPO, 2506.05183, whose normaliser is an
    assumption; SPO-tree's optional division by the std, 2505.23564). 0 among siblings of one value."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        tree = build_tree(batch)
        parents = jnp.asarray(tree.parents)
        value = value_fn(tree, batch.reward)
        score = segment_whiten(value, jnp.maximum(parents, 0), parents >= 0, ddof=ddof, epsilon=epsilon)
        return _masked(on_tokens(tree, score), batch)

    return advantages


def depth_normalized(
    *, value_fn: ValueFn = child_mean, clip: float = 5.0, ddof: int = 1, epsilon: float = 1e-8
) -> AdvantageFn:
    """`clip((V(s) - mean) / (std + epsilon), -clip, clip)` over the nodes of one prompt at one depth, each counted once
    (BranchGRPO, 2509.06040). A lone node and nodes of one value get 0."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        tree = build_tree(batch)
        roots = jnp.asarray(tree.roots)
        depths = jnp.asarray(tree.depths)
        order = jnp.lexsort((depths, roots))
        differs = (jnp.diff(roots[order]) != 0) | (jnp.diff(depths[order]) != 0)
        level = jnp.zeros_like(roots).at[order].set(jnp.cumsum(jnp.pad(differs, (1, 0))).astype(roots.dtype))
        value = value_fn(tree, batch.reward)
        score = segment_whiten(value, level, roots >= 0, ddof=ddof, epsilon=epsilon)
        is_below = jnp.asarray(tree.parents) >= 0
        return _masked(on_tokens(tree, jnp.where(is_below, jnp.clip(score, -clip, clip), 0)), batch)

    return advantages


def surprisal_weighted(*, ddof: int = 0, epsilon: float = 1e-6) -> AdvantageFn:
    """Leaf rewards z-scored per prompt and averaged up the tree with the surprisal of turns (AT2PO, 2601.04767).

        A(s) = sum_{children c} H(c) A(c) / sum H(c),    H(c) = mean of -log p over the tokens of c's first turn

    On every token of the node. Siblings without surprisal count the same.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        tree = build_tree(batch)
        mask = _valid_tokens(batch)
        total = jnp.shape(tree.parents)[0]
        inside = mask & (jnp.asarray(tree.node_ids) >= 0)
        ids = jnp.where(inside, tree.node_ids, total).ravel()
        turn_ids = jnp.asarray(batch.turn_ids)
        first_turn = jnp.full(total, jnp.iinfo(turn_ids.dtype).max).at[ids].min(turn_ids.ravel(), mode="drop")
        is_first = inside & (turn_ids == first_turn[jnp.maximum(jnp.asarray(tree.node_ids), 0)])
        surprisal = jnp.where(is_first, -as_float(batch.behavior_logprobs), 0)
        count = jnp.zeros(total, jnp.int32).at[ids].add(is_first.ravel().astype(jnp.int32), mode="drop")
        summed = jnp.zeros(total, surprisal.dtype).at[ids].add(surprisal.ravel(), mode="drop")
        weights = jnp.maximum(summed / jnp.maximum(count, 1), 0)
        score = segment_whiten(batch.reward, batch.group_id, batch.is_valid, ddof=ddof, epsilon=epsilon)
        return _masked(on_tokens(tree, child_mean(tree, score, weights)), batch)

    return advantages


def prefix_baseline(*, alpha: float = 0.5) -> AdvantageFn:
    """`a - mean_group(a)`, `a = R - alpha V(prefix)`, the prefix being the node before the row's own tokens; on these
    alone (Tree-OPO's form, 2509.09284, with on-policy values).

    Rows of equal reward get 0 only where their prefixes are worth the same, as they are in that case.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        tree = build_tree(batch)
        value = leaf_mean(tree, batch.reward)
        own = token_leaf_counts(tree) == 1
        last = last_nodes(tree)
        leaves = jnp.asarray(tree.leaf_counts)[last]
        prefix = jnp.where(leaves > 1, value[last], parent_values(tree, value)[last])
        score = jnp.where(batch.is_valid, as_float(batch.reward) - alpha * prefix, 0)
        mean = segment_mean(score, batch.group_id, batch.is_valid)[jnp.asarray(batch.group_id)]
        return jnp.where(own, _on_tokens(score - mean, batch), 0)

    return advantages


def trie_difference(*, epsilon: float = 1e-6) -> AdvantageFn:
    """The group's advantage plus the step in value where samples part, no forks needed (TEMPO, 2509.18314).

        A[t] = (R - mean + V(after t) - V(before t)) / (std + epsilon)

    V is the mean reward of the rows of the group with the same text so far; mean and std (ddof 1) of the group.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        tree = build_tree(batch, match_owners(batch))
        value = leaf_mean(tree, batch.reward)
        step = jnp.where(tree.node_starts, on_tokens(tree, value - parent_values(tree, value)), 0)
        group_id = jnp.asarray(batch.group_id)
        std = segment_std(batch.reward, group_id, batch.is_valid)[group_id]
        centered = jnp.where(batch.is_valid, as_float(batch.reward) - value[group_id], 0)
        return _masked((centered[:, None] + step) / (std[:, None] + epsilon), batch)

    return advantages


def vine_gain() -> AdvantageFn:
    """Values from continuations that are thrown away (VinePPO, 2410.01679; SPO-chain, 2505.23564, with
    `below_probability`).

        A[t] = V(next cut) - V(last cut),    V(end) = R

    The cuts of an initial sample are the places where rows were forked from it, and V there is the mean reward of these
    rows. Before the first cut V is the mean reward of the prompt's initial samples. Only initial samples get
    credit; forked rows get 0, see `root_tokens`.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        parent = jnp.asarray(batch.parent_row)
        group_id = jnp.asarray(batch.group_id)
        is_valid = jnp.asarray(batch.is_valid)
        rows, width = jnp.shape(batch.tokens)
        # Rewards less one of their group, so that equal ones leave no rounding.
        mean = segment_mean(batch.reward, group_id, is_valid & (parent < 0))[group_id]
        reward = jnp.where(is_valid, as_float(batch.reward) - mean, 0)
        where = (jnp.where(is_valid & (parent >= 0), parent, rows), jnp.asarray(batch.fork_index))
        count = jnp.zeros((rows, width), jnp.int32).at[where].add(1, mode="drop")
        value = jnp.zeros((rows, width), reward.dtype).at[where].add(reward, mode="drop") / jnp.maximum(count, 1)

        column = jnp.arange(width)
        last = jax.lax.cummax(jnp.where(count > 0, column, -1), axis=1)
        following = jax.lax.cummin(jnp.where(count > 0, column, width), axis=1, reverse=True)
        following = jnp.pad(following[:, 1:], ((0, 0), (0, 1)), constant_values=width)
        before = jnp.where(last >= 0, jnp.take_along_axis(value, jnp.maximum(last, 0), axis=1), 0)
        after = jnp.where(
            following < width,
            jnp.take_along_axis(value, jnp.minimum(following, width - 1), axis=1),
            reward[:, None],
        )
        return _masked(jnp.where((parent < 0)[:, None], after - before, 0), batch)

    return advantages


def below_probability(advantage_fn: AdvantageFn, *, threshold: float = 0.9) -> AdvantageFn:
    """`advantage_fn` on tokens that the behavior policy sampled with a probability below `threshold`, 0 on the others
    (the probability mask of SPO, 2505.23564)."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        is_choice = as_float(batch.behavior_logprobs) < jnp.log(threshold)
        return _constant(jnp.where(is_choice, advantage_fn(batch), 0))

    return advantages


def whitened(advantage_fn: AdvantageFn, *, epsilon: float = 1e-8) -> AdvantageFn:
    """`advantage_fn`, whitened over all action tokens of the batch. Prompts of equal rewards can become non-zero beside
    others."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        return _constant(masked_whiten(advantage_fn(batch), _valid_tokens(batch), epsilon=epsilon))

    return advantages
