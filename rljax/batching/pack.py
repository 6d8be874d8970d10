"""Rows of a minibatch packed into the fixed shapes that are compiled: forests of unique tokens. Host, numpy.

As in `stack`, every dimension comes from a bucket table and is a function of the data alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rljax.batching.bins import Bins, choose_bins
from rljax.batching.config import PackConfig
from rljax.batching.forest import lay_out_forest
from rljax.batching.sizes import Needs, Sizes, choose_sizes
from rljax.types import ROW_WEIGHT, Allowed, ArrayLike, Packed, RaggedRows, RolloutBatch, TrainBatch, Width

_LEAST_MASKS = 8  # that a packed sequence has room for


class Packing(NamedTuple):
    """The layout of a minibatch, before any advantage or log-prob is attached.

    `token[m, q, c]` is the place of loss token `c` of a part in the flattened batch `[batch rows * T]`, `source_row[m,
    q, l]` the row of the batch that a line shows; -1 pads both. `place`, `row_index` and `width` are those of
    `RaggedRows`. `flat_tokens` counts the tokens of the rows, `unique_tokens` those packed, `scored_tokens` the unique
    ones whose log-prob is wanted, `repeated_tokens` those that are packed again because what shares them does not fit
    one packed sequence. `needs` and `sizes` are what the minibatch has at most, and the sizes that this makes.
    """

    packed: Packed
    token: Int[np.ndarray, "M Q C"]
    place: Int[np.ndarray, "M Q C"]
    row_index: Int[np.ndarray, "M Q C"]
    source_row: Int[np.ndarray, "M Q L"]
    width: Width
    flat_tokens: int
    unique_tokens: int
    scored_tokens: int
    repeated_tokens: int
    needs: Needs
    sizes: Sizes

    def of_tokens(self, values: ArrayLike) -> np.ndarray:
        """`values [batch rows, T, ...]` of the loss tokens, `[M, Q, C, ...]`, 0 in padding."""
        values = np.asarray(values)
        return _taken(values.reshape(-1, *values.shape[2:]), self.token)

    def of_rows(self, values: ArrayLike) -> np.ndarray:
        """`values [batch rows]` of the lines, `[M, Q, L]`, 0 in padding."""
        return _taken(np.asarray(values), self.source_row)

    def batch_of(self, values: ArrayLike, like: ArrayLike) -> np.ndarray:
        """The inverse of `of_tokens`: `values [M, Q, C, ...]` as `[batch rows, T, ...]`, of which `like` has the first
        two sizes; 0 off the mask."""
        values = np.asarray(values)
        rest = values.shape[3:]
        out = np.zeros((*np.shape(like), *rest), values.dtype)
        real = self.token >= 0
        out.reshape(-1, *rest)[self.token[real]] = values[real]
        return out

    def of_scored(self, values: ArrayLike, fill: int) -> Int[np.ndarray, "M R K"]:
        """`values [batch rows, T]` of the scored tokens, int32, `fill` where nothing is scored."""
        out = np.full(self.packed.score_index.shape, fill, np.int32)
        real = self.token >= 0
        microbatch, part, _ = np.nonzero(real)
        by_part = out.reshape(*self.token.shape[:2], -1)
        by_part[microbatch, part, self.row_index[real]] = np.asarray(values).reshape(-1)[self.token[real]]
        return out

    def rows_to_score(self) -> RaggedRows:
        """The rows with nothing to learn yet, to score them."""
        zero = np.zeros(self.place.shape, np.float32)
        return RaggedRows(
            place=self.place,
            row_index=self.row_index,
            loss_weights=zero,
            token_count=np.ones(len(self.place), np.float32),
            advantages=zero,
            behavior_logprobs=zero,
            source=np.zeros(self.source_row.shape, np.int32),
            width=self.width,
        )


def masked(packing: Packing, allowed: Allowed | None) -> Packed:
    """The packed sequences of `packing`, each with the masks that its scored tokens were drawn under. The room for
    masks is a power of two, so that few programs serve all."""
    if allowed is None:
        return packing.packed
    index = packing.of_scored(allowed.which, -1)
    used = [np.unique(row[row >= 0]) for row in index.reshape(-1, index.shape[-1])]
    room = max(_LEAST_MASKS, 1 << (max(map(len, used)) - 1).bit_length())

    masks = np.zeros((len(used), room, allowed.masks.shape[1]), np.uint32)
    own = np.full(index.shape, -1, np.int32)
    for target, numbers, of_row, row in zip(masks, used, own.reshape(len(used), -1), index.reshape(len(used), -1)):
        target[: len(numbers)] = allowed.masks[numbers]
        of_row[:] = np.where(row >= 0, np.searchsorted(numbers, row), -1)
    return packing.packed.replace(  # type: ignore[attr-defined]
        allowed=masks.reshape(*index.shape[:2], room, -1), allowed_index=own
    )


def emptied(batch: TrainBatch, sizes: Sizes) -> TrainBatch:
    """A minibatch of other sizes with the same fields as `batch`, and nothing in them. It updates nothing."""
    _, sequences, _ = batch.packed.tokens.shape
    _, parts, _ = batch.rows.place.shape
    of_sequence = (sizes.microbatches, sequences, sizes.length)
    of_token = (sizes.microbatches, parts, sizes.tokens)
    of_row = (sizes.microbatches, parts, sizes.rows)

    def filled(shape: tuple[int, ...], fill: int = 0, dtype: Any = np.int32) -> np.ndarray:
        return np.full(shape, fill, dtype)

    def tokens(like: ArrayLike | None) -> np.ndarray | None:
        return None if like is None else filled(of_token, 0, np.float32)

    def wide(like: ArrayLike) -> np.ndarray:
        return filled((*of_token, *np.shape(like)[3:]), 0, like.dtype)

    # Sequences, with masks where the others have them: as many as those have room for, and no token under one.
    record = batch.packed.experts
    packed = Packed(
        tokens=filled(of_sequence),
        positions=filled(of_sequence),
        predecessor=filled(of_sequence, -1),
        subtree_end=filled(of_sequence),
        score_index=filled((sizes.microbatches, sequences, sizes.scored), -1),
        experts=None if record is None else filled((*of_sequence, *np.shape(record)[3:]), -1, np.int16),
        drawn=None if batch.packed.drawn is None else filled(of_sequence, 0, bool),
    )
    if batch.packed.allowed is not None:
        packed = packed.replace(  # type: ignore[attr-defined]
            allowed=filled((sizes.microbatches, *batch.packed.allowed.shape[1:]), 0, np.uint32),
            allowed_index=packed.score_index,
        )

    # A count of 1 where there are no tokens: losses divide by it.
    rows = batch.rows
    return TrainBatch(
        packed=packed,
        rows=RaggedRows(
            place=filled(of_token, -1),
            row_index=filled(of_token),
            loss_weights=filled(of_token, 0, np.float32),
            token_count=filled((sizes.microbatches,), 1, np.float32),
            advantages=filled(of_token, 0, np.float32),
            behavior_logprobs=filled(of_token, 0, np.float32),
            source=filled(of_row),
            width=Width(sizes.width),
            old_logprobs=tokens(rows.old_logprobs),
            ref_logprobs=tokens(rows.ref_logprobs),
            uniforms=tokens(rows.uniforms),
            columns={name: tokens(value) for name, value in rows.columns.items()},
            row_columns={name: filled(of_row, 0, np.float32) for name in rows.row_columns},
            teacher={name: wide(value) for name, value in rows.teacher.items()},
        ),
        teacher_head=batch.teacher_head,
    )


def _taken(values: np.ndarray, index: Int[np.ndarray, "*shape"]) -> np.ndarray:
    taken = np.take(values, index, axis=0, mode="clip")
    taken[index < 0] = 0
    return taken


def _taken_rows(values: np.ndarray, index: Int[np.ndarray, "*shape"]) -> np.ndarray:
    """`values[index]` along the first axis, -1 where the index is."""
    taken = np.take(values, index, axis=0, mode="clip")
    taken[index < 0] = -1
    return taken


def loss_mask(batch: RolloutBatch, extra_mask: ArrayLike | None = None) -> Bool[np.ndarray, "B T"]:
    """Tokens that receive gradient: sampled by the policy, in a valid row, and kept by `extra_mask` if there is one."""
    mask = np.asarray(batch.action_mask) & np.asarray(batch.is_valid)[:, None]
    return mask if extra_mask is None else mask & np.asarray(extra_mask, bool)


def row_weights(weight: Float[np.ndarray, " B"], mask: Bool[np.ndarray, "B T"]) -> Float[np.ndarray, " B"]:
    """`weight` scaled to a mean of 1 over the rows that have loss tokens: the aggregations divide by how many there are
    of these, so that only the proportions are left to say."""
    counted = mask.any(axis=1)
    if not counted.any():
        return weight
    return weight / weight[counted].mean(dtype=np.float64).astype(np.float32)


def pack(
    batch: RolloutBatch,
    advantages: Float[ArrayLike, "B T"],
    config: PackConfig,
    *,
    token_weights: Callable[[Bool[np.ndarray, "B T"]], ArrayLike] | None = None,
    extra_mask: Bool[ArrayLike, "B T"] | None = None,
    packing: Packing | None = None,
    parts: int = 1,
    allowed: Allowed | None = None,
) -> TrainBatch:
    """One minibatch: the rows of `batch` that have loss tokens, packed, with everything that losses see.

    `token_weights` gives the aggregation's weights from the loss mask of the whole minibatch; None is the token mean.
    Where the batch has the column `ROW_WEIGHT`, rows count in its proportions.
    Old log-probs are the behavior's until the learner sets them. `packing` is `layout` of the same loss mask, if
    it was made before; else one of `parts` is made. `allowed` are the masks that tokens of `batch` were drawn under.
    ValueError as in `layout`.
    """
    mask = loss_mask(batch, extra_mask)
    if packing is None:
        packing = layout(batch, mask, config, parts=parts)

    # Counted over the whole minibatch, before it is split: microbatches and devices then just add up.
    count = max(float(mask.sum()), 1.0)
    weights = mask / np.float32(count) if token_weights is None else token_weights(mask)

    columns = {name: np.asarray(value, np.float32) for name, value in batch.columns.items()}
    if ROW_WEIGHT in columns:
        weights = np.asarray(weights) * row_weights(columns.pop(ROW_WEIGHT), mask)[:, None]

    reference = None
    if batch.ref_logprobs is not None:
        reference = packing.of_tokens(np.asarray(batch.ref_logprobs, np.float32))

    rows = RaggedRows(
        place=packing.place,
        row_index=packing.row_index,
        loss_weights=packing.of_tokens(np.asarray(weights, np.float32)),
        token_count=np.full(len(packing.place), count, np.float32),
        advantages=packing.of_tokens(np.asarray(advantages, np.float32)),
        behavior_logprobs=packing.of_tokens(np.asarray(batch.behavior_logprobs, np.float32)),
        source=packing.of_rows(np.asarray(batch.source, np.int32)),
        width=packing.width,
        ref_logprobs=reference,
        columns={name: packing.of_tokens(value) for name, value in columns.items() if value.ndim == 2},
        row_columns={name: packing.of_rows(value) for name, value in columns.items() if value.ndim == 1},
        teacher={name: packing.of_tokens(value) for name, value in batch.teacher.items()},
    )
    return TrainBatch(packed=masked(packing, allowed), rows=rows)


def layout(batch: RolloutBatch, mask: Bool[np.ndarray, "B T"], config: PackConfig, *, parts: int = 1) -> Packing:
    """Packs the rows of `batch` that `mask` wants something of, each up to its last wanted token.

    Packed sequences are filled group by group; a group too big for one is split where that repeats least. Groups that
    share a prefix share its tokens where they meet; tokens are compared by `token_keys` where the batch has them. Rows
    without a wanted token are left out. `parts` is `Q` of `RaggedRows`, a divisor of `config.microbatch_size`.

    Raises ValueError for a config that cannot be met, a row longer than `config.pack_length`, a wanted token that
    nothing precedes, and a size beyond its bucket table.
    """
    config.check()
    if config.microbatch_size % parts:
        raise ValueError(
            f"config.update.microbatch_size={config.microbatch_size} packed sequences do not divide into {parts} "
            f"parts; set it to a multiple of {parts}"
        )

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
    chosen = choose_bins(identity[rows], lengths[rows], np.asarray(batch.group_id)[rows], config)
    packing, places = _fill(np.asarray(batch.tokens), mask, lengths, rows, chosen, config, parts)
    packed = packing.packed
    if batch.experts is not None:
        # A token that rows share has the record of the first of them.
        taken = _taken_rows(np.asarray(batch.experts).reshape(-1, *np.shape(batch.experts)[2:]), places)
        packed = dataclasses.replace(packed, experts=taken)
    if batch.drawn is not None:
        # Rows share no token that one of them has sampled and another was given (`token_keys`).
        packed = dataclasses.replace(packed, drawn=np.asarray(batch.drawn).reshape(-1)[places] & (places >= 0))
    return packing._replace(packed=packed)


def _fill(
    tokens: np.ndarray,
    mask: np.ndarray,
    lengths: np.ndarray,
    rows: np.ndarray,
    chosen: Bins,
    config: PackConfig,
    parts: int,
) -> tuple[Packing, Int[np.ndarray, "M R S"]]:
    """Writes the forests, and the rows of every bin, into the arrays of the layout; and where each packed token stands
    in the flattened batch, -1 in padding. `chosen` counts among `rows`."""
    width = mask.shape[1]
    per_micro = config.microbatch_size
    per_part = per_micro // parts
    bins = chosen.size

    # Rows bin by bin, and the forests of all bins one after another.
    order = rows[chosen.rows]
    ends = lengths[order]
    forest = lay_out_forest(ends, chosen.shared)
    row_bin = chosen.bin
    token_bin = row_bin[forest.place]
    first_token = np.searchsorted(token_bin, np.arange(bins + 1))

    # The loss tokens of all rows, in the order of part, line and position.
    row_start = np.cumsum(ends) - ends
    flat = np.repeat((order.astype(np.int64) * width - row_start), ends) + np.arange(int(ends.sum()))
    wanted = mask.reshape(-1)[flat]
    batch_token = flat[wanted]
    packed_token = forest.row_index[wanted]
    token_row = np.repeat(np.arange(len(order), dtype=np.int32), ends)[wanted]

    # Unique tokens that are scored, and the slots of these: they are numbered within their bin.
    is_scored = np.zeros(len(token_bin), bool)
    is_scored[packed_token] = True
    scored_before = np.searchsorted(token_bin[is_scored], np.arange(bins + 1)).astype(np.int32)
    slot = np.cumsum(is_scored, dtype=np.int32) - np.int32(1) - scored_before[token_bin]

    # How many lines and entries each part of the microbatches that hold something has.
    row_part = row_bin // per_part
    entry_part = row_part[token_row]
    part_count = -(-max(bins, 1) // per_micro) * parts
    lines = np.bincount(row_part, minlength=part_count)
    entries = np.bincount(entry_part, minlength=part_count)

    needs = Needs(
        microbatches=-(-bins // per_micro),
        rows=int(lines.max()),
        scored=int(np.diff(scored_before).max(initial=0)),
        tokens=int(entries.max()),
    )
    sizes = choose_sizes(needs, config, per_part=per_part, length=chosen.length, width=width)

    # A unique token at its place in its packed sequence, whose own numbers count from the sequence's start.
    shape = (sizes.microbatches, per_micro, chosen.length)
    start = first_token[token_bin].astype(np.int32)
    at = (token_bin.astype(np.int64) * chosen.length - start) + np.arange(len(token_bin))

    def packed_array(values: np.ndarray, fill: int, dtype: type = np.int32) -> np.ndarray:
        out: np.ndarray = np.full(shape, fill, dtype)
        out.reshape(-1)[at] = values
        return out

    scored = np.flatnonzero(is_scored)
    score_index = np.full((sizes.microbatches, per_micro, sizes.scored), -1, np.int32)
    score_index.reshape(-1)[token_bin[scored].astype(np.int64) * sizes.scored + slot[scored]] = scored - start[scored]
    token_of = forest.token_of(order, width)
    packed = Packed(
        tokens=packed_array(tokens.reshape(-1)[token_of], 0),
        positions=packed_array(forest.positions, 0),
        predecessor=packed_array(np.maximum(forest.predecessor - start, -1), -1),
        subtree_end=packed_array(forest.subtree_end - start, 0),
        score_index=score_index,
    )

    # Lines and entries of a part count from its start; parts follow each other in the order of their bins.
    line_start = np.cumsum(lines) - lines
    line = np.arange(len(order)) - line_start[row_part]
    source_row = np.full((sizes.microbatches, parts, sizes.rows), -1, np.int32)
    source_row.reshape(-1)[row_part.astype(np.int64) * sizes.rows + line] = order

    entry_start = np.cumsum(entries) - entries
    entry = entry_part.astype(np.int64) * sizes.tokens + np.arange(len(token_row)) - entry_start[entry_part]

    def entry_array(values: np.ndarray, fill: int, dtype: type = np.int32) -> np.ndarray:
        out: np.ndarray = np.full((sizes.microbatches, parts, sizes.tokens), fill, dtype)
        out.reshape(-1)[entry] = values
        return out

    sequence = row_bin[token_row] % per_part
    packing = Packing(
        packed=packed,
        token=entry_array(batch_token, -1, np.int64),
        place=entry_array(line[token_row] * sizes.width + batch_token % width, -1),
        row_index=entry_array(sequence * sizes.scored + slot[packed_token], 0),
        source_row=source_row,
        width=Width(sizes.width),
        flat_tokens=int(ends.sum()),
        unique_tokens=len(token_bin),
        scored_tokens=len(scored),
        repeated_tokens=chosen.repeated,
        needs=needs,
        sizes=sizes,
    )
    return packing, packed_array(token_of, -1, np.int64)
