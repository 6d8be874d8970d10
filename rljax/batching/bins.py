"""Which rows go into which packed sequence. Host, numpy."""

import bisect
import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from rljax.batching.config import PackConfig
from rljax.batching.forest import Identity, SortedRows, sort_rows, unique_tokens

_LITTLE_SHARED = 0.1


class Bins(NamedTuple):
    """Rows in the order in which packed sequences hold them.

    `rows[i]` lies in the packed sequence `bin[i]`, whose numbers never fall, and shares its first `shared[i]` tokens
    with the row before it there. `size` packed sequences of `length` tokens each; `repeated` counts the tokens that
    the trie of all rows holds once and the packed sequences together more often.
    """

    rows: Int[np.ndarray, " n"]
    bin: Int[np.ndarray, " n"]
    shared: Int[np.ndarray, " n"]
    size: int
    length: int
    repeated: int


def quarters(size: int) -> tuple[int, ...]:
    """The automatic table of sizes up to `size`."""
    return tuple(sorted({max(-(-size * n // 4), 1) for n in (1, 2, 3, 4)}))


def choose_bins(identity: Identity, lengths: np.ndarray, groups: np.ndarray, config: PackConfig) -> Bins:
    """The bins of a forest or of rows side by side, as `config.share_prefixes` says."""
    table = config.length_buckets or quarters(config.pack_length)
    rows = np.arange(len(lengths), dtype=np.int32)
    side_by_side = SortedRows(order=rows, shared=np.zeros(len(lengths), np.int32))
    if not len(lengths):
        return Bins(rows, rows, rows, size=0, length=table[0], repeated=0)
    if config.share_prefixes is False:
        return _bins_of(side_by_side, lengths, groups, table, config)

    as_trie = sort_rows(identity, lengths)
    forest = _bins_of(as_trie, lengths, groups, table, config)
    if config.share_prefixes or as_trie.shared.sum() >= _LITTLE_SHARED * lengths.sum():
        return forest

    # Little is shared: whichever needs less room.
    plain = _bins_of(side_by_side, lengths, groups, table, config)
    return min(forest, plain, key=lambda b: -(-b.size // config.microbatch_size) * b.length)


def _bins_of(
    order: SortedRows, lengths: np.ndarray, groups: np.ndarray, table: Sequence[int], config: PackConfig
) -> Bins:
    """Bins of the shortest packed length that needs no more microbatches than the longest.

    Of automatic lengths, several microbatches take the longest alone: what a shorter one saves is less than the last
    microbatch leaves empty, and every length is a program.
    """
    best = None
    count = 0
    for size in sorted(table, reverse=True):
        if size < lengths.max() or (count > 1 and not config.length_buckets):
            break
        bins = _pack_bins(order, lengths, groups, size)
        micro = -(-len(bins) // config.microbatch_size)
        if best is not None and micro > count:
            break
        best = (bins, size)
        count = micro

    if best is None:
        raise ValueError(f"length_buckets={table} hold no row of {int(lengths.max())} tokens; add a larger one")

    bins, length = best
    places = np.concatenate(bins)
    shared = np.concatenate([_shared_within(order.shared, b) for b in bins])
    rows = order.order[places]
    return Bins(
        rows=rows,
        bin=np.repeat(np.arange(len(bins), dtype=np.int32), [len(b) for b in bins]),
        shared=shared,
        size=len(bins),
        length=length,
        repeated=int(lengths[rows].sum() - shared.sum()) - unique_tokens(order, lengths),
    )


def _shared_within(shared: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The prefix that each of some increasing places shares with the one before it among them."""
    out = np.zeros(len(places), np.int32)
    if len(places) > 1:
        # Two places share the least that neighbours between them do.
        out[1:] = np.minimum.reduceat(shared[: places[-1] + 1], places[:-1] + 1)
    return out


def _pack_bins(rows: SortedRows, lengths: np.ndarray, groups: np.ndarray, size: int) -> list[np.ndarray]:
    """Best-fit decreasing over units (the rows of a group, split where they exceed `size`); the cost of a unit in a
    bin is its own tokens less the longest prefix it shares with a unit there. Bins list places of `rows`."""
    first, cost = _units(rows, lengths, groups, size)
    # The order is stable, so that bins are a function of the rows alone.
    largest_first = np.argsort(-cost, kind="stable")
    if rows.shared.any():
        members = _best_fit_sharing(rows, lengths, first, cost, largest_first.tolist(), size)
    else:
        members = _best_fit(cost.tolist(), largest_first.tolist(), size)

    stops = np.append(first[1:], len(lengths))
    bins = [np.concatenate([np.arange(first[u], stops[u]) for u in sorted(units)]) for units in members]
    return sorted(bins, key=lambda b: b[0])


def _best_fit(cost: list[int], order: list[int], size: int) -> list[list[int]]:
    """Units by bin: each goes into the fullest bin that has room, the oldest of those."""
    members: list[list[int]] = []
    # (tokens, -number) of every bin: what stands last before a limit is the fullest, and the oldest among equals.
    by_use: list[tuple[int, int]] = []
    for unit in order:
        at = bisect.bisect_right(by_use, (size - cost[unit], 1)) - 1
        if at >= 0:
            used, negative = by_use.pop(at)
        else:
            used = 0
            negative = -len(members)
            members.append([])
        members[-negative].append(unit)
        bisect.insort(by_use, (used + cost[unit], negative))
    return members


def _best_fit_sharing(
    rows: SortedRows, lengths: np.ndarray, first: np.ndarray, cost: np.ndarray, order: list[int], size: int
) -> list[list[int]]:
    """Units by bin, where a unit adds less to a bin that holds a part of it.

    What a unit shares with all others takes a NumPy pass over them, so time goes with the square of the units. Groups
    that fit are one each; 8192 take about half a second.
    """
    # Neighbouring units share what their nearest rows do, which is the least that is shared on the way.
    starts = np.append(0, first[:-1] + 1)[: len(first)]
    boundary = np.minimum.reduceat(rows.shared[: first[-1] + 1], starts)

    members: list[list[int]] = []
    used = np.zeros(len(first), np.int64)
    unit_bin = np.full(len(first), -1)
    for unit in order:
        extra = np.full(len(members), cost[unit])
        if members:
            prefix = _prefix_with_others(boundary, unit, int(lengths[rows.order[first[unit]]]))
            placed = unit_bin >= 0
            saved = np.zeros(len(members), np.int64)
            np.maximum.at(saved, unit_bin[placed], prefix[placed])
            extra = extra - saved

        after = used[: len(members)] + extra
        fits = np.flatnonzero(after <= size)
        if len(fits):
            # Among the bins where it adds least, the fullest.
            chosen = fits[np.lexsort((-after[fits], extra[fits]))[0]]
            used[chosen] = after[chosen]
        else:
            chosen = len(members)
            members.append([])
            used[chosen] = cost[unit]
        members[chosen].append(int(unit))
        unit_bin[unit] = chosen
    return members


def _units(rows: SortedRows, lengths: np.ndarray, groups: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First place and number of unique tokens of every unit. Rows that share nothing are units of their own."""
    ends = np.asarray(lengths, np.int64)[rows.order]
    group = np.asarray(groups)[rows.order]
    new = ends - rows.shared

    # A run is what could be one unit: neighbours of a group that share something.
    begins = np.ones(len(ends), bool)
    begins[1:] = (group[1:] != group[:-1]) | (rows.shared[1:] == 0)
    runs = np.append(np.flatnonzero(begins), len(ends))
    total = np.add.reduceat(new, runs[:-1]) + rows.shared[runs[:-1]]

    first = []
    for begin, end, whole in zip(runs[:-1].tolist(), runs[1:].tolist(), total.tolist(), strict=True):
        if whole <= size:
            first.append(begin)
        else:
            first += _split(ends[begin:end].tolist(), rows.shared[begin:end].tolist(), size, begin)

    places = np.array(first)
    return places, np.add.reduceat(new, places) + rows.shared[places]


def _split(ends: list[int], shared: list[int], size: int, begin: int) -> list[int]:
    """First places, from `begin` on, of the units of at most `size` tokens that a run becomes.

    A cut before a row repeats what the row shares with the one before it. So cuts fall between subtrees, where least is
    shared, and there are no more of them than that takes.
    """
    count = len(ends)
    # Best way to cut the first `n` rows: tokens repeated, number of units, where the last one begins.
    best = [(0, 0, 0)]
    # Unique tokens of rows `i` to `n`, cut from the others, are `whole[n + 1] - whole[i] + shared[i]`.
    whole = [0]
    for end, common in zip(ends, shared, strict=True):
        whole.append(whole[-1] + end - common)

    # Starts that may begin the last unit, from the widest on; a later one that is as good displaces an earlier.
    starts: collections.deque[tuple[int, int, int]] = collections.deque()
    for n in range(count):
        repeated = shared[n] if n else 0
        start = (best[n][0] + repeated, best[n][1] + 1, n)
        while starts and starts[-1][:2] >= start[:2]:
            starts.pop()
        starts.append(start)
        while whole[n + 1] - whole[starts[0][2]] + shared[starts[0][2]] > size:
            starts.popleft()
        best.append(starts[0])

    cuts = []
    n = count
    while n:
        n = best[n][2]
        cuts.append(begin + n)
    return cuts[::-1]


def _prefix_with_others(boundary: np.ndarray, unit: int, own: int) -> np.ndarray:
    """Common prefix of the first row of `unit` with that of every unit, from the prefixes between neighbours."""
    prefix = np.empty(len(boundary), np.int64)
    prefix[unit] = own
    prefix[unit + 1 :] = np.minimum.accumulate(boundary[unit + 1 :])
    prefix[:unit] = np.minimum.accumulate(boundary[1 : unit + 1][::-1])[::-1]
    return prefix
