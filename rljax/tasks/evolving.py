"""Curricula that make tasks: what they see of a rollout, what they may ask of the policy, and the tasks they hold.

    Curriculum     sample, observe, state_dict, load_state_dict
    Evolving       a curriculum that also sees every sample (`see`) and may change its tasks before a rollout (`evolve`)
    Player         the policy as it stands, for `evolve`
    TaskPool       the data's tasks and those that were added, with the rules of what may be added

Before each rollout the curriculum may ask the policy, with the weights that are about to sample it. The answers depend
on (weights, seed, step, example, sample) alone, so a run that is resumed makes the same tasks again.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rljax.tasks.callables import load_callable
from rljax.tasks.curriculum import Curriculum, UniformCurriculum, fingerprint
from rljax.tasks.examples import Example, Prompt, prompt_digest

ADDED = "added"
"""Key of a `state_dict` that holds, as `row_of` writes them, the examples that are drawn and that the data lacks."""


ASKED = "asked_alone"
"""Column that marks an example whose prompt is a question to the policy, answered in one turn: an environment stays out
of it."""


class SeenGroup(NamedTuple):
    """The samples of one example, one entry of each list a sample."""

    example: Example
    texts: Sequence[str]
    """Completions as the reward saw them."""
    rewards: Sequence[float]
    """Raw rewards; NaN where the reward failed."""
    components: Sequence[Mapping[str, float]] = ()
    """Rewards by name, and counts of an environment's steps."""
    answers: Sequence[str | None] = ()
    """What the reward took for the answers, None for none; empty where nothing extracts them."""
    tokens: int = 0
    """Tokens that were sampled for all of them."""

    @property
    def valid(self) -> list[float]:
        """The rewards that did not fail."""
        return [reward for reward in self.rewards if not math.isnan(reward)]

    @property
    def mean(self) -> float:
        """Mean of the valid rewards; NaN without any."""
        valid = self.valid
        return sum(valid) / len(valid) if valid else math.nan


@runtime_checkable
class Player(Protocol):
    """The policy with the weights of the rollout to come."""

    def play(self, examples: Sequence[Example], samples: int, *, temperature: float | None = None) -> list[SeenGroup]:
        """`samples` answers to every example, judged as in training; groups in order. `temperature` None is the
        run's."""
        ...

    def can_play(self, example: Example) -> bool:
        """Whether the run takes this example: its prompt can be rendered, and fits."""
        ...


@runtime_checkable
class Evolving(Curriculum, Protocol):
    """A curriculum that sees samples and changes its tasks.

    Whatever it draws is one of `tasks`, and stays one for as long as a rollout of it may be under way. `state_dict`
    holds those of them that the data lacks under `ADDED`.
    """

    @property
    def tasks(self) -> Sequence[Example]:
        """All examples that it has drawn or may draw."""
        ...

    def keep_out(self, examples: Sequence[Example]) -> None:
        """Held-out examples: what has the prompt of one never becomes a task. Told once, before anything else."""
        ...

    def evolve(self, step: int, player: Player) -> dict[str, float]:
        """Called before the examples of `step` are drawn; gives metrics without prefix. What it does may depend on
        nothing but its state, `step` and what `player` says."""
        ...

    def see(self, step: int, groups: Sequence[SeenGroup]) -> None:
        """Everything that was sampled for `step`, groups that dynamic sampling left out among it."""
        ...


@runtime_checkable
class Judging(Evolving, Protocol):
    """A curriculum that says itself what some samples are worth: what the policy wrote of which only its later use
    tells, such as a question."""

    def judge(self, step: int, groups: Sequence[SeenGroup], player: Player) -> list[list[float] | None]:
        """A reward for every sample of a group, or None for a group whose rewards stand. Called with what was sampled
        for `step` before anything is learned from it."""
        ...


JUDGED = "curriculum"
"""Name, among the components, of a reward that a curriculum gave (`Judging`)."""
MEDIUM = (0.2, 0.8)
"""Mean reward of a group, in [0, 1], between which its task is of medium difficulty."""


def medium_share(groups: Sequence[SeenGroup]) -> float:
    """Share of the groups with a valid reward whose mean is within `MEDIUM`, without those whose rewards a curriculum
    gave, which are of no task; NaN without any."""
    means = [g.mean for g in groups if g.valid and not any(JUDGED in parts for parts in g.components)]
    return sum(MEDIUM[0] <= mean <= MEDIUM[1] for mean in means) / len(means) if means else math.nan


def row_of(example: Example) -> dict[str, Any]:
    """An example as JSON-like data; its columns must be such."""
    return {"prompt": example.prompt, "columns": dict(example.columns), "id": example.id, "place": example.place}


def example_of(row: Mapping[str, Any]) -> Example:
    """The inverse of `row_of`."""
    return Example(row["prompt"], row["columns"], row["id"], row["place"])


def added_by(state: Mapping[str, Any]) -> dict[int, Example]:
    """The examples, by id, that a curriculum's `state_dict` holds beyond the data."""
    return {row["id"]: example_of(row) for row in state.get(ADDED, ())}


@dataclasses.dataclass
class Intake:
    """What became of proposed tasks, counted since the run began. All but `accepted` never enter."""

    proposed: int = 0
    """Texts that were to be tasks."""
    unreadable: int = 0
    """No task could be read from the text, or none whose answer can be checked."""
    repeated: int = 0
    """The prompt is that of a task that is there already, or of one proposed in the same round."""
    held_out: int = 0
    """The prompt is that of a held-out example."""
    unplayable: int = 0
    """The prompt is too long for the run, or its tokenizer cannot write it."""
    unsolved: int = 0
    """No attempt of the policy earned anything."""
    not_medium: int = 0
    """Too many attempts agreed on an answer, or too few."""
    unconfirmed: int = 0
    """A second vote gave another label, or another check refused it."""
    surplus: int = 0
    """More had passed than the round takes in."""
    accepted: int = 0
    """It became a task."""


