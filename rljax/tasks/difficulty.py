"""Tasks chosen by how often the policy solves them: an online filter, and the second stage of GLM-4.5 (2508.06471).

First the mathematics as functions of arrays, then the settings and the curricula. What is drawn more often is not
corrected for in the loss.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rljax.tasks.curriculum import UniformCurriculum, WeighedCurriculum, fingerprint, refuse_other_state
from rljax.tasks.evolving import Player, SeenGroup
from rljax.tasks.examples import Example


def refreshed(estimate: float, mean: float, *, rate: float) -> float:
    """`estimate + rate (mean - estimate)`: a pass rate that follows a policy which changes."""
    return estimate + rate * (mean - estimate)


def signal_weights(pass_rate: np.ndarray, *, floor: float) -> np.ndarray:
    """`p (1 - p) + floor` [n]: a group's rewards have the variance p (1 - p), and with it goes the size of its
    gradient. `floor` keeps tasks in reach that are always or never solved, as they seem."""
    pass_rate = np.asarray(pass_rate, np.float64)
    return pass_rate * (1 - pass_rate) + floor


def second_stage(solved: np.ndarray, *, few: int) -> np.ndarray:
    """Which tasks are hard and not hopeless, bool [n], by `solved` bool [n, many]: none of the first `few` attempts
    solved it, and some attempt did. pass@few = 0 and pass@many > 0 (2508.06471; there 8 and 512). The few are a fixed
    part of the many, and never chosen."""
    return np.asarray(~solved[:, :few].any(axis=1) & solved.any(axis=1))


def chance_of_second_stage(pass_rate: np.ndarray, *, few: int, many: int) -> np.ndarray:
    """With what probability a task of this pass rate is chosen where few and many are independent draws:
    `(1 - p)^few (1 - (1 - p)^many)`."""
    missed = 1 - np.asarray(pass_rate, np.float64)
    return missed**few * (1 - missed**many)


@dataclass
class MediumTasks:
    """Tasks that are solved sometimes are drawn more often: in proportion to p (1 - p), with p as rollouts show it."""

    rate: float = 0.3
    """How far one group moves the estimate of its task's pass rate. Lower it for small groups."""
    floor: float = 0.02
    """Added to p (1 - p), which is 0.25 at most: how often tasks are looked at again that were always or never
    solved."""
    start: float = 0.5
    """The pass rate that a task is held for before its first group."""

    def check(self) -> None:
        """Raises ValueError for a setting out of range."""
        name = "config.curriculum"
        if not 0 < self.rate <= 1:
            raise ValueError(f"{name}.rate={self.rate} must be above 0 and at most 1")
        if not self.floor > 0:
            raise ValueError(f"{name}.floor={self.floor} must be above 0, or a task that fails once never comes again")
        if not 0 <= self.start <= 1:
            raise ValueError(f"{name}.start={self.start} must be at least 0 and at most 1")

    def make(self, examples: Sequence[Example], seed: int) -> "MediumCurriculum":
        """The curriculum over `examples`."""
        return MediumCurriculum(examples, self, seed=seed)


