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
        rows = sort_rows(tokens if token_keys is None else token_keys, lengths)
    else:
        rows = SortedRows(order=np.arange(count, dtype=np.int32), shared=np.zeros(count, np.int32))

    ends = np.asarray(lengths, np.int32)[rows.order]
    laid = lay_out_forest(ends, rows.shared)
    row_index = np.full((count, width), -1, np.int32)
    row_index[rows.order] = _padded(laid.row_index, ends, width)
    return Forest(
        tokens=tokens.reshape(-1)[laid.token_of(rows.order, width)].astype(np.int32),
        positions=laid.positions,
        predecessor=laid.predecessor,
        subtree_end=laid.subtree_end,
        row_index=row_index,
    )


class RaggedForest(NamedTuple):
    """The forest of rows in depth-first order, without their tokens: all that follows from lengths and shared prefixes.

    Unique tokens are numbered `[N]` and the tokens of rows `[F]`, row after row. `place` is the row that a unique token
    stands in first. `row_index` gives the unique token of every token of a row; the rest is as in `Forest`.
    """

    place: Int[np.ndarray, " N"]
    positions: Int[np.ndarray, " N"]
    predecessor: Int[np.ndarray, " N"]
    subtree_end: Int[np.ndarray, " N"]
    row_index: Int[np.ndarray, " F"]

    def token_of(self, order: Int[np.ndarray, " B"], width: int) -> Int[np.ndarray, " N"]:
        """Where the unique tokens stand in a flattened `[rows, width]` whose row `order[i]` is at place `i`."""
        return (np.asarray(order, np.int64) * width)[self.place] + self.positions


def lay_out_forest(ends: Int[np.ndarray, " B"], shared: Int[np.ndarray, " B"]) -> RaggedForest:
    """Rows of `ends[i]` tokens, of which the first `shared[i]` are those of the row before. A row that shares nothing
    begins a tree, so rows of several forests may follow each other.

    One pass over rows keeps the path of the row at hand as pieces, each a run of unique tokens of one row; whatever is
    of the size of the tokens is NumPy.
    """
    new = np.asarray(ends - shared, np.int64)
    starts = np.concatenate([[0], np.cumsum(new)])
    total = int(starts[-1])

    # The path at hand: first position and first unique token of each piece.
    path_from: list[int] = []
    path_at: list[int] = []
    path_end = 0

    # All paths, one after another; and the runs of unique tokens whose subtree ends at one place.
    pieces_from: list[int] = []
    pieces_at: list[int] = []
    pieces: list[int] = []
    closed_at: list[int] = []
    closed_length: list[int] = []
    closed_by: list[int] = []
    before_first: list[int] = []

    def close(position: int, by: int) -> None:
        """Ends the subtrees of the path's tokens from `position` on."""
        end = path_end
        while path_from and end > position:
            first = path_from[-1]
            at = path_at[-1]
            low = max(first, position)
            closed_at.append(at + low - first)
            closed_length.append(end - low)
            closed_by.append(by)
            if first >= position:
                path_from.pop()
                path_at.pop()
            end = low

    columns = zip(starts.tolist(), np.asarray(ends).tolist(), np.asarray(shared).tolist(), strict=False)
    for start, end, position in columns:
        close(position, start)
        before_first.append(path_at[-1] + position - 1 - path_from[-1] if path_from else -1)
        if end > position:
            path_from.append(position)
            path_at.append(start)
        path_end = end
        pieces.append(len(path_from))
        pieces_from += path_from
        pieces_at += path_at
    close(0, total)

    place = np.repeat(np.arange(len(new), dtype=np.int32), new)
    unique = np.arange(total, dtype=np.int32)
    predecessor = unique - np.int32(1)
    owns = new > 0
    predecessor[starts[:-1][owns]] = np.array(before_first, np.int32)[owns]

    closed = np.argsort(np.array(closed_at, np.int64))
    subtree_end = np.repeat(np.array(closed_by, np.int32)[closed], np.array(closed_length, np.int64)[closed])

    # A piece reaches to the next one of its row, the last one to the row's end.
    begins = np.array(pieces_from, np.int64)
    reaches = np.roll(begins, -1)
    has_path = np.array(pieces, np.int64) > 0
    reaches[np.cumsum(pieces, dtype=np.int64)[has_path] - 1] = np.asarray(ends)[has_path]
    sizes = reaches - begins
    offsets = np.array(pieces_at, np.int64) - (np.cumsum(sizes) - sizes)
    row_index = np.repeat(offsets.astype(np.int32), sizes)
    row_index += np.arange(len(row_index), dtype=np.int32)

    return RaggedForest(
        place=place,
        positions=unique - (starts[:-1] - shared).astype(np.int32)[place],
        predecessor=predecessor,
        subtree_end=subtree_end,
        row_index=row_index,
    )


def _padded(values: Int[np.ndarray, " F"], lengths: Int[np.ndarray, " B"], width: int) -> Int[np.ndarray, "B T"]:
    out = np.full((len(lengths), width), -1, np.int32)
    out[np.arange(width) < lengths[:, None]] = values
    return out


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
