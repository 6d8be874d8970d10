"""The policy says why it failed and which earlier tasks failed alike, and these are drawn more often (Role-Agent,
2606.10917, the agent-in-world part).

First what is asked and how the answers are read, as functions of texts, then the settings and the curriculum.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from rljax.tasks.curriculum import WeighedCurriculum
from rljax.tasks.evolving import ASKED, Player, SeenGroup
from rljax.tasks.examples import Example
from rljax.tasks.failures import failure_distribution, failure_mass, prompt_text

FAILURE_MODES: dict[str, tuple[str, ...]] = {
    "household": (
        "repetitive_exploration",
        "wrong_target_location",
        "wrong_receptacle",
        "premature_give_up",
        "missing_precondition",
        "repeated_failed_action",
        "navigation_loop",
        "entity_confusion",
        "wrong_object_interaction",
        "exhaustive_exploration_failure",
        "action_format_error",
    ),
    "shopping": (
        "irrelevant_query",
        "wrong_product_selection",
        "wrong_attribute_selection",
        "missing_attribute_selection",
        "premature_purchase",
        "excessive_browsing",
        "repeated_query",
        "navigation_error",
        "price_constraint_violation",
        "action_format_error",
        "premature_termination",
    ),
    "search": (
        "wrong_answer",
        "insufficient_retrieval",
        "irrelevant_retrieval_query",
        "repeated_retrieval_query",
        "information_misinterpretation",
        "partial_answer",
        "hallucinated_answer",
        "premature_answer",
        "action_format_error",
    ),
}
"""The ways to fail that the paper tells apart, by kind of task (its appendix)."""

FIELDS = ("DOMINANT_TYPE", "DETAIL", "CRITICAL_STEP", "CORE_LESSON", "RETRIEVAL_QUERY")
"""What a reflection holds, in this order."""

TASK_CHARS = 300
"""Characters of an earlier task that the policy reads when it chooses among them."""


class Reflection(NamedTuple):
    """Why a rollout failed, in the policy's words; the fields are those of `FIELDS`."""

    mode: str
    """One of the modes that were asked for."""
    detail: str
    step: str
    lesson: str
    query: str
    """What to look for among earlier failures."""


def reflection_prompt(task: str, trajectory: str, modes: Sequence[str]) -> str:
    """What is asked about a failed rollout."""
    form = "\n".join((f"{FIELDS[0]}: one of {', '.join(modes)}", *(f"{name}: ..." for name in FIELDS[1:])))
    return (
        f"A rollout of this task has failed.\n\nTask:\n{task}\n\nRollout:\n{trajectory}\n\n"
        "Say why: the type of the failure, what happened, the step that decided it, the lesson, and a query that finds "
        f"earlier tasks that failed alike. Answer in this form alone:\n<reflection>\n{form}\n</reflection>"
    )


def read_reflection(text: str, modes: Sequence[str]) -> Reflection | None:
    """The last reflection of a text; None where there is none, where a field is missing or empty, or where the type is
    none of `modes`. Spaces, hyphens and capitals in a type do not matter, nor do asterisks around names of fields."""
    block = _last_block(text, "reflection")
    parts = re.split(rf"^[\s*]*({'|'.join(FIELDS)})[\s*]*:", block, flags=re.MULTILINE)
    # A field that is there twice is what was said last.
    found = {name: value.strip(" *\t\r\n") for name, value in zip(parts[1::2], parts[2::2], strict=True)}
    if not all(found.get(name) for name in FIELDS):
        return None
    mode = re.sub(r"[\s-]+", "_", found[FIELDS[0]].lower())
    return Reflection(mode, *(found[name] for name in FIELDS[1:])) if mode in modes else None


