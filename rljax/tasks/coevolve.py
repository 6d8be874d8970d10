"""Tasks that are made where the policy is weak (CoEvolve, 2604.15840).

First the signals as functions of scores and counts, then the settings and the curriculum.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rljax.tasks.callables import load_callable
from rljax.tasks.curriculum import refuse_other_state
from rljax.tasks.evolving import (
    GrowingOrder,
    Player,
    SeenGroup,
    TaskMaker,
    TaskPool,
    read_task,
    task_maker,
)
from rljax.tasks.examples import Example

HALF = 0.5
"""Outcome in [0, 1] that parts success from failure."""
PATTERN_ACTIONS = 8
"""A pattern has at most so many actions."""
SIGNALS = ("forgetting", "boundary", "rare")
"""Why a task is explored again; a task may have several."""


def is_forgotten(past: Sequence[float], score: float) -> bool:
    """Whether a task of which an earlier outcome was at least 0.5 is now below it (section 3.1). `past` are the
    outcomes before those of this group, in [0, 1]."""
    return score < HALF and any(value >= HALF for value in past)


def is_boundary(scores: Sequence[float]) -> bool:
    """Whether one group holds an outcome above 0.5 and one below it (section 3.1)."""
    return any(value > HALF for value in scores) and any(value < HALF for value in scores)


def is_rare(count: int, observed: int, *, percent: int, least: int) -> bool:
    """Whether a pattern was seen, in less than `percent` of at least `least` observations (section 3.1). In whole
    numbers, so that no rounding decides at the threshold."""
    return observed >= least and count > 0 and 100 * count < percent * observed


def is_accepted(scores: Sequence[float], *, partial: bool) -> bool:
    """Whether a proposed task enters: an attempt earned 1, or anything above 0 where `partial` credit counts."""
    return any(value >= 1 or (partial and value > 0) for value in scores)


def action_patterns(actions: Sequence[str]) -> list[tuple[str, ...]]:
    """The actions of a trajectory in order, equal ones that follow each other as one, at most 8 of them; and the
    triples that follow each other among these."""
    kept = [action for i, action in enumerate(actions) if i == 0 or actions[i - 1] != action][:PATTERN_ACTIONS]
    if not kept:
        return []
    triples = [tuple(kept[i : i + 3]) for i in range(len(kept) - 2)]
    return list(dict.fromkeys([tuple(kept), *triples]))


def stratified(marked: Mapping[str, Sequence[Any]], most: int) -> list[tuple[str, Any]]:
    """At most `most` of what is marked, as (signal, entry): the newest of each signal in turn, so that a frequent
    signal does not crowd out the others."""
    left = {signal: list(entries) for signal, entries in marked.items()}
    chosen: list[tuple[str, Any]] = []
    while len(chosen) < most and any(left.values()):
        for signal, entries in left.items():
            if entries and len(chosen) < most:
                chosen.append((signal, entries.pop()))
    return chosen


def self_similarity(vectors: np.ndarray, k: int) -> float:
    """SR@k of unit vectors [n, d] (section 4.3): the mean similarity of each to its `k` nearest others. Lower is more
    diverse. ValueError unless 1 <= k < n."""
    count = len(vectors)
    if not 1 <= k < count:
        raise ValueError(f"k={k} must be at least 1 and below the number of vectors, {count}")
    likeness = np.asarray(vectors, np.float64) @ np.asarray(vectors, np.float64).T
    np.fill_diagonal(likeness, -np.inf)
    return float(np.sort(likeness, axis=1)[:, -k:].mean())


def relative_energy_distance(target: np.ndarray, made: np.ndarray) -> float:
    """ED_rel of `made` [m, d] from `target` [n, d] (section 4.3): the energy distance, the means within a set over all
    pairs, over the mean distance between different vectors of `target`. 0 for equal sets."""

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(np.asarray(a, np.float64)[:, None] - np.asarray(b, np.float64)[None], axis=-1)

    within = distances(target, target)
    energy = 2 * distances(target, made).mean() - within.mean() - distances(made, made).mean()
    return float(energy / (within.sum() / (len(target) * (len(target) - 1))))


@dataclass
class CoEvolvedTasks:
    """Tasks like those that the policy fails at are made by the policy, tried, and added (CoEvolve, 2604.15840)."""

    maker: str = ""
    """How tasks are asked for and read, `module:Class`: a `rljax.tasks.TaskMaker`."""
    args: dict[str, Any] = field(default_factory=dict)
    """What it is called with."""
    every: int = 10
    """Steps between two rounds of new tasks. Fewer follow the policy faster and cost more tokens."""
    contexts: int = 32
    """Most marked tasks that a round explores, dealt out over the signals."""
    proposals: int = 3
    """Texts that are asked for, for each of them."""
    attempts: int = 8
    """Answers that the policy gives to a proposed task before it may enter."""
    accept_partial: bool = True
    """Whether a task enters of which no attempt earned 1 but some earned more than 0. Turn it off where a judge gives
    partial credit easily."""
    window: int = 10
    """Outcomes of a task that are remembered, to see what was forgotten."""
    actions: str = ""
    """`module:function` from the text of a completion to the names of its actions, for the signal `rare`. Empty: there
    is no such signal, and the next two fields have no effect."""
    rare_percent: int = 5
    """A pattern of actions is rare below this share of the patterns observed, in percent."""
    rare_least: int = 50
    """Patterns to observe before one can be rare."""

    def check(self) -> None:
        """Raises ValueError for a setting out of range."""
        name = "config.curriculum"
        for one in ("every", "contexts", "proposals", "attempts", "window", "rare_least"):
            if getattr(self, one) < 1:
                raise ValueError(f"{name}.{one}={getattr(self, one)} must be at least 1")
        if not 0 < self.rare_percent < 100:
            raise ValueError(f"{name}.rare_percent={self.rare_percent} must be above 0 and below 100")

    def make(self, examples: Sequence[Example], seed: int) -> "CoEvolvedCurriculum":
        """The curriculum over `examples`. Raises ValueError for names that lead nowhere."""
        maker = task_maker(self.maker, self.args, "config.curriculum.maker")
        actions = load_callable(self.actions) if self.actions else None
        return CoEvolvedCurriculum(examples, self, maker, actions, seed=seed)


class CoEvolvedCurriculum:
    """The data's tasks, and in every `settings.every` steps new ones, uniformly.

    A round asks the policy for tasks like those that were marked since the last one (`SIGNALS`), reads them with
    `maker`, and has the policy try each of them: one that nothing can check (`TaskMaker.task_of` gave None), that no
    attempt solves, or that repeats another or a held-out one never enters. Nothing leaves.

    Everything that later draws depend on is part of the state: outcomes, counts of patterns, marks and tasks.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        settings: CoEvolvedTasks,
        maker: TaskMaker,
        actions: Callable[[str], Sequence[str]] | None = None,
        *,
        seed: int = 0,
    ):
        settings.check()
        self._settings = settings
        self._maker = maker
        self._actions = actions
        self._seed = seed
        self._pool = TaskPool(examples)
        self._order = GrowingOrder(self._pool.tasks, seed)
        self._by_id = {example.id: example for example in self._pool.tasks}
        self._past: dict[int, deque[float]] = {}
        self._patterns: Counter[tuple[str, ...]] = Counter()
        self._marked: dict[str, dict[int, list[str]]] = {signal: {} for signal in SIGNALS}

    @property
    def tasks(self) -> Sequence[Example]:
        """The data's tasks, then those that were added, in their order."""
        return self._pool.tasks

    def keep_out(self, examples: Sequence[Example]) -> None:
        """As `Evolving.keep_out`."""
        self._pool.keep_out(examples)

    def sample(self, step: int, n: int) -> list[Example]:
        """`n` distinct tasks; `step` does not enter. Raises ValueError unless 1 <= n <= number of tasks."""
        return self._order.sample(n, self._pool.tasks)

    def observe(self, examples: Sequence[Example], rewards: Sequence[float]) -> None:
        """Means say nothing that `see` has not told."""

    def see(self, step: int, groups: Sequence[SeenGroup]) -> None:
        """Marks tasks by what became of their samples."""
        # Patterns of the whole rollout are counted before any is called rare.
        patterns = [[self._patterns_of(text) for text in group.texts] for group in groups]
        for found in patterns:
            for one in found:
                self._patterns.update(one)

        for group, found in zip(groups, patterns, strict=True):
            if group.example.id in self._by_id:
                self._mark(group, found)

    def _mark(self, group: SeenGroup, patterns: Sequence[Sequence[tuple[str, ...]]]) -> None:
        settings = self._settings
        task = group.example.id
        # A reward that failed is NaN, which is neither a success nor a failure.
        scores = np.clip(np.asarray(group.rewards, np.float64), 0.0, 1.0).tolist()
        valid = [score for score in scores if not math.isnan(score)]

        # Against what is remembered of earlier groups: any mixed group would be forgetting otherwise.
        past = self._past.setdefault(task, deque(maxlen=settings.window))
        forgotten = [text for text, score in zip(group.texts, scores, strict=True) if is_forgotten(past, score)]
        past.extend(valid)

        observed = self._patterns.total()
        rare = [
            text
            for text, found in zip(group.texts, patterns, strict=True)
            if any(
                is_rare(self._patterns[one], observed, percent=settings.rare_percent, least=settings.rare_least)
                for one in found
            )
        ]
        boundary = list(group.texts) if is_boundary(valid) else []
        for signal, texts in zip(SIGNALS, (forgotten, boundary, rare), strict=True):
            if texts:
                # Marked anew: it is the newest of its signal.
                self._marked[signal].pop(task, None)
                self._marked[signal][task] = texts

    def _patterns_of(self, text: str) -> list[tuple[str, ...]]:
        return [] if self._actions is None else action_patterns(list(self._actions(text)))

    def evolve(self, step: int, player: Player) -> dict[str, float]:
        """A round of new tasks, where it is time for one."""
        if step and step % self._settings.every == 0:
            self._explore(player)
        counts = {name: float(count) for name, count in vars(self._pool.intake).items()}
        marks = {f"marked_{signal}": float(len(tasks)) for signal, tasks in self._marked.items()}
        return {"tasks": float(len(self._pool.tasks)), **counts, **marks}

    def _explore(self, player: Player) -> None:
        settings = self._settings
        chosen = stratified({s: list(tasks.items()) for s, tasks in self._marked.items()}, settings.contexts)
        asked = []
        sources = []
        for signal, (task, texts) in chosen:
            source = self._by_id[task]
            # With the columns of its source, since the same rewards read what is written here.
            example = Example(self._maker.prompt_of(source, signal, texts), source.columns)
            if player.can_play(example):
                asked.append(example)
                sources.append(source)

        written = player.play(asked, settings.proposals) if asked else []
        proposed = [
            read_task(self._maker, text, source)
            for group, source in zip(written, sources, strict=True)
            for text in group.texts
        ]
        candidates = self._pool.new_ones(proposed, player)

        tried = player.play(candidates, settings.attempts) if candidates else []
        accepted = [group.example for group in tried if is_accepted(group.valid, partial=settings.accept_partial)]
        self._pool.intake.unsolved += len(tried) - len(accepted)
        self._pool.add(accepted)
        self._by_id |= {example.id: example for example in accepted}
        for marked in self._marked.values():
            marked.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "seed": self._seed,
            "data": self._pool.fingerprint,
            **self._pool.state_dict(),
            "order": self._order.state_dict(),
            "past": [[task, list(scores)] for task, scores in self._past.items()],
            "patterns": [[list(pattern), count] for pattern, count in self._patterns.items()],
            "marked": [
                [signal, task, texts] for signal, tasks in self._marked.items() for task, texts in tasks.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is of another kind of curriculum, other data or another seed."""
        refuse_other_state(state, kind=type(self).__name__, seed=self._seed, data=self._pool.fingerprint)
        self._pool.load_state_dict(state)
        self._by_id = {example.id: example for example in self._pool.tasks}
        self._order.load_state_dict(state["order"], self._pool.tasks)
        self._past = {task: deque(scores, maxlen=self._settings.window) for task, scores in state["past"]}
        self._patterns = Counter({tuple(pattern): count for pattern, count in state["patterns"]})
        self._marked = {signal: {} for signal in SIGNALS}
        for signal, task, texts in state["marked"]:
            self._marked[signal][task] = list(texts)
