"""Episodes of many turns over the decoder for conversations, scored by their environment.

An episode becomes the same `Sample` as a completion does: its tokens are those that were sampled and, given between
them, the observations. Decoding goes on while environments work; no turn waits for another episode's.
"""

import queue
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rljax.envs import DONE, FAILED, NONSENSE, EnvironmentPool, Episode
from rljax.plans import ForkPlan
from rljax.rollouts.collect import Scored
from rljax.rollouts.forks import rounds_of
from rljax.sampling import Fork, Rounds, Sample, SamplingParams, Turn, TurnDecoder, TurnResult
from rljax.tasks import Example, RewardResult
from rljax.text import Dialogue
from rljax.types import NO_PARENT, Params

Pick = Callable[[int, int, int], int]
"""(prompt id, sample id, turn) -> the decoder that speaks this turn."""


@dataclass(eq=False)
class _Play:
    """One episode as it is played: `tokens` and what lies beside them follow the prompt."""

    group: "_Group"
    index: int
    fork: Fork
    context: int
    episode: Episode | None = None
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    turn_ids: list[int] = field(default_factory=list)
    forced: list[tuple[int, int]] = field(default_factory=list)
    observed: list[tuple[int, int]] = field(default_factory=list)  # the forced spans that are observations
    turn: int = 0
    turn_start: int = 0
    is_truncated: bool = False
    problem: str = ""

    def add(self, tokens: list[int], logprobs: list[float], entropies: list[float], version: int) -> None:
        self.tokens += tokens
        self.logprobs += logprobs
        self.entropies += entropies
        self.versions += [version] * len(tokens)
        self.turn_ids += [self.turn] * len(tokens)

    def give(self, tokens: Sequence[int], version: int) -> tuple[int, int]:
        """Adds tokens that were not sampled."""
        span = len(self.tokens), len(self.tokens) + len(tokens)
        self.add(list(tokens), [0.0] * len(tokens), [0.0] * len(tokens), version)
        self.forced.append(span)
        return span


@dataclass(eq=False)
class _Group:
    """The episodes of one prompt."""

    number: int
    example: Example
    forks: list[Fork]  # one a play: how it begins
    rounds: Rounds | None
    size: int
    plays: list[_Play] = field(default_factory=list)
    samples: list[Sample | None] = field(default_factory=list)
    results: list[RewardResult | None] = field(default_factory=list)
    prompt: list[int] | None = None


