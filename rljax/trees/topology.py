"""The nodes of a rollout's forest, as arrays: from fork columns to values of nodes and back to tokens. Jitted, static
sizes.

Rows with one `group_id` are the leaves of one tree that hangs on their prompt: `parent_row` and `fork_index` say which
tokens a row inherited, whatever the tokens are (a branch that happens to repeat the token it forked at shares nothing
more). The leaves that count are the valid rows. A **node** is a maximal run of tokens below which the same leaves lie.
So a leaf's own last run is a node, a fork ends one, and the prompt is part of the group's root node. Rows that are not
valid pass their prefixes on, and make no node and no leaf.

`B` rows, `T` positions, `N` = 3 B nodes: node `g < B` is the root of group `g`, the others follow in the order of their
first tokens; unused ones have no leaves.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.ops import as_float
from rljax.types import NO_PARENT, ArrayLike, RolloutBatch, struct

NO_NODE = -1
"""`node_ids` where no valid row passes, and `roots` of unused nodes."""


@struct
class Tree:
    """The forest of a batch.

    `parents` is the node before on the path (`NO_PARENT` for roots and unused nodes), `roots` the root node of its
    group, `depths` the number of nodes above, `leaf_counts` the valid rows below. On rows, `node_ids` is the node of a
    token, `node_starts` marks the first token of every node but the root, and `owners` names the row that generated a
    token. Tokens before the first action token of a group are its prompt; they belong to the root node, and their owner
    is the first row of the group. `root_rows` is the sample a row descends from, `is_leaf` the valid rows.
    """

    parents: Int[ArrayLike, " N"]
    roots: Int[ArrayLike, " N"]
    depths: Int[ArrayLike, " N"]
    leaf_counts: Int[ArrayLike, " N"]
    node_ids: Int[ArrayLike, "B T"]
    node_starts: Bool[ArrayLike, "B T"]
    owners: Int[ArrayLike, "B T"]
    root_rows: Int[ArrayLike, " B"]
    group_id: Int[ArrayLike, " B"]
    is_leaf: Bool[ArrayLike, " B"]


@jax.jit
def build_tree(batch: RolloutBatch, owners: Int[ArrayLike, "B T"] | None = None) -> Tree:
    """The forest that the fork columns of `batch` describe, or `owners` if it is given (see `match_owners`)."""
    group_id, is_leaf, lengths = (jnp.asarray(x) for x in (batch.group_id, batch.is_valid, batch.lengths))
    rows, width = jnp.shape(batch.tokens)
    column = jnp.arange(width, dtype=jnp.int32)

    # Who generated each token; a group's prompt counts as its first row's.
    root_rows, inherited = _walk_up(batch)
    owners = _share_prompts(inherited if owners is None else jnp.asarray(owners, jnp.int32), batch)

    # How many leaves lie below each token.
    is_token = column < lengths[:, None]
    leaves = jnp.where(is_token, _sum_shared(owners, (is_token & is_leaf[:, None]).astype(jnp.int32)), 0)
    group_leaves = jax.ops.segment_sum(is_leaf.astype(jnp.int32), group_id, num_segments=rows)

    # A node begins where the leaves below change. Leaf sets shrink along a path, so they change exactly where their
    # sizes do.
    before = jnp.concatenate([group_leaves[group_id][:, None], leaves[:, :-1]], axis=1)[:, :width]
    starts = (leaves > 0) & (leaves != before)

    # The row that generated a node's first token numbers the node, after the roots; the rows that share it look the
    # number up there.
    is_new = starts & (owners == jnp.arange(rows)[:, None])
    new_ids = (rows + jnp.cumsum(is_new.ravel()) - 1).reshape(rows, width).astype(jnp.int32)
    start = jax.lax.cummax(jnp.where(starts, column, -1), axis=1)
    owner_of_start = jnp.take_along_axis(owners, jnp.maximum(start, 0), axis=1)
    inside = new_ids[owner_of_start, jnp.maximum(start, 0)]
    node_ids = jnp.where(leaves > 0, jnp.where(start < 0, group_id[:, None], inside), NO_NODE)

    previous = jnp.concatenate([group_id[:, None], node_ids[:, :-1]], axis=1)[:, :width]
    depth = jnp.cumsum(starts, axis=1, dtype=jnp.int32)

    # A root per group, and at most two new nodes per row: its own last run, and the one that its fork ends. Places that
    # begin no node write out of bounds, which is dropped.
    total = 3 * rows
    where = jnp.where(starts, node_ids, total).ravel()

    def per_node(values: Array, of_roots: Array) -> Array:
        """Values at the first tokens of nodes, on nodes; every row that passes says the same."""
        others = jnp.full(total, NO_NODE, jnp.int32).at[where].max(values.ravel().astype(jnp.int32), mode="drop")
        return jnp.where(jnp.arange(total) < rows, jnp.pad(of_roots, (0, total - rows)), others)

    groups = jnp.arange(rows, dtype=jnp.int32)
    return Tree(
        parents=per_node(previous, jnp.full(rows, NO_PARENT, jnp.int32)),
        roots=per_node(jnp.broadcast_to(group_id[:, None], starts.shape), jnp.where(group_leaves > 0, groups, NO_NODE)),
        depths=jnp.maximum(per_node(depth, jnp.zeros(rows, jnp.int32)), 0),
        leaf_counts=jnp.maximum(per_node(leaves, group_leaves), 0),
        node_ids=node_ids,
        node_starts=starts,
        owners=owners,
        root_rows=root_rows,
        group_id=group_id,
        is_leaf=is_leaf,
    )


@jax.jit
def match_owners(batch: RolloutBatch) -> Int[Array, "B T"]:
    """Owners by equal text: a token belongs to the first row of its group whose path up to it is the same. This is the
    prefix trie of independent samples, which needs no fork columns (TEMPO, 2509.18314). Tokens are compared by
    `token_keys` where the batch has them."""
    lengths = jnp.asarray(batch.lengths)
    rows, width = jnp.shape(batch.tokens)
    identity = jnp.asarray(batch.tokens if batch.token_keys is None else batch.token_keys).reshape(rows, width, -1)
    index = jnp.arange(rows, dtype=jnp.int32)

    def step(owner: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        parts, t = at
        # Beyond its end a row is alone, and so stays.
        parts = jnp.where(t < lengths[:, None], parts, 0)
        alone = jnp.where(t < lengths, 0, 1 + index)
        order = jnp.lexsort((index, *parts.T, alone, owner))
        differs = jnp.stack([x[order][1:] != x[order][:-1] for x in (owner, *parts.T, alone)]).any(axis=0)
        first = jax.lax.cummax(jnp.where(jnp.pad(differs, (1, 0), constant_values=True), index, 0))
        owner = jnp.zeros_like(owner).at[order].set(order[first].astype(jnp.int32))
        return owner, owner

    group_first = jax.ops.segment_min(index, jnp.asarray(batch.group_id), num_segments=rows)
    start = group_first[jnp.asarray(batch.group_id)]
    _, owners = jax.lax.scan(step, start, (identity.swapaxes(0, 1), jnp.arange(width)))
    return owners.T


def leaf_mean(
    tree: Tree, values: Float[ArrayLike, " B"], mask: Bool[ArrayLike, " B"] | None = None
) -> Float[Array, " N"]:
    """The mean of `values` over the leaves below each node, or over those of them where `mask`; 0 for none.

        V(s) = sum_{leaves l below s} values[l] / number of them

    Equal values within a group give that value exactly.
    """
    mask = jnp.asarray(tree.is_leaf) if mask is None else jnp.asarray(tree.is_leaf) & jnp.asarray(mask)
    shift, values = _shifted(tree, values, mask)
    count = _sum_below(tree, mask.astype(jnp.int32))
    mean = shift + _sum_below(tree, values) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, 0)


@jax.jit
def child_mean(
    tree: Tree, values: Float[ArrayLike, " B"], weights: Float[ArrayLike, " N"] | None = None
) -> Float[Array, " N"]:
    """Values from the leaves upwards: each node the mean of its children, weighted by the children's `weights` (>= 0).

        V(s) = sum_{children c of s} w_c V(c) / sum w_c

    A leaf whose row ends inside `s` (a branch without a token of its own) is a child of weight 1, or 0 where weights
    are given. Children of zero weight in all count the same. Equal values within a group give that value exactly.
    """
    is_leaf = jnp.asarray(tree.is_leaf)
    shift, values = _shifted(tree, values, is_leaf)
    total = shift.shape[0]

    # Where a node, and a row that ends in one, add to their parent; what is no child writes out of bounds.
    parents = jnp.asarray(tree.parents)
    is_child = (parents >= 0) & (jnp.asarray(tree.leaf_counts) > 0)
    above = jnp.where(is_child, parents, total)
    last = jnp.where(is_leaf, last_nodes(tree), total)

    def gather(of_nodes: Array, of_rows: Array) -> Array:
        return jnp.zeros(total, of_nodes.dtype).at[above].add(of_nodes, mode="drop").at[last].add(of_rows, mode="drop")

    ones = jnp.ones(total, values.dtype)
    node_weight = ones if weights is None else jnp.where(is_child, as_float(weights), 0)
    row_weight = jnp.ones_like(values) if weights is None else jnp.zeros_like(values)

    # A parent whose children weigh nothing takes them all alike.
    is_flat = gather(node_weight, row_weight) <= 0
    node_weight = jnp.where(is_flat[jnp.maximum(parents, 0)], 1, node_weight)
    row_weight = jnp.where(is_flat[jnp.minimum(last, total - 1)], 1, row_weight)
    norm = gather(node_weight, row_weight)
    norm = jnp.where(norm > 0, norm, 1)

    # Each pass carries values one level up, so that roots are right after as many as the forest is deep.
    def up(_: Array, v: Array) -> Array:
        return gather(node_weight * v, row_weight * values) / norm

    levels = jnp.max(jnp.asarray(tree.depths)) + 1
    return jnp.where(jnp.asarray(tree.leaf_counts) > 0, shift + jax.lax.fori_loop(0, levels, up, 0 * shift), 0)


def parent_values(tree: Tree, values: Float[ArrayLike, " N"]) -> Float[Array, " N"]:
    """The value of each node's parent; a root's own."""
    parents = jnp.asarray(tree.parents)
    values = as_float(values)
    return jnp.where(parents >= 0, values[jnp.maximum(parents, 0)], values)


def root_values(tree: Tree, values: Float[ArrayLike, " N"]) -> Float[Array, " N"]:
    """The value of the root node of each node's group."""
    return as_float(values)[jnp.maximum(jnp.asarray(tree.roots), 0)]


