"""Episodes of many turns over the decoder for conversations, scored by their environment.

An episode becomes the same `Sample` as a completion does: its tokens are those that were sampled and, given between
them, the observations. Decoding goes on while environments work; no turn waits for another episode's.
"""

import dataclasses
import functools
import queue
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np

from rljax.envs import (
    DONE,
    MALFORMED,
    RAY,
    EnvironmentLimits,
    EnvironmentPool,
    Episode,
    RayConfig,
    check_chat_template,
    check_hosts,
    get_format,
    require_ray,
)
from rljax.plans import RolloutPlan
from rljax.rollouts.actor import (
    Actor,
    Decoder,
    GroupRequest,
    RolloutSettings,
    ScoredGroup,
    TurnSource,
    known_example,
)
from rljax.rollouts.admission import all_in_time, capacity
from rljax.rollouts.config import ActorParts, TurnsConfig
from rljax.rollouts.cross_policy import stale_turns
from rljax.rollouts.episodes import (
    NO_CONVERSATION,
    TOKEN_LISTS,
    Group,
    Play,
    can_go_on_from,
    episode_state,
    sample_of,
    scored,
    turns_of,
)
from rljax.rollouts.forks import ForkRounds
from rljax.rollouts.groups import terminal_class
from rljax.sampling import Fork, RowScorer, Sample, SamplingConfig, SamplingParams, Turn, TurnDecoder, TurnResult
from rljax.sampling.slots import spans_before
from rljax.settings import field
from rljax.tasks import Example, RewardResult, load_callable
from rljax.text import Dialogue, Tokenizer, encode_text
from rljax.types import INTERVENTION_SUPPRESS, NO_PARENT, Params

AtHandOver = Literal["recompute", "keep"]
"""What becomes of keys and values that older weights have computed."""

Pick = Callable[[int, int, int], int]
"""(prompt id, sample id, turn) -> the decoder that speaks this turn."""


