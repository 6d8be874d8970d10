"""Days of users who share skills, and the nights between them (SkillClaw, 2604.08377), over a run whose weights stay.

FOLDER/repository/           the skills (`rljax.tasks.SkillRepository`)
FOLDER/day-01/episodes.jsonl what users did on day 1, a line an episode, which names its skills
FOLDER/day-01/decisions.json what became of the proposals of the night behind it
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rljax.evaluation import evaluate
from rljax.experiment.build import Run, held_out_examples
from rljax.experiment.player import PolicyPlayer
from rljax.experiment.stage_parts import StageParts
from rljax.tasks import (
    ByTopic,
    Decision,
    Episode,
    Example,
    Gate,
    Skill,
    SkillRepository,
    Trial,
    admit,
    by_skill,
    episodes_of,
    proposals,
    split_by_hash,
    success_rates,
    with_skills,
)
from rljax.training.storage import replace_text


@dataclasses.dataclass(frozen=True)
class Day:
    """What a day and the night behind it came to; JSON-ready by `to_dict`."""

    number: int
    """From 1 on; 0 is before the first day."""
    success: dict[str, float]
    """Share of solved episodes of the day by skill (`success_rates`), in the day's own wording."""
    decisions: list[Decision]
    """Of the night."""
    deployed: list[str]
    """Labels of what users are given on the next day."""
    held_out: float
    """avg@k of the held-out examples with these skills."""

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "decisions": [_told(decision) for decision in self.decisions]}


class SkillDays:
    """The users, tasks and repository of `run.config.skills`, with the weights that the run's actor has.

    Users are given examples to train on; candidates are tried on a share of them that no user sees. Everything depends
    on (weights, config, what the repository holds) alone. `weights` names the weights for files of answers.
    """

    def __init__(self, run: Run, weights: str, folder: Path):
        check_skills(run)
        own = run.config.skills
        split = split_by_hash(run.dataset.train, test_fraction=own.validation_share)
        self._run = run
        self._weights = weights
        self._folder = folder
        self._evidence = split.train
        self._validation = split.test
        self._choose = ByTopic(own.topic_column)
        self._player: PolicyPlayer = run.player()
        self.repository = SkillRepository(folder / "repository")

    def before(self) -> Day:
        """What the policy does with the skills that are there."""
        return self._look(0, {}, [])

    def day(self, number: int, gate: Gate) -> Day:
        """Day `number` and its night."""
        own = self._run.config.skills
        deployed = self.repository.deployed()
        folder = self._folder / f"day-{number:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        self._player.begin(number)
        episodes = self._play(number, deployed)
        _write_lines(folder / "episodes.jsonl", [vars(episode) for episode in episodes])

        assert own.evolver is not None
        evolve = own.evolver(StageParts(self._run, self._weights, number, folder))
        proposed = proposals(evolve, deployed, by_skill(episodes), least=own.least_evidence)
        handed_in = [] if own.handed_in is None else own.handed_in(number, deployed)
        decisions = admit(self.repository, [*proposed, *handed_in], self._try, gate)
        replace_text(folder / "decisions.json", json.dumps([_told(one) for one in decisions], indent=1) + "\n")
        return self._look(number, success_rates(episodes), decisions)

    def _play(self, number: int, deployed: Sequence[Skill]) -> list[Episode]:
        own = self._run.config.skills
        count = min(own.users * own.episodes, len(self._evidence))
        rng = np.random.default_rng([self._run.config.seed, number])
        drawn = rng.choice(len(self._evidence), count, replace=False)

        # Users take turns, so that each has something of everything.
        episodes: list[Episode] = []
        for user in range(own.users):
            tasks = [self._playable(self._evidence[index], deployed) for index in drawn[user :: own.users]]
            episodes += episodes_of(f"user-{user + 1}", self._player.play(tasks, 1))
        return episodes

    def _try(self, skill: Skill, before: Sequence[Skill], after: Sequence[Skill]) -> Trial:
        """Both pools on the validation tasks that are given `skill`."""
        own = self._run.config.skills
        tasks = [example for example in self._validation if self._choose([skill], example)][: own.validation_tasks]
        return Trial([task.id for task in tasks], *(self._outcomes(tasks, pool) for pool in (before, after)))

    def _outcomes(self, tasks: Sequence[Example], skills: Sequence[Skill]) -> list[list[float]]:
        given = [self._given(task, skills) for task in tasks]
        # A skill by which a prompt becomes too long, or that the tokenizer cannot write, does not run.
        if not all(self._player.can_play(example) for example in given):
            return [[math.nan] * self._run.config.skills.repeats for _ in tasks]
        # Begun anew for each pool, so that a sample of a task meets the same random numbers in both.
        self._player.begin(_TRIALS)
        groups = self._player.play(given, self._run.config.skills.repeats)
        return [list(group.rewards) for group in groups]

    def _playable(self, example: Example, skills: Sequence[Skill]) -> Example:
        """With the skills, or with none of them where the prompt would become too long: it was tried on other tasks."""
        given = self._given(example, skills)
        return given if self._player.can_play(given) else self._given(example, [])

    def _given(self, example: Example, skills: Sequence[Skill]) -> Example:
        return with_skills(example, skills, choose=self._choose, form=self._run.config.skills.form)

    def _look(self, number: int, success: dict[str, float], decisions: list[Decision]) -> Day:
        deployed = self.repository.deployed()
        asked = [self._playable(example, deployed) for example in held_out_examples(self._run)]
        evaluation = evaluate(self._run.actor, asked, self._run.config.evaluation, step=number)
        held_out = evaluation.estimates[f"avg@{evaluation.samples}"].value
        return Day(number, success, decisions, [skill.label for skill in deployed], held_out)


_TRIALS = 2**20
"""The player's step of all validations, beyond any day's."""


def check_skills(run: Run) -> None:
    """ValueError for a run without an evolver, a form without a place for the text, rows without a topic, or nothing
    held out."""
    own = run.config.skills
    if own.evolver is None:
        raise ValueError(
            "config.skills.evolver=None proposes no skills; give a function that returns a rljax.tasks.Evolver, such "
            "as that of configs/papers/skillclaw.py"
        )
    if "{text}" not in own.form:
        raise ValueError(f"config.skills.form={own.form!r} has no {{text}}, where the text of a skill goes")
    lacking = next((e for e in [*run.dataset.train, *run.dataset.test] if own.topic_column not in e.columns), None)
    if lacking is not None:
        raise ValueError(
            f"{lacking.name} has no column {own.topic_column!r}, by which it is given skills; name another one with "
            "config.skills.topic_column"
        )
    held_out_examples(run)


def _told(decision: Decision) -> dict[str, Any]:
    verdict = decision.verdict
    return {
        "skill": decision.proposal.skill.name,
        "text": decision.proposal.skill.text,
        "base": decision.proposal.base,
        "evidence": list(decision.proposal.evidence),
        "deployed": decision.is_deployed,
        "verdict": None if verdict is None else verdict._asdict(),
        "told": decision.describe(),
    }


def _write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    # NaN, a reward that failed, is null in JSON.
    told = [{**line, "reward": None if math.isnan(line["reward"]) else line["reward"]} for line in lines]
    replace_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in told))
