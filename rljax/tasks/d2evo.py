"""A solver and a questioner that are one policy with two prompts (D2Evo, 2605.17037).

First the mathematics as functions of counts and answers, then the settings and the curriculum.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rljax.tasks.curriculum import UniformCurriculum, refuse_other_state
from rljax.tasks.evolving import (
    ADDED,
    Player,
    SeenGroup,
    TaskMaker,
    TaskPool,
    example_of,
    read_task,
    row_of,
    task_maker,
)
from rljax.tasks.examples import Example, Prompt, prompt_digest, with_paragraph

EDGE = 1e-6
"""How far beyond an end of a band a share still counts as within it: 4 of 10 may lie on either side of 0.4."""


class Vote(NamedTuple):
    """What several attempts at a question agree on."""

    label: str | None
    """The most frequent answer, of equally frequent ones the first; None where there is no answer."""
    share: float
    """Attempts that gave it, over all attempts: those without an answer count below the line."""


def majority(answers: Sequence[str | None]) -> Vote:
    """The vote of `answers`, None for an attempt without one. Equal answers must be equal texts."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return Vote(None, 0.0)
    # `most_common` keeps the order of first appearance among equal counts.
    label, count = counts.most_common(1)[0]
    return Vote(label, count / len(answers))


def is_within(share: float, band: tuple[float, float]) -> bool:
    """Whether `share` lies in the closed `band`, up to rounding."""
    return band[0] - EDGE <= share <= band[1] + EDGE


def difficulty_reward(share: float, *, band: tuple[float, float], steepness: float) -> float:
    """What a question is worth whose majority answer has `share` of the votes (section on the questioner):

    1                                 within the band
    (share / low) ** steepness        below it
    ((1 - share) / (1 - high)) ** steepness   above it
    """
    low, high = band
    if is_within(share, band):
        return 1.0
    return (share / low) ** steepness if share < low else ((1 - share) / (1 - high)) ** steepness


def anchors_of(solved: Sequence[float], *, band: tuple[float, float], least: int) -> list[int]:
    """The places of the tasks of medium difficulty: those whose share of solved attempts lies within `band`. Where
    fewer than `least` do, the band is widened on its hard side: the most solved of those below it follow, without
    those that nothing solved."""
    found = [i for i, share in enumerate(solved) if is_within(share, band)]
    harder = [i for i, share in enumerate(solved) if 0 < share < band[0] - EDGE]
    harder.sort(key=lambda i: -solved[i])
    return sorted(found + harder[: max(least - len(found), 0)])


@runtime_checkable
class QuestionMaker(TaskMaker, Protocol):
    """A `TaskMaker` whose `task_of` says nothing of the answer: a vote finds it."""

    def labelled(self, task: Example, label: str) -> Example | None:
        """`task`, which has the columns of its anchor, with its own, `label` among them. None where a second check,
        such as a stronger model or a program, does not confirm `label`."""
        ...


class TaggedQuestions:
    """Questions in words, between `<question>` and `</question>`; their answer is the column `answer`.

    `solution` and `subject` are columns of the data that the questioner reads beside the question, where a row has
    them.
    """

    def __init__(self, instruction: str = "", solution: str = "solution", subject: str = "subject"):
        self.instruction = instruction or (
            "Write one new problem on the same subject, different from the one above, that a solver gets right about "
            "every second time. Give the problem alone, inside <question> and </question>."
        )
        self.solution = solution
        self.subject = subject

    def prompt_of(self, source: Example, why: str, texts: Sequence[str]) -> Prompt:
        prompt = source.prompt
        for title, name in (("Solution", self.solution), ("Subject", self.subject)):
            if value := source.columns.get(name):
                prompt = with_paragraph(prompt, f"{title}: {value}")
        return with_paragraph(prompt, self.instruction)

    def task_of(self, text: str, source: Example) -> Example | None:
        _, opened, rest = text.rpartition("<question>")
        question, closed, _ = rest.partition("</question>")
        question = question.strip()
        if not opened or not closed or not question:
            return None
        # In the form of the data's prompts: text where they are text.
        is_text = isinstance(source.prompt, str)
        return Example(question if is_text else [{"role": "user", "content": question}])

    def labelled(self, task: Example, label: str) -> Example | None:
        # The solution is the anchor's.
        others = {name: value for name, value in task.columns.items() if name != self.solution}
        return Example(task.prompt, {**others, "answer": label})


