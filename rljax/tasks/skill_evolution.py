"""How skills evolve: a proposal from all evidence of a skill, validation beside what is deployed, and a gate.

    Evolver       (skill or None, its episodes) -> proposed skills; none is a skip
    AskedEvolver  one that asks a language model: an endpoint, or the run's own policy
    proposals     what an evolver makes of the evidence, one skill after the other
    admit         validates proposals and deploys those that pass

First `by_skill`, then `proposals`, then `admit`: that is a night of SkillClaw (2604.08377), whose users begin the next
day with `SkillRepository.deployed`. The gate is the paired one of `rljax.tasks.skills`, since the paper states no
threshold.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rljax.tasks.asking import Complete
from rljax.tasks.skill_store import Candidate, SkillRepository
from rljax.tasks.skills import Episode, Evidence, Skill, Verdict, paired_gate, refuse_shared_tasks


@runtime_checkable
class Evolver(Protocol):
    """What proposes skills."""

    def __call__(self, skill: Skill | None, episodes: Sequence[Episode]) -> Sequence[Skill]:
        """Proposals from all `episodes` that were given `skill`, or from those that were given none. One that has the
        name of `skill` refines it, another is new; an empty list leaves all as it is."""
        ...


class Proposal(NamedTuple):
    """A skill that may be deployed once it is validated."""

    skill: Skill
    base: int
    """Version that it is to take the place of; 0 for a new skill."""
    evidence: tuple[int, ...]
    """Ids of the tasks that it was made from; none for one that a person hands in."""


def proposals(evolve: Evolver, deployed: Sequence[Skill], evidence: Evidence, *, least: int = 1) -> list[Proposal]:
    """What `evolve` proposes of each deployed skill, by its episodes, and of the episodes that had none.

    A skill with fewer than `least` episodes is left alone. Of episodes without a skill nothing but new skills is taken,
    and of two proposals with one name the first.
    """
    versions = {skill.name: skill.version for skill in deployed}
    groups: list[tuple[Skill | None, Sequence[Episode]]] = [
        (skill, evidence.of_skill.get(skill.name, ())) for skill in deployed
    ]
    groups.append((None, evidence.unguided))

    made: dict[str, Proposal] = {}
    for skill, episodes in groups:
        if len(episodes) < max(least, 1):
            continue
        for new in evolve(skill, episodes):
            if new.name in made:
                continue
            if skill is not None and new.name == skill.name:
                if (new.text, new.topic) == (skill.text, skill.topic):
                    continue
            elif new.name in versions:
                # It is refined by its own evidence alone.
                continue
            tasks = tuple(sorted({episode.task for episode in episodes}))
            made[new.name] = Proposal(new, versions.get(new.name, 0), tasks)
    return list(made.values())


class Trial(NamedTuple):
    """Outcomes of incumbent and candidate on the same tasks with the same random numbers, by task and repeat."""

    tasks: Sequence[int]
    """Ids of the examples."""
    incumbent: Sequence[Sequence[float]]
    candidate: Sequence[Sequence[float]]


@runtime_checkable
class Validate(Protocol):
    """What tries a candidate."""

    def __call__(self, skill: Skill, before: Sequence[Skill], after: Sequence[Skill]) -> Trial:
        """The tasks that `skill` is for, with the skills `before` and with those `after`, `skill` among them. No tasks
        where there are none: the skill is then rejected."""
        ...


@dataclass(frozen=True)
class Gate:
    """When a candidate is accepted, as `paired_gate` has it."""

    margin: float = 0.05
    """Least gain of mean success."""
    max_broken: int = 0
    """Most tasks that may stop working."""


class Decision(NamedTuple):
    """What became of a proposal."""

    proposal: Proposal
    verdict: Verdict | None
    """None where it was not tried: these very words were rejected before, or no task was left to try it on."""
    outcome: Skill | Candidate
    """The deployed version, or the candidate that it is kept as."""

    @property
    def is_deployed(self) -> bool:
        return isinstance(self.outcome, Skill)

    def describe(self) -> str:
        """One line for a person."""
        name = self.proposal.skill.name
        if isinstance(self.outcome, Skill):
            return f"{self.outcome.label} deployed ({self.verdict})"
        return f"{name} kept as a candidate ({self.outcome.status}: {self.outcome.reason})"


def admit(
    repository: SkillRepository, proposed: Sequence[Proposal], validate: Validate, gate: Gate = Gate()
) -> list[Decision]:
    """Tries proposals, each beside all that is deployed by then, and deploys those that pass; the others are kept as
    candidates. ValueError where a proposal is tried on a task that it was made from."""
    return [_decide(repository, proposal, validate, gate) for proposal in proposed]


def _decide(repository: SkillRepository, proposal: Proposal, validate: Validate, gate: Gate) -> Decision:
    skill, base, evidence = proposal
    if repository.was_rejected(skill, base):
        reason = "the same words were rejected before"
        return Decision(proposal, None, Candidate(skill, base, "rejected", reason, {}))

    before = repository.deployed()
    after = [*(one for one in before if one.name != skill.name), skill]
    trial = validate(skill, before, after)
    if not trial.tasks:
        reason = f"no validation task is of the topic {skill.topic!r}"
        return Decision(proposal, None, repository.keep(skill, base, "rejected", reason, {"evidence": list(evidence)}))

    refuse_shared_tasks(evidence, trial.tasks)
    verdict = paired_gate(trial.incumbent, trial.candidate, margin=gate.margin, max_broken=gate.max_broken)

    notes: Mapping[str, Any] = {**verdict._asdict(), "evidence": list(evidence), "validation": list(trial.tasks)}
    if verdict.accepted:
        return Decision(proposal, verdict, repository.deploy(skill, base, notes))
    reason = f"{verdict.delta:+.3f}, {verdict.broken} broken"
    return Decision(proposal, verdict, repository.keep(skill, base, "rejected", reason, notes))


EVOLVE = """\
You keep a shared library of skills: short texts that are put in front of the tasks they help with. Below are episodes
of several users{with_skill}. What solved episodes have in common must stay as it is; failed ones show what to repair.
Change as little as you can.

