"""Advantages of forests: what the nodes of `rljax.trees.build_tree` say about the tokens in them.

`R` is the reward of a row, and `V(s)` the mean reward of the valid rows below node `s`. As in `group`, rows that are
not valid take no part, a result is 0 off `action_mask`, and rows of one prompt with equal rewards get exactly 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.advantages.group import AdvantageFn, _constant, _on_tokens, _valid_tokens
from rljax.ops import segment_whiten
from rljax.trees import build_tree, leaf_mean, on_tokens, parent_values, prefix_weights, root_values, token_mean
from rljax.types import NO_PARENT, RolloutBatch


def intra_and_inter_tree(*, ddof: int = 1, epsilon: float = 1e-6) -> AdvantageFn:
    """A row among the leaves of its own tree, plus among all of its prompt (Tree-GRPO, 2509.21240, Eqs. 6-7).

        A = (R - mean_tree) / (std_tree + epsilon) + (R - mean_group) / (std_group + epsilon)

    A tree is an initial sample and all that was forked from it. A tree, or group, of one leaf or of equal rewards adds
    0; so without forks this is GRPO. (The released code keeps the raw reward of a lone leaf.)
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        trees = build_tree(batch).root_rows
        intra, inter = (
            segment_whiten(batch.reward, ids, batch.is_valid, ddof=ddof, epsilon=epsilon)
            for ids in (trees, batch.group_id)
        )
        return _on_tokens(intra + inter, batch)

    return advantages


def global_and_local(*, power: float = 0.5) -> AdvantageFn:
    """The gain of a node over the prompt and over the node before it (TreeRL, 2506.11902; AttnRL, 2509.26628).

        A(s) = count(s)^(power - 1) [ (V(s) - V(root)) + (V(s) - V(parent(s))) ]

    on every token of the node; the paper's power is 0.5, see `prefix_weights`. Without forks it is twice `R - mean`.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        tree = build_tree(batch)
        value = leaf_mean(tree, batch.reward)
        credit = (value - root_values(tree, value)) + (value - parent_values(tree, value))
        return _masked(on_tokens(tree, credit) * prefix_weights(tree, power=power), batch)

    return advantages


def global_and_local_released() -> AdvantageFn:
    """What TreeRL's released code computes in place of `global_and_local`: the value is damped before the difference,

        D(s) = n / (n - 1) (V(s) - V(root)) / sqrt(count(s)),    A(s) = D(s) + L(s),    L(s) = D(s) - D(parent(s))

    `n` being the leaves of the prompt, and an `L` of 0 below the first node of a path is replaced by that of the
    node before. A node no better than its parent so gets a local term. For replication only.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        tree = build_tree(batch)
        value = leaf_mean(tree, batch.reward)
        leaves = jnp.maximum(jnp.asarray(tree.leaf_counts), 1).astype(value.dtype)
        total = root_values(tree, leaves)
        damped = total / jnp.maximum(total - 1, 1) * (value - root_values(tree, value)) / jnp.sqrt(leaves)
        local = damped - parent_values(tree, damped)
        # On a path the last node that keeps its own term lends it to the nodes after.
        keeps = on_tokens(tree, jnp.where((jnp.abs(local) >= 1e-8) | (jnp.asarray(tree.depths) <= 1), 1.0, 0.0)) > 0
        column = jnp.arange(keeps.shape[1])
        source = jax.lax.cummax(jnp.where(keeps & jnp.asarray(tree.node_starts), column, -1), axis=1)
        local = on_tokens(tree, local)
        lent = jnp.where(source >= 0, jnp.take_along_axis(local, jnp.maximum(source, 0), axis=1), local)
        return _masked(on_tokens(tree, damped) + lent, batch)

    return advantages


def shared_mean(advantage_fn: AdvantageFn) -> AdvantageFn:
    """A token that several rows share gets the mean of what `advantage_fn` gives it in each of them.

        A'[i, t] = mean over the rows j that hold token t of row i of A[j, t]

    Of z-scored rewards this is ARPO's hard credit (2507.19849), and TreeAdv with plain means (2601.03703). Soft
    credit, ARPO's default, leaves the rows as they are.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        return _masked(token_mean(build_tree(batch), advantage_fn(batch), _valid_tokens(batch)), batch)

    return advantages


def prefix_weighted(advantage_fn: AdvantageFn, *, power: float) -> AdvantageFn:
    """`advantage_fn` times `count^(power - 1)`, `count` being the rows that share a token: 1 leaves the sum over rows,
    0.5 makes it sqrt(count) times their mean, 0 their mean (lambda-GRPO, 2509.21154). See `prefix_weights`."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        return _masked(advantage_fn(batch) * prefix_weights(build_tree(batch), power=power), batch)

    return advantages


def own_tokens(advantage_fn: AdvantageFn) -> AdvantageFn:
    """`advantage_fn`, 0 on the tokens that a fork has from its parent: what a branch came to says nothing against the
    prefix that it was given, from which other branches go on."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        is_fork = jnp.asarray(batch.parent_row) != NO_PARENT
        first = jnp.where(is_fork, jnp.asarray(batch.fork_index), 0)
        is_own = jnp.arange(jnp.shape(batch.tokens)[1]) >= first[:, None]
        return _masked(jnp.where(is_own, advantage_fn(batch), 0), batch)

    return advantages


def _masked(advantages: Array, batch: RolloutBatch) -> Array:
    return _constant(jnp.where(_valid_tokens(batch), advantages, 0))
