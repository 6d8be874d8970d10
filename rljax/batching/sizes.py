"""Sizes of a packed minibatch: from tables, so that few programs are compiled. Host, no arrays."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rljax.batching.bins import quarters
from rljax.batching.config import PackConfig
from rljax.batching.stack import bucket

_MICROBATCHES = tuple(1 << p for p in range(20))
_ROWS = tuple(32 << 2 * p for p in range(8))
"""32, 128, 512, ...: lines are laid out for one microbatch at a time, and few programs are worth their padding."""


class Needs(NamedTuple):
    """What a minibatch has at most: microbatches, rows and loss tokens of a part of one, and scored tokens of a packed
    sequence."""

    microbatches: int
    rows: int
    scored: int
    tokens: int


class Sizes(NamedTuple):
    """Sizes of the arrays, which make a program: `M`, `L`, `K` and `C` of `RaggedRows`, the length `S` of a packed
    sequence, and the positions `T` of a line."""

    microbatches: int
    rows: int
    scored: int
    tokens: int
    length: int
    width: int


def choose_sizes(needs: Needs, config: PackConfig, *, per_part: int, length: int, width: int) -> Sizes:
    """The smallest entries of the tables. `per_part` packed sequences of `length` tokens make a part, and rows of the
    batch have `width` positions. ValueError for what a table does not hold."""
    microbatches = bucket(
        max(needs.microbatches, 1), config.microbatch_buckets or _MICROBATCHES, "the number of microbatches"
    )
    rows = bucket(max(needs.rows, 1), config.row_buckets or _ROWS, "the rows of a microbatch")
    scored = bucket(
        max(needs.scored, 1), _score_table(config, microbatches, length), "the scored tokens of a packed sequence"
    )
    # Of automatic sizes a line is as long as its packed sequence, so that no long row is a program of its own.
    span = width if config.row_buckets else length
    table = config.token_buckets or _token_table(config, per_part * scored, rows * min(scored, span))
    tokens = bucket(max(needs.tokens, 1), table, "the loss tokens of a microbatch's rows")
    return Sizes(microbatches, rows, scored, tokens, length, span)


def likely_sizes(
    needs: Needs, sizes: Sizes, config: PackConfig, *, per_part: int, width: int, count: int
) -> list[Sizes]:
    """`sizes`, and the `count - 1` that a minibatch is most likely to have whose needs differ a little: one number
    each is that of the next entry of its table, or of the one before."""
    found = [sizes]
    for _, changed in sorted(_neighbours(needs, sizes, config)):
        if len(found) >= count:
            break
        near = choose_sizes(changed, config, per_part=per_part, length=sizes.length, width=width)
        if near not in found:
            found.append(near)
    return found


def _neighbours(needs: Needs, sizes: Sizes, config: PackConfig) -> Iterator[tuple[float, Needs]]:
    """Needs that make other sizes, and how far they are: the logarithm of the factor by which a number must change."""
    tables = {
        "microbatches": config.microbatch_buckets or _MICROBATCHES,
        "rows": config.row_buckets or _ROWS,
        "scored": _score_table(config, sizes.microbatches, sizes.length),
    }
    for name, table in tables.items():
        need = max(getattr(needs, name), 1)
        at = list(table).index(getattr(sizes, name))
        # Sequences shorter than the longest hold all in one microbatch, and grow before there are two (`choose_bins`).
        is_short = not config.length_buckets and sizes.length < config.pack_length
        if at + 1 < len(table) and not (is_short and name == "microbatches"):
            yield math.log(table[at] / need), needs._replace(**{name: table[at] + 1})
        if at:
            yield math.log(need / table[at - 1]), needs._replace(**{name: table[at - 1]})


def _score_table(config: PackConfig, microbatches: int, length: int) -> Sequence[int]:
    """Automatic numbers of scored tokens: quarters of the only microbatch, halves where there are several, whose
    fullest packed sequence is near full."""
    if config.score_buckets:
        return config.score_buckets
    return quarters(length) if microbatches == 1 else sorted({-(-length // 2), length})


def _token_table(config: PackConfig, scored: int, most: int) -> Sequence[int]:
    """Automatic numbers of loss tokens of a part, which scores `scored` tokens and whose rows can have `most`."""
    # Tables that fix the other sizes fix this one too.
    if config.row_buckets and config.score_buckets:
        return (most,)
    return [*itertools.takewhile(lambda n: n < most, (scored << p for p in range(30))), most]