{skill}{episodes}
Answer with one JSON object: {{"choice": "refine", "text": "..."}} to change the skill, {{"choice": "create", "name":
"...", "topic": "...", "text": "..."}} for a new one that other tasks can use, or {{"choice": "skip"}}."""


@dataclass(frozen=True)
class AskedEvolver:
    """Asks a language model, which reads the skill and its evidence at once. A reply that cannot be read is a skip.

    Of more than `most` episodes half are failed ones and half solved ones, as far as there are; a long one loses its
    middle.
    """

    complete: Complete
    """An endpoint (`EndpointCompletions`), or the run's own policy (`StageParts.policy`)."""
    template: str = EVOLVE
    """Filled with `with_skill`, `skill` and `episodes`; `{{` is a brace."""
    most: int = 16
    """Episodes of a request."""
    most_chars: int = 2000
    """Characters of an episode."""

    def __call__(self, skill: Skill | None, episodes: Sequence[Episode]) -> list[Skill]:
        told = "\n".join(self._told(number, one) for number, one in enumerate(self._chosen(episodes), start=1))
        prompt = self.template.format(
            with_skill=f" who were given the skill {skill.name}" if skill else "",
            skill=f"The skill {skill.name}, for {skill.topic}:\n{skill.text}\n\n" if skill else "",
            episodes=told,
        )
        [[reply]] = self.complete([prompt], 1)
        try:
            made = read_proposal(reply.text, skill)
        except ValueError as error:
            logging.getLogger(__name__).warning("no skill could be read from %.80r: %s", reply.text, error)
            return []
        return [] if made is None else [made]

    def _chosen(self, episodes: Sequence[Episode]) -> list[Episode]:
        solved = [one for one in episodes if one.is_solved]
        failed = [one for one in episodes if not one.is_solved]
        failed_count = max(self.most // 2, self.most - len(solved))
        kept = [*failed[:failed_count], *solved]
        return kept[: self.most]

    def _told(self, number: int, episode: Episode) -> str:
        prompt = episode.prompt if isinstance(episode.prompt, str) else json.dumps(list(episode.prompt))
        text = f"{prompt}\n{episode.text}"
        if len(text) > self.most_chars:
            half = self.most_chars // 2
            text = f"{text[:half]} ... {text[-half:]}"
        outcome = "solved" if episode.is_solved else "failed"
        return f"Episode {number} ({episode.user}, {outcome}, reward {episode.reward:g}):\n{text}\n"


def read_proposal(text: str, skill: Skill | None) -> Skill | None:
    """The skill that a reply of an evolver proposes, from its last JSON object; None for `skip`. ValueError for a reply
    of another form, and for one that refines where there is no skill."""
    reply = _last_object(text)
    choice = reply.get("choice")
    if choice == "skip":
        return None
    if choice == "refine":
        if skill is None:
            raise ValueError("there is no skill to refine")
        return Skill(skill.name, _text_of(reply, "text"), skill.topic)
    if choice == "create":
        return Skill(_text_of(reply, "name"), _text_of(reply, "text"), _text_of(reply, "topic"))
    raise ValueError(f"the choice is {choice!r}; it must be refine, create or skip")


def _text_of(reply: Mapping[str, Any], name: str) -> str:
    value = reply.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; it must be a text")
    return value


def _last_object(text: str) -> dict[str, Any]:
    """The last JSON object of a text that may say more."""
    decoder = json.JSONDecoder()
    found: dict[str, Any] | None = None
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            start = text.find("{", start + 1)
            continue
        found = value
        start = text.find("{", end)
    if found is None:
        raise ValueError("it holds no JSON object")
    return found
