"""Several tasks in one data set: small ones are repeated, and all take turns (AgentRL, 2510.04206)."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from rljax.tasks.examples import Example

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
