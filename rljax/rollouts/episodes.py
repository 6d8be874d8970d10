"""The episodes of a group as they are played, and as samples of a scored group."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rljax.envs import FAILED, Episode
from rljax.rollouts.actor import GroupRequest, ScoredGroup
from rljax.rollouts.forks import ForkRounds
from rljax.sampling import Fork, Sample
from rljax.tasks import Example, RewardResult
from rljax.text import Dialogue
from rljax.types import NO_PARENT

TOKEN_LISTS = ("tokens", "logprobs", "entropies", "versions", "turn_ids")
"""What a play has one entry of for each token behind the prompt."""

NO_CONVERSATION = -1
"""`conversation` of a play that was over before the process began."""


@dataclass(eq=False)
class Play:
    """One episode as it is played. Token lists follow the prompt.

    `forced` are spans of tokens that were not sampled, `observed` those of them that are observations. `turn_start` is
    where the turn `turn` begins, which the policy is saying or the environment answers.
    """

    group: "Group"
    index: int
    fork: Fork
    conversation: int
    episode: Episode | None = None
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    turn_ids: list[int] = field(default_factory=list)
    forced: list[tuple[int, int]] = field(default_factory=list)
    observed: list[tuple[int, int]] = field(default_factory=list)
    turn: int = 0
    turn_start: int = 0
    is_truncated: bool = False
    problem: str = ""

    @property
    def spoken(self) -> tuple[tuple[int, int], ...]:
        """Spans of the turns that the policy has said, without the observations between them."""
        starts = [0, *(stop for _, stop in self.observed)]
        stops = [*(start for start, _ in self.observed), len(self.tokens)]
        return tuple((start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop)

    @property
    def own(self) -> tuple[tuple[int, int], ...]:
        """Spans of tokens that the policy has sampled, counted with the prompt."""
        starts = [0, *(stop for _, stop in self.forced)]
        stops = [*(start for start, _ in self.forced), len(self.tokens)]
        first = len(self.prompt)
        return tuple((first + start, first + stop) for start, stop in zip(starts, stops, strict=True) if start < stop)

    @property
    def first_own(self) -> int:
        """Tokens that were there before its own: inherited or given to it as a fork."""
        return self.fork.fork_index + len(self.fork.inject)

    def add(self, tokens: list[int], logprobs: list[float], entropies: list[float], version: int) -> None:
        """Appends tokens of the current turn."""
        self.tokens += tokens
        self.logprobs += logprobs
        self.entropies += entropies
        self.versions += [version] * len(tokens)
        self.turn_ids += [self.turn] * len(tokens)

    def give(self, tokens: Sequence[int], version: int) -> tuple[int, int]:
        """Appends tokens that were not sampled; returns their span."""
        start = len(self.tokens)
        nothing = [0.0] * len(tokens)
        self.add(list(tokens), nothing, nothing, version)
        span = (start, len(self.tokens))
        self.forced.append(span)
        return span


@dataclass(eq=False)
class Group:
    """The episodes of one prompt. `starts` says how each begins, `rounds` which forks follow, `size` how many there can
    be. `step` is that of its submission: with the seed it names the random numbers of its forks."""

    number: int
    request: GroupRequest
    starts: list[Fork]
    rounds: ForkRounds | None
    size: int
    step: int
    plays: list[Play] = field(default_factory=list)
    samples: list[Sample | None] = field(default_factory=list)
    results: list[RewardResult | None] = field(default_factory=list)
    prompt: list[int] | None = None

    @property
    def example(self) -> Example:
        return self.request.example


def turns_of(sample: Sample) -> np.ndarray:
    assert sample.turns is not None
    return sample.turns


def can_go_on_from(group: Group, fork: Fork) -> bool:
    """Whether anything can be said after a fork: not behind the last token of an episode, nor of one that failed."""
    parent = group.plays[fork.parent]
    episode = parent.episode

    # A place within an observation stands for the end of it, as in `MultiTurnActor._branch`.
    stop = next((stop for start, stop in parent.observed if start <= fork.fork_index < stop), fork.fork_index)
    has_failed = bool(parent.problem) or episode is None or episode.end in FAILED
    return stop < len(parent.tokens) and not has_failed


def sample_of(play: Play, *, grammar: str = "", is_penalised: bool = False) -> Sample:
    """The sample that a play has become, whose turns follow `grammar`, with penalties or without."""
    is_child = play.fork.parent != NO_PARENT
    return Sample(
        tokens=np.array(play.tokens, np.int32),
        logprobs=np.array(play.logprobs, np.float32),
        entropies=np.array(play.entropies, np.float32),
        finish_reason="length" if play.is_truncated else "stop",
        parent=play.fork.parent,
        fork_index=play.fork.fork_index if is_child else 0,
        fork_score=play.fork.score,
        forced=tuple(play.forced),
        spoken=play.spoken,
        grammar=grammar,
        is_penalised=is_penalised,
        intervention=play.fork.intervention,
        turns=np.array(play.turn_ids, np.int32),
        versions=np.array(play.versions, np.int32),
    )


def scored(group: Group, dialogue: Dialogue) -> ScoredGroup:
    samples = [sample for sample in group.samples if sample is not None]
    # A group none of whose episodes opened has no prompt; a row needs one token before the first sampled one.
    prompt = group.prompt or [dialogue.tokenizer.eos_id]
    return ScoredGroup(
        example=group.example,
        prompt=prompt,
        samples=samples,
        texts=[dialogue.action(sample.tokens.tolist(), prompt) for sample in samples],
        results=[result for result in group.results if result is not None],
        steps=[np.array(play.turn_ids, np.int32) for play in group.plays],
        turn_fields=[turn_fields_of(play) for play in group.plays],
        signals=[signals_of(play) for play in group.plays],
    )


def turn_fields_of(play: Play) -> Mapping[str, np.ndarray]:
    """The optional fields of `Trajectory` that say something of turns, on the completion's tokens."""
    steps = [] if play.episode is None else play.episode.steps

    # A turn begins in the state that the observation before it shows; all of a group open in the same one. Equal texts
    # get equal ids. The shift keeps a checksum within int32, and off -1, which marks tokens without a state.
    before = ["", *(step.observation for step in steps)]
    states = np.array([zlib.crc32(text.encode()) >> 1 for text in before], np.int32)
    turn_ids = np.minimum(np.array(play.turn_ids, np.int32), len(states) - 1)
    return {
        "turn_rewards": on_turns(play, [step.reward for step in steps]),
        "state_ids": np.where(sample_of(play).sampled, states[turn_ids], -1).astype(np.int32),
    }