@dataclass
class D2EvoTasks:
    """Rounds in which tasks of medium difficulty are found, the policy learns to ask for more of them, and it learns
    from both (D2Evo, 2605.17037)."""

    maker: str = "rljax.tasks:TaggedQuestions"
    """How questions are asked for, read and given their answer, `module:Class`: a `rljax.tasks.QuestionMaker`."""
    args: dict[str, Any] = field(default_factory=dict)
    """What it is called with."""
    questioner_steps: int = 20
    """Steps of a round that train the questioner."""
    solver_steps: int = 40
    """Steps of a round that train the solver, after those."""
    attempts: int = 32
    """Answers to every task of the data with which a round begins, to find its anchors."""
    anchor_band: tuple[float, float] = (0.4, 0.8)
    """A task of the data is an anchor if its share of solved attempts is within."""
    least_anchors: int = 32
    """With fewer anchors the most solved of the harder tasks are taken beside them, up to this number."""
    votes: int = 10
    """Answers to every question; how many agree says how hard it is. A question of a training step costs so many."""
    question_band: tuple[float, float] = (0.4, 0.6)
    """A question is of medium difficulty if the share of its most frequent answer is within."""
    steepness: float = 2.0
    """Exponent of the questioner's reward outside of that band."""
    proposals: int = 8
    """Questions asked for of every anchor, once the questioner is trained."""
    per_anchor: float = 1.0
    """Most questions that enter a round, as a multiple of its anchors."""
    second_votes: int = 10
    """Fresh answers whose majority must confirm a label. 0 leaves the check to the maker's `labelled`."""
    solved_at: float = 1.0
    """Reward from which an attempt has solved its task."""

    def check(self) -> None:
        """Raises ValueError for a setting out of range."""
        name = "config.curriculum"
        for one in ("questioner_steps", "solver_steps", "attempts", "least_anchors", "votes", "proposals"):
            if getattr(self, one) < 1:
                raise ValueError(f"{name}.{one}={getattr(self, one)} must be at least 1")
        for one in ("second_votes", "per_anchor", "steepness"):
            if getattr(self, one) < 0:
                raise ValueError(f"{name}.{one}={getattr(self, one)} must be at least 0")
        for one in ("anchor_band", "question_band"):
            low, high = getattr(self, one)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name}.{one}={(low, high)} must be (low, high) with 0 < low <= high <= 1")

    def make(self, examples: Sequence[Example], seed: int) -> "D2EvoCurriculum":
        """The curriculum over `examples`. Raises ValueError for names that lead nowhere."""
        path = "config.curriculum.maker"
        maker = task_maker(self.maker, self.args, path)
        if not isinstance(maker, QuestionMaker):
            raise ValueError(f"{path}={self.maker} makes a {type(maker).__name__}, which lacks labelled; add it")
        return D2EvoCurriculum(examples, self, maker, seed=seed)


