"""An actor around another one, for several processes: each plays its share of the groups, and all see all of them."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

import jax

from rljax.parallel import exchange
from rljax.plans import RolloutPlan
from rljax.rollouts.actor import Actor, Decoder, GroupRequest, ScoredGroup, known_example
from rljax.rollouts.plain import from_bytes, group_of, plain_group, to_bytes
from rljax.sampling import SamplingParams
from rljax.tasks import Example
from rljax.types import Params

COMBINED: dict[str, Callable[[list[float]], float]] = {
    "prefill_tokens": sum,
    "turns": sum,
    "failed": sum,
    "policy_aborts": sum,
    "groups_in_flight": sum,
    "unused_conversations": sum,
    "steps_in_flight": max,
}
"""What an actor's stats are of all processes: numbers of things add up, and what is not here is a mean."""


NAME = "rollouts"
"""Of the exchanges of actors: one thread has them all."""


class Shared:
    """Each process plays every P-th of the groups that are asked for, on devices of its own, and judges what it has
    played; then all are told all groups, as plain bytes from host to host. The `Actor` protocol says the rest.

    All processes ask for the same groups in the same order. The k-th group that is asked for is played by process
    k mod P, and the k-th that is handed out is from there too. So without groups in flight they are handed out in the
    order in which they were asked for, and each is what one process would have made of it.
    """

    def __init__(self, actor: Actor):
        self.actor = actor
        self.stats: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

        # Both count groups, of all processes.
        self._submitted = 0
        self._taken = 0
        # The rows of groups under way, by id.
        self._examples: dict[int, Example] = {}
        # Of all processes, as long as nothing has changed.
        self._state: dict[str, Any] | None = None

    def __enter__(self) -> "Shared":
        self.actor.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.actor.__exit__(*error)

    def set_params(self, params: Params, version: int) -> None:
        """The decoders copy weights that are spread over all processes onto this one's devices: all come here."""
        self.actor.set_params(params, version)

    def for_evaluation(self, sampling: SamplingParams) -> "Shared":
        return Shared(self.actor.for_evaluation(sampling))

    @property
    def decoders(self) -> Sequence[Decoder]:
        return self.actor.decoders

    @property
    def resting(self) -> Sequence[Decoder]:
        return self.actor.resting

    def cache_bytes(self) -> int:
        return self.actor.cache_bytes()

    def longest_row(self, prompt_length: int) -> int:
        return self.actor.longest_row(prompt_length)

    def missing(self, n: int, pending: int | None = None) -> int:
        return self.actor.missing(n, self._submitted - self._taken if pending is None else pending)

    def submit(self, requests: Sequence[GroupRequest], plan: RolloutPlan, step: int) -> None:
        own = [request for number, request in enumerate(requests, self._submitted) if self._is_own(number)]
        self.actor.submit(own, plan, step)

        self._submitted += len(requests)
        self._examples |= {request.example.id: request.example for request in requests}
        self._state = None

    def ready(self, n: int) -> list[ScoredGroup]:
        if n > self._submitted - self._taken:
            raise RuntimeError(f"{n} groups were asked for, but only {self._submitted - self._taken} are under way")
        numbers = range(self._taken, self._taken + n)
        groups = self.actor.ready(sum(map(self._is_own, numbers)))

        mine = {
            "groups": [plain_group(group) for group in groups],
            "stats": self.actor.stats,
            "seconds": self.actor.seconds,
        }
        told = [from_bytes(data) for data in exchange(NAME, to_bytes(mine))]
        self._tell_of(told)

        # What a process has made itself it takes from the bytes too, so that all hold the very same.
        found = [iter(part["groups"]) for part in told]
        ordered = [next(found[number % len(found)]) for number in numbers]
        taken = [group_of(plain, lambda number: known_example(self._examples, number)) for plain in ordered]

        self._taken += n
        if self._taken == self._submitted:
            self._examples = {}
        self._state = None
        return taken

    def _is_own(self, number: int) -> bool:
        return number % jax.process_count() == jax.process_index()

    def _tell_of(self, told: Sequence[Mapping[str, Any]]) -> None:
        """Stats and seconds of all processes as if they were one. `waiting` is how long a process waits for the slowest
        in the mean, so that the phases add up to what the slowest took."""
        played = [part["stats"] for part in told if part["groups"]]
        self.stats = {}
        for name in dict.fromkeys(name for stats in played for name in stats):
            values = [stats[name] for stats in played if name in stats]
            self.stats[name] = COMBINED.get(name, mean)(values)

        spent = [part["seconds"] for part in told]
        phases = dict.fromkeys(name for seconds in spent for name in seconds)
        self.seconds = {name: sum(seconds.get(name, 0.0) for seconds in spent) / len(spent) for name in phases}
        slowest = max(sum(seconds.values()) for seconds in spent)
        self.seconds["waiting"] = slowest - sum(self.seconds.values())

    def state_dict(self) -> dict[str, Any]:
        """What is under way in all processes, which come here together; `{}` where nothing is."""
        if self._submitted == self._taken:
            return {}
        if self._state is None:
            told = exchange(NAME, to_bytes(self.actor.state_dict()))
            counts = {"submitted": self._submitted, "taken": self._taken}
            self._state = {**counts, "processes": [from_bytes(data) for data in told]}
        return self._state

    def older(self, version: int) -> int:
        return self.actor.older(version)

    def checkpointed(self) -> None:
        self.actor.checkpointed()

    def load_state_dict(self, state: Mapping[str, Any], plan: RolloutPlan, examples: Mapping[int, Example]) -> None:
        """ValueError for what another number of processes had under way."""
        check_processes(state)
        if not state:
            return
        self._submitted = state["submitted"]
        self._taken = state["taken"]
        self._examples = dict(examples)
        self.actor.load_state_dict(state["processes"][jax.process_index()], plan, examples)


def check_processes(state: Mapping[str, Any]) -> None:
    """ValueError unless what an actor had under way was under way in as many processes as there are."""
    count = len(state.get("processes", (state,)))
    if state and count != jax.process_count():
        raise ValueError(
            f"the checkpoint holds groups that were under way on {count} processes, and this run has "
            f"{jax.process_count()}; go on with {count}, or start anew with --fresh"
        )