def signals_of(play: Play) -> Mapping[str, np.ndarray]:
    """Counts of the environment's steps by name, each on the tokens of its turn."""
    steps = [] if play.episode is None else play.episode.steps
    names = dict.fromkeys(name for step in steps for name in step.counts)
    return {name: on_turns(play, [step.counts.get(name, 0.0) for step in steps]) for name in names}


def on_turns(play: Play, values: Sequence[float]) -> np.ndarray:
    """A value for each turn, on the tokens that the policy sampled in it: float32 [T], 0 elsewhere and for a turn that
    the environment has not answered."""
    turn_ids = np.array(play.turn_ids, np.int32)

    # The 0 at the end is for turns that have no value yet, whatever their number.
    padded = np.array([*values, 0.0], np.float32)
    on_tokens = padded[np.minimum(turn_ids, len(values))]
    return np.where(sample_of(play).sampled, on_tokens, 0).astype(np.float32)


def episode_state(episode: Episode, turns: int | None = None) -> dict[str, Any]:
    """What a checkpoint holds of an episode, JSON-ready: the first `turns` turns of one that goes on, all of one that
    is over (None). The row stays with the data, whose columns JSON may not hold."""
    state = {name: value for name, value in episode.state_dict().items() if name != "row"}
    if turns is None:
        return state

    # The environment may have stepped, or ended, behind the turns that are kept: replay finds that out again.
    return state | {
        "actions": state["actions"][:turns],
        "steps": state["steps"][:turns],
        "end": None,
        "error": "",
    }
