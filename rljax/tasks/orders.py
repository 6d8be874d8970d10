"""Tasks in an order: from easy to hard or back, or a part of them (2510.19099), by any number that the data tells."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from rljax.tasks.curriculum import check_draw, fingerprint, refuse_other_state
from rljax.tasks.examples import Example

Order = Literal[
    "random",
    "forward",
    "reverse",
    "grouped_forward",
    "grouped_reverse",
    "low",
    "middle",
    "high",
    "random_third",
]
ORDERS: tuple[Order, ...] = get_args(Order)
"""The orders that there are (2510.19099)."""


def arranged(difficulty: Sequence[float], order: str, *, seed: int = 0) -> list[int]:
    """Numbers of the tasks in the order in which they are trained on, by their `difficulty` [n] (higher is harder).

    `forward` goes from easy to hard, ties as they stand, and `reverse` is its exact reversal. `grouped_forward` cuts
    that at a third and two thirds of all (the last part takes what is left over) and shuffles inside the parts;
    `grouped_reverse` has the same parts from the last to the first. `low`, `middle` and `high` are one of these parts
    alone, shuffled; `random` is all tasks and `random_third` a third of them, whatever their difficulty. Tasks of
    difficulty NaN are left out of all orders, so that all have the same. ValueError for another order, and where
    nothing is left.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} must be one of {', '.join(ORDERS)}")

    values = np.asarray(difficulty, np.float64)
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        raise ValueError(f"none of the {len(values)} tasks has a difficulty")

    ascending = known[np.argsort(values[known], kind="stable")]
    if order == "forward":
        return ascending.tolist()
    if order == "reverse":
        return ascending[::-1].tolist()

    rng = np.random.default_rng(seed)
    third = len(ascending) // 3
    if order in ("random", "random_third"):
        # Of the tasks as they stand, so that an order of them does not depend on what they are ordered by.
        parts = [rng.permutation(known)[: third if order == "random_third" else None]]
    else:
        low, middle, high = (rng.permutation(part) for part in np.split(ascending, [third, 2 * third]))
        parts = {
            "grouped_forward": [low, middle, high],
            "grouped_reverse": [high, middle, low],
            "low": [low],
            "middle": [middle],
            "high": [high],
        }[order]
    chosen: list[int] = np.concatenate(parts).tolist()
    if not chosen:
        raise ValueError(f"order={order!r} has no task: a third of {len(ascending)} is none; give at least 3")
    return chosen


@dataclass
class OrderedTasks:
    """Tasks in the order of a number in the data, such as one that `rljax study curriculum` measured, pass after pass.

    A run that ends within the first pass has seen the first tasks of the order alone: from easy to hard that is
    the easy ones. Let `config.steps * config.prompts_per_step` be at least the tasks that there are.
    """

    column: str = ""
    """Column of the data: a number, higher for harder tasks. Rows without one are left out."""
    order: Order = "forward"
    """How tasks follow each other: `rljax.tasks.arranged` names the orders."""
    easy_is_high: bool = False
    """Whether the number is higher for easier tasks, as a pass rate is."""

    def check(self) -> None:
        """Raises ValueError for a setting out of range."""
        if not self.column:
            raise ValueError("config.curriculum.column='' names no column; name the one that holds the difficulty")

    def make(self, examples: Sequence[Example], seed: int) -> "OrderedCurriculum":
        """The curriculum over `examples`. ValueError where a value is no number, or no row has one."""
        self.check()
        sign = -1.0 if self.easy_is_high else 1.0
        difficulty = [sign * self._number(example) for example in examples]
        lacking = sum(map(math.isnan, difficulty))
        if lacking == len(difficulty):
            raise ValueError(
                f"config.curriculum.column={self.column!r}: no row has it; the first has "
                f"{sorted(examples[0].columns) if examples else 'not been given'}"
            )
        if lacking:
            logging.getLogger(__name__).warning("%d of %d tasks have no %s", lacking, len(difficulty), self.column)
        return OrderedCurriculum([examples[i] for i in arranged(difficulty, self.order, seed=seed)], seed=seed)

    def _number(self, example: Example) -> float:
        value = example.columns.get(self.column)
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{example.name} has {value!r:.60} as {self.column!r}, which must be a number")
        return float(value)


class OrderedCurriculum:
    """The examples as they stand, from the first to the last, and again.

    The place reached is part of the state, so a restored curriculum continues exactly. Raises ValueError for an empty
    data set.
    """

    def __init__(self, examples: Sequence[Example], seed: int = 0):
        if not examples:
            raise ValueError("a curriculum needs at least one example; the data set is empty")
        self._examples = list(examples)
        self._fingerprint = fingerprint(self._examples)
        self._seed = seed
        self._drawn = 0

    def sample(self, step: int, n: int) -> list[Example]:
        """The next `n` examples; `step` does not enter. Raises ValueError unless 1 <= n <= number of examples."""
        check_draw(n, len(self._examples))
        places = range(self._drawn, self._drawn + n)
        self._drawn += n
        return [self._examples[place % len(self._examples)] for place in places]

    def observe(self, examples: Sequence[Example], rewards: Sequence[float]) -> None:
        """Rewards do not change the order."""

    def state_dict(self) -> dict[str, Any]:
        return {"kind": type(self).__name__, "seed": self._seed, "data": self._fingerprint, "drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is of another kind of curriculum, other data, another order or seed."""
        refuse_other_state(dict(state), kind=type(self).__name__, seed=self._seed, data=self._fingerprint)
        self._drawn = int(state["drawn"])
