"""Which examples a step trains on."""

import abc
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rljax.tasks.examples import Example, digest


@runtime_checkable
class Curriculum(Protocol):
    """Chooses the examples of a step, may learn from their rewards, and can be written to a checkpoint.

    `sample` may depend on nothing but the step, the constructor's arguments and what `observe` was told.
    """

    def sample(self, step: int, n: int) -> list[Example]:
        """The `n` distinct examples of step `step`, counted from 0."""
        ...

    def observe(self, examples: Sequence[Example], rewards: Sequence[float]) -> None:
        """Learn from the mean reward of each example of a step. One without any valid reward is not among them, so
        there may be fewer than were drawn, or none."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later `sample` depends on, as JSON-like data."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises ValueError if it belongs to other data or another seed."""
        ...


def check_draw(n: int, examples: int) -> None:
    """ValueError unless 1 <= n <= `examples`."""
    if not 1 <= n <= examples:
        raise ValueError(
            f"cannot draw {n} distinct examples from {examples}; "
            "lower the number of prompts of a step, or give more data"
        )


def draw_by(distribution: np.ndarray, n: int, *, seed: int, draw: int) -> list[int]:
    """Numbers of `n` distinct examples, of which each step of the draw takes one in proportion to `distribution`
    (float64 [N], above 0) among those that are left.

    Depends on the arguments alone; `draw` counts what was drawn with the same seed before. Raises ValueError unless
    1 <= n <= N.
    """
    check_draw(n, len(distribution))
    key = hashlib.blake2b(f"{seed}/{draw}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(key, "big")))

    # The n first to arrive, when each arrives at a rate of its probability: draws without replacement.
    arrivals = generator.exponential(size=len(distribution))
    order = np.argsort(arrivals / distribution, kind="stable")
    return [int(i) for i in order[:n]]


class WeighedCurriculum(abc.ABC):
    """What curricula share that draw by a `distribution` over the data's examples.

    A batch has no example twice: they are drawn without replacement. The draw depends on (seed, number of the draw) and
    the distribution, so that a curriculum whose state holds what these come from continues exactly. Raises ValueError
    for an empty data set.
    """

    def __init__(self, examples: Sequence[Example], seed: int):
        if not examples:
            raise ValueError("a curriculum needs at least one example; the data set is empty")
        self._examples = list(examples)
        self._index = {example.id: i for i, example in enumerate(self._examples)}
        self._fingerprint = fingerprint(self._examples)
        self._seed = seed
        self._draws = 0

    @property
    @abc.abstractmethod
    def distribution(self) -> np.ndarray:
        """With what probability each example is drawn first, float64 [n]."""

    def sample(self, step: int, n: int) -> list[Example]:
        """`n` distinct examples; `step` does not enter. Raises ValueError unless 1 <= n <= number of examples."""
        drawn = draw_by(self.distribution, n, seed=self._seed, draw=self._draws)
        self._draws += 1
        return [self._examples[i] for i in drawn]

    def state_dict(self) -> dict[str, Any]:
        return {"kind": type(self).__name__, "seed": self._seed, "data": self._fingerprint, "draws": self._draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is of another kind of curriculum, other data or another seed."""
        refuse_other_state(dict(state), kind=type(self).__name__, seed=self._seed, data=self._fingerprint)
        self._draws = int(state["draws"])


class UniformCurriculum:
    """All examples in a new order in every epoch.

    The order depends on (seed, epoch) alone, and no example comes twice in an epoch or in a batch: when a batch spans
    two epochs, what it already holds is put off to the end of the new one. The place reached is part of the state, so
    a restored curriculum continues exactly. Raises ValueError for an empty data set.
    """

    def __init__(self, examples: Sequence[Example], seed: int = 0):
        if not examples:
            raise ValueError("a curriculum needs at least one example; the data set is empty")
        self._examples = list(examples)
        self._seed = seed
        self._fingerprint = fingerprint(self._examples)
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self._put_off: list[int] = []
        key = hashlib.blake2b(f"{self._seed}/{epoch}".encode(), digest_size=16).digest()
        self._order = list(range(len(self._examples)))
        random.Random(int.from_bytes(key, "big")).shuffle(self._order)
        self._epoch = epoch
        self._cursor = 0

    @property
    def epoch(self) -> int:
        """Epochs begun before the current one."""
        return self._epoch

    def sample(self, step: int, n: int) -> list[Example]:
        """The next `n` examples; `step` does not enter. Raises ValueError unless 1 <= n <= number of examples."""
        check_draw(n, len(self._examples))
        batch: list[int] = []
        while len(batch) < n:
            batch.append(self._next(set(batch)))
        return [self._examples[i] for i in batch]

    def _next(self, taken: set[int]) -> int:
        while self._cursor < len(self._order):
            i = self._order[self._cursor]
            self._cursor += 1
            if i not in taken:
                return i
            self._put_off.append(i)
        if self._put_off:
            return self._put_off.pop(0)  # never in `taken`: an epoch has n - r other examples for the batch's rest
        self._start_epoch(self._epoch + 1)
        return self._next(taken)

    def observe(self, examples: Sequence[Example], rewards: Sequence[float]) -> None:
        """Rewards do not change a uniform order."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "seed": self._seed,
            "data": self._fingerprint,
            "epoch": self._epoch,
            "cursor": self._cursor,
            "put_off": list(self._put_off),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is of another kind of curriculum, other data or another seed."""
        refuse_other_state(state, kind=type(self).__name__, seed=self._seed, data=self._fingerprint)
        self._start_epoch(int(state["epoch"]))
        self._cursor = int(state["cursor"])
        self._put_off = [int(i) for i in state["put_off"]]


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of the ids of the examples in their order."""
    return f"{digest([e.id for e in examples]):032x}"


def refuse_other_state(state: dict[str, Any], **wanted: Any) -> None:
    """Raises ValueError if a `state_dict` says anything else of `kind`, `seed` or `data`."""
    for name, mine in wanted.items():
        if state.get(name) != mine:
            raise ValueError(
                f"this curriculum state has {name} {state.get(name)!r}, and the run has {mine!r}; "
                "resume with the data and seed of the run that wrote it, or begin a new run folder"
            )
