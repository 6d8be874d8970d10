"""What the configs of actors have in common.

Each kind of actor is a config that builds itself and stands beside its actor (`SingleTurn`, `MultiTurn`, `BlackBox`,
`Guided`), so that what does not go together cannot be written.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jax.sharding import Mesh

from rljax.envs import get_format
from rljax.models import DecoderConfig
from rljax.parallel import num_processes
from rljax.plans import RolloutPlan
from rljax.rollouts.actor import Actor, RolloutSettings, TurnSource
from rljax.rollouts.shared import Shared
from rljax.sampling import SamplingConfig, Stops, TurnDecoder, TurnDecoderSpec
from rljax.tasks import Dataset, RewardConfig, RewardRunner, RewardSpec
from rljax.text import Tokenizer, control_tokens_of, encode_text


@dataclasses.dataclass(frozen=True)
class ActorParts:
    """What an actor is built from.

    Attributes:
        decoder: the model.
        tokenizer: its tokenizer.
        mesh: the devices to roll out on.
        plan: what a rollout is to collect.
        dataset: examples, and the reward that comes with them, if any.
        sampling: how to sample.
        settings: the same as functions need it, with the run's seed.
        groups: prompts of a step.
        processes: how many there are, each of which plays its share of the groups on a mesh of its own.
    """

    decoder: DecoderConfig
    tokenizer: Tokenizer
    mesh: Mesh
    plan: RolloutPlan
    dataset: Dataset
    sampling: SamplingConfig
    settings: RolloutSettings
    groups: int
    processes: int = 1

    def share(self, count: int) -> int:
        """What one process needs of so many slots, rows or conversations of all."""
        return -(-count // self.processes)

    def shared(self, actor: Actor) -> Actor:
        """`actor` for all processes: as it is for one, and where all decode in step."""
        return actor if self.processes == 1 else Shared(actor)

    def refuse_in_step(self, what: str) -> None:
        """ValueError where all processes decode in step, which takes the same work in the same order in each."""
        if num_processes(self.mesh) > 1:
            raise ValueError(
                f"config.rollout.in_step=True has all processes decode the same batch at the same time, and {what} "
                "answer each process at their own pace; set it to False"
            )


@runtime_checkable
class ActorConfig(Protocol):
    """How a run rolls out."""

    @property
    def off_policy(self) -> str:
        """The setting that lets rollouts hold tokens which the current policy did not sample under their prompt, as
        `config.<path>=value`; empty where there is none."""
        ...

    def check(self, plan: RolloutPlan, sampling: SamplingConfig, pack_length: int) -> None:
        """Refuses what cannot work, with a ValueError of one line, before any data is read. A trajectory is trained on
        in packed sequences of `pack_length` tokens."""
        ...

    def build(self, parts: ActorParts) -> Actor:
        """The actor, with nothing open. ValueError for what only the data can show."""
        ...

    def check_prompts(self, parts: ActorParts, pack_length: int) -> Dataset:
        """The data set, without rows that the config says are to be dropped. ValueError for a prompt that cannot be
        sampled or trained on."""
        ...


@dataclasses.dataclass
class TurnsConfig:
    """The decoder for conversations, which episodes and agents share."""

    tool_format: str = "hermes"
    """How tool calls are written, by name or as `module:object`. Its stop strings end a turn, and its role or wrapping
    stands around an observation."""
    context_length: int = 1024
    """Tokens of a whole episode. It must fit into `config.update.pack_length`."""
    decode_rows: int = 0
    """Turns that decode at once, at most `conversations`; 0 is one for each episode of a step. On a mesh it is rounded
    up to a multiple of the devices that split the batch, each of which decodes turns of the conversations that it
    keeps. Several processes share them, as they share `conversations`."""
    conversations: int = 0
    """Conversations whose keys and values are kept on the device, rounded up likewise; 0 is one for each episode under
    way."""
    prefill_chunks: tuple[int, ...] = (16, 64, 256)
    """Lengths in tokens in which what comes anew is computed: programs are compiled for these alone."""
    check_every: int = 8
    """Decoding steps between two looks for finished turns."""
    memories: int = 2
    """Of a model with a delta rule: the last tokens at which a conversation's turns began or ended, behind which it
    keeps what it remembers. Raise it where a method forks at earlier turns, which are computed again without."""
    workers: int = 64
    """Threads that environments or agents run in, or processes, or workers on a cluster; in each process of the run."""

    @property
    def off_policy(self) -> str:
        return ""

    def check(self, plan: RolloutPlan, sampling: SamplingConfig, pack_length: int) -> None:
        try:
            get_format(self.tool_format)
        except ValueError as error:
            raise ValueError(f"config.actor.tool_format={self.tool_format!r}: {error}") from None
        if not sampling.max_new_tokens < self.context_length <= pack_length:
            raise ValueError(
                f"config.actor.context_length={self.context_length}, the length of an episode, must be above "
                f"config.sampling.max_new_tokens={sampling.max_new_tokens} (of a turn) and at most "
                f"config.update.pack_length={pack_length}"
            )
        for name in ("decode_rows", "conversations"):
            if getattr(self, name) < 0:
                raise ValueError(f"config.actor.{name}={getattr(self, name)} must be at least 0")
        if self.workers < 1:
            raise ValueError(f"config.actor.workers={self.workers} must be at least 1")
        if self.memories < 2:
            raise ValueError(
                f"config.actor.memories={self.memories} must be at least 2: behind a turn's beginning and its end"
            )

    def check_prompts(self, parts: ActorParts, pack_length: int) -> Dataset:
        """All of it: what opens an episode is known when it does; one that is too long fails alone."""
        return parts.dataset

    def turn_decoder(self, parts: ActorParts, *, groups_in_flight: int, stop_strings: tuple[str, ...]) -> TurnSource:
        spec = self.turn_spec(parts, groups_in_flight)
        return TurnDecoder(parts.decoder, spec, stops_of(parts, stop_strings), mesh=parts.mesh)

    def turn_spec(self, parts: ActorParts, groups_in_flight: int) -> TurnDecoderSpec:
        group = parts.plan.forks.leaves if parts.plan.forks else parts.plan.group_size
        own_groups = parts.share(parts.groups) + parts.share(groups_in_flight)
        conversations = parts.share(self.conversations) or own_groups * group
        rows = parts.share(self.decode_rows) or parts.share(parts.groups) * chains_of(parts.plan)
        return TurnDecoderSpec(
            conversations=conversations,
            rows=min(rows, conversations),
            context_length=self.context_length,
            max_new_tokens=parts.sampling.max_new_tokens,
            prefill_chunks=self.prefill_chunks,
            check_every=self.check_every,
            memories=self.memories,
            suppressed=parts.plan.forks.suppressed if parts.plan.forks else (),
            top_logprobs=parts.sampling.top_logprobs,
        )


def make_rewards(configs: tuple[RewardConfig, ...], parts: ActorParts) -> RewardRunner | None:
    """The configured rewards, or the data set's own verifier; None for neither. ValueError when a reward wants a column
    that the data lacks, and for a name in the config or plan that is no reward's."""
    dataset = parts.dataset
    specs = [reward.load() for reward in configs]
    if not specs and dataset.verifier is not None:
        specs = [RewardSpec(dataset.verifier)]
    if not specs:
        return None
    runner = RewardRunner(specs)
    for path, name in (
        ("config.evaluation.solved_by", parts.settings.solved_by),
        ("config.algorithm.signal_reward", parts.plan.signal_reward),
    ):
        if name and name not in runner.names:
            raise ValueError(f"{path}={name!r} is none of the rewards: {', '.join(runner.names)}; name one of them")
    runner.decided_by = parts.settings.solved_by or runner.decided_by
    runner.check_columns(set.intersection(*(set(e.columns) for e in [*dataset.train, *dataset.test])))
    return runner


