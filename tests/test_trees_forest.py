"""The forest of packed rows is the trie of the rows, laid out depth-first."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rljax.batching import build_forest, pad_rows, sort_rows, unique_tokens

ROWS = st.lists(st.lists(st.integers(0, 2), max_size=7), min_size=1, max_size=9)


def paths_of(forest):
    """Every packed token's path of ids, by following predecessors."""
    paths = []
    for k, before in enumerate(forest.predecessor):
        paths.append((*(paths[before] if before >= 0 else ()), int(forest.tokens[k])))
    return paths


@settings(max_examples=300, deadline=None)
@given(ROWS, st.booleans())
def test_visible_means_ancestor_or_self(rows, share):
    tokens, lengths = pad_rows(rows)
    forest = build_forest(tokens, lengths, share_prefixes=share)
    count = len(forest.tokens)
    ancestors = np.zeros((count, count), bool)  # [query, key], walking up one token at a time
    for q in range(count):
        k = q
        while k >= 0:
            ancestors[q, k] = True
            k = forest.predecessor[k]
    index = np.arange(count)
    visible = (index[None, :] <= index[:, None]) & (index[:, None] < forest.subtree_end[None, :])
    np.testing.assert_array_equal(visible, ancestors)
    np.testing.assert_array_equal(forest.positions, ancestors.sum(1) - 1)


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_rows_share_exactly_their_equal_paths(rows):
    tokens, lengths = pad_rows(rows)
    forest = build_forest(tokens, lengths)
    prefixes = {tuple(row[: t + 1]) for row in rows for t in range(len(row))}
    paths = paths_of(forest)
    assert len(paths) == len(set(paths)) and set(paths) == prefixes
    assert unique_tokens(sort_rows(tokens, lengths), lengths) == len(prefixes)
    for b, row in enumerate(rows):
        assert (forest.row_index[b, len(row) :] == -1).all()
        assert [paths[k] for k in forest.row_index[b, : len(row)]] == [tuple(row[: t + 1]) for t in range(len(row))]


def test_without_sharing_rows_stay_whole_and_in_order():
    tokens, lengths = pad_rows([[5, 6], [5, 6, 7], [], [1]])
    forest = build_forest(tokens, lengths, share_prefixes=False)
    np.testing.assert_array_equal(forest.tokens, [5, 6, 5, 6, 7, 1])
    np.testing.assert_array_equal(forest.subtree_end, [2, 2, 5, 5, 5, 6])
    np.testing.assert_array_equal(forest.predecessor, [-1, 0, -1, 2, 3, -1])


@settings(max_examples=50, deadline=None)
@given(ROWS, st.randoms())
def test_the_layout_does_not_depend_on_the_order_of_rows(rows, random):
    shuffled = rows.copy()
    random.shuffle(shuffled)
    first, second = build_forest(*pad_rows(rows)), build_forest(*pad_rows(shuffled))
    for name in ("tokens", "positions", "predecessor", "subtree_end"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("shared", [0, 500])
def test_512_rows_of_1000_tokens_take_a_fraction_of_a_second(shared):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1000, (512, 1000)).astype(np.int32)
    tokens[:, :shared] = tokens[np.arange(512) // 8 * 8, :shared]
    lengths = rng.integers(max(shared, 1), 1001, 512).astype(np.int32)
    best = np.inf
    for _ in range(3):
        start = time.process_time()
        build_forest(tokens, lengths)
        best = min(best, time.process_time() - start)
    assert best < 0.2