def retrieval_prompt(reflection: Reflection, past: Sequence[tuple[str, Reflection]]) -> str:
    """What is asked about earlier failures, (task, reflection) each, which are numbered from 1."""
    listed = "\n\n".join(
        f"INDEX: {number}\nTYPE: {one.mode}\nLESSON: {one.lesson}\nTASK: {task}"
        for number, (task, one) in enumerate(past, start=1)
    )
    return (
        f"A task has failed ({reflection.mode}): {reflection.detail}\nQuery: {reflection.query}\n\n"
        f"Earlier failures:\n\n{listed}\n\nWhich of these failed alike? Name the most similar first, and none that is "
        "not. Answer in this form alone, two lines for each:\n<selected_tasks>\nINDEX: ...\nREASON: ...\n"
        "</selected_tasks>"
    )


def read_selected(text: str, among: int, *, count: int) -> list[int]:
    """The places, from 0 on, of the first `count` distinct entries that a text selects of those that it was shown
    (`among`); what is no number of one is passed over."""
    named = re.findall(r"^[\s*-]*INDEX[\s*]*:[\s*]*(\d{1,9})\b", _last_block(text, "selected_tasks"), re.MULTILINE)
    return list(dict.fromkeys(int(number) - 1 for number in named if 1 <= int(number) <= among))[:count]


def shown_failures(
    memory: Sequence[tuple[int, Reflection]], task: int, mode: str, *, most: int
) -> list[tuple[int, Reflection]]:
    """Of remembered failures, oldest first, those that are shown for one of `task`: the newest of each other task,
    those of the same mode first, then newer ones first, at most `most`."""
    newest: dict[int, Reflection] = {}
    for other, reflection in reversed(memory):
        if other != task:
            newest.setdefault(other, reflection)
    return sorted(newest.items(), key=lambda one: one[1].mode != mode)[:most]


def _last_block(text: str, tag: str) -> str:
    """What stands in the last whole `<tag>`; empty without one."""
    found = re.findall(rf"<{tag}>((?:(?!<{tag}>).)*?)</{tag}>", text, re.DOTALL)
    return found[-1] if found else ""


def _cut(text: str, chars: int) -> str:
    """`text` without its middle where it is longer than `chars`."""
    if len(text) <= chars:
        return text
    head = chars // 2
    return f"{text[:head]}\n[...]\n{text[len(text) - (chars - head) :]}"