class Player:
    """Plays groups of episodes; called as `rljax.rollouts.sample_and_score` is, and returns the same.

    `decoders` speak; `pick` says which one takes a turn (all share the numbers of contexts). A turn that runs into the
    decoder's `max_new_tokens`, or a full context, truncates its episode; what a limit of the environment ends is worth
    `unfinished_reward`, or what it had earned for None. An environment that fails costs its episode: it is not valid.

    With `groups_in_flight` above 0 that many groups more than asked for are under way: a call returns when as many as
    it asked for are complete, and the others go on at the next call, with the weights of then; every token carries the
    `policy_version` that said it.

    All decoders but the first take new weights only every `stale_every` steps (cross-policy sampling of AgentRL,
    2510.04206).
    """

    def __init__(
        self,
        decoders: Sequence[TurnDecoder],
        pool: EnvironmentPool,
        dialogue: Dialogue,
        *,
        pick: Pick | None = None,
        unfinished_reward: float | None = None,
        groups_in_flight: int = 0,
        stale_every: int = 1,
    ):
        self.decoders, self.pool, self.dialogue = list(decoders), pool, dialogue
        self.unfinished_reward, self.groups_in_flight = unfinished_reward, groups_in_flight
        self.stale_every, self.versions = stale_every, [-1] * len(decoders)
        self.last_stats: dict[str, float] = {}
        self._pick = pick or (lambda prompt_id, sample_id, turn: 0)
        self._free = deque(range(min(decoder.spec.conversations for decoder in decoders)))
        self._num_contexts = len(self._free)
        self._length = min(decoder.spec.context_length for decoder in decoders)
        self._queue: deque[_Group] = deque()
        self._open: list[_Group] = []
        self._done: list[_Group] = []
        self._speaking: dict[int, _Play] = {}  # by context
        self._paused: list[_Play] = []
        self._events: queue.SimpleQueue[tuple[Callable[[_Play], None], _Play, Episode]] = queue.SimpleQueue()
        self._acting = 0  # environments at work
        self._groups = 0
        self._truncated_is_wrong = False

    def set_params(self, params: Params, *, version: int) -> None:
        """The weights to speak with from now on, those of step `version`."""
        for i, decoder in enumerate(self.decoders):
            if i == 0 or self.versions[i] < 0 or version % self.stale_every == 0:
                decoder.set_params(params)
                self.versions[i] = version

    def cache_bytes(self) -> int:
        """Bytes of keys and values over all devices."""
        return sum(decoder.cache_bytes() for decoder in self.decoders)

    def aside(self) -> "Player":
        """Another player over the same decoders and environments, for an evaluation: it leaves what is under way alone.
        The current weights speak all turns."""
        return Player(self.decoders[:1], self.pool, self.dialogue, unfinished_reward=self.unfinished_reward)

    @property
    def num_pending(self) -> int:
        """Groups under way between calls."""
        return len(self._queue) + len(self._open) + len(self._done)

    def missing(self, num_groups: int) -> int:
        """How many examples the next call needs to return `num_groups` groups."""
        return max(0, num_groups + self.groups_in_flight - self.num_pending)

    def __call__(
        self,
        examples: Sequence[Example],
        samples_each: int,
        *,
        sampling: SamplingParams,
        seed: int,
        step: int,
        seen: dict[int, int] | None = None,
        forks: ForkPlan | None = None,
        phase: Callable[[str], AbstractContextManager] = nullcontext,
        num_groups: int | None = None,
        truncated_is_wrong: bool = False,
        **unused: Any,
    ) -> list[Scored]:
        """Plays every example `samples_each` times, or as `forks` says; returns the groups of `examples` in order, or,
        with `num_groups`, the first that many to be complete. Raises ValueError if a group needs more contexts than
        there are."""
        seen = {} if seen is None else seen
        self._truncated_is_wrong = truncated_is_wrong
        size = forks.leaves if forks else samples_each
        if size > self._num_contexts:
            raise ValueError(
                f"a group of {size} episodes needs as many contexts, but the decoder has {self._num_contexts}; "
                "raise contexts, or lower the group size"
            )
        for decoder in self.decoders:
            decoder.begin(sampling, seed=seed, step=step)
        new = [self._group(example, samples_each, forks, seen, seed, step) for example in examples]
        self._queue += new
        with phase("sample"):
            done = self._play(len(new) if num_groups is None else num_groups)
        return [_scored(group, self.dialogue) for group in done]

    def _group(self, example, samples_each, forks, seen, seed, step) -> _Group:
        first = samples_each * seen.setdefault(example.id, 0)
        seen[example.id] += 1
        chains = forks.chains if forks else samples_each
        rounds = None
        if forks:
            rounds = rounds_of(
                forks,
                self.dialogue.tokenizer.decode,
                _turns_of,
                seed=seed,
                step=step,
                prompt_id=example.id,
                first_id=first,
                limit=self._length,
            )
        starts = [Fork(NO_PARENT, 0, first + i) for i in range(chains)]
        self._groups += 1
        return _Group(self._groups, example, starts, rounds, forks.leaves if forks else samples_each)

    def _play(self, wanted: int) -> list[_Group]:
        """The loop: until `wanted` groups are complete, which are taken out."""
        begin = time.perf_counter()
        paused, self._paused = self._paused, []
        for play in paused:
            self._speak(play)
        while len(self._done) < wanted:
            self._open_groups()
            for decoder in self.decoders:
                if decoder.num_open:
                    for spoken in decoder.run():
                        self._heard(self._speaking.pop(spoken.turn.conversation), spoken)
            is_idle = not any(decoder.num_open for decoder in self.decoders)
            if is_idle and not self._acting and not self._queue and len(self._done) < wanted:
                raise RuntimeError(f"{wanted} groups were asked for, but only {len(self._done)} are under way")
            self._take_events(wait=is_idle and self._acting > 0 and len(self._done) < wanted)
        for decoder in self.decoders:
            for spoken in decoder.interrupt():
                self._heard(self._speaking.pop(spoken.turn.conversation), spoken)
        done, self._done = sorted(self._done[:wanted], key=lambda group: group.number), self._done[wanted:]
        self.last_stats = self._stats(done, time.perf_counter() - begin)
        return done

    def _open_groups(self) -> None:
        promised = sum(group.size - len(group.plays) for group in self._open)  # to forks that are to come
        while self._queue and len(self._free) - promised >= self._queue[0].size:
            promised += self._queue[0].size - len(self._queue[0].forks)
            group = self._queue.popleft()
            self._open.append(group)
            self._begin(group, group.forks)

    def _begin(self, group: _Group, forks: Sequence[Fork]) -> None:
        """Opens an episode for each of `forks`."""
        for fork in forks:
            play = _Play(group, len(group.plays), fork, self._free.popleft())
            group.plays.append(play)
            group.samples.append(None)
            group.results.append(None)
            if fork.parent == NO_PARENT:
                row = {"prompt": group.example.prompt, **group.example.columns}
                self._after(play, self._opened, self.pool.start(row))
            else:
                self._branch(play)

    def _branch(self, play: _Play) -> None:
        """A play that begins as another one did. A place within an observation is the end of it."""
        fork, group = play.fork, play.group
        parent = group.plays[fork.parent]
        place = next((stop for start, stop in parent.observed if start <= fork.fork_index < stop), fork.fork_index)
        play.prompt, play.turn = parent.prompt, parent.turn_ids[place] if place else 0
        play.turn_start = parent.turn_ids.index(play.turn)
        for name in ("tokens", "logprobs", "entropies", "versions", "turn_ids"):
            setattr(play, name, getattr(parent, name)[:place])
        play.forced = [(start, min(stop, place)) for start, stop in parent.forced if start < place]
        play.observed = [span for span in parent.observed if span[0] < place]
        play.fork = fork._replace(fork_index=place)
        if fork.inject:
            play.give(fork.inject, self.versions[0])
        assert parent.episode is not None
        self._after(play, self._resumed, self.pool.fork(parent.episode, play.turn))

    def _after(self, play: _Play, then: Callable[[_Play], None], future: Any) -> None:
        self._acting += 1
        future.add_done_callback(lambda done: self._events.put((then, play, done.result())))

    def _take_events(self, *, wait: bool) -> None:
        """Goes on with what environments have answered; waits for one answer if told to."""
        while wait or not self._events.empty():
            then, play, episode = self._events.get()
            play.episode = episode
            self._acting -= 1
            wait = False
            then(play)

    def _opened(self, play: _Play) -> None:
        episode, group = play.episode, play.group
        assert episode is not None
        if episode.end is not None:
            return self._finish(play)
        try:
            play.prompt = self.dialogue.opening(episode.opening)
        except ValueError as error:
            return self._fail(play, f"its opening cannot be rendered: {error}")
        if len(play.prompt) >= self._length:
            return self._fail(play, f"its opening has {len(play.prompt)} tokens, the whole context only {self._length}")
        group.prompt = group.prompt or play.prompt
        if play.prompt != group.prompt:
            return self._fail(play, "reset opened two episodes of one row differently; it must depend on the row alone")
        self._speak(play)

    def _resumed(self, play: _Play) -> None:
        assert play.episode is not None
        if play.episode.end is not None:
            return self._finish(play)
        self._speak(play)

    def _speak(self, play: _Play) -> None:
        """Asks for the policy's turn, or for the rest of it."""
        group, said = play.group, len(play.tokens) - play.turn_start
        tokens = play.prompt + play.tokens
        prompt_id, sample_id = group.example.id, play.fork.sample_id
        decoder = self.decoders[self._pick(prompt_id, sample_id, play.turn)]
        room = min(decoder.spec.max_new_tokens - said, self._length - len(tokens))
        if room < 1:
            play.is_truncated = True
            return self._finish(play)
        source = group.plays[max(play.fork.parent, 0)].context
        self._speaking[play.context] = play
        decoder.submit(Turn(play.context, tokens, prompt_id, sample_id, play.turn, source, room))

    def _heard(self, play: _Play, spoken: TurnResult) -> None:
        decoder = self._pick(play.group.example.id, play.fork.sample_id, play.turn)
        said = spoken.tokens.tolist(), spoken.logprobs.tolist(), spoken.entropies.tolist()
        play.add(*said, self.versions[decoder])
        if spoken.end == "interrupted":
            self._paused.append(play)
        elif spoken.end == "length":
            play.is_truncated = True
            self._finish(play)
        else:
            assert play.episode is not None
            action = self.dialogue.action(play.tokens[play.turn_start :])
            self._after(play, self._stepped, self.pool.step(play.episode, action))

    def _stepped(self, play: _Play) -> None:
        episode = play.episode
        assert episode is not None
        if episode.end is not None:
            return self._finish(play)
        try:
            observation = self.dialogue.observation(
                episode.steps[-1].observation,
                is_chat=self.dialogue.is_chat(episode.opening),
                is_closed=play.tokens[-1] in self.dialogue.tokenizer.stop_ids,
            )
        except ValueError as error:
            return self._fail(play, f"its observation cannot be tokenised: {error}")
        if len(play.prompt) + len(play.tokens) + len(observation) >= self._length:  # nothing could be said behind it
            play.is_truncated = True
            return self._finish(play)
        play.observed.append(play.give(observation, self.versions[0]))
        play.turn += 1
        play.turn_start = len(play.tokens)
        self._speak(play)

    def _fail(self, play: _Play, problem: str) -> None:
        play.problem = problem
        self.pool.failures[NONSENSE] += 1
        self._finish(play)

    def _finish(self, play: _Play) -> None:
        """The episode is over; so may be its round, and its group."""
        group = play.group
        group.samples[play.index] = _sample(play)
        group.results[play.index] = self._result(play)
        if group.rounds is None:
            self._leave(play)
        samples = [sample for sample in group.samples if sample is not None]
        if len(samples) < len(group.samples):
            return
        forks = group.rounds(samples) if group.rounds else []
        if forks := [fork for fork in forks if _is_open(group, fork)]:
            return self._begin(group, forks)
        if group.rounds is not None:
            for other in group.plays:
                self._leave(other)
        self._open.remove(group)
        self._done.append(group)

    def _leave(self, play: _Play) -> None:
        self._free.append(play.context)
        if play.episode is not None:
            self.pool.release(play.episode)

    def _result(self, play: _Play) -> RewardResult:
        episode = play.episode
        assert episode is not None
        parts = {"turns": float(len(episode.steps)), **episode.counts}
        if play.problem or episode.end in FAILED:
            return RewardResult(0.0, parts, False, play.problem or f"{episode.end}: {episode.error}")
        value = episode.reward
        if episode.end != DONE and self.unfinished_reward is not None:
            value = self.unfinished_reward
        if play.is_truncated and self._truncated_is_wrong:
            value = min(value, 0.0)
        return RewardResult(value, parts)

    def _stats(self, groups: Sequence[_Group], seconds: float) -> dict[str, float]:
        """What a call cost: `busy_share` is the share of its time in which a decoder worked, `reused_share` that of the
        context tokens of all turns that did not have to be computed."""
        total = {name: sum(d.stats[name] for d in self.decoders) for name in self.decoders[0].stats}
        results = [r for group in groups for r in group.results if r is not None]
        episodes = [play.episode for group in groups for play in group.plays if play.episode is not None]
        stats = {
            "busy_share": total["seconds"] / max(seconds, 1e-9),
            "row_occupancy": total["busy_rows"] / max(total["decode_steps"] * self.decoders[0].spec.rows, 1),
            "reused_share": 1 - total["prefill_tokens"] / max(total["conversation_tokens"], 1),
            "prefill_tokens": float(total["prefill_tokens"]),
            "turns": float(total["turns"]),
            "finished_share": float(np.mean([episode.end == DONE for episode in episodes])) if episodes else 0.0,
            "failed": float(sum(not result.is_valid for result in results)),
            "groups_in_flight": float(self.num_pending),
        }
        return stats


