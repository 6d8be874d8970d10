"""Forests of unique tokens: rows that share a prefix share its tokens. Host side, numpy.

Rows are sequences of tokens. Two rows share a token iff their whole paths up to and including it are equal, so the
forest is the trie of the rows, laid out depth-first (see `rljax.types.Packed` for the visibility rule).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt32


class SortedRows(NamedTuple):
    """Rows in lexicographic order, in which neighbours share the longest prefixes.

    `order[i]` is the row at place `i`; `shared[i]` the length of the common prefix of places `i - 1` and `i`
    (`shared[0]` is 0). Any two places `i < j` share `min(shared[i + 1 : j + 1])` tokens.
    """

    order: Int[np.ndarray, " B"]
    shared: Int[np.ndarray, " B"]


class Forest(NamedTuple):
    """`N` unique tokens in depth-first order, and where each row's tokens lie among them.

    `positions` is the depth on the path, `predecessor` the packed index of the token before (-1 for a root),
    `subtree_end` one past the last packed index of the subtree. `row_index[b, t]` is the packed index of token `t` of
    row `b`, -1 beyond its length. All int32.
    """

    tokens: Int[np.ndarray, " N"]
    positions: Int[np.ndarray, " N"]
    predecessor: Int[np.ndarray, " N"]
    subtree_end: Int[np.ndarray, " N"]
    row_index: Int[np.ndarray, "B T"]


Identity = Int[np.ndarray, "B T"] | UInt32[np.ndarray, "B T 2"]
"""What tokens are compared by: their ids, or `RolloutBatch.token_keys`."""


def sort_rows(identity: Identity, lengths: Int[np.ndarray, " B"]) -> SortedRows:
    """Lexicographic order of the rows `identity[b, :lengths[b]]` and the prefix each shares with the one before."""
    # Bytes of big-endian numbers compare as the numbers do.
    big_endian = np.ascontiguousarray(identity, dtype=">u4")
    keys = [big_endian[b, :n].tobytes() for b, n in enumerate(lengths)]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int32)

    shared = np.zeros(len(order), np.int32)
    if len(order) > 1:
        ordered = identity[order]
        ends = np.asarray(lengths)[order]
        differs = ordered[1:] != ordered[:-1]
        if differs.ndim == 3:
            differs = differs.any(axis=-1)
        # A column that always differs stands at the end, where `argmax` finds rows that are equal throughout.
        differs = np.pad(differs, [(0, 0), (0, 1)], constant_values=True)
        shared[1:] = np.minimum(differs.argmax(axis=1), np.minimum(ends[1:], ends[:-1]))

    return SortedRows(order=order, shared=shared)


def build_forest(
    tokens: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    *,
    share_prefixes: bool = True,
    token_keys: UInt32[np.ndarray, "B T 2"] | None = None,
) -> Forest:
    """The forest of the rows `tokens[b, :lengths[b]]`.

    Tokens are one where all of their paths up to and including them have equal `token_keys`, or equal ids without keys.
    With `share_prefixes` off every row is a tree of its own, in the order given. Rows of length 0 are allowed.
    """
    count, width = tokens.shape
    if share_prefixes:
        order, shared = sort_rows(tokens if token_keys is None else token_keys, lengths)
    else:
        order = np.arange(count, dtype=np.int32)
        shared = np.zeros(count, np.int32)

    # The new tokens of a place begin where those of the place before end.
    ends = np.asarray(lengths, np.int32)[order]
    starts = np.concatenate([[0], np.cumsum(ends - shared)]).astype(np.int32)
    total = int(starts[-1])
    column = np.arange(width, dtype=np.int32)

    # Token t of place i belongs to the last place j <= i that did not take its t-th token from the place before.
    own = shared[:, None] <= column
    place = np.arange(count, dtype=np.int32)[:, None]
    owner = np.maximum.accumulate(np.where(own, place, 0), axis=0)
    index = np.where(column < ends[:, None], (starts[:-1] - shared)[owner] + column, -1).astype(np.int32)

    # Its subtree ends where the next place begins that does not share it.
    next_place = np.full((count + 1, width), count, np.int32)
    next_place[:-1] = np.minimum.accumulate(np.where(own, place, count)[::-1], axis=0)[::-1]

    # Every unique token is written once, by the place that owns it.
    new = own & (column < ends[:, None])
    where = index[new]
    before = np.concatenate([np.full((count, 1), -1, np.int32), index[:, :-1]], axis=1)[:, :width]
    forest = Forest(
        tokens=np.empty(total, np.int32),
        positions=np.empty(total, np.int32),
        predecessor=np.empty(total, np.int32),
        subtree_end=np.empty(total, np.int32),
        row_index=np.empty((count, width), np.int32),
    )
    forest.tokens[where] = tokens[order][new]
    forest.positions[where] = np.broadcast_to(column, new.shape)[new]
    forest.predecessor[where] = before[new]
    forest.subtree_end[where] = starts[next_place[1:][new]]
    forest.row_index[order] = index
    return forest


def unique_tokens(rows: SortedRows, lengths: Int[np.ndarray, " B"]) -> int:
    """How many tokens the forest of these rows has."""
    return int(np.asarray(lengths)[rows.order].sum() - rows.shared.sum())


def pad_rows(rows: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ragged rows as int32 `tokens [B, T]`, padded on the right with 0, and `lengths [B]`."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), int(lengths.max(initial=0))), np.int32)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row
    return tokens, lengths