class MediumCurriculum(WeighedCurriculum):
    """Draws examples by `signal_weights` of their estimated pass rates.

    It learns from every group, also from those that dynamic sampling leaves out. Rewards count as clipped to [0, 1].
    Raises ValueError for an empty data set and for settings out of range.
    """

    def __init__(self, examples: Sequence[Example], settings: MediumTasks, *, seed: int = 0):
        super().__init__(examples, seed)
        settings.check()
        self._settings = settings
        self._pass_rate = np.full(len(self._examples), settings.start)

    @property
    def tasks(self) -> Sequence[Example]:
        """The data's."""
        return self._examples

    @property
    def distribution(self) -> np.ndarray:
        """With what probability each example is drawn first, float64 [n]."""
        weights = signal_weights(self._pass_rate, floor=self._settings.floor)
        return weights / weights.sum()

    def keep_out(self, examples: Sequence[Example]) -> None:
        """Nothing is added."""

    def observe(self, examples: Sequence[Example], rewards: Sequence[float]) -> None:
        """Means say nothing that `see` has not told."""

    def see(self, step: int, groups: Sequence[SeenGroup]) -> None:
        """Moves the estimates of the tasks seen; those of other data sets are passed over."""
        for group in groups:
            place = self._index.get(group.example.id)
            if place is not None and group.valid:
                mean = float(np.clip(group.valid, 0.0, 1.0).mean())
                self._pass_rate[place] = refreshed(float(self._pass_rate[place]), mean, rate=self._settings.rate)

    def evolve(self, step: int, player: Player) -> dict[str, float]:
        """Asks nothing."""
        return {"tasks": float(len(self._examples))}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"pass_rate": self._pass_rate.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is of another kind of curriculum, other data or another seed."""
        super().load_state_dict(state)
        self._pass_rate = np.array(state["pass_rate"], np.float64)


@dataclass
class TwoStageTasks:
    """All tasks at first; from a step on those that are hard for the policy and not hopeless (GLM-4.5, 2508.06471)."""

    at: int = 100
    """The step, counted from 0, before which every task is measured and the second stage begins."""
    few: int = 8
    """A task of the second stage is solved by none of so many attempts."""
    many: int = 512
    """And by some of so many, the few among them. It is what the measurement costs: so many answers to every task."""
    least: int = 64
    """Where fewer tasks are so, the hardest of the others that were solved are drawn beside them, up to this number. At
    least the prompts of a step."""
    solved_at: float = 1.0
    """Reward from which an attempt has solved its task."""

    def check(self) -> None:
        """Raises ValueError for a setting out of range."""
        name = "config.curriculum"
        for one in ("at", "few", "least"):
            if getattr(self, one) < 1:
                raise ValueError(f"{name}.{one}={getattr(self, one)} must be at least 1")
        if self.many <= self.few:
            raise ValueError(f"{name}.many={self.many} must be above few={self.few}")

    def make(self, examples: Sequence[Example], seed: int) -> "TwoStageCurriculum":
        """The curriculum over `examples`."""
        return TwoStageCurriculum(examples, self, seed=seed)


class TwoStageCurriculum:
    """All examples, uniformly; from step `settings.at` on those that `second_stage` chooses.

    Groups of the usual size are mostly silent there: at a pass rate of 0.01 a group of 16 has a signal in 15 of 100
    cases. So raise the algorithm's group size, or take one with dynamic sampling. Which examples the second stage has
    is part of the state.
    """

    def __init__(self, examples: Sequence[Example], settings: TwoStageTasks, *, seed: int = 0):
        settings.check()
        self._settings = settings
        self._seed = seed
        self._examples = list(examples)
        self._order = UniformCurriculum(self._examples, seed=seed)
        self._chosen: list[int] | None = None
        self._num_hard = 0

    @property
    def tasks(self) -> Sequence[Example]:
        """The data's."""
        return self._examples

    def keep_out(self, examples: Sequence[Example]) -> None:
        """Nothing is added."""

    def sample(self, step: int, n: int) -> list[Example]:
        """`n` distinct examples of the stage; `step` does not enter. Raises ValueError where there are fewer."""
        return self._order.sample(step, n)

    def observe(self, examples: Sequence[Example], rewards: Sequence[float]) -> None:
        """What is drawn depends on the measurement alone."""

    def see(self, step: int, groups: Sequence[SeenGroup]) -> None:
        """Likewise."""

    def evolve(self, step: int, player: Player) -> dict[str, float]:
        """Measures every task, once, when the second stage begins."""
        if self._chosen is None and step >= self._settings.at:
            self._begin(self._chosen_by(player))
        chosen = self._examples if self._chosen is None else self._chosen
        return {"tasks": float(len(chosen)), "hard_tasks": float(self._num_hard)}

    def _chosen_by(self, player: Player) -> list[int]:
        settings = self._settings
        groups = player.play(self._examples, settings.many)
        # A reward that failed is NaN, and solves nothing.
        solved = np.array([[reward >= settings.solved_at for reward in group.rewards] for group in groups])
        chosen = np.flatnonzero(second_stage(solved, few=settings.few)).tolist()
        self._num_hard = len(chosen)

        if len(chosen) < settings.least:
            share = solved.mean(axis=1)
            others = [i for i in np.argsort(share, kind="stable").tolist() if share[i] > 0 and i not in set(chosen)]
            chosen += others[: settings.least - len(chosen)]
        if not chosen:
            logging.getLogger(__name__).warning(
                "no task was solved in %d attempts, so the second stage goes on with all %d; raise "
                "config.curriculum.many, or give easier data",
                settings.many,
                len(self._examples),
            )
        return chosen or list(range(len(self._examples)))

    def _begin(self, chosen: list[int]) -> None:
        self._chosen = chosen
        self._order = UniformCurriculum([self._examples[i] for i in chosen], seed=self._seed)

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "seed": self._seed,
            "data": fingerprint(self._examples),
            "chosen": self._chosen,
            "hard": self._num_hard,
            "order": self._order.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is of another kind of curriculum, other data or another seed."""
        data = fingerprint(self._examples)
        refuse_other_state(state, kind=type(self).__name__, seed=self._seed, data=data)
        self._num_hard = int(state["hard"])
        if state["chosen"] is not None:
            self._begin([int(i) for i in state["chosen"]])
        self._order.load_state_dict(state["order"])
