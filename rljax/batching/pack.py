"""Rows of a minibatch packed into the fixed shapes that are compiled: forests of unique tokens. Host, numpy.

As in `stack`, every dimension comes from a bucket table and is a function of the data alone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rljax.batching.config import PackConfig
from rljax.batching.forest import Forest, Identity, SortedRows, build_forest, sort_rows
from rljax.batching.stack import bucket
from rljax.types import ArrayLike, Packed, RolloutBatch, Rows, TrainBatch


class Packing(NamedTuple):
    """The layout of a minibatch, before any advantage or log-prob is attached.

    `source_row[m, b]` is the row of the batch that line `b` of microbatch `m` shows, -1 for padding; `mask` marks the
    tokens of these lines that are scored. `flat_tokens` counts the tokens of the rows, `unique_tokens` those packed,
    `scored_tokens` the unique ones whose log-prob is wanted.
    """

    packed: Packed
    row_index: Int[np.ndarray, "M B T"]
    mask: Bool[np.ndarray, "M B T"]
    source_row: Int[np.ndarray, "M B"]
    flat_tokens: int
    unique_tokens: int
    scored_tokens: int

    def rows_of(self, values: ArrayLike) -> np.ndarray:
        """`values [batch rows, T]` as `[M, B, T]`, 0 off the mask; `values [batch rows]` as `[M, B]`, 0 in padding."""
        values = np.asarray(values)
        is_kept = self.mask if values.ndim == 2 else self.source_row >= 0
        return np.where(is_kept, values[np.maximum(self.source_row, 0)], np.zeros((), values.dtype))

    def batch_of(self, values: ArrayLike, like: ArrayLike) -> np.ndarray:
        """The inverse: `values [M, B, T]` as an array of the shape of `like [batch rows, T]`, 0 off the mask."""
        out = np.zeros(np.shape(like), np.asarray(values).dtype)
        real = self.source_row >= 0
        out[self.source_row[real]] = np.where(self.mask, np.asarray(values), 0)[real]
        return out


def loss_mask(batch: RolloutBatch, extra_mask: ArrayLike | None = None) -> Bool[np.ndarray, "B T"]:
    """Tokens that receive gradient: sampled by the policy, in a valid row, and kept by `extra_mask` if there is one."""
    mask = np.asarray(batch.action_mask) & np.asarray(batch.is_valid)[:, None]
    return mask if extra_mask is None else mask & np.asarray(extra_mask, bool)


def pack(
    batch: RolloutBatch,
    advantages: Float[ArrayLike, "B T"],
    config: PackConfig,
    *,
    token_weights: Callable[[Bool[np.ndarray, "B T"]], ArrayLike] | None = None,
    extra_mask: Bool[ArrayLike, "B T"] | None = None,
    packing: Packing | None = None,
) -> TrainBatch:
    """One minibatch: the rows of `batch` that have loss tokens, packed, with everything that losses see.

    `token_weights` gives the aggregation's weights from the loss mask of the whole minibatch; None is the token mean.
    `old_logprobs` are the behavior's until the learner replaces them. `packing` is `layout` of the same loss mask, if
    it was made before. ValueError as in `layout`.
    """
    mask = loss_mask(batch, extra_mask)
    if packing is None:
        packing = layout(batch, mask, config)

    # Counted over the whole minibatch, before it is split: microbatches and devices then just add up.
    count = max(float(mask.sum()), 1.0)
    weights = mask / np.float32(count) if token_weights is None else token_weights(mask)

    behavior = packing.rows_of(np.asarray(batch.behavior_logprobs, np.float32))
    reference = None
    if batch.ref_logprobs is not None:
        reference = packing.rows_of(np.asarray(batch.ref_logprobs, np.float32))

    rows = Rows(
        row_index=packing.row_index,
        loss_mask=packing.mask,
        loss_weights=packing.rows_of(np.asarray(weights, np.float32)),
        token_count=np.full(len(packing.source_row), count, np.float32),
        advantages=packing.rows_of(np.asarray(advantages, np.float32)),
        behavior_logprobs=behavior,
        old_logprobs=behavior,
        source=packing.rows_of(np.asarray(batch.source, np.int32)),
        ref_logprobs=reference,
        columns={name: packing.rows_of(np.asarray(value, np.float32)) for name, value in batch.columns.items()},
    )
    return TrainBatch(packed=packing.packed, rows=rows)


def layout(batch: RolloutBatch, mask: Bool[np.ndarray, "B T"], config: PackConfig) -> Packing:
    """Packs the rows of `batch` that `mask` wants something of, each up to its last wanted token.

    Packed sequences are filled group by group; a group too big for one is split, its prompt repeated. Groups that share
    a prefix share its tokens where they meet; tokens are compared by `token_keys` where the batch has them. Rows
    without a wanted token are left out.

    Raises ValueError for a config that cannot be met, a row longer than `config.pack_length`, a wanted token that
    nothing precedes, and a size beyond its bucket table.
    """
    config.check()
    mask = np.asarray(mask, bool)
    if mask[:, :1].any():
        raise ValueError(
            f"row {int(mask[:, 0].argmax())} is trained on its first token, which nothing precedes; "
            "begin the prompt with at least one token, such as the BOS token"
        )

    # What follows the last wanted token of a row does not bear on it.
    width = mask.shape[1]
    lengths = np.where(mask.any(axis=1), width - mask[:, ::-1].argmax(axis=1), 0).astype(np.int32)
    rows = np.flatnonzero(lengths)
    if len(rows) and lengths.max() > config.pack_length:
        raise ValueError(
            f"row {int(lengths.argmax())} has {int(lengths.max())} tokens but a packed sequence holds "
            f"{config.pack_length}; raise pack_length to at least {int(lengths.max())}, or sample fewer tokens"
        )

    identity = np.asarray(batch.tokens if batch.token_keys is None else batch.token_keys)
    chosen = _choose_bins(identity[rows], lengths[rows], np.asarray(batch.group_id)[rows], config)
    chosen = chosen._replace(bins=[rows[b] for b in chosen.bins])
    return _fill(_forests(batch, lengths, chosen), lengths, mask, chosen, config)


class _Bins(NamedTuple):
    """Row numbers of every packed sequence, the length of one, and whether prefixes are shared in it."""

    bins: list[np.ndarray]
    length: int
    is_forest: bool


def _forests(batch: RolloutBatch, lengths: np.ndarray, chosen: _Bins) -> list[Forest]:
    """The forest of every bin."""
    tokens = np.asarray(batch.tokens)
    keys = None if batch.token_keys is None else np.asarray(batch.token_keys)
    return [
        build_forest(
            tokens[b],
            lengths[b],
            share_prefixes=chosen.is_forest,
            token_keys=None if keys is None else keys[b],
        )
        for b in chosen.bins
    ]


def _fill(forests: list[Forest], lengths: np.ndarray, mask: np.ndarray, chosen: _Bins, config: PackConfig) -> Packing:
    """Writes the forests, and the rows of every bin, into the arrays of the layout."""
    bins = chosen.bins
    scored = [np.unique(forest.row_index[mask[b]]) for forest, b in zip(forests, bins, strict=True)]

    # Every size comes from its table, so that few shapes are compiled.
    per_micro = config.microbatch_size
    count = max(-(-len(bins) // per_micro), 1)
    micro = bucket(count, config.microbatch_buckets or _POWERS, "the number of microbatches")
    rows_of = [sum(map(len, bins[m : m + per_micro])) for m in range(0, len(bins), per_micro)]
    height = bucket(max(rows_of, default=1), config.row_buckets or _POWERS[3:], "the rows of a microbatch")
    most = max(map(len, scored), default=1)
    wide = bucket(most, config.score_buckets or _quarters(chosen.length), "the scored tokens of a packed sequence")

    shape = (micro, per_micro, chosen.length)
    packed = Packed(
        tokens=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        predecessor=np.full(shape, -1, np.int32),
        subtree_end=np.zeros(shape, np.int32),
        score_index=np.full((micro, per_micro, wide), -1, np.int32),
    )
    lines_shape = (micro, height, mask.shape[1])
    row_index = np.zeros(lines_shape, np.int32)
    row_mask = np.zeros(lines_shape, bool)
    source_row = np.full((micro, height), -1, np.int32)

    line = 0
    for i, (b, forest, wants) in enumerate(zip(bins, forests, scored, strict=True)):
        m, r = divmod(i, per_micro)
        if r == 0:
            line = 0
        lines = slice(line, line + len(b))
        line += len(b)

        for name in ("tokens", "positions", "predecessor", "subtree_end"):
            values = getattr(forest, name)
            getattr(packed, name)[m, r, : len(values)] = values
        packed.score_index[m, r, : len(wants)] = wants

        # Rows point at scored tokens, of which this sequence has `wide` from `r * wide` on. A row's index is -1 beyond
        # its length, which the last entry answers.
        slot = np.zeros(len(forest.tokens) + 1, np.int32)
        slot[wants] = r * wide + np.arange(len(wants))
        row_index[m, lines] = np.where(mask[b], slot[forest.row_index], 0)
        row_mask[m, lines] = mask[b]
        source_row[m, lines] = b

    return Packing(
        packed=packed,
        row_index=row_index,
        mask=row_mask,
        source_row=source_row,
        flat_tokens=int(lengths.sum()),
        unique_tokens=sum(len(f.tokens) for f in forests),
        scored_tokens=sum(map(len, scored)),
    )


_POWERS = tuple(1 << p for p in range(20))


def _quarters(size: int) -> tuple[int, ...]:
    return tuple(sorted({max(-(-size * n // 4), 1) for n in (1, 2, 3, 4)}))


_LITTLE_SHARED = 0.1


def _choose_bins(identity: Identity, lengths: np.ndarray, groups: np.ndarray, config: PackConfig) -> _Bins:
    """The bins of a forest or of rows side by side, as `config.share_prefixes` says."""
    table = config.length_buckets or _quarters(config.pack_length)
    if not len(lengths):
        return _Bins([], table[0], bool(config.share_prefixes))

    def bins_of(order: SortedRows, is_forest: bool) -> _Bins:
        return _Bins(*_bins_of(order, lengths, groups, table, config), is_forest)

    rows = np.arange(len(lengths), dtype=np.int32)
    side_by_side = SortedRows(order=rows, shared=np.zeros(len(lengths), np.int32))
    if config.share_prefixes is False:
        return bins_of(side_by_side, False)

    as_trie = sort_rows(identity, lengths)
    forest = bins_of(as_trie, True)
    if config.share_prefixes or as_trie.shared.sum() >= _LITTLE_SHARED * lengths.sum():
        return forest

    # Little is shared: whichever needs less room.
    plain = bins_of(side_by_side, False)
    return min(forest, plain, key=lambda b: -(-len(b.bins) // config.microbatch_size) * b.length)


def _bins_of(
    order: SortedRows, lengths: np.ndarray, groups: np.ndarray, table: Sequence[int], config: PackConfig
) -> tuple[list[np.ndarray], int]:
    """Bins, and the packed length: the shortest that needs no more microbatches than the longest."""
    best = None
    count = 0
    for size in sorted(table, reverse=True):
        if size < lengths.max():
            break
        bins = _pack_bins(order, lengths, groups, size)
        micro = -(-len(bins) // config.microbatch_size)
        if best is not None and micro > count:
            break
        best = (bins, size)
        count = micro

    if best is None:
        raise ValueError(f"length_buckets={table} hold no row of {int(lengths.max())} tokens; add a larger one")
    return best


def _pack_bins(rows: SortedRows, lengths: np.ndarray, groups: np.ndarray, size: int) -> list[np.ndarray]:
    """Best-fit decreasing over units (the rows of a group, split where they exceed `size`); the cost of a unit in a
    bin is its own tokens less the longest prefix it shares with a unit there."""
    first, cost = _units(rows, lengths, groups, size)
    stops = np.append(first[1:], len(lengths))
    sharing = bool(rows.shared.any())

    # Neighbouring units share what their nearest rows do, which is the least that is shared on the way.
    starts = np.append(0, first[:-1] + 1)[: len(first)]
    boundary = np.minimum.reduceat(rows.shared[: first[-1] + 1], starts)

    members: list[list[int]] = []
    used = np.zeros(len(first), np.int64)
    unit_bin = np.full(len(first), -1)
    # The order is stable, so that bins are a function of the rows alone.
    for unit in np.argsort(-cost, kind="stable").tolist():
        extra = np.full(len(members), cost[unit])
        if sharing and members:
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

    bins = [np.concatenate([np.arange(first[u], stops[u]) for u in sorted(units)]) for units in members]
    return [rows.order[b] for b in sorted(bins, key=lambda b: b[0])]


def _units(rows: SortedRows, lengths: np.ndarray, groups: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First place and number of unique tokens of every unit. Rows that share nothing are units of their own."""
    first: list[int] = []
    cost: list[int] = []
    previous = None
    for place, row in enumerate(rows.order):
        length = int(lengths[row])
        shared = int(rows.shared[place])
        group = int(groups[row])
        if group == previous and shared and cost[-1] + length - shared <= size:
            cost[-1] += length - shared
        else:
            first.append(place)
            cost.append(length)
        previous = group
    return np.array(first), np.array(cost)


def _prefix_with_others(boundary: np.ndarray, unit: int, own: int) -> np.ndarray:
    """Common prefix of the first row of `unit` with that of every unit, from the prefixes between neighbours."""
    prefix = np.empty(len(boundary), np.int64)
    prefix[unit] = own
    prefix[unit + 1 :] = np.minimum.accumulate(boundary[unit + 1 :])
    prefix[:unit] = np.minimum.accumulate(boundary[1 : unit + 1][::-1])[::-1]
    return prefix
