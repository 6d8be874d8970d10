"""Tasks that fail, and tasks like them by their words, are drawn more often (Role-Agent, 2606.10917, the agent-in-world
part without a model: `rljax.tasks.reflection` asks the policy).

First the mathematics as functions of arrays, then the settings and the curriculum. What is drawn more often is not
corrected for in the loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rljax.tasks.curriculum import WeighedCurriculum
from rljax.tasks.examples import Example
from rljax.tasks.similarity import TextSimilarity, dice

FINGERPRINT_CHARS = 800


def nearest(neighbours: Sequence[tuple[int, float]], *, count: int) -> list[tuple[int, float]]:
    """The `count` most similar distinct tasks of (task, similarity) pairs, those of similarity 0 left out."""
    found: dict[int, float] = {}
    for task, similarity in neighbours:
        if similarity > 0:
            found[task] = max(similarity, found.get(task, 0.0))
    return sorted(found.items(), key=lambda pair: -pair[1])[:count]


def failure_mass(mass: np.ndarray, own: np.ndarray, similar: np.ndarray, *, decay: float, kappa: float) -> np.ndarray:
    """`decay mass + own + kappa similar`, all [n]: own failures of a task in this step, and the similarities by which
    failures of other tasks point to it."""
    return decay * np.asarray(mass, np.float64) + np.asarray(own, np.float64) + kappa * np.asarray(similar, np.float64)


def failure_distribution(mass: np.ndarray, *, eta: float) -> np.ndarray:
    """`(1 - eta) / n + eta mass / sum(mass)` [n], uniform where there is no mass: no task is ever drawn less often than
    `1 - eta` times its uniform share."""
    mass = np.asarray(mass, np.float64)
    total = mass.sum()
    uniform = np.full(len(mass), 1 / len(mass))
    return (1 - eta) * uniform + eta * mass / total if total > 0 else uniform


def grown_weights(
    weights: np.ndarray, own: np.ndarray, similar: np.ndarray, *, step: float = 0.15, kappa: float = 0.35
) -> np.ndarray:
    """`weights + step own + kappa similar`, all [n], at least 1e-3: those of the release, of which none ever falls.
    They begin at 1, and examples are drawn in proportion to them; the other arguments are as in `failure_mass`."""
    grown = np.asarray(weights, np.float64) + step * np.asarray(own) + kappa * np.asarray(similar)
    return np.maximum(grown, 1e-3)


@dataclass
class FailedTasks:
    """What failed, and what is like it, more often (Role-Agent, 2606.10917)."""

    eta: float = 0.5
    """Share of the draws that follow failures; the rest is uniform. Lower it if solved tasks are forgotten. The other
    fields take effect with it above 0."""
    forgets: bool = True
    """Whether failures fade. Without, weights begin at 1 and only grow, as in the release: by 0.15 for an own failure,
    by `kappa` (there 0.35) times the similarity for one of another task; `eta` and `decay` have no effect then."""
    decay: float = 0.9
    """What is left of a failure after a step."""
    kappa: float = 0.5
    """How much a failure counts for a task that is like it, times the similarity; 1 is as much as its own. `count` and
    `history` take effect with it above 0."""
    count: int = 3
    """How many similar tasks share in a failure."""
    history: int = 512
    """Failures that are remembered to be compared with."""
    failed_at: float = 0.0
    """An example whose mean reward is at most this has failed."""

    def check(self) -> None:
        """Raises ValueError for a setting out of range."""
        name = "config.curriculum"
        if not 0 <= self.eta < 1:
            raise ValueError(f"{name}.eta={self.eta}, the share that follows failures, must be at least 0 and below 1")
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"{name}.decay={self.decay}, what is left of a failure after a step, must be at least 0 and below 1"
            )
        for field in ("kappa", "count", "history"):
            if getattr(self, field) < 0:
                raise ValueError(f"{name}.{field}={getattr(self, field)} must be at least 0")

    def make(self, examples: Sequence[Example], seed: int) -> "FailureCurriculum":
        """The curriculum over `examples`."""
        return FailureCurriculum(examples, self, seed=seed)


class FailureCurriculum(WeighedCurriculum):
    """Draws examples by `failure_distribution`, as `settings` say.

    An example that failed adds 1 to its own mass, and `kappa` times the similarity to that of each of the `count` tasks
    most like it among the last `history` failures of others. What is solved is forgotten by the factor `decay` per
    step. Only training examples are ever compared.

    `similarity` compares the first 800 characters of two prompts. Raises ValueError for an empty data set and for
    settings out of range.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        settings: FailedTasks | None = None,
        *,
        seed: int = 0,
        similarity: TextSimilarity = dice,
    ):
        super().__init__(examples, seed)
        self._settings = FailedTasks() if settings is None else settings
        self._settings.check()
        self._similarity = similarity
        self._texts = [prompt_text(e)[:FINGERPRINT_CHARS] for e in self._examples]
        self._mass = np.zeros(len(self._examples))
        self._failures: list[int] = []

    @property
    def distribution(self) -> np.ndarray:
        """With what probability each example is drawn first, float64 [n]."""
        if self._settings.forgets:
            return failure_distribution(self._mass, eta=self._settings.eta)
        weights = 1.0 + self._mass
        return weights / weights.sum()

    def observe(self, examples: Sequence[Example], rewards: Sequence[float]) -> None:
        """Learn which examples of a step failed; those of other data sets are passed over. A step of which nothing is
        known is none."""
        if not examples:
            return
        settings = self._settings
        failed = [
            self._index[example.id]
            for example, reward in zip(examples, rewards, strict=True)
            if example.id in self._index and reward <= settings.failed_at
        ]
        own = np.zeros(len(self._mass))
        np.add.at(own, failed, 1.0)

        similar = np.zeros(len(self._mass))
        for i in failed:
            # those of this step, too, count as earlier failures of one another, in the order of the batch
            past = dict.fromkeys(j for j in self._failures if j != i)
            neighbours = [(j, self._similarity(self._texts[i], self._texts[j])) for j in past]
            for j, likeness in nearest(neighbours, count=settings.count):
                similar[j] += likeness
            self._failures = [*self._failures, i][-settings.history :] if settings.history else []

        if settings.forgets:
            self._mass = failure_mass(self._mass, own, similar, decay=settings.decay, kappa=settings.kappa)
            self._mass[self._mass < 1e-9] = 0.0  # what has faded leaves the state
        else:
            # What is above 1 alone, so that most examples are in no state.
            self._mass = grown_weights(1.0 + self._mass, own, similar, kappa=settings.kappa) - 1.0

    def state_dict(self) -> dict[str, Any]:
        held = np.flatnonzero(self._mass)
        mass = [[int(i), float(self._mass[i])] for i in held]
        return super().state_dict() | {"failures": list(self._failures), "mass": mass}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is of another kind of curriculum, other data or another seed."""
        super().load_state_dict(state)
        self._failures = [int(i) for i in state["failures"]]
        self._mass = np.zeros(len(self._examples))
        for i, mass in state["mass"]:
            self._mass[int(i)] = mass


def prompt_text(example: Example) -> str:
    """What a prompt says: the contents of its messages, where it has any, a line each."""
    if isinstance(example.prompt, str):
        return example.prompt
    return "\n".join(str(message.get("content") or "") for message in example.prompt)