class TaskPool:
    """The data's examples, and those added behind them; nothing leaves. Raises ValueError for an empty data set."""

    def __init__(self, examples: Sequence[Example]):
        if not examples:
            raise ValueError("a curriculum needs at least one example; the data set is empty")
        self.data = list(examples)
        self.fingerprint = fingerprint(self.data)
        self.added: list[Example] = []
        self.intake = Intake()
        self._held_out: set[int] = set()
        self._held_ids: set[int] = set()
        self._index()

    def _index(self) -> None:
        self._prompts = {prompt_digest(example) for example in self.tasks}
        self._ids = {example.id for example in self.tasks}

    @property
    def tasks(self) -> list[Example]:
        """Those of the data first, then in the order in which they were added."""
        return [*self.data, *self.added]

    def keep_out(self, examples: Iterable[Example]) -> None:
        """As `Evolving.keep_out`."""
        for example in examples:
            self._held_out.add(prompt_digest(example))
            self._held_ids.add(example.id)

    def new_ones(self, proposals: Sequence[Example | None], player: Player) -> list[Example]:
        """Of proposed tasks those that may be tried: readable, new, not held out, and playable. Counts the others."""
        found: dict[int, Example] = {}
        ids: set[int] = set()
        for example in proposals:
            self.intake.proposed += 1
            if example is None:
                self.intake.unreadable += 1
                continue

            key = prompt_digest(example)
            if key in self._held_out or example.id in self._held_ids:
                self.intake.held_out += 1
            # An id names a prompt in sampling keys and in the journal, so it must be its own too.
            elif key in self._prompts or key in found or example.id in self._ids | ids:
                self.intake.repeated += 1
            elif not player.can_play(example):
                self.intake.unplayable += 1
            else:
                found[key] = example
                ids.add(example.id)
        return list(found.values())

    def add(self, examples: Sequence[Example]) -> None:
        """Takes them in, as accepted."""
        self.added += examples
        self.intake.accepted += len(examples)
        self._index()

    def state_dict(self) -> dict[str, Any]:
        """JSON-like."""
        return {ADDED: [row_of(example) for example in self.added], "intake": dataclasses.asdict(self.intake)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`, of the same data."""
        self.added = list(added_by(state).values())
        self.intake = Intake(**state["intake"])
        self._index()


class GrowingOrder:
    """Draws from a list of tasks that grows: all of them in a new order in every epoch, and anew when some are added.

    The order depends on (seed, how often tasks were added) and the tasks alone.
    """

    def __init__(self, tasks: Sequence[Example], seed: int):
        self._seed = seed
        self._generation = 0
        self._begin(list(tasks))

    def _begin(self, tasks: list[Example]) -> None:
        self._tasks = tasks
        self._order = UniformCurriculum(tasks, seed=self._seed + self._generation)

    def sample(self, n: int, tasks: Sequence[Example]) -> list[Example]:
        """`n` distinct examples of `tasks`, which begin with those of the last call. ValueError where there are fewer
        than `n`."""
        # What is new is drawn at once, not behind an epoch that began without it.
        if len(tasks) > len(self._tasks):
            self._generation += 1
            self._begin(list(tasks))
        return self._order.sample(0, n)

    def state_dict(self) -> dict[str, Any]:
        """JSON-like; the tasks are told anew."""
        return {"generation": self._generation, "tasks": len(self._tasks), "order": self._order.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], tasks: Sequence[Example]) -> None:
        """Goes on from `state_dict`, of a list that begins with the same tasks."""
        self._generation = int(state["generation"])
        self._begin(list(tasks[: int(state["tasks"])]))
        self._order.load_state_dict(state["order"])


@runtime_checkable
class TaskMaker(Protocol):
    """How tasks are asked for and read, for one kind of task; made by name, without a model or a file open."""

    def prompt_of(self, source: Example, why: str, texts: Sequence[str]) -> Prompt:
        """What the policy is asked, to propose a task like `source`. `why` says what made it be chosen, `texts` are
        what the policy answered to it."""
        ...

    def task_of(self, text: str, source: Example) -> Example | None:
        """The task that the policy wrote, with the columns that the reward checks it by; None for a text that is no
        task, or whose answer nothing could check."""
        ...


def task_maker(name: str, args: Mapping[str, Any], path: str) -> TaskMaker:
    """The maker `module:Class`, called with `args`. ValueError that begins with `path` where there is none."""
    if name.count(":") != 1:
        raise ValueError(f"{path}={name!r} must have the form 'module:Class', a class with prompt_of and task_of")
    try:
        maker = load_callable(name)(**args)
    except TypeError as error:
        raise ValueError(f"{path}={name}: args {dict(args)} do not fit: {error}") from None
    if not isinstance(maker, TaskMaker):
        raise ValueError(f"{path}={name} makes a {type(maker).__name__}, which lacks prompt_of or task_of; add them")
    return maker


def read_task(maker: TaskMaker, text: str, source: Example) -> Example | None:
    """`maker.task_of`; a text that it fails on is no task, as a reward that fails costs no run."""
    try:
        return maker.task_of(text, source)
    except Exception as error:
        logging.getLogger(__name__).warning("no task could be read from %.80r: %r", text, error)
        return None