def chains_of(plan: RolloutPlan) -> int:
    """Samples of a group that are sampled at once, before anything forks."""
    return plan.forks.chains if plan.forks else plan.group_size


def stops_of(parts: ActorParts, strings: tuple[str, ...] = ()) -> Stops:
    """What ends a completion: the tokenizer's stop tokens, the config's stop strings and `strings`. ValueError for a
    string that no completion can hold."""
    tokenizer = parts.tokenizer
    for string in parts.sampling.stop_strings:
        check_can_be_said(tokenizer, string)
    strings = (*strings, *parts.sampling.stop_strings)
    return Stops(
        tokens=(*tokenizer.stop_ids, *stop_tokens_of(tokenizer, strings)),
        strings=strings,
        decode_text=tokenizer.decode,
    )


def check_can_be_said(tokenizer: Tokenizer, string: str) -> None:
    """ValueError for a stop string that the tokenizer has no tokens for, or whose tokens say something else."""
    if string in getattr(tokenizer, "special_tokens", {}):
        return
    never = f"config.sampling.stop_strings: {string!r} never ends a completion"
    try:
        said = tokenizer.decode(encode_text(tokenizer, string))
    except ValueError as error:
        raise ValueError(f"{never}: {error}") from None
    # A space at either end is what a tokenizer may add or take away at the ends of a text.
    if string.strip(" ") not in said:
        raise ValueError(f"{never}: its tokens say {said!r}; choose another")


def stop_tokens_of(tokenizer: Tokenizer, strings: Sequence[str]) -> list[int]:
    """Those of `strings` that are control tokens, as ids: the text of a completion does not show them. ValueError for a
    string that can stand in no text."""
    return control_tokens_of(tokenizer, strings, "config.sampling.stop_strings: {} never ends a completion")
