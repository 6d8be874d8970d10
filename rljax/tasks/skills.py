"""Skills of text that many users share, and what is done with them as functions of data (SkillClaw, 2604.08377).

Skill          a text, and the topic of the tasks that are given it
Episode        what one user did in one task, and which skills it had been given
with_skills    puts the texts of skills in front of a prompt
by_skill       G(s), the episodes that had been given skill s, and G(0), those that had none
success_rates  the share of solved episodes of each skill
paired_gate    whether what was changed in prompts may be deployed: incumbent and candidate on the same tasks

Skills on disk are in `rljax.tasks.skill_store`, and what makes new ones in `rljax.tasks.skill_evolution`. No weights
change, and nothing here enters a gradient.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from rljax.tasks.evolving import SeenGroup
from rljax.tasks.examples import Example, Prompt

SKILLS = "given_skills"
"""Column of an example: labels of the skills that its prompt holds. A rollout's record has it with all columns."""
SOLVED = 1.0
"""An episode that earned so much is solved."""
HALF = 0.5
"""Mean outcome in [0, 1] that parts a task that works from one that does not."""

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}")


@dataclass(frozen=True)
class Skill:
    """One version of a skill. Raises ValueError for a name that is none of a folder, an empty text, or a version below
    0."""

    name: str
    """Of its folder: letters, digits, - and _."""
    text: str
    """What a prompt is given."""
    topic: str
    """Of the tasks that it is for; `ByTopic` compares it with a column of theirs."""
    version: int = 0
    """From 1 on, as it was deployed; 0 is a proposal."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"skill {self.name!r}: a name has up to 64 letters, digits, - and _, since folders are called so"
            )
        if not self.text.strip():
            raise ValueError(f"skill {self.name}: the text is empty; leave the skill out")
        if self.version < 0:
            raise ValueError(f"skill {self.name}: version {self.version} must be at least 0")

    @property
    def label(self) -> str:
        """Name and version, as records hold it."""
        return f"{self.name}@{self.version}"


def skill_of_label(label: str) -> str:
    """The name of the skill that a label is of."""
    return label.partition("@")[0]


ChooseSkills: TypeAlias = Callable[[Sequence[Skill], Example], Sequence[Skill]]
"""Which of the deployed skills the prompt of an example is given."""


@dataclass(frozen=True)
class ByTopic:
    """The skills whose topic is what the example has in `column`."""

    column: str = "topic"

    def __call__(self, skills: Sequence[Skill], example: Example) -> list[Skill]:
        return [skill for skill in skills if skill.topic == str(example.columns.get(self.column))]


def with_skills(
    example: Example, skills: Sequence[Skill], *, choose: ChooseSkills = ByTopic(), form: str = "{text}\n\n"
) -> Example:
    """`example`, whose prompt begins with those of `skills` that are for it, each as `form` says. The column
    `given_skills` names them; it is an empty list where there are none.

    All samples of an example have one prompt, so a group shares its skills, and its baseline is that of one task. The
    id stays: with and without a skill a sample meets the same random numbers.
    """
    chosen = choose(skills, example)
    labels = [skill.label for skill in chosen]
    prefix = "".join(form.format(text=skill.text) for skill in chosen)
    return Example(with_prefix(example.prompt, prefix), {**example.columns, SKILLS: labels}, example.id, example.place)


def with_prefix(prompt: Prompt, text: str) -> Prompt:
    """`prompt` with `text` in front, of its first user message where it is messages: not every chat template has a
    system's. ValueError for messages without a user message of text."""
    if not text:
        return prompt
    if isinstance(prompt, str):
        return text + prompt
    messages = [dict(message) for message in prompt]
    users = [m for m in messages if m.get("role") == "user" and isinstance(m.get("content"), str)]
    if not users:
        raise ValueError(f"the prompt {prompt!r:.100} has no user message of text that a skill could stand in")
    users[0]["content"] = text + users[0]["content"]
    return messages


@dataclass(frozen=True)
class Episode:
    """One user's episode, as evidence for an evolver; JSON-ready by `vars`."""

    user: str
    """Whose it was."""
    task: int
    """Id of the example."""
    prompt: Prompt
    """What the policy read first, skills among it."""
    text: str
    """What followed: actions and, in an environment, what came back."""
    reward: float
    """NaN where the task could not be judged."""
    skills: tuple[str, ...] = ()
    """Labels of the skills that it was given."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Those of the example. An evolver that read a right answer there would not need episodes."""

    @property
    def is_solved(self) -> bool:
        """Whether it earned 1 or more."""
        return self.reward >= SOLVED


