"""What `rljax study skills` is set by."""

import dataclasses
from collections.abc import Callable
from typing import Any

from rljax.settings import field


@dataclasses.dataclass
class SkillsConfig:
    """Users who share a repository of skills, and the nights in which it evolves."""

    evolver: Callable[[Any], Any] | None = None
    """`evolver(parts)`: what proposes skills (`rljax.tasks.Evolver`), such as `AskedEvolver(parts.policy)`. `parts`
    holds the policy and remembers answers (`StageParts`)."""

    handed_in: Callable[[int, Any], list[Any]] | None = None
    """`handed_in(day, deployed)`: proposals (`rljax.tasks.Proposal`) that people hand in on a day, from 1 on; they pass
    the same gate. None is none."""

    topic_column: str = "topic"
    """Column of the data by which a task is given the skills of its topic."""

    form: str = "{text}\n\n"
    """How a skill stands in front of a prompt."""

    days: int = field(default=4, least=1)
    """Days, each with a night behind it."""

    users: int = field(default=4, least=1)
    """Users, whose episodes are evidence together."""

    episodes: int = field(default=32, least=1)
    """Episodes of a user on a day."""

    least_evidence: int = field(default=1, least=1)
    """Episodes below which a skill is left alone."""

    validation_share: float = field(default=0.3, above=0, below=1)
    """Share of the training examples, by the hash of their prompts, that no user is given: candidates are tried on
    them."""

    validation_tasks: int = field(default=8, least=1)
    """Most tasks that a candidate is tried on. With few of them a good one may fail by chance, and a bad one pass."""

    repeats: int = field(default=4, least=1)
    """Samples of each of these tasks."""

    margin: float = field(default=0.05, least=-1, most=1)
    """Least gain of mean success by which a candidate is accepted."""

    max_broken: int = field(default=0, least=0)
    """Most tasks that may stop working with it."""