def _turns_of(sample: Sample) -> np.ndarray:
    assert sample.turns is not None
    return sample.turns


def _is_open(group: _Group, fork: Fork) -> bool:
    """Whether anything can be said after a fork: not behind the last token of an episode, nor of one that failed."""
    parent = group.plays[fork.parent]
    stop = next((stop for start, stop in parent.observed if start <= fork.fork_index < stop), fork.fork_index)
    episode = parent.episode
    return stop < len(parent.tokens) and not parent.problem and episode is not None and episode.end not in FAILED


def _sample(play: _Play) -> Sample:
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
        intervention=play.fork.intervention,
        turns=np.array(play.turn_ids, np.int32),
        versions=np.array(play.versions, np.int32),
    )


def _scored(group: _Group, dialogue: Dialogue) -> Scored:
    samples = [sample for sample in group.samples if sample is not None]
    return Scored(
        group.example,
        group.prompt or [dialogue.tokenizer.eos_id],
        samples,
        [dialogue.tokenizer.decode(sample.tokens.tolist()) for sample in samples],
        [result for result in group.results if result is not None],
        [np.array(play.turn_ids, np.int32) for play in group.plays],
        [_turn_fields(play) for play in group.plays],
    )


def _turn_fields(play: _Play) -> Mapping[str, Any]:
    """The optional fields of `Trajectory` that say something of turns, on the completion's tokens."""
    episode = play.episode
    steps = [] if episode is None else episode.steps
    sampled = _sample(play).sampled
    turn_ids = np.array(play.turn_ids, np.int32)
    before = ["", *(step.observation for step in steps)]
    states = np.array([zlib.crc32(text.encode()) >> 1 for text in before], np.int32)

    def spread(values: Sequence[float]) -> np.ndarray:
        padded = np.array([*values, 0.0], np.float32)
        return np.where(sampled, padded[np.minimum(turn_ids, len(values))], 0).astype(np.float32)

    return {
        "turn_rewards": spread([step.reward for step in steps]),
        "prediction_scores": spread([step.counts.get("prediction", 0.0) for step in steps]),
        "state_ids": np.where(sampled, states[np.minimum(turn_ids, len(states) - 1)], -1).astype(np.int32),
        "penalty": 0.0 if episode is None else float(episode.counts.get("redundancy", 0.0)),
    }
