"""The one way to roll out: what a trainer, an evaluation and a study ask of whatever plays the policy. Host.

An `Actor` owns its decoders, what judges, and the mesh that they live on. It is given weights and prompts and gives
back scored groups; whether a group is one turn, an episode over turns, a guided rollout or the conversations of an
agent that cannot be changed is its own business.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from rljax.plans import RolloutPlan
from rljax.sampling import DecoderPlan, Sample, SamplingParams, Stops, Turn, TurnDecoderSpec, TurnResult
from rljax.sampling.slots import Grammar
from rljax.tasks import Example, RewardResult
from rljax.types import SOURCE_POLICY, Params


class GroupRequest(NamedTuple):
    """A prompt to sample a group of, whose sample ids count from `first_sample` on."""

    example: Example
    first_sample: int = 0


class ScoredGroup(NamedTuple):
    """The samples of one prompt with their texts and rewards.

    Attributes:
        example: the data row that was asked for.
        prompt: token ids of the prompt.
        samples: completions; all lists below have one entry a sample.
        texts: completions as the reward saw them.
        results: rewards.
        steps: number of the step (or turn) of each completion token, int32 [T].
        turn_fields: optional typed fields of `Trajectory` that the sample fills; arrays are of the completion's tokens.
        signals: named values of each completion token, float32 [T], that a plan may declare as columns.
        episodes: the first sample of the episode that each sample belongs to; empty where each is its own.
        source: one of the sources of `rljax.types`, of the whole group.
        answers: what the reward that decides took for the answers, None for none; empty where nothing extracts them.
    """

    example: Example
    prompt: list[int]
    samples: list[Sample]
    texts: list[str]
    results: list[RewardResult]
    steps: list[np.ndarray]
    turn_fields: Sequence[Mapping[str, np.ndarray]] = ()
    signals: Sequence[Mapping[str, np.ndarray]] = ()
    episodes: Sequence[int] = ()
    source: int = SOURCE_POLICY
    answers: Sequence[str | None] = ()


def _no_grammar(example: Example) -> Grammar | None:
    return None


@dataclass(frozen=True)
class RolloutSettings:
    """How an actor samples and reads what was sampled.

    Attributes:
        seed: of the run; enters every random number.
        sampling: the distribution that is sampled from.
        chat: as in `rljax.text.render_prompt`.
        stop_strings: texts that end a completion, and are cut from what the reward sees.
        truncated_is_wrong: a completion cut off by a length limit earns 0 at most.
        solved_by: the reward, or count of an environment, by which a sample counts as solved; empty is the first
            reward, or what an episode is worth.
        grammar_of: what completions of a row must follow; None for nothing.
        stop_column: column of the data with texts that end completions of a row, beside `stop_strings`.
    """

    seed: int
    sampling: SamplingParams
    chat: bool | None = None
    stop_strings: Sequence[str] = ()
    truncated_is_wrong: bool = False
    solved_by: str = ""
    grammar_of: Callable[[Example], Grammar | None] = _no_grammar
    stop_column: str = ""

    def stops_of(self, example: Example) -> tuple[str, ...]:
        """Texts that end completions of this row alone. ValueError for what is neither a text nor a list of texts."""
        if not self.stop_column:
            return ()
        value = example.columns.get(self.stop_column) or ()
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(
                f"{example.name}, column {self.stop_column}: {value!r:.80} must be a text or a list of texts"
            )
        return tuple(texts)

    def sampled_by(self, sampling: SamplingParams) -> "RolloutSettings":
        """The same with another temperature and truncation: what is banned or biased stays so."""
        return replace(self, sampling=sampling.adjusted_as(self.sampling))


@runtime_checkable
class Decoder(Protocol):
    """What a plan of a run asks of a `Sampler` or `TurnDecoder`."""

    def plan(self) -> DecoderPlan:
        """What it holds, in shapes."""
        ...

    def lower(self, plan: DecoderPlan, sampling: SamplingParams) -> dict[str, jax.stages.Lowered]:
        """Its largest programs by what they do."""
        ...

    def drop_params(self) -> None:
        """Frees its copy of the weights; it needs new ones before it decodes again."""
        ...


@runtime_checkable
class TurnSource(Protocol):
    """What says turns: a `TurnDecoder`, or engines in other processes that take its place. Not safe for several
    threads.

    Attributes:
        spec: its sizes.
        stats: counts since `begin`.
    """

    spec: TurnDecoderSpec
    stats: dict[str, float]

    @property
    def finds_strings(self) -> bool:
        """Whether turns may have stop strings of their own."""
        ...

    @property
    def num_open(self) -> int:
        """Turns that wait or run."""
        ...

    def set_params(self, params: Params, *, keep: Collection[int] = ()) -> None:
        """The weights to speak with from now on; what was computed with others is forgotten, but for the conversations
        `keep`. Raises RuntimeError while turns are under way."""
        ...

    def begin(self, sampling: SamplingParams, *, seed: int, step: int) -> None:
        """How turns are sampled from now on; clears `stats`. (seed, step) enter the random numbers."""
        ...

    def set_stops(self, stops: Stops) -> None:
        """What ends turns from now on. Raises RuntimeError while turns are under way."""
        ...

    def submit(self, turn: Turn) -> None:
        """Asks for a turn. Raises ValueError for one that cannot be served."""
        ...

    def run(self) -> list[TurnResult]:
        """Goes on for a while, and gives the turns that have ended."""
        ...

    def interrupt(self, *, keep: bool = False) -> list[TurnResult]:
        """No turn is under way any more: what there is of each."""
        ...

    def forget(self, *, keep: Collection[int] = ()) -> None:
        """Conversations but those of `keep` are computed anew when they are next used."""
        ...

    def pick(self, free: Sequence[int], near: int | None = None) -> int:
        """Which of the conversations `free` a new one takes; beside `near` where it shares that one's beginning."""
        ...

    def part_of(self, conversation: int) -> int:
        """Which part of the devices keeps a conversation."""
        ...

    def cache_bytes(self) -> int:
        """Bytes of keys and values in this process."""
        ...


