"""The samples of one prompt as a tree: which lane each is drawn on, where it leaves its parent, and node values."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Stretch(NamedTuple):
    """Tokens of a sample between two forks, which the same leaves share."""

    start: int
    """First token, counted from the beginning of the completion."""
    end: int
    """The token behind the last."""
    leaves: int
    """Samples that go through it."""
    value: float | None
    """Mean reward of those of them that have one; None where none has."""


class Branch(NamedTuple):
    """The tokens that one sample does not share with the sample it leaves."""

    sample: int
    """Its place among the records."""
    parent: int | None
    """Place of the sample that it leaves; None for a root."""
    lane: int
    """Row of the drawing, from 0. A branch is below the one it leaves."""
    fork_score: float | None
    reward: float | None
    stretches: tuple[Stretch, ...]


class Forest(NamedTuple):
    branches: list[Branch]
    """In the order of their lanes."""
    length: int
    """Tokens of the longest sample."""


def lay_out(records: Sequence[Mapping[str, Any]]) -> Forest:
    """The tree of the records of one group, in which `parent` names another one by its place. A record whose parent is
    missing, or comes after it, is a root. Values are means of raw rewards, not of what an estimator makes of them."""
    lengths = [len(record.get("tokens") or ()) for record in records]
    parents: list[int | None] = []
    starts: list[int] = []
    for place, record in enumerate(records):
        parent = record.get("parent")
        fork = record.get("fork_index") or 0
        if not isinstance(parent, int) or not 0 <= parent < place:
            parents.append(None)
            starts.append(0)
            continue

        # A fork before its parent's own beginning is on tokens that the parent shares with an ancestor.
        while fork < starts[parent] and (above := parents[parent]) is not None:
            parent = above
        parents.append(parent)
        starts.append(min(fork, lengths[place]))

    children: list[list[int]] = [[] for _ in records]
    for place, parent in enumerate(parents):
        if parent is not None:
            children[parent].append(place)

    # Children come after their parents, so that one walk backwards has every subtree whole.
    below: list[list[int]] = [[place] for place in range(len(records))]
    for place in reversed(range(len(records))):
        parent = parents[place]
        if parent is not None:
            below[parent].extend(below[place])

    branches: list[Branch] = []
    # Late forks lie next to their parent, so that no line crosses another branch. No recursion: chains may be long.
    waiting = [place for place in reversed(range(len(records))) if parents[place] is None]
    while waiting:
        place = waiting.pop()
        record = records[place]
        branches.append(
            Branch(
                sample=place,
                parent=parents[place],
                lane=len(branches),
                fork_score=record.get("fork_score"),
                reward=record.get("reward"),
                stretches=_stretches(place, records, starts, lengths, children, below),
            )
        )
        waiting.extend(sorted(children[place], key=lambda child: (starts[child], -child)))
    return Forest(branches, max(lengths, default=0))


def _stretches(
    place: int,
    records: Sequence[Mapping[str, Any]],
    starts: Sequence[int],
    lengths: Sequence[int],
    children: Sequence[Sequence[int]],
    below: Sequence[Sequence[int]],
) -> tuple[Stretch, ...]:
    cuts = sorted({starts[place], lengths[place], *(min(starts[child], lengths[place]) for child in children[place])})
    found = []
    for start, end in zip(cuts, cuts[1:] or cuts, strict=False):
        leaves = [place]
        for child in children[place]:
            if starts[child] >= end:
                leaves.extend(below[child])

        rewards = [value for leaf in leaves if (value := records[leaf].get("reward")) is not None]
        value = sum(rewards) / len(rewards) if rewards else None
        found.append(Stretch(start, end, len(leaves), value))
    return tuple(found)