def episodes_of(user: str, groups: Sequence[SeenGroup]) -> list[Episode]:
    """The episodes of a user, one for each sample."""
    return [
        Episode(
            user=user,
            task=group.example.id,
            prompt=group.example.prompt,
            text=text,
            reward=reward,
            skills=tuple(group.example.columns.get(SKILLS, ())),
            columns={name: value for name, value in group.example.columns.items() if name != SKILLS},
        )
        for group in groups
        for text, reward in zip(group.texts, group.rewards, strict=True)
    ]


class Evidence(NamedTuple):
    """Episodes of all users by skill."""

    of_skill: Mapping[str, Sequence[Episode]]
    """G(s): those that had been given a skill, by its name. One episode may be with several."""
    unguided: Sequence[Episode]
    """G(0): those that had been given none."""


def by_skill(episodes: Sequence[Episode]) -> Evidence:
    """Sorts episodes by the skills that they had been given."""
    of_skill: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        for name in dict.fromkeys(map(skill_of_label, episode.skills)):
            of_skill[name].append(episode)
    return Evidence(dict(of_skill), [episode for episode in episodes if not episode.skills])


def success_rates(episodes: Sequence[Episode]) -> dict[str, float]:
    """Share of solved episodes by skill, and of those without any under the empty name; those that could not be judged
    are left out."""
    judged = by_skill([episode for episode in episodes if not math.isnan(episode.reward)])
    groups = {**judged.of_skill, **({"": judged.unguided} if judged.unguided else {})}
    return {name: float(np.mean([e.is_solved for e in group])) for name, group in sorted(groups.items())}


class Verdict(NamedTuple):
    """What `paired_gate` found."""

    accepted: bool
    """Whether the candidate may be deployed."""
    delta: float
    """Mean of the candidate minus mean of the incumbent."""
    broken: int
    """Tasks that worked and do not any more."""

    def __str__(self) -> str:
        word = "accepted" if self.accepted else "rejected"
        return f"{word}: {self.delta:+.3f}, {self.broken} broken"


def paired_gate(
    incumbent: Sequence[Any] | np.ndarray,
    candidate: Sequence[Any] | np.ndarray,
    *,
    margin: float = 0.05,
    max_broken: int = 0,
) -> Verdict:
    """Whether a candidate may take the place of an incumbent, from outcomes in [0, 1] on the same tasks: [N], or [N, R]
    for R repeats of each task, of which the mean counts, since a single run flips by chance.

        delta  = mean(candidate) - mean(incumbent)
        broken = tasks with incumbent >= 0.5 and candidate < 0.5
        accept = delta >= margin and broken <= max_broken

    NaN, a run that could not be judged, counts as 0; a candidate of which no run could be judged is never accepted.
    ValueError for no task, or for outcomes of different tasks.
    """
    has_run = not np.isnan(np.asarray(candidate, np.float64)).all()
    old, new = (np.nan_to_num(np.asarray(x, np.float64), nan=0.0) for x in (incumbent, candidate))
    if not old.size or old.shape != new.shape or old.ndim > 2:
        raise ValueError(
            f"outcomes of shapes {old.shape} and {new.shape}: incumbent and candidate need the same tasks, at least "
            "one, as [tasks] or [tasks, repeats]"
        )
    # By task: a task is what may break.
    if old.ndim == 2:
        old, new = old.mean(axis=1), new.mean(axis=1)

    # Of the differences, so that equal outcomes give exactly 0.
    delta = float(np.mean(new - old))
    broken = int(np.sum((old >= HALF) & (new < HALF)))
    return Verdict(has_run and delta >= margin and broken <= max_broken, delta, broken)


def refuse_shared_tasks(evidence: Sequence[int], validation: Sequence[int]) -> None:
    """ValueError where a task that a candidate was made from is one that it is to be validated on, by example ids."""
    if shared := sorted(set(evidence) & set(validation)):
        raise ValueError(
            f"{len(shared)} tasks are evidence and validation at once, such as {shared[0]}: a skill would be tried on "
            "what it was written from; keep them apart (rljax.tasks.split_by_hash)"
        )