@runtime_checkable
class Actor(Protocol):
    """Plays the policy. Ports, threads and processes are open between `__enter__` and `__exit__`, and at no other time.

    Attributes:
        stats: metrics of the last `ready`, without prefix.
        seconds: wall seconds of the last `ready` by phase (`sample`, `reward`).
    """

    stats: dict[str, float]
    seconds: dict[str, float]

    def set_params(self, params: Params, version: int) -> None:
        """The weights to speak with from now on, those of step `version`, wherever they lie: the actor copies them onto
        its own mesh."""
        ...

    def missing(self, n: int, pending: int | None = None) -> int:
        """How many groups have to be submitted for `ready(n)` to return `n`; where `pending` are under way, or as many
        as are (None)."""
        ...

    def submit(self, requests: Sequence[GroupRequest], plan: RolloutPlan, step: int) -> None:
        """Asks for groups as `plan` describes them; `step` enters their random numbers. Returns at once."""
        ...

    def ready(self, n: int) -> list[ScoredGroup]:
        """Waits until `n` groups are complete, and takes them out in the order in which they were asked for. What else
        is under way goes on at the next call."""
        ...

    def for_evaluation(self, sampling: SamplingParams) -> "Actor":
        """An actor over the same decoders and judges that samples from `sampling`. It leaves what is under way alone,
        speaks with the newest weights only, and needs no `with` of its own."""
        ...

    @property
    def decoders(self) -> Sequence[Decoder]:
        """What samples for it, each with a copy of the weights."""
        ...

    @property
    def resting(self) -> Sequence[Decoder]:
        """Of `decoders`, those whose weights nothing needs from the end of `ready` to the next `set_params`, which
        replaces them whatever its version is."""
        ...

    def cache_bytes(self) -> int:
        """Bytes of keys and values over all devices of its mesh."""
        ...

    def longest_row(self, prompt_length: int) -> int:
        """Tokens of the longest trajectory that a prompt of `prompt_length` tokens can become."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is under way, JSON-ready. `{}` where nothing is."""
        ...

    def older(self, version: int) -> int:
        """The version of the weights that it also samples with when its newest are `version`: an older one, from 0 on,
        or the same where it has no other. A run that is resumed gives it those first."""
        ...

    def checkpointed(self) -> None:
        """A checkpoint has been made of this moment, with `state_dict` and the weights. What a run that is resumed from
        it could not know, such as keys and values of older weights, is forgotten, so that both go on alike."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], plan: RolloutPlan, examples: Mapping[int, Example]) -> None:
        """Goes on with what `state_dict` gave. `examples` are the data rows by id."""
        ...

    def __enter__(self) -> "Actor": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def number_groups(examples: Sequence[Example], size: int, seen: dict[int, int] | None = None) -> list[GroupRequest]:
    """Requests for `examples` with sample ids of their own: a prompt that occurs again goes on where it ended, so that
    its samples differ from the first ones. `seen` counts occurrences by prompt id, across calls when it is given."""
    seen = {} if seen is None else seen
    requests = []
    for example in examples:
        count = seen.get(example.id, 0)
        seen[example.id] = count + 1
        requests.append(GroupRequest(example, size * count))
    return requests


def known_example(examples: Mapping[int, Example], example_id: int) -> Example:
    """The data row of this id. ValueError if the data has changed since the state was saved."""
    if example_id not in examples:
        raise ValueError(
            f"a group under way is of the data row {example_id}, which the data does not hold; resume with the data "
            "that the run began with, or start anew with --fresh"
        )
    return examples[example_id]
