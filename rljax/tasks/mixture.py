"""Several tasks in one data set: small ones are repeated, and all take turns (AgentRL, 2510.04206); or each row is
drawn of one kind or another by chance (AgentTuning, 2310.12823)."""

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rljax.tasks.examples import Example, digest
from rljax.tasks.stages import Row, StageResult

T = TypeVar("T")


def replications(sizes: Sequence[int]) -> list[int]:
    """`rep_i = round(max_j n_j / n_i)`: how often each task's rows are repeated to be seen about as often as the
    largest task's. Raises ValueError for a task without rows, or no tasks."""
    if not sizes or min(sizes) < 1:
        raise ValueError(f"task sizes {list(sizes)} must be at least one number, all of them positive")
    return [round(max(sizes) / size) for size in sizes]


def interleave(parts: Sequence[Sequence[T]]) -> list[T]:
    """One element of each part in turn, each part in its order; a part that has run out is passed over."""
    longest = max(map(len, parts), default=0)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def balanced(examples: Iterable[Example]) -> list[Example]:
    """Training examples of several tasks, told apart by the column `task`, repeated by `replications` and interleaved.

    A repeated example gets the column `copy`, 1 and up, and so an id of its own: two copies in one step draw different
    samples. Do this after test items were taken out, since a split drops repeated prompts. Raises ValueError for no
    examples.
    """
    tasks: dict[int, list[Example]] = {}
    for example in examples:
        tasks.setdefault(example.task_id, []).append(example)
    parts = list(tasks.values())
    counts = replications([len(part) for part in parts])
    return interleave([[_copy(e, i) for i in range(count) for e in part] for part, count in zip(parts, counts)])


def _copy(example: Example, number: int) -> Example:
    return replace(example, columns={**example.columns, "copy": number}, id=-1) if number else example


def example_weights(shares: Mapping[str, float], lengths: Mapping[str, float]) -> dict[str, float]:
    """How often to draw a row of each kind, so that the kinds have these `shares` of the tokens, where their rows have
    these mean `lengths`: `share / length`, normalised. With the weights 0.2 and 0.8 rows of 2,000 and 400 tokens have
    shares of 0.56 and 0.44; for 0.2 and 0.8 of the tokens the weights are 0.048 and 0.952. ValueError for a length
    that is not positive."""
    if min(lengths.values(), default=1) <= 0:
        raise ValueError(f"mean lengths {dict(lengths)} must be above 0; a kind of empty rows has no share")
    ratios = {kind: share / lengths[kind] for kind, share in shares.items()}
    return {kind: ratio / sum(ratios.values()) for kind, ratio in ratios.items()}


def mixed(
    rows: Sequence[Row],
    *,
    weights: Mapping[str, float],
    count: int,
    column: str = "task",
    length: Callable[[Row], float] | None = None,
    by_length: bool = False,
    seed: int = 0,
) -> StageResult:
    """`count` rows, each of a kind (what stands in `column`) drawn with the probability of its weight (AgentTuning,
    2310.12823):

        J(theta) = eta E_agent[log pi(y|x)] + (1 - eta) E_general[log pi(y|x)]

    in expectation, for the weights eta and 1 - eta, where every row counts once. Where a loss is the mean over tokens,
    longer rows count for more: with a `length` of a row the figures say how much, and `by_length` makes `weights`
    shares of that instead (`example_weights`). Rows of a kind come in a new order in each pass over them. Row `i`
    depends on (seed, i) and the rows alone, so a larger `count` only adds rows.

    ValueError for weights that are no probabilities, a kind that is drawn and has no rows, and rows of a kind that
    `weights` do not name.
    """
    if by_length and length is None:
        raise ValueError("by_length=True needs a length of a row, such as that of its completion; give one")
    pools: dict[str, list[int]] = {kind: [] for kind in weights}
    for number, row in enumerate(rows):
        kind = str(row.get(column))
        if kind not in pools:
            raise ValueError(
                f"a row has {column}={kind!r}, and weights are for {sorted(pools)}; give it one, 0 to leave it out"
            )
        pools[kind].append(number)
    _check_weights(weights, pools)

    # A length may be that of a text in tokens, and small pools are drawn many times.
    @functools.cache
    def length_of(number: int) -> float:
        assert length is not None
        return length(rows[number])

    chances = dict(weights)
    if by_length:
        means = {kind: sum(map(length_of, pool)) / len(pool) for kind, pool in pools.items() if pool}
        chances = example_weights({kind: weights[kind] for kind in means}, means)

    streams = {kind: _passes(pool, seed, kind) for kind, pool in pools.items() if pool}
    kinds = list(chances)
    by_kind = list(chances.values())
    drawn = [random.Random(digest([seed, i])).choices(kinds, by_kind)[0] for i in range(count)]
    numbers = [next(streams[kind]) for kind in drawn]

    figures = {f"share of {kind}": drawn.count(kind) / max(1, count) for kind in kinds}
    if length is not None:
        total = sum(map(length_of, numbers))
        for kind in kinds:
            own = sum(length_of(number) for number, of in zip(numbers, drawn, strict=True) if of == kind)
            figures[f"share of {kind} by length"] = own / total if total else 0.0
    return StageResult([rows[number] for number in numbers], figures=figures)


def _check_weights(weights: Mapping[str, float], pools: Mapping[str, Sequence[Any]]) -> None:
    if min(weights.values(), default=-1) < 0 or abs(sum(weights.values()) - 1) > 1e-9:
        raise ValueError(f"weights {dict(weights)} must be probabilities: at least 0, and 1 together")
    empty = [kind for kind, weight in weights.items() if weight > 0 and not pools[kind]]
    if empty:
        # Others would take its share, and eta would be another.
        raise ValueError(f"no row is of the kind {empty[0]!r}, whose weight is {weights[empty[0]]}; leave it out")


def _passes(pool: Sequence[T], seed: int, kind: str) -> Iterator[T]:
    """All of a pool again and again, each time in a new order."""
    for epoch in itertools.count():
        order = list(pool)
        random.Random(digest([seed, kind, epoch])).shuffle(order)
        yield from order
