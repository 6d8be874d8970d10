"""Groups that were asked for and not begun: the queue of actors whose work does not outlive a call."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rljax.plans import RolloutPlan
from rljax.rollouts.actor import Decoder, GroupRequest, known_example
from rljax.tasks import Example


class Order(NamedTuple):
    """Groups to be made by one plan, with the random numbers of one step."""

    requests: list[GroupRequest]
    plan: RolloutPlan
    step: int


class Orders:
    """A queue of `Order`s, first in, first out, that is counted in groups."""

    def __init__(self) -> None:
        self._queue: list[tuple[GroupRequest, RolloutPlan, int]] = []

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, requests: Sequence[GroupRequest], plan: RolloutPlan, step: int) -> None:
        self._queue += [(request, plan, step) for request in requests]

    def take(self, n: int) -> list[Order]:
        """The first `n` groups, those of one plan and step together. Raises RuntimeError if there are fewer."""
        if n > len(self._queue):
            raise RuntimeError(f"{n} groups were asked for, but only {len(self._queue)} were submitted")
        taken = self._queue[:n]
        self._queue = self._queue[n:]
        together = itertools.groupby(taken, key=lambda entry: (id(entry[1]), entry[2]))
        return [
            Order([request for request, _, _ in entries], entries[0][1], entries[0][2])
            for entries in (list(part) for _, part in together)
        ]

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready; `{}` when nothing waits."""
        if not self._queue:
            return {}
        return {"orders": [[request.example.id, request.first_sample, step] for request, _, step in self._queue]}

    def load_state_dict(self, state: Mapping[str, Any], plan: RolloutPlan, examples: Mapping[int, Example]) -> None:
        """What `state_dict` gave, to be made by `plan`. ValueError for an example that the data no longer holds."""
        self._queue = [
            (GroupRequest(known_example(examples, example_id), first_sample), plan, step)
            for example_id, first_sample, step in state.get("orders", ())
        ]


class QueuedActor:
    """What actors have in common whose work does not outlive a call: what was submitted waits in a queue, and that is
    all that is ever under way."""

    def __init__(self) -> None:
        self.stats: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._orders = Orders()

    def missing(self, n: int, pending: int | None = None) -> int:
        return max(0, n - (len(self._orders) if pending is None else pending))

    def submit(self, requests: Sequence[GroupRequest], plan: RolloutPlan, step: int) -> None:
        self._orders.add(requests, plan, step)

    def state_dict(self) -> dict[str, Any]:
        return self._orders.state_dict()

    @property
    def resting(self) -> Sequence[Decoder]:
        return ()

    def older(self, version: int) -> int:
        return version

    def checkpointed(self) -> None:
        pass

    def load_state_dict(self, state: Mapping[str, Any], plan: RolloutPlan, examples: Mapping[int, Example]) -> None:
        self._orders.load_state_dict(state, plan, examples)
