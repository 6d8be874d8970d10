"""What generated stories share: casts that keep splits apart, threads that are told among each other, windows."""

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

NAMES = (
    *("Anna", "Ben", "Cara", "Dora", "Emil", "Fritz", "Greta", "Hugo"),
    *("Ida", "Jonas", "Klara", "Ludo", "Mira", "Nils", "Olga", "Paul"),
)
FULL = -1
"""The window that shows everything."""
LONGEST = 262_144
"""Characters of a story: 64k tokens, at about four characters each."""


def draw_cast(rng: random.Random, count: int, split: str) -> tuple[str, ...]:
    """Characters of a story, by name. The splits "train" and "test" have no cast in common. ValueError for another than
    these and "all"."""
    parts = {"all": (0, 1, 2), "train": (0, 1), "test": (2,)}.get(split)
    if parts is None:
        raise ValueError(f"split {split!r} must be one of all, train, test")
    while True:
        chosen = sorted(rng.sample(range(len(NAMES)), count))
        if sum(chosen) % 3 in parts:
            return tuple(NAMES[index] for index in chosen)


def listed(names: Sequence[str]) -> str:
    """Names, at least one, as a sentence has them."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def merged(threads: Iterable[Sequence[T]], rng: random.Random) -> list[T]:
    """All parts of some threads in a random order that keeps that of each thread."""
    queues = [list(thread) for thread in threads if thread]
    made = []
    while queues:
        # A thread with more left comes up more often: every order is as likely.
        queue = rng.choices(queues, weights=[len(queue) for queue in queues])[0]
        made.append(queue.pop(0))
        queues = [queue for queue in queues if queue]
    return made


def shown(texts: Sequence[str], window: int) -> int:
    """How many of the last texts a window of so many characters shows, each on a line of its own."""
    if window == FULL:
        return len(texts)
    left = window
    for count, text in enumerate(reversed(texts)):
        left -= len(text) + 1
        if left < 0:
            return count
    return len(texts)


def check_rows(size: int, length: int, windows: Sequence[int], *, shortest: int) -> None:
    """ValueError for arguments of rows that are out of range."""
    if size < 1 or not shortest <= length <= LONGEST:
        raise ValueError(f"size {size} must be at least 1, and length {length} from {shortest} to {LONGEST} characters")
    if not windows or any(window < FULL for window in windows):
        raise ValueError(f"windows {list(windows)} must be numbers of characters, {FULL} for everything")
