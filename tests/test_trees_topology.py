"""Nodes, leaves and values of forests, from fork columns, against golden trees and plain loops."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from forests import WIDTH, forest_batch, leaves_below, owner, pad, permute, random_forests
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import float64, map_fields

from rljax import trees

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trees.json").read_text())
examples = settings(max_examples=120, deadline=None)
build = jax.jit(trees.build_tree)
leaf_mean, child_mean = jax.jit(trees.leaf_mean), jax.jit(trees.child_mean)


def tree_of(batch):
    """As numpy, of the jitted function, on a fixed number of rows so that it compiles once."""
    rows = len(batch.group_id)
    filled = pad(batch, 10 - rows, WIDTH - batch.tokens.shape[1]) if rows < 10 else batch
    return map_fields(build(filled), np.asarray)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_trees(case):
    columns = {
        k: case[k] for k in ("prompt", "parent_row", "fork_index", "lengths", "group_id", "is_valid") if k in case
    }
    tree = trees.build_tree(forest_batch(**columns))
    np.testing.assert_array_equal(tree.node_ids, case["node_ids"])
    used = {
        str(n): [int(x[n]) for x in (tree.parents, tree.depths, tree.leaf_counts)] for n in np.unique(tree.node_ids)
    }
    used.pop("-1", None)
    for g in set(columns.get("group_id", [0])):
        if tree.leaf_counts[g]:  # a root without tokens is there all the same
            used[str(g)] = [int(x[g]) for x in (tree.parents, tree.depths, tree.leaf_counts)]
    assert used == case["nodes"]
    np.testing.assert_array_equal(tree.root_rows, case["root_rows"])
    if "owners" in case:
        np.testing.assert_array_equal(tree.owners, case["owners"])
    unused = np.setdiff1d(np.arange(len(tree.parents)), [int(n) for n in used])
    assert (np.asarray(tree.leaf_counts)[unused] == 0).all()
    assert (np.asarray(tree.roots)[unused] == trees.NO_NODE).all()


@examples
@given(random_forests())
def test_a_node_is_a_maximal_run_of_tokens_with_the_same_leaves(forest):
    prompt, batch = forest
    tree = tree_of(batch)
    rows = len(batch.group_id)
    prompt = prompt if batch.is_valid.any() else 0
    sets = {}
    for b in range(rows):
        everyone = frozenset(np.flatnonzero((batch.group_id == batch.group_id[b]) & batch.is_valid).tolist())
        path = [(everyone, int(batch.group_id[b]))]
        for t in range(batch.lengths[b]):
            below = leaves_below(batch, b, t, prompt)
            node = int(tree.node_ids[b, t])
            if not below:
                assert node == trees.NO_NODE and not tree.node_starts[b, t]
                continue
            assert sets.setdefault(node, below) == below
            assert tree.leaf_counts[node] == len(below)
            assert tree.node_starts[b, t] == (below != path[-1][0])
            if tree.node_starts[b, t]:
                assert tree.parents[node] == path[-1][1]
                path.append((below, node))
            assert node == path[-1][1]
            assert tree.depths[node] == len(path) - 1
            assert tree.roots[node] == batch.group_id[b]
            if t >= prompt:
                assert tree.owners[b, t] == owner(batch, b, t)
        assert (tree.node_ids[b, batch.lengths[b] :] == trees.NO_NODE).all()
    assert len(set(sets.values())) == len(sets)  # no two nodes with the same leaves
    np.testing.assert_array_equal(tree.root_rows[:rows], [owner(batch, b, -1) for b in range(rows)])


@examples
@given(random_forests())
def test_values_of_nodes_equal_loops(forest):
    _, batch = forest
    tree = tree_of(batch)
    rows = len(batch.group_id)
    reward = np.zeros(10, np.float32)
    reward[:rows] = batch.reward
    below = {}  # rows by node
    for b in np.flatnonzero(batch.is_valid):
        for node in {int(batch.group_id[b]), *tree.node_ids[b]} - {-1}:
            below.setdefault(node, []).append(b)
    leaf_values, child_values = np.asarray(leaf_mean(tree, reward)), np.asarray(child_mean(tree, reward))
    roots = np.asarray(leaf_mean(tree, reward, tree.root_rows == np.arange(10)))

    def by_children(node):
        children = [n for n in below if tree.parents[n] == node]
        inside = {b for c in children for b in below[c]}
        return np.mean([by_children(c) for c in children] + [batch.reward[b] for b in below[node] if b not in inside])

    for node, members in below.items():
        np.testing.assert_allclose(leaf_values[node], np.mean(batch.reward[members]), atol=1e-6)
        np.testing.assert_allclose(child_values[node], by_children(node), atol=1e-6)
        initial = [b for b in members if batch.parent_row[b] < 0]
        np.testing.assert_allclose(roots[node], np.mean(batch.reward[initial]) if initial else 0, atol=1e-6)
    unused = np.setdiff1d(np.arange(30), list(below))
    assert not leaf_values[unused].any() and not child_values[unused].any()


def test_leaf_mean_and_child_mean_differ_on_unbalanced_trees():
    """A leaf beside an inner node of two leaves: 1/3 against 1/2."""
    batch = forest_batch(parent_row=[-1, 0, 1], fork_index=[0, 2, 4], lengths=[6, 6, 6], rewards=[1, 0, 0])
    tree = trees.build_tree(batch)
    np.testing.assert_allclose(trees.leaf_mean(tree, batch.reward)[0], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(trees.child_mean(tree, batch.reward)[0], 1 / 2, rtol=1e-6)
    inner = int(tree.node_ids[1, 2])
    weights = np.zeros(9, np.float32)
    weights[inner], weights[int(tree.node_ids[0, 2])] = 3.0, 1.0
    np.testing.assert_allclose(trees.child_mean(tree, batch.reward, weights)[0], 1 / 4, rtol=1e-6)
    np.testing.assert_allclose(trees.child_mean(tree, batch.reward, 0 * weights)[0], 1 / 2, rtol=1e-6)


@examples
@given(random_forests(), st.sampled_from([0.1, 0.2, 0.8, 1.1, 1 / 3]))
def test_equal_rewards_give_exactly_that_value_everywhere(forest, value):
    _, batch = forest
    tree = tree_of(batch)
    reward = np.full(10, value, np.float32)
    used = tree.leaf_counts > 0
    np.testing.assert_array_equal(np.asarray(leaf_mean(tree, reward))[used], reward[0])
    np.testing.assert_array_equal(np.asarray(child_mean(tree, reward))[used], reward[0])


@jax.jit
def describe(tree, reward):
    values = trees.leaf_mean(tree, reward)
    per_node = [values, trees.child_mean(tree, reward), trees.parent_values(tree, values), tree.depths.astype(float)]
    per_token = [trees.on_tokens(tree, v) for v in per_node]
    return [*per_token, trees.token_leaf_counts(tree), trees.prefix_weights(tree, power=0.5)]


def tokens_view(batch):
    """What the tree says of each token, free of node numbers."""
    tree = tree_of(batch)
    rows, width = batch.tokens.shape
    reward = np.where(tree.is_leaf, np.pad(batch.reward, (0, 10 - rows)), np.nan)
    per_token = [*describe(tree, reward), tree.node_starts]
    return [np.asarray(x)[:rows, :width] for x in per_token]


@examples
@given(random_forests(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(forest, random):
    _, batch = forest
    order = list(range(len(batch.group_id)))
    random.shuffle(order)
    for a, b in zip(tokens_view(batch), tokens_view(permute(batch, order)), strict=True):
        np.testing.assert_allclose(b[order], a, atol=1e-6)


@examples
@given(random_forests(max_rows=7))
def test_padding_and_rows_without_a_reward_change_nothing(forest):
    _, batch = forest
    rows, width = batch.tokens.shape
    narrow = map_fields(batch, lambda x: np.asarray(x)[:, : max(batch.lengths)] if np.ndim(x) == 2 else x)
    for a, b in zip(tokens_view(batch), tokens_view(pad(narrow, 3, WIDTH - max(batch.lengths))), strict=True):
        np.testing.assert_allclose(b[:rows, :width], a, atol=1e-6)
    # A branch that failed, on top of every row.
    failed = dataclasses.replace(
        permute(pad(batch, 1, 0), range(rows + 1)),
        parent_row=np.append(batch.parent_row, rows - 1).astype(np.int32),
        fork_index=np.append(batch.fork_index, batch.lengths[-1] - 1).astype(np.int32),
        group_id=np.append(batch.group_id, batch.group_id[-1]).astype(np.int32),
        lengths=np.append(batch.lengths, WIDTH).astype(np.int32),
    )
    for a, b in zip(tokens_view(batch), tokens_view(failed), strict=True):
        np.testing.assert_allclose(b[:rows], a, atol=1e-6)


def test_rows_that_lost_their_action_mask_still_share_the_prompt():
    batch = forest_batch(parent_row=[-1, 0, -1], fork_index=[0, 3, 0], lengths=[5, 5, 4], prompt=2)
    mask = np.array(batch.action_mask)
    mask[0] = False
    a, b = (trees.build_tree(dataclasses.replace(batch, action_mask=m)) for m in (batch.action_mask, mask))
    np.testing.assert_array_equal(a.node_ids, b.node_ids)
    mask[:] = False  # nothing tells the prompt, so only the fork columns count
    lost = trees.build_tree(dataclasses.replace(batch, action_mask=mask))
    np.testing.assert_array_equal(trees.token_leaf_counts(lost), [[2, 2, 2, 1, 1], [2, 2, 2, 1, 1], [1, 1, 1, 1, 0]])


def test_prefix_weights_are_powers_of_the_leaf_count():
    batch = forest_batch(parent_row=[-1, 0, 0], fork_index=[0, 3, 4], lengths=[6, 6, 5])
    tree = trees.build_tree(batch)
    count = np.array([[3, 3, 3, 2, 1, 1], [3, 3, 3, 1, 1, 1], [3, 3, 3, 2, 1, 0]])
    np.testing.assert_array_equal(trees.token_leaf_counts(tree), count)
    with np.errstate(divide="ignore"):
        for power in (1.0, 0.5, 0.0):
            want = np.where(count > 0, np.maximum(count, 1).astype(float) ** (power - 1), 0)
            np.testing.assert_allclose(trees.prefix_weights(tree, power=power), want, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(trees.prefix_weights(tree, power=1.0)), (count > 0).astype(np.float32))


@examples
@given(random_forests())
def test_a_token_weighs_its_count_to_the_power(forest):
    """Summed over the rows that share it."""
    _, batch = forest
    tree = tree_of(batch)
    alive = (tree.node_ids >= 0) & tree.is_leaf[:, None]
    for power in (1.0, 0.5, 0.0):
        weight = np.asarray(trees.prefix_weights(tree, power=power))
        total = {}
        for b, t in np.argwhere(alive):
            key = (tree.owners[b, t], t)
            total.setdefault(key, []).append(weight[b, t])
        for weights in total.values():
            np.testing.assert_allclose(sum(weights), len(weights) ** power, rtol=1e-5)


@examples
@given(random_forests())
def test_token_mean_is_taken_over_the_rows_that_share_a_token(forest):
    prompt, batch = forest
    tree = tree_of(batch)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, WIDTH)).astype(np.float32)
    mask = np.asarray(tree.is_leaf)[:, None] & (tree.node_ids >= 0) & (rng.random(x.shape) < 0.8)
    got = np.asarray(trees.token_mean(tree, np.where(mask, x, np.nan), mask))
    for b, t in np.argwhere(mask):
        sharers = [j for j in leaves_below(batch, b, t, prompt) if mask[j, t]]
        np.testing.assert_allclose(got[b, t], x[sharers, t].mean(), atol=1e-6)
    assert not got[~mask].any()


def test_owners_by_text_make_the_trie_of_independent_samples():
    rows = [[9, 1, 2, 3], [9, 1, 2, 4], [9, 1, 5], [9, 1, 2, 3], [9, 1, 2]]
    group_id = [0, 0, 0, 1, 0]
    batch = forest_batch(parent_row=[-1] * 5, fork_index=[0] * 5, lengths=[4, 4, 3, 4, 3], group_id=group_id)
    tokens = np.zeros((5, 4), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    batch = dataclasses.replace(batch, tokens=tokens)
    owners = np.asarray(trees.match_owners(batch))
    assert [list(o[: len(r)]) for o, r in zip(owners, rows, strict=True)] == [
        [0, 0, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 2],
        [3, 3, 3, 3],
        [0, 0, 0],
    ]
    tree = trees.build_tree(batch, trees.match_owners(batch))
    np.testing.assert_array_equal(
        trees.token_leaf_counts(tree), [[4, 4, 3, 1], [4, 4, 3, 1], [4, 4, 1, 0], [1] * 4, [4, 4, 3, 0]]
    )


def test_a_ring_of_parents_ends():
    batch = forest_batch(parent_row=[-1, -1], fork_index=[0, 0], lengths=[3, 3])
    ring = dataclasses.replace(batch, parent_row=np.array([1, 0], np.int32), fork_index=np.array([3, 3], np.int32))
    assert np.isfinite(trees.leaf_mean(trees.build_tree(ring), batch.reward)).all()


def test_values_keep_double_precision():
    batch = forest_batch(
        parent_row=[-1, 0, 0], fork_index=[0, 2, 3], lengths=[4, 4, 4], rewards=[1, 0, 0], dtype=np.float64
    )
    with float64():
        tree = trees.build_tree(batch)
        for values in (trees.leaf_mean(tree, batch.reward), trees.child_mean(tree, batch.reward)):
            assert values.dtype == np.float64
        np.testing.assert_allclose(trees.leaf_mean(tree, batch.reward)[0], 1 / 3, rtol=1e-15)