@dataclasses.dataclass
class MultiTurn(TurnsConfig):
    """The policy acts in an environment, over turns; the environment gives the reward.

    A turn has at most `config.sampling.max_new_tokens` tokens.
    """

    make: str = ""
    """`module:callable` that makes an environment (`rljax.envs`) for an episode. It gets a row's prompt and columns."""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of `make`."""
    hosts: str = "threads"
    """Where environments live: in `threads` of this process; in `processes`, for code that may hang or hold the
    interpreter; or, with `ray`, in processes on the machines of a cluster, for more of them than this machine bears."""
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)
    """The cluster of `hosts="ray"`."""
    limits: EnvironmentLimits = dataclasses.field(default_factory=EnvironmentLimits)
    """What an episode, and a step of it, may take."""
    unfinished_reward: float | None = None
    """What an episode is worth that ended at a limit or was cut off; None is what it had earned."""
    groups_in_flight: int = 0
    """Groups that are under way beyond those that a step needs: an episode may span updates."""
    steps_in_flight: int | None = field(default=None, least=1)
    """Steps after the one that asked for it in which a group is trained on at the latest. It lets in at most so many
    times `prompts_per_step` of the groups in flight (AReaL, 2505.24298), and a step waits for those whose last step it
    is. None lets slow groups take any time. Set it where a few episodes take much longer than the others."""
    at_hand_over: AtHandOver = "recompute"
    """What becomes of the keys and values of conversations under way when new weights come. `recompute` has the new
    weights compute them again (AReaL, 2505.24298): what they say next is what they would say behind these tokens.
    `keep` goes on over those of older weights (PipelineRL, 2509.19128), which saves the computation for long
    conversations; an evaluation or a checkpoint in between still has them computed again."""
    answers_after: int = field(default=0, least=0)
    """Runs of the decoder, of `check_every` steps each, from the end of a turn until the environment's answer to it is
    taken, and waited for. 0 takes answers as they come: then the groups that a step gets of those in flight, and the
    last bits of numbers, depend on how fast environments are. Above 0 a run repeats bit for bit, also one that was
    killed. Choose it so that a usual answer is there in time."""
    stale_share: float = 0.0
    """Share of turns, in [0, 1), that weights of an earlier step speak (AgentRL, 2510.04206)."""
    stale_every: int = 25
    """Steps after which these weights are renewed."""

    @property
    def off_policy(self) -> str:
        for name in ("groups_in_flight", "stale_share"):
            if getattr(self, name):
                return f"config.actor.{name}={getattr(self, name)}"
        return ""

    def check(self, plan: RolloutPlan, sampling: SamplingConfig, pack_length: int) -> None:
        if not self.make:
            raise ValueError(
                "config.actor.make is empty; name a callable that makes an environment, e.g. "
                "make='rljax.envs.library:MultiHop'"
            )
        super().check(plan, sampling, pack_length)
        self.limits.check()

        # Here rather than where lanes are made: a run is built by then.
        try:
            check_hosts(self.hosts)
            if self.hosts == RAY:
                require_ray()
        except ValueError as error:
            raise ValueError(f"config.actor.{error}") from None

        # Which weights speak is said in one place.
        if not 0 <= self.stale_share < 1 or self.stale_every < 1:
            raise ValueError(
                f"config.actor.stale_share={self.stale_share} must be at least 0 and below 1, and "
                f"stale_every={self.stale_every} at least 1"
            )
        if self.stale_share and plan.forks and plan.forks.lagged_chains:
            raise ValueError(
                f"config.actor.stale_share={self.stale_share} and forks of lagged chains both say which weights speak; "
                "set it to 0"
            )
        if self.at_hand_over == "keep" and plan.forks and plan.forks.lagged_chains:
            raise ValueError(
                "config.actor.at_hand_over='keep' mixes weights within a conversation, and forks of lagged chains need "
                "to know which of two weights spoke; set it to 'recompute'"
            )

        if self.groups_in_flight < 0:
            raise ValueError(f"config.actor.groups_in_flight={self.groups_in_flight} must be at least 0")

    def build(self, parts: ActorParts) -> Actor:
        parts.refuse_in_step("environments")
        # Each process trains its own groups by their last step, for which its share of a step must always be the same.
        if self.steps_in_flight is not None and parts.groups % parts.processes:
            raise ValueError(
                f"config.actor.steps_in_flight={self.steps_in_flight} needs config.prompts_per_step={parts.groups} to "
                f"divide over the {parts.processes} processes; change one of the three"
            )

        style = get_format(self.tool_format)
        dialogue = Dialogue(parts.tokenizer, role=style.role, wrap=style.wrap, chat=parts.settings.chat)
        if any(dialogue.is_chat(example.prompt) for example in [*parts.dataset.train, *parts.dataset.test]):
            check_chat_template(parts.tokenizer, role=style.role)

        # Where two policies speak each has a decoder of its own, with weights and conversations.
        forks = parts.plan.forks if parts.plan.forks and parts.plan.forks.lagged_chains else None
        decoders = [
            self.turn_decoder(
                parts, groups_in_flight=self.most_in_flight(parts.groups), stop_strings=tuple(style.stop_strings)
            )
            for _ in range(2 if self.stale_share or forks else 1)
        ]
        scorer = None
        if forks:
            scorer = RowScorer(parts.decoder, parts.mesh, rows=forks.parents, length=self.context_length)

        pool = self._pool(parts.tokenizer)
        actor = self.actor_of(decoders, pool, dialogue, parts, scorer)
        actor.processes = parts.processes
        return parts.shared(actor)

    def actor_of(
        self,
        decoders: Sequence[TurnSource],
        pool: EnvironmentPool,
        dialogue: Dialogue,
        parts: ActorParts,
        scorer: RowScorer | None,
    ) -> "MultiTurnActor":
        """The actor of this process."""
        return MultiTurnActor(decoders, pool, dialogue, parts.settings, self, scorer=scorer, batch=parts.groups)

    def most_in_flight(self, batch: int) -> int:
        """Groups that may be under way beyond the `batch` that a step needs."""
        if self.steps_in_flight is None:
            return self.groups_in_flight
        return capacity(
            version=0,
            staleness=self.steps_in_flight,
            batch=batch,
            accepted=0,
            running=batch,
            most=batch + self.groups_in_flight,
        )

    def _pool(self, tokenizer: Tokenizer) -> EnvironmentPool:
        """ValueError when an environment cannot be made."""
        make = functools.partial(load_callable(self.make), **self.args)
        try:
            make()
        except Exception as error:  # whatever a user's class raises
            raise ValueError(
                f"config.actor.make={self.make} with args {self.args} makes no environment: "
                f"{type(error).__name__}: {error}"
            ) from error
        return EnvironmentPool(
            make,
            workers=self.workers,
            hosts=self.hosts,
            ray=self.ray,
            limits=self.limits,
            tokenizer=_Text(tokenizer),
        )


@dataclasses.dataclass(frozen=True)
class _Text:
    """Observations as ids and back, for those that are too long: names of control tokens in them are text."""

    tokenizer: Tokenizer

    def encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


class _Asked(NamedTuple):
    """An answer of an environment that is to come."""

    due: int
    """How often the decoders have run when it is taken."""
    then: Callable[[Play], None]
    play: Play
    future: Any


class MultiTurnActor:
    """Plays groups of episodes. The `Actor` protocol says most of it.

    A turn that runs into the decoder's `max_new_tokens`, or a full context, truncates its episode. An environment that
    fails costs its episode: it is not valid.

    With `config.groups_in_flight` above 0 that many groups more than asked for are under way, and `ready` returns when
    as many as it was asked for are complete; the others go on at the next call, with the weights of then. Every token
    carries the `policy_version` that said it. With `config.steps_in_flight` fewer may be under way, and `ready` takes
    the oldest, and waits for those that no later step could take in time; `batch` is how many groups a step trains.

    Which groups a call returns, and where in an episode a version begins, depends on how fast environments answer,
    unless `config.answers_after` fixes the places at which answers are taken.

    There is one decoder, or two for cross-policy sampling (AgentRL, 2510.04206): the second speaks a share
    `config.stale_share` of the turns, or those that `pick` says, and takes new weights only every `config.stale_every`
    steps. With a `scorer` chains are lagged (`ForkPlan.lagged_chains`): the second decoder has the weights before the
    last update, and speaks the turns of chains.
    """

    def __init__(
        self,
        decoders: Sequence[TurnSource],
        pool: EnvironmentPool,
        dialogue: Dialogue,
        settings: RolloutSettings,
        config: MultiTurn,
        *,
        pick: Pick | None = None,
        scorer: RowScorer | None = None,
        batch: int = 0,
    ):
        if config.steps_in_flight is not None and batch < 1:
            raise ValueError(f"steps_in_flight={config.steps_in_flight} needs batch, the groups that a step trains")
        self.scorer = scorer
        # The first decoder has the current weights; a second one, older ones.
        self._sources = list(decoders)
        self.pool = pool
        self.dialogue = dialogue
        self.settings = settings
        self.config = config
        self.batch = batch
        self.processes = 1  # that share the groups of a step
        self.versions = [-1] * len(decoders)
        self.stats: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

        # An episode has the same conversation in every decoder, and must fit into each.
        self._free = deque(range(min(decoder.spec.conversations for decoder in decoders)))
        self._num_conversations = len(self._free)
        self._length = min(decoder.spec.context_length for decoder in decoders)
        self._pick = pick or stale_turns(settings.seed, config.stale_share if len(decoders) > 1 else 0.0)
        # Whether an evaluation has used the conversations since the weights came.
        self._is_lent = False

        self._step = 0
        self._num_groups = 0
        # A group is in one of these three; a play that was cut off in mid-turn by the end of a call is also paused.
        self._queue: deque[Group] = deque()
        self._open: list[Group] = []
        self._done: list[Group] = []
        self._paused: list[Play] = []
        self._speaking: dict[int, Play] = {}  # by conversation
        # What environments have answered, and how many are at work.
        self._events: queue.SimpleQueue[tuple[Callable[[Play], None], Play, Episode]] = queue.SimpleQueue()
        self._acting = 0
        # With answers at fixed places: those asked for, in order, and how often the decoders ran.
        self._asked: deque[_Asked] = deque()
        self._runs = 0

    def __enter__(self) -> "MultiTurnActor":
        self.pool.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.__exit__(*error)

    def set_params(self, params: Params, version: int) -> None:
        if self.scorer is not None:
            self.scorer.set_params(params)
            if 0 <= self.versions[0] != version:
                older, newest = self._sources[1], self._sources[0]
                assert isinstance(older, TurnDecoder) and isinstance(newest, TurnDecoder), "engines hold one version"
                older.adopt(newest)
                self.versions[1] = self.versions[0]

        is_renewal = self.scorer is None and version % self.config.stale_every == 0
        for i, decoder in enumerate(self._sources):
            if i == 0 or self.versions[i] < 0 or is_renewal:
                decoder.set_params(params, keep=self._conversations_to_keep())
                self.versions[i] = version
        self._is_lent = False

    @property
    def decoders(self) -> Sequence[Decoder]:
        return [source for source in self._sources if isinstance(source, Decoder)]

    @property
    def resting(self) -> Sequence[Decoder]:
        # With a scorer the newest weights are the next version's older ones; a second decoder's are renewed seldom.
        return self.decoders[:1] if self.scorer is None else ()

    def cache_bytes(self) -> int:
        return sum(decoder.cache_bytes() for decoder in self._sources)

    def longest_row(self, prompt_length: int) -> int:
        return self._length

    def for_evaluation(self, sampling: SamplingParams) -> "MultiTurnActor":
        settings = self.settings.sampled_by(sampling)
        # What it says is said by the newest weights alone, also where it begins as a conversation under way does.
        if self._keeps:
            self._forget()
        self._is_lent = True
        config = replace(self.config, groups_in_flight=0, steps_in_flight=None, stale_share=0.0)
        actor = MultiTurnActor(self._sources[:1], self.pool, self.dialogue, settings, config)
        actor.versions = self.versions[:1]
        return actor

    @property
    def num_pending(self) -> int:
        """Groups under way between calls."""
        return len(self._queue) + len(self._open) + len(self._done)

    def missing(self, n: int, pending: int | None = None) -> int:
        eta = self.config.steps_in_flight
        most = n + self.config.groups_in_flight
        running = self.num_pending if pending is None else pending
        if eta is None:
            return max(0, most - running)

        # Counted from this step on; what it asks for less than a batch, it has accepted in an earlier round.
        return capacity(version=0, staleness=eta, batch=self.batch, accepted=self.batch - n, running=running, most=most)

    def submit(self, requests: Sequence[GroupRequest], plan: RolloutPlan, step: int) -> None:
        """Raises ValueError if a group needs more conversations than there are."""
        size = group_size(plan)
        if size > self._num_conversations:
            raise ValueError(
                f"a group of {size} episodes needs as many conversations, but the decoder has "
                f"{self._num_conversations}; raise config.actor.conversations, or lower the group size"
            )
        self._step = step
        self._queue += [self._new_group(request, plan, step) for request in requests]

    def ready(self, n: int) -> list[ScoredGroup]:
        begin = time.perf_counter()
        for decoder in self._sources:
            decoder.begin(self.settings.sampling, seed=self.settings.seed, step=self._step)
        groups = self._play(n)
        self.seconds = {"sample": time.perf_counter() - begin}
        return [scored(group, self.dialogue) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        """Groups that wait, are under way, and are complete but not taken; `{}` for none. Of an episode its tokens and
        actions are saved: environments come back by replay."""
        groups = [*self._done, *self._open, *self._queue]
        if not groups:
            return {}
        return {"groups": [self._group_state(group) for group in sorted(groups, key=lambda group: group.number)]}

    @property
    def _keeps(self) -> bool:
        return self.config.at_hand_over == "keep"

    def _conversations_to_keep(self) -> set[int]:
        """Those under way: one that begins later has nothing of older weights, although it may begin alike. Behind an
        evaluation none: what they hold is its own, by weights that may never be handed to the rollouts."""
        if not self._keeps or self._is_lent:
            return set()
        return set(range(self._num_conversations)) - set(self._free)

    def _forget(self) -> None:
        for decoder in self._sources:
            decoder.forget()

    def older(self, version: int) -> int:
        if self.scorer is not None:
            return max(0, version - 1)
        return version if len(self._sources) == 1 else version - version % self.config.stale_every

    def checkpointed(self) -> None:
        # A run that is resumed has the tokens, and the newest weights to compute them with.
        if self._keeps:
            self._forget()

    def load_state_dict(self, state: Mapping[str, Any], plan: RolloutPlan, examples: Mapping[int, Example]) -> None:
        """Needs open environments. A turn that was cut off goes on where it stood."""
        for saved in state.get("groups", ()):
            request = GroupRequest(known_example(examples, saved["example_id"]), saved["first_sample"])
            group = self._new_group(request, plan, saved["step"])
            if not saved["plays"]:
                self._queue.append(group)
                continue
            self._restore(group, saved)

    # Groups: from the queue to the decoders, and out.

    def _new_group(self, request: GroupRequest, plan: RolloutPlan, step: int) -> Group:
        chains = plan.forks.chains if plan.forks else plan.group_size
        starts = [Fork(NO_PARENT, 0, request.first_sample + i) for i in range(chains)]

        # Numbered in order of submission, which is the order in which complete groups are handed out.
        self._num_groups += 1
        group = Group(self._num_groups, request, starts, None, group_size(plan), step)

        if plan.forks:
            group.rounds = ForkRounds(
                plan=plan.forks,
                decode=lambda ids: self.dialogue.action(ids, group.prompt or ()),
                steps_of=turns_of,
                seed=self.settings.seed,
                step=step,
                prompt_id=request.example.id,
                first_id=request.first_sample,
                limit=self._length,
                score=None if self.scorer is None else functools.partial(self._score, self.scorer, group),
            )
        return group

    def _score(self, scorer: RowScorer, group: Group, samples: Sequence[Sample]) -> list[np.ndarray]:
        return scorer(group.prompt or [], [sample.tokens for sample in samples], self.settings.sampling)

    def _play(self, wanted: int) -> list[Group]:
        """The loop: until `wanted` groups are complete, which are taken out."""
        begin = time.perf_counter()
        # What goes on behind a restart was asked for anew; without one nothing is.
        self._take_all_asked()
        paused = self._paused
        self._paused = []
        for play in paused:
            self._speak(play)

        while (taken := self._taken(wanted)) is None:
            self._open_groups()
            for decoder in self._sources:
                if decoder.num_open:
                    for result in decoder.run():
                        self._heard(self._speaking.pop(result.turn.conversation), result)

            self._runs += 1
            is_idle = not any(decoder.num_open for decoder in self._sources)
            if is_idle and not self._acting and not self._queue and self._taken(wanted) is None:
                raise RuntimeError(f"{wanted} groups were asked for, but only {len(self._done)} are under way")

            # With nothing to decode the only thing to do is to wait for an environment.
            self._take_events(wait=is_idle and self._acting > 0 and self._taken(wanted) is None)

        # The weights may change before the next call, so no turn stays in a decoder.
        self._take_all_asked()
        for decoder in self._sources:
            for result in decoder.interrupt(keep=self._keeps):
                self._heard(self._speaking.pop(result.turn.conversation), result)

        if self.config.answers_after:
            self._put_in_order()

        # Within the call their order is fixed.
        taken.sort(key=lambda group: group.number)
        self._done = [group for group in self._done if group not in taken]
        self.stats = self._stats(taken, time.perf_counter() - begin)
        return taken

    def _taken(self, wanted: int) -> list[Group] | None:
        """The complete groups that a call for `wanted` takes; None to wait for more."""
        if len(self._done) < wanted:
            return None
        eta = self.config.steps_in_flight
        # Those complete first, so that none waits for another.
        if eta is None:
            return self._done[:wanted]

        oldest = sorted(self._done, key=lambda group: (group.step, group.number))[:wanted]
        left = [group.step for group in (*self._done, *self._open, *self._queue) if group not in oldest]
        is_all_done = len(self._done) == self.num_pending
        in_time = all_in_time(left, step=self._step + 1, staleness=eta, batch=self.batch // self.processes)
        return oldest if in_time or is_all_done else None

    def _open_groups(self) -> None:
        """Opens groups from the queue as long as each can be finished: conversations are promised to the forks that are
        to come, or two groups could wait for each other's."""
        promised = sum(group.size - len(group.plays) for group in self._open)
        while self._queue and len(self._free) - promised >= self._queue[0].size:
            group = self._queue.popleft()
            promised += group.size - len(group.starts)
            self._open.append(group)
            self._begin(group, group.starts)

    def _begin(self, group: Group, forks: Sequence[Fork]) -> None:
        """Opens an episode for each of `forks`."""
        for fork in forks:
            play = self._new_play(group, fork)
            if fork.parent != NO_PARENT:
                self._branch(play)
                continue
            row = {"prompt": group.example.prompt, **group.example.columns}
            self._after(play, self._opened, self.pool.start(row))

    def _new_play(self, group: Group, fork: Fork, *, speaks: bool = True, wanted: int = NO_CONVERSATION) -> Play:
        conversation = NO_CONVERSATION
        if speaks and wanted in self._free:
            conversation = wanted
            self._free.remove(conversation)
        elif speaks:
            # Plays of a group share its prompt.
            near = next((x.conversation for x in group.plays if x.conversation != NO_CONVERSATION), None)
            conversation = self._sources[0].pick(self._free, near)
            self._free.remove(conversation)
        play = Play(group, len(group.plays), fork, conversation)
        group.plays.append(play)
        group.samples.append(None)
        group.results.append(None)
        return play

    def _branch(self, play: Play) -> None:
        """Begins a play as another one did."""
        group = play.group
        fork = play.fork
        parent = group.plays[fork.parent]

        # A place within an observation stands for the end of it: the policy cannot speak in the middle.
        place = next((stop for start, stop in parent.observed if start <= fork.fork_index < stop), fork.fork_index)

        play.fork = fork._replace(fork_index=place)
        play.prompt = parent.prompt
        play.turn = parent.turn_ids[place] if place else 0
        play.turn_start = parent.turn_ids.index(play.turn)

        # What is inherited keeps its spans, cut where the fork leaves them.
        for name in TOKEN_LISTS:
            setattr(play, name, getattr(parent, name)[:place])
        play.forced = list(spans_before(parent.forced, place))
        play.observed = [span for span in parent.observed if span[0] < place]
        if fork.inject:
            play.give(fork.inject, self.versions[0])

        # The environment is brought to where this turn began; the part of the turn that is kept changes nothing in it.
        assert parent.episode is not None
        self._after(play, self._resumed, self.pool.fork(parent.episode, play.turn))

    def _after(self, play: Play, then: Callable[[Play], None], future: Any) -> None:
        """Calls `then(play)` in the loop once the environment has answered."""
        self._acting += 1
        if self.config.answers_after:
            self._asked.append(_Asked(self._runs + self.config.answers_after, then, play, future))
            return
        # A worker's thread only reports: plays and decoders are changed in the loop's thread alone.
        future.add_done_callback(lambda done: self._events.put((then, play, done.result())))

    def _take_events(self, *, wait: bool) -> None:
        """Goes on with what environments have answered; waits for one answer if told to."""
        if self.config.answers_after:
            # With nothing to decode, those that were asked for first are taken before their time.
            due = self._asked[0].due if wait else self._runs
            while self._asked and self._asked[0].due <= due:
                self._take_asked()
            return

        while wait or not self._events.empty():
            then, play, episode = self._events.get()
            play.episode = episode
            self._acting -= 1
            wait = False
            then(play)

    def _take_asked(self) -> None:
        """Waits for the answer that was asked for first, and goes on with it."""
        _, then, play, future = self._asked.popleft()
        play.episode = future.result()
        self._acting -= 1
        then(play)

    def _take_all_asked(self) -> None:
        while self._asked:
            self._take_asked()

    def _put_in_order(self) -> None:
        """Between two calls all stands as a checkpoint would bring it back, so that both go on alike."""
        self._paused.sort(key=lambda play: (play.group.number, play.index))
        self._done.sort(key=lambda group: group.number)
        self._free = deque(sorted(self._free))

    # Turns of a play: the environment opens, the policy speaks, the environment steps.

    def _opened(self, play: Play) -> None:
        episode = play.episode
        group = play.group
        assert episode is not None
        # An environment may fail, or run out of time, before it has opened.
        if episode.end is not None:
            return self._finish(play)

        try:
            play.prompt = self.dialogue.opening(episode.opening)
        except ValueError as error:
            return self._fail(play, f"its opening cannot be rendered: {error}")
        if len(play.prompt) >= self._length:
            return self._fail(play, f"its opening has {len(play.prompt)} tokens, the whole context only {self._length}")

        # One prompt for the group: its samples are compared, and share its tokens.
        group.prompt = group.prompt or play.prompt
        if play.prompt != group.prompt:
            return self._fail(play, "reset opened two episodes of one row differently; it must depend on the row alone")
        self._speak(play)

    def _resumed(self, play: Play) -> None:
        assert play.episode is not None
        if play.episode.end is not None:
            return self._finish(play)
        self._speak(play)

    def _speak(self, play: Play) -> None:
        """Asks for the policy's turn, or for the rest of it."""
        group = play.group
        tokens = play.prompt + play.tokens
        spoken = len(play.tokens) - play.turn_start
        drawn = len(play.tokens) - max(play.turn_start, play.first_own)
        decoder = self._sources[self._decoder_of(play)]

        # The limit is of a turn as a whole, also where it was cut off and goes on.
        room = min(decoder.spec.max_new_tokens - spoken, self._length - len(tokens))
        if room < 1:
            play.is_truncated = True
            return self._finish(play)

        self._speaking[play.conversation] = play
        # What a fork is to go on without cannot come again with the first token that is its own.
        is_suppressed = play.fork.intervention == INTERVENTION_SUPPRESS and bool(decoder.spec.suppressed)
        decoder.submit(
            Turn(
                conversation=play.conversation,
                tokens=tokens,
                prompt_id=group.example.id,
                sample_id=play.fork.sample_id,
                turn=play.turn,
                prefix_of=self._prefix_of(play),
                max_new_tokens=room,
                suppress=is_suppressed and len(play.tokens) == play.first_own,
                begun=spoken,
                drawn=drawn,
                own=play.own,
                grammar=self.settings.grammar_of(group.example),
            )
        )

    def _prefix_of(self, play: Play) -> int | None:
        """The conversation whose beginning a play shares: its parent's if it is a fork, else that of the first play of
        the group. None where that play is over and its conversation another's, as it is behind a restart too."""
        group = play.group
        first = group.plays[max(play.fork.parent, 0)]
        is_over = group.rounds is None and group.samples[first.index] is not None
        return None if is_over or first.conversation == NO_CONVERSATION else first.conversation

    def _decoder_of(self, play: Play) -> int:
        """Which decoder speaks the current turn: the same each time it is asked, so that a turn goes on where it
        began."""
        if self.scorer is not None:
            return int(play.fork.parent == NO_PARENT)
        return self._pick(play.group.example.id, play.fork.sample_id, play.turn)

    def _heard(self, play: Play, result: TurnResult) -> None:
        version = self.versions[self._decoder_of(play)]
        if result.turn.suppress and len(result.tokens):
            play.forced.append((len(play.tokens), len(play.tokens) + 1))
        play.add(result.tokens.tolist(), result.logprobs.tolist(), result.entropies.tolist(), version)
        if result.end == "interrupted":
            self._paused.append(play)
        elif result.end == "length":
            play.is_truncated = True
            self._finish(play)
        else:
            self._act(play)

    def _act(self, play: Play) -> None:
        """Hands the policy's turn to the environment."""
        assert play.episode is not None
        before = play.tokens[: play.turn_start] or play.prompt
        action = self.dialogue.action(play.tokens[play.turn_start :], before)
        self._after(play, self._stepped, self.pool.step(play.episode, action))

    def _stepped(self, play: Play) -> None:
        episode = play.episode
        assert episode is not None
        if episode.end is not None:
            return self._finish(play)

        # What the template puts between turns depends on whether the policy has closed its own.
        try:
            observation = self.dialogue.observation(
                episode.steps[-1].observation,
                is_chat=self.dialogue.is_chat(episode.opening),
                is_closed=play.tokens[-1] in self.dialogue.tokenizer.stop_ids,
            )
        except ValueError as error:
            return self._fail(play, f"its observation cannot be tokenised: {error}")

        # An observation that nothing could be said behind is left out: nobody would learn from it.
        if len(play.prompt) + len(play.tokens) + len(observation) >= self._length:
            play.is_truncated = True
            return self._finish(play)

        play.observed.append(play.give(observation, self.versions[0]))
        play.turn += 1
        play.turn_start = len(play.tokens)
        self._speak(play)

    def _fail(self, play: Play, problem: str) -> None:
        play.problem = problem
        self.pool.failures[MALFORMED] += 1
        self._finish(play)

    def _finish(self, play: Play) -> None:
        """The episode is over; so may be its round, and its group."""
        group = play.group
        grammar = self.settings.grammar_of(group.example)
        group.samples[play.index] = sample_of(
            play,
            grammar="" if grammar is None else grammar.name,
            is_penalised=self.settings.sampling.penalises,
        )
        group.results[play.index] = self._result(play)
        if group.rounds is None:
            self._leave(play)

        # A round of forks is chosen from all samples so far: it waits for the slowest of them.
        samples = [sample for sample in group.samples if sample is not None]
        if len(samples) < len(group.samples):
            return
        forks = group.rounds(samples) if group.rounds else []
        if forks := [fork for fork in forks if can_go_on_from(group, fork)]:
            return self._begin(group, forks)

        # Forks need the conversations and environments of their parents, so those stay until the last round.
        if group.rounds is not None:
            for other in group.plays:
                self._leave(other)
        self._open.remove(group)
        self._done.append(group)

    def _leave(self, play: Play) -> None:
        if play.conversation != NO_CONVERSATION:
            self._free.append(play.conversation)
        if play.episode is not None:
            self.pool.release(play.episode)

    def _result(self, play: Play) -> RewardResult:
        episode = play.episode
        assert episode is not None
        parts = {"turns": float(len(episode.steps)), **episode.counts}
        if play.problem or terminal_class(episode.end, is_truncated=play.is_truncated) == "environment":
            return RewardResult(0.0, parts, False, play.problem or f"{episode.end}: {episode.error}")

        value = episode.reward
        if episode.end != DONE and self.config.unfinished_reward is not None:
            value = self.config.unfinished_reward
        result = RewardResult(value, parts, decided_by=self.settings.solved_by)
        return result.voided() if play.is_truncated and self.settings.truncated_is_wrong else result

    # What is under way, out of a checkpoint and back.

    def _restore(self, group: Group, saved: Mapping[str, Any]) -> None:
        """A group that was under way, or complete, when its state was saved."""
        group.prompt = saved["prompt"]

        # Rounds that were made are not made again; a group that was complete makes no more.
        if group.rounds is not None:
            group.rounds.made = saved["rounds_made"]
        if saved["is_done"]:
            group.rounds = None
        self._open.append(group)

        for state in saved["plays"]:
            # What is over and will not be forked holds no conversation, as it held none when it was saved.
            is_left = state["then"] == "finish" and group.rounds is None
            # Its old conversation, on whose devices it was decoded.
            wanted = state.get("conversation", NO_CONVERSATION)
            play = self._new_play(group, Fork(**state["fork"]), speaks=not is_left, wanted=wanted)
            # JSON has made lists of the spans.
            for name in (*TOKEN_LISTS, "prompt", "turn", "turn_start", "is_truncated", "problem"):
                setattr(play, name, state[name])
            play.forced = [(start, stop) for start, stop in state["forced"]]
            play.observed = [(start, stop) for start, stop in state["observed"]]

        # All plays are there before the first goes on: the last one to end looks at the whole group.
        for play, state in zip(list(group.plays), saved["plays"], strict=True):
            row = {"prompt": group.example.prompt, **group.example.columns}
            if state["then"] == "open":
                self._after(play, self._opened, self.pool.start(row))
            else:
                self._after(play, self._goes_on[state["then"]], self.pool.restore(state["episode"], row))

    @property
    def _goes_on(self) -> dict[str, Callable[[Play], None]]:
        return {"finish": self._finish, "speak": self._resumed, "act": self._act_again}

    def _act_again(self, play: Play) -> None:
        assert play.episode is not None
        if play.episode.end is not None:
            return self._finish(play)
        self._act(play)

    def _group_state(self, group: Group) -> dict[str, Any]:
        return {
            "example_id": group.example.id,
            "first_sample": group.request.first_sample,
            "step": group.step,
            "prompt": group.prompt,
            "rounds_made": group.rounds.made if group.rounds else 0,
            "is_done": group in self._done,
            "plays": [self._play_state(play) for play in group.plays],
        }

    def _play_state(self, play: Play) -> dict[str, Any]:
        """A play, and how it goes on. An environment may be at work, or have answered, while this is written, so of an
        episode that goes on only the turns count that the play has seen."""
        group = play.group
        is_over = group.samples[play.index] is not None
        then = "finish" if is_over else "open" if not play.prompt else "speak" if play in self._paused else "act"

        # The fork of an environment may not have been made yet: its parent's episode is what it will be made from.
        episode = play.episode
        if episode is None and play.fork.parent != NO_PARENT:
            episode = group.plays[play.fork.parent].episode
            then = "speak"

        state = {name: getattr(play, name) for name in TOKEN_LISTS}
        state |= {name: getattr(play, name) for name in ("prompt", "turn", "turn_start", "is_truncated", "problem")}
        return state | {
            "conversation": play.conversation,
            "fork": {**play.fork._asdict(), "inject": list(play.fork.inject)},
            "forced": play.forced,
            "observed": play.observed,
            "then": then,
            "episode": None if episode is None else episode_state(episode, None if is_over else play.turn),
        }

    def _decoder_stats(self, total: Mapping[str, float], seconds: float) -> dict[str, float]:
        """What decoders that live here did: `busy_share` is the share of a call's time in which one worked,
        `reused_share` that of the context tokens of all turns that did not have to be computed."""
        if not self.decoders:
            return {}
        row_steps = total["decode_steps"] * self._sources[0].spec.rows
        return {
            "busy_share": total["seconds"] / max(seconds, 1e-9),
            "row_occupancy": total["busy_rows"] / max(row_steps, 1),
            "reused_share": 1 - total["prefill_tokens"] / max(total["conversation_tokens"], 1),
            "prefill_tokens": total["prefill_tokens"],
        }

    def _stats(self, groups: Sequence[Group], seconds: float) -> dict[str, float]:
        """What a call cost, and what came of its groups."""
        total = {name: float(sum(d.stats[name] for d in self._sources)) for name in self._sources[0].stats}
        results = [r for group in groups for r in group.results if r is not None]
        episodes = [play.episode for group in groups for play in group.plays if play.episode is not None]

        ends = [
            terminal_class(play.episode.end, is_truncated=play.is_truncated)
            for group in groups
            for play in group.plays
            if play.episode is not None and not play.problem
        ]

        return self._decoder_stats(total, seconds) | {
            "turns": total["turns"],
            "finished_share": float(np.mean([episode.end == DONE for episode in episodes])) if episodes else 0.0,
            "failed": float(sum(not result.is_valid for result in results)),
            "policy_aborts": float(sum(end == "policy" for end in ends)),
            "groups_in_flight": float(self.num_pending),
            "steps_in_flight": float(max((self._step - group.step for group in groups), default=0)),
        }


def group_size(plan: RolloutPlan) -> int:
    return plan.forks.leaves if plan.forks else plan.group_size