class D2EvoCurriculum:
    """In rounds: questioner steps draw prompts that ask for a question like an anchor, and are judged here (`judge`);
    solver steps draw the anchors and the questions that entered this round.

    Both train the one policy. A question enters if it can be read, repeats nothing, is of medium difficulty by a vote,
    and its label is confirmed. Anchors, questions, order and counts are part of the state.
    """

    def __init__(self, examples: Sequence[Example], settings: D2EvoTasks, maker: QuestionMaker, *, seed: int = 0):
        settings.check()
        self._settings = settings
        self._maker = maker
        self._seed = seed
        self._pool = TaskPool(examples)
        # With the columns of its source, since the run's rewards read what is written here too, before `judge`.
        self._asks = [Example(maker.prompt_of(e, "anchor", ()), e.columns) for e in self._pool.data]
        self._source = {ask.id: e for ask, e in zip(self._asks, self._pool.data, strict=True)}
        if len(self._source) < len(self._asks) or self._source.keys() & {e.id for e in self._pool.data}:
            raise ValueError(
                f"config.curriculum.maker={settings.maker} asks for questions with one prompt for several tasks, or "
                "with a task's own; its prompt_of must tell them apart"
            )
        self._held_out: set[int] = set()
        self._anchors: list[int] = []
        self._hybrid: list[int] = []
        self._generation = 0
        self._draw_from([])
        self._stats = {"anchors": 0.0, "question_share": 0.0, "questions_in_band": 0.0}

    @property
    def tasks(self) -> Sequence[Example]:
        """The data's tasks, the questions that ever entered, then the prompts of the questioner."""
        return [*self._pool.tasks, *self._asks]

    def keep_out(self, examples: Sequence[Example]) -> None:
        """As `Evolving.keep_out`."""
        self._pool.keep_out(examples)
        self._held_out |= {prompt_digest(example) for example in examples}

    def asks_at(self, step: int) -> bool:
        """Whether `step` trains the questioner."""
        settings = self._settings
        return step % (settings.questioner_steps + settings.solver_steps) < settings.questioner_steps

    def evolve(self, step: int, player: Player) -> dict[str, float]:
        """Finds the anchors where a round begins, and takes questions in where its solver steps do."""
        settings = self._settings
        place = step % (settings.questioner_steps + settings.solver_steps)
        if step == 0:
            self._check_asks(player)
        if place == 0:
            self._find_anchors(player)
        elif place == settings.questioner_steps:
            self._take_questions(player)

        counts = {name: float(count) for name, count in vars(self._pool.intake).items()}
        return {"tasks": float(len(self._hybrid) or len(self._anchors)), **counts, **self._stats}

    def _check_asks(self, player: Player) -> None:
        """ValueError for a prompt of the questioner that cannot be sampled, which is longer than its task's."""
        wrong = [ask for ask in self._asks if not player.can_play(ask)]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(self._asks)} prompts with which config.curriculum.maker={self._settings.maker} "
                f"asks for a question cannot be sampled, such as {wrong[0].prompt!r:.100}; raise "
                "config.actor.prompt_buckets, or leave less in the prompt"
            )

    def _find_anchors(self, player: Player) -> None:
        settings = self._settings
        groups = player.play(self._pool.data, settings.attempts)
        # A reward that failed is NaN, and solves nothing.
        solved = [sum(r >= settings.solved_at for r in group.rewards) / settings.attempts for group in groups]
        found = anchors_of(solved, band=settings.anchor_band, least=settings.least_anchors)
        # Of a policy that solves nothing, or everything, no task is better than another.
        self._anchors = found or list(range(len(self._pool.data)))
        self._hybrid = []
        self._stats["anchors"] = float(len(found))
        self._draw_from(self._anchors)

    def _take_questions(self, player: Player) -> None:
        settings = self._settings
        written = player.play([self._asks[i] for i in self._anchors], settings.proposals)
        # The first of every anchor, then the second of every one: no anchor crowds out another.
        proposed = [
            self._read(text, self._source[group.example.id])
            for texts in itertools.zip_longest(*(group.texts for group in written))
            for group, text in zip(written, texts, strict=True)
        ]
        candidates = self._pool.new_ones(proposed, player)
        votes = self._votes(candidates, player, settings.votes)
        medium = [(c, v.label) for c, v in zip(candidates, votes, strict=True) if self._is_medium(v)]
        self._pool.intake.not_medium += len(candidates) - len(medium)

        again: Sequence[Vote] = [Vote(label, 1.0) for _, label in medium]
        if settings.second_votes:
            again = self._votes([task for task, _ in medium], player, settings.second_votes)
        confirmed = []
        for (task, label), second in zip(medium, again, strict=True):
            named = self._maker.labelled(task, label) if label is not None and second.label == label else None
            if named is None:
                self._pool.intake.unconfirmed += 1
            else:
                # The id that was looked up among those that there are.
                confirmed.append(dataclasses.replace(named, id=task.id))

        most = round(settings.per_anchor * len(self._anchors))
        self._pool.intake.surplus += max(len(confirmed) - most, 0)
        first = len(self._pool.tasks)
        self._pool.add(confirmed[:most])
        self._hybrid = [*self._anchors, *range(first, len(self._pool.tasks))]
        self._draw_from(self._hybrid)

    def _votes(self, questions: Sequence[Example], player: Player, count: int) -> list[Vote]:
        groups = player.play(questions, count) if questions else []
        if any(not group.answers for group in groups):
            raise ValueError(
                "config.curriculum votes on answers, and the reward that decides extracts none; give it a method "
                "answer_in, or take one of rljax.tasks.verifiers"
            )
        return [majority(group.answers) for group in groups]

    def _is_medium(self, vote: Vote) -> bool:
        return vote.label is not None and is_within(vote.share, self._settings.question_band)

    def judge(self, step: int, groups: Sequence[SeenGroup], player: Player) -> list[list[float] | None]:
        """What questions are worth: 0 for what is no question, repeats its anchor, is held out or cannot be played;
        else `difficulty_reward` of a vote by the policy that asked. None for groups that are answers."""
        settings = self._settings
        read: list[list[Example | None] | None] = []
        asked: dict[int, Example] = {}
        for group in groups:
            source = self._source.get(group.example.id)
            if source is None:
                read.append(None)
                continue
            tasks = [self._question_of(text, source, player) for text in group.texts]
            asked |= {prompt_digest(task): task for task in tasks if task is not None}
            read.append(tasks)

        # A question that is written several times is answered once, and worth the same each time.
        votes = dict(zip(asked, self._votes(list(asked.values()), player, settings.votes), strict=True))
        worth = {
            key: difficulty_reward(vote.share, band=settings.question_band, steepness=settings.steepness)
            for key, vote in votes.items()
        }
        if votes:
            self._stats["question_share"] = sum(vote.share for vote in votes.values()) / len(votes)
            self._stats["questions_in_band"] = sum(map(self._is_medium, votes.values())) / len(votes)
        return [
            None if tasks is None else [0.0 if t is None else worth[prompt_digest(t)] for t in tasks] for tasks in read
        ]

    def _read(self, text: str, source: Example) -> Example | None:
        """The question, with its anchor's columns: rewards that lack one would fail, and find no answers to vote on."""
        task = read_task(self._maker, text, source)
        return None if task is None else dataclasses.replace(task, columns=source.columns)

    def _question_of(self, text: str, source: Example, player: Player) -> Example | None:
        task = self._read(text, source)
        if task is None or prompt_digest(task) in self._held_out | {prompt_digest(source)}:
            return None
        return task if player.can_play(task) else None

    def sample(self, step: int, n: int) -> list[Example]:
        """`n` prompts of the questioner, or tasks of the solver; all that there are before one comes again."""
        asks = self.asks_at(step)
        drawn: list[Example] = []
        while len(drawn) < n:
            drawn += self._order.sample(step, min(n - len(drawn), self._distinct))
        if not asks:
            return drawn
        places = {example.id: i for i, example in enumerate(self._pool.data)}
        return [self._asks[places[example.id]] for example in drawn]

    def _draw_from(self, places: Sequence[int]) -> None:
        tasks = self._pool.tasks
        chosen = [tasks[i] for i in places] or tasks
        self._distinct = len(chosen)
        self._order = UniformCurriculum(chosen, seed=self._seed + self._generation)
        self._generation += 1

    def observe(self, examples: Sequence[Example], rewards: Sequence[float]) -> None:
        """What is drawn depends on the measurements alone."""

    def see(self, step: int, groups: Sequence[SeenGroup]) -> None:
        """Likewise."""

    def state_dict(self) -> dict[str, Any]:
        state = self._pool.state_dict()
        return {
            "kind": type(self).__name__,
            "seed": self._seed,
            "data": self._pool.fingerprint,
            **state,
            # What is drawn and not in the data: questions, and the prompts that ask for them.
            ADDED: [*state[ADDED], *map(row_of, self._asks)],
            "anchors": self._anchors,
            "hybrid": self._hybrid,
            "generation": self._generation,
            "order": self._order.state_dict(),
            "stats": dict(self._stats),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is of another kind of curriculum, other data or another seed."""
        refuse_other_state(dict(state), kind=type(self).__name__, seed=self._seed, data=self._pool.fingerprint)
        asks = [example_of(row) for row in state[ADDED][-len(self._asks) :]]
        if [ask.id for ask in asks] != [ask.id for ask in self._asks]:
            raise ValueError(
                "this curriculum state has other prompts of the questioner; resume with the maker and args that the "
                "run began with, or begin a new run folder"
            )
        self._pool.load_state_dict({**state, ADDED: state[ADDED][: -len(self._asks)]})
        self._anchors = [int(i) for i in state["anchors"]]
        self._hybrid = [int(i) for i in state["hybrid"]]
        self._generation = int(state["generation"]) - 1
        self._draw_from(self._hybrid or self._anchors)
        self._order.load_state_dict(state["order"])
        self._stats = dict(state["stats"])