@dataclass
class ReflectedTasks:
    """What failed, and what the policy itself says failed alike, more often (Role-Agent, 2606.10917): it reads its
    failed rollouts, names why each failed, and looks for earlier failures like it."""

    vocabulary: Literal["household", "shopping", "search"] = "search"
    """The ways to fail that a reflection may name: those of the paper for one kind of task."""
    modes: tuple[str, ...] = ()
    """Own ones, in place of a vocabulary's; lower-cased words joined by underscores."""
    eta: float = 0.5
    """Share of the draws that follow failures; the rest is uniform. Lower it if solved tasks are forgotten."""
    decay: float = 0.9
    """What is left of a failure after a step."""
    kappa: float = 0.5
    """How much a failure counts for a task that was selected as like it; 1 is as much as its own."""
    count: int = 3
    """Most tasks that are selected for a failed rollout."""
    rollouts: int = 0
    """Most failed rollouts of an example that are read after a step; 0 is all. Each costs an answer to a prompt with
    the whole rollout, and one to the list of failures."""
    shown: int = 32
    """Most earlier failures that the policy chooses among."""
    history: int = 512
    """Reflections that are remembered."""
    chars: int = 6000
    """Characters of a rollout that are read; a longer one loses its middle. Task, rollout and some
    500 tokens of questions must fit where the policy's prompts do, else a rollout is passed over and counted. An answer
    is as long as `config.sampling.max_new_tokens` allows."""
    temperature: float = 0.5
    """That of reflections and selections; 0 is greedy."""
    failed_at: float = 0.0
    """A rollout whose reward is at most this has failed, and so has an example whose mean reward is."""

    @property
    def known_modes(self) -> tuple[str, ...]:
        """The ways to fail."""
        return self.modes or FAILURE_MODES[self.vocabulary]

    def check(self) -> None:
        """Raises ValueError for a setting out of range."""
        name = "config.curriculum"
        wrong = [mode for mode in self.modes if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", mode)]
        if wrong or len(set(self.modes)) < len(self.modes):
            raise ValueError(
                f"{name}.modes={self.modes} must be distinct lower-cased words joined by underscores, such as "
                "'wrong_answer'"
            )
        for field in ("eta", "decay"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{name}.{field}={getattr(self, field)} must be at least 0 and below 1")
        if 0 < self.temperature < 0.01:
            raise ValueError(f"{name}.temperature={self.temperature} must be 0, which is greedy, or at least 0.01")
        for field in ("kappa", "rollouts", "temperature"):
            if getattr(self, field) < 0:
                raise ValueError(f"{name}.{field}={getattr(self, field)} must be at least 0")
        for field in ("count", "shown", "history", "chars"):
            if getattr(self, field) < 1:
                raise ValueError(f"{name}.{field}={getattr(self, field)} must be at least 1")

    def make(self, examples: Sequence[Example], seed: int) -> "ReflectedCurriculum":
        """The curriculum over `examples`."""
        return ReflectedCurriculum(examples, self, seed=seed)


class ReflectedCurriculum(WeighedCurriculum):
    """Draws examples by `failure_distribution`, as `settings` say.

    After a step the policy reads every failed rollout and reflects on it, and then selects, for each reflection that
    could be read, tasks that failed alike among those that it reflected on before, this step's among them. An example
    of which all failed adds 1 to its own mass, whatever could be read; a selection adds `kappa` to that of the task
    selected. Tasks never select themselves. All is asked before the next rollout is drawn, with the weights of then.

    Part of the state are mass, memory, and the rollouts that are still to be read. Raises ValueError for an empty data
    set and for settings out of range.
    """

    def __init__(self, examples: Sequence[Example], settings: ReflectedTasks | None = None, *, seed: int = 0):
        super().__init__(examples, seed)
        self._settings = ReflectedTasks() if settings is None else settings
        self._settings.check()
        self._mass = np.zeros(len(self._examples))
        self._memory: list[tuple[int, Reflection]] = []
        self._counts = dict.fromkeys(("reflections", "unread_reflections", "retrieved"), 0)
        self._forget_seen()

    def _forget_seen(self) -> None:
        self._has_seen = False
        self._failed: list[int] = []
        self._unread: list[tuple[int, str]] = []

    @property
    def tasks(self) -> Sequence[Example]:
        """Those of the data: none is made."""
        return self._examples

    @property
    def distribution(self) -> np.ndarray:
        """With what probability each example is drawn first, float64 [n]."""
        return failure_distribution(self._mass, eta=self._settings.eta)

    def keep_out(self, examples: Sequence[Example]) -> None:
        """No task is made, and those of other data are never read (`see`)."""

    def observe(self, examples: Sequence[Example], rewards: Sequence[float]) -> None:
        """Means say nothing that `see` has not told."""

    def see(self, step: int, groups: Sequence[SeenGroup]) -> None:
        """Remembers what failed, to be read by `evolve`; examples of other data are passed over, and so are rollouts
        whose reward failed."""
        settings = self._settings
        for group in groups:
            task = self._index.get(group.example.id)
            if task is None or not group.valid:
                continue
            self._has_seen = True
            if group.mean <= settings.failed_at:
                self._failed.append(task)
            # NaN is not at most anything.
            texts = [t for t, reward in zip(group.texts, group.rewards, strict=True) if reward <= settings.failed_at]
            self._unread += [(task, _cut(text, settings.chars)) for text in texts[: settings.rollouts or None]]

    def evolve(self, step: int, player: Player) -> dict[str, float]:
        """Reflections on what failed since the last time, and the weights that follow."""
        if self._has_seen:
            own, similar = np.zeros(len(self._mass)), np.zeros(len(self._mass))
            np.add.at(own, self._failed, 1.0)
            for task in self._select(self._reflect(player), player):
                similar[task] += 1.0
            self._mass = failure_mass(self._mass, own, similar, decay=self._settings.decay, kappa=self._settings.kappa)
            # What has faded leaves the state.
            self._mass[self._mass < 1e-9] = 0.0
            self._forget_seen()
        modes = {reflection.mode for _, reflection in self._memory}
        counts = {name: float(count) for name, count in self._counts.items()}
        return {"tasks": float(len(self._examples)), **counts, "modes": float(len(modes))}

    def _reflect(self, player: Player) -> list[tuple[int, Reflection]]:
        """(task, reflection) of every rollout whose reflection could be read, in order."""
        modes = self._settings.known_modes
        prompts = [
            (task, reflection_prompt(prompt_text(self._examples[task]), text, modes)) for task, text in self._unread
        ]
        read = [None if text is None else read_reflection(text, modes) for text in self._ask(prompts, player)]
        self._counts["reflections"] += len(read)
        self._counts["unread_reflections"] += sum(one is None for one in read)
        return [(task, one) for (task, _), one in zip(prompts, read, strict=True) if one is not None]

    def _select(self, reflections: Sequence[tuple[int, Reflection]], player: Player) -> list[int]:
        """The tasks selected for each of `reflections`, which become part of the memory."""
        settings = self._settings
        asked: list[tuple[int, str]] = []
        choices: list[list[int]] = []
        for task, reflection in reflections:
            past = shown_failures(self._memory, task, reflection.mode, most=settings.shown)
            if past:
                told = [(_cut(prompt_text(self._examples[other]), TASK_CHARS), one) for other, one in past]
                asked.append((task, retrieval_prompt(reflection, told)))
                choices.append([other for other, _ in past])
            # One of this step counts as an earlier one for those behind it.
            self._memory = [*self._memory, (task, reflection)][-settings.history :]

        selected: list[int] = []
        for text, tasks in zip(self._ask(asked, player), choices, strict=True):
            places = [] if text is None else read_selected(text, len(tasks), count=settings.count)
            selected += [tasks[place] for place in places]
        self._counts["retrieved"] += len(selected)
        return selected

    def _ask(self, prompts: Sequence[tuple[int, str]], player: Player) -> list[str | None]:
        """An answer to each prompt, which is of a task; None to one that the run cannot play."""
        asked: list[Example] = []
        places: list[int] = []
        for place, (task, text) in enumerate(prompts):
            source = self._examples[task]
            # In the form of the data's prompts, and with their columns, which the run's rewards read.
            prompt = text if isinstance(source.prompt, str) else [{"role": "user", "content": text}]
            example = Example(prompt, {**source.columns, ASKED: True})
            if player.can_play(example):
                asked.append(example)
                places.append(place)

        answers: list[str | None] = [None] * len(prompts)
        groups = player.play(asked, 1, temperature=self._settings.temperature) if asked else []
        for place, group in zip(places, groups, strict=True):
            answers[place] = group.texts[0]
        return answers

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "mass": [[int(i), float(self._mass[i])] for i in np.flatnonzero(self._mass)],
            "memory": [[task, list(reflection)] for task, reflection in self._memory],
            "counts": dict(self._counts),
            "seen": self._has_seen,
            "failed": list(self._failed),
            "unread": [[task, text] for task, text in self._unread],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is of another kind of curriculum, other data or another seed."""
        super().load_state_dict(state)
        self._mass = np.zeros(len(self._examples))
        for i, mass in state["mass"]:
            self._mass[int(i)] = mass
        self._memory = [(int(task), Reflection(*reflection)) for task, reflection in state["memory"]]
        self._counts = {name: int(count) for name, count in state["counts"].items()}
        self._has_seen = bool(state["seen"])
        self._failed = [int(task) for task in state["failed"]]
        self._unread = [(int(task), str(text)) for task, text in state["unread"]]