def last_nodes(tree: Tree) -> Int[Array, " B"]:
    """The node in which each row ends; for rows that are not valid, the last that it shares with a valid one."""
    node_ids = jnp.asarray(tree.node_ids)
    last = jnp.max(jnp.where(node_ids >= 0, jnp.arange(node_ids.shape[1]), -1), axis=1)
    inside = jnp.take_along_axis(node_ids, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
    return jnp.where(last >= 0, inside, jnp.asarray(tree.group_id))


def on_tokens(tree: Tree, values: Float[ArrayLike, " N"]) -> Float[Array, "B T"]:
    """The value of each token's node, 0 where it has none."""
    node_ids = jnp.asarray(tree.node_ids)
    return jnp.where(node_ids >= 0, as_float(values)[jnp.maximum(node_ids, 0)], 0)


def token_leaf_counts(tree: Tree) -> Int[Array, "B T"]:
    """How many valid rows hold each token; 0 where none does."""
    node_ids = jnp.asarray(tree.node_ids)
    return jnp.where(node_ids >= 0, jnp.asarray(tree.leaf_counts)[jnp.maximum(node_ids, 0)], 0)


def token_mean(tree: Tree, x: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """The mean of `x` over the rows that share each token, among those where `mask`; 0 off the mask."""
    owners = jnp.asarray(tree.owners)
    mask = jnp.asarray(mask)
    count = _sum_shared(owners, mask.astype(jnp.int32))
    total = _sum_shared(owners, jnp.where(mask, as_float(x), 0))
    return jnp.where(mask, total / jnp.maximum(count, 1), 0)


def prefix_weights(tree: Tree, *, power: float) -> Float[Array, "B T"]:
    """`count ** (power - 1)` on the rows, `count` being the leaves that hold a token; 0 where none does.

    A token counts once for each of its `count` rows, so its weight in all is `count ** power` times the mean of its
    rows: 1 is the plain sum, 0.5 the square root (TreeRL, 2506.11902), 0 the mean (2509.21154). Exact under
    aggregations that weigh all rows of a token alike, such as the token mean.
    """
    count = token_leaf_counts(tree)
    weight = jnp.maximum(count, 1).astype(jnp.result_type(float)) ** (power - 1)
    return jnp.where(count > 0, weight, 0)


def _walk_up(batch: RolloutBatch) -> tuple[Array, Array]:
    """The root row of each row, and the row that generated each token."""
    parent = jnp.asarray(batch.parent_row)
    fork = jnp.asarray(batch.fork_index)
    rows, width = jnp.shape(batch.tokens)
    column = jnp.arange(width)
    index = jnp.arange(rows, dtype=jnp.int32)

    def climb(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        root, owner, _, steps = state
        up = parent[root]
        climbs = parent[root] >= 0
        inherited = (column < fork[owner]) & (parent[owner] >= 0)
        root = jnp.where(climbs, up, root).astype(jnp.int32)
        owner = jnp.where(inherited, parent[owner], owner).astype(jnp.int32)
        return root, owner, climbs.any() | inherited.any(), steps + 1

    start = (index, jnp.broadcast_to(index[:, None], (rows, width)), jnp.asarray(True), jnp.asarray(0))
    # A chain has at most `rows` links; the bound ends the walk on columns that make a ring.
    root, owner, _, _ = jax.lax.while_loop(lambda s: s[2] & (s[3] < rows), climb, start)
    return root, owner


def _share_prompts(owners: Array, batch: RolloutBatch) -> Array:
    """Gives the tokens before a group's first action token to the first row of the group."""
    group_id = jnp.asarray(batch.group_id)
    mask = jnp.asarray(batch.action_mask) & jnp.asarray(batch.is_valid)[:, None]
    rows, width = mask.shape
    # Overlong rows may have lost their action mask; another row of the group shows where the prompt ends.
    first = jnp.where(mask.any(axis=1), jnp.argmax(mask, axis=1), width)
    prompt = jax.ops.segment_min(first, group_id, num_segments=rows)[group_id]
    prompt = jnp.where(prompt < width, prompt, 0)
    first_row = jax.ops.segment_min(jnp.arange(rows, dtype=jnp.int32), group_id, num_segments=rows)[group_id]
    return jnp.where(jnp.arange(width) < prompt[:, None], first_row[:, None], owners)


def _sum_shared(owners: Array, x: Array) -> Array:
    """The sum of `x` over the rows that share a token, on each of them."""
    rows, width = x.shape
    key = owners * width + jnp.arange(width)
    return jax.ops.segment_sum(x.ravel(), key.ravel(), num_segments=rows * width)[key]


def _sum_below(tree: Tree, values: Array) -> Array:
    """The sum of row values over the rows that pass through each node."""
    starts = jnp.asarray(tree.node_starts)
    node_ids = jnp.asarray(tree.node_ids)
    total = jnp.shape(tree.parents)[0]
    ids = jnp.concatenate([jnp.asarray(tree.group_id), jnp.where(starts, node_ids, total).ravel()])
    x = jnp.concatenate([values, jnp.where(starts, values[:, None], 0).ravel()])
    return jax.ops.segment_sum(x, ids, num_segments=total)


def _shifted(tree: Tree, values: ArrayLike, mask: Array) -> tuple[Array, Array]:
    """The largest value of each node's group [N], and `values` less that of theirs, 0 off the mask: sums of equal
    values are then free of rounding."""
    x = as_float(values)
    group_id = jnp.asarray(tree.group_id)
    largest = jax.ops.segment_max(jnp.where(mask, x, -jnp.inf), group_id, num_segments=x.shape[0])
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0))
    roots = jnp.asarray(tree.roots)
    return jnp.where(roots >= 0, largest[jnp.maximum(roots, 0)], 0), jnp.where(mask, x - largest[group_id], 0)
