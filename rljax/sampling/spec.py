"""What the decoders are told once, when they are made: their sizes, and where a text ends."""

import dataclasses
from collections.abc import Callable, Sequence

from rljax.models.config import DecoderConfig

_SMALLEST_RING = 64
_SMALLEST_CONTEXT = 512


@dataclasses.dataclass(frozen=True)
class Stops:
    """What ends a completion, or a turn."""

    tokens: Sequence[int] = ()
    """Token ids that end it, themselves included in it."""
    strings: Sequence[str] = ()
    """Texts that end it once it contains one of them, looked for every `check_every` steps. One that begins in
    inherited or given tokens and ends behind them counts; one that lies in them as a whole does not."""
    decode_text: Callable[[list[int]], str] | None = None
    """Token ids -> text, such as a tokenizer's `decode`; needed with `strings`."""

    def check(self, config: DecoderConfig) -> None:
        """ValueError for a token that the model does not know."""
        if outside := [token for token in self.tokens if not 0 <= token < config.num_ids]:
            raise ValueError(f"stop token {outside[0]} is outside the vocabulary of {config.num_ids}; leave it out")


NO_STOPS = Stops()
"""Completions end at their length alone."""


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """Sizes of a `Sampler`: a grid of `prompt_slots` prompts x `sample_slots` samples of each."""

    prompt_buckets: Sequence[int]
    """Prompt lengths that programs are compiled for; a call uses the smallest that fits its longest prompt."""
    max_new_tokens: int
    """Most tokens of a completion, and columns of a row in the cache."""
    prompt_slots: int
    """Prompts held at once, each stored and read once for all of its samples. A decoder on a mesh rounds it up to a
    multiple of the devices that split the batch."""
    sample_slots: int
    """Samples of a prompt that decode at once: the group size, or 1 (plain continuous batching) for ragged lengths."""
    check_every: int = 16
    """Steps between two searches for stop strings; only with stop strings."""
    refill_rows: int | None = None
    """Rows that must be idle before decoding pauses to give them waiting work; None is a sixteenth of all."""
    path_slots: int = 0
    """Samples of a request, the first ones, that forks may start from: memory for as many completions a prompt slot."""
    max_injected: int = 0
    """Most given tokens that a fork may begin with."""
    top_logprobs: int = 0
    """Most probable tokens that are told beside each sampled one."""
    suppressed: Sequence[int] = ()
    """Tokens that a fork of intervention SUPPRESS cannot begin with."""
    record_experts: bool = False
    """Whether samples tell which experts computed for each token (`Sample.experts`)."""

    def check(self) -> None:
        """ValueError for a size that cannot be."""
        sizes = {
            "max_new_tokens": self.max_new_tokens,
            "prompt_slots": self.prompt_slots,
            "sample_slots": self.sample_slots,
            "check_every": self.check_every,
            "refill_rows": 1 if self.refill_rows is None else self.refill_rows,
            "smallest prompt bucket": min(self.prompt_buckets, default=0),
            "path_slots + 1": self.path_slots + 1,
            "max_injected + 1": self.max_injected + 1,
        }
        _check_positive(sizes)

    def resolved(self, parts: int = 1) -> "SamplerSpec":
        """The same with its buckets in order, and slots that divide over `parts` of the devices."""
        return dataclasses.replace(
            self,
            prompt_buckets=tuple(sorted(set(self.prompt_buckets))),
            prompt_slots=_multiple(self.prompt_slots, parts),
        )

    @property
    def ring_sizes(self) -> tuple[int, ...]:
        """Columns that the ring of completions may have; programs are compiled for each. A step reads all of them, so
        the ring is as short as the oldest row allows."""
        return (*_powers(_SMALLEST_RING, self.max_new_tokens, 2), self.max_new_tokens)

    @property
    def path_lengths(self) -> tuple[int, ...]:
        """Tokens of a path, or the next longer of these, over which a model with a delta rule computes what a fork
        recalls; programs are compiled for each."""
        return (*_powers(_SMALLEST_RING, self.max_new_tokens, 4), self.max_new_tokens)

    @property
    def rows_to_refill(self) -> int:
        """`refill_rows` as a number."""
        return self.refill_rows or max(1, self.prompt_slots * self.sample_slots // 16)


@dataclasses.dataclass(frozen=True)
class TurnDecoderSpec:
    """Sizes of a `TurnDecoder`."""

    conversations: int
    """Conversations whose keys and values are kept on the device. A decoder on a mesh rounds it up to a multiple of the
    devices that split the batch."""
    rows: int
    """Turns that decode at once; rounded up likewise."""
    context_length: int
    """Most tokens of a conversation, its turns and what stands between them included."""
    max_new_tokens: int
    """Most tokens that one turn adds."""
    prefill_chunks: Sequence[int] = (16, 64, 256)
    """Lengths (tokens) of the chunks in which what is new before a turn is computed: an observation up to a prompt."""
    check_every: int = 8
    """Steps after which finished rows are handed over and waiting turns take them; raise it where turns are long."""
    top_logprobs: int = 0
    """Most probable tokens that are told beside each sampled one."""
    suppressed: Sequence[int] = ()
    """Tokens that a turn with `suppress` cannot begin with."""
    memories: int = 2
    """Of a model with a delta rule: tokens of a conversation behind which its memories are kept, the last at which
    turns began and ended. Two serve conversations that go on; what forks at an earlier turn begins at one of more, or
    is computed from the first token on."""

    @property
    def context_sizes(self) -> tuple[int, ...]:
        """Tokens of conversations for which rows may have room; programs are compiled for each. A step reads all of
        it, so it is as short as the longest conversation that decodes allows."""
        return (*_powers(_SMALLEST_CONTEXT, self.context_length, 2), self.context_length)

    def check(self, config: DecoderConfig) -> None:
        """ValueError for a size that cannot be, or that the model cannot serve."""
        sizes = {
            "conversations": self.conversations,
            "rows": self.rows,
            "max_new_tokens": self.max_new_tokens,
            "check_every": self.check_every,
            "smallest of prefill_chunks": min(self.prefill_chunks, default=0),
        }
        _check_positive(sizes)
        if self.memories < 2:
            raise ValueError(f"memories={self.memories} must be at least 2: behind a turn's beginning and its end")
        if not self.max_new_tokens < self.context_length <= config.longest_sequence:
            raise ValueError(
                f"context_length={self.context_length} must be above max_new_tokens={self.max_new_tokens} and at most "
                f"the model's {config.longest_sequence} positions"
            )
        if config.rope_scaling.type == "dynamic":
            raise ValueError("dynamic RoPE scaling changes earlier keys as a context grows; choose another scaling")

    def resolved(self, parts: int = 1) -> "TurnDecoderSpec":
        """The same with its chunks in order, no more steps between two looks than a turn can have, and conversations
        and rows that divide over `parts` of the devices."""
        return dataclasses.replace(
            self,
            conversations=_multiple(self.conversations, parts),
            rows=_multiple(self.rows, parts),
            prefill_chunks=tuple(sorted(set(self.prefill_chunks))),
            check_every=min(self.check_every, self.max_new_tokens),
        )


def _multiple(size: int, parts: int) -> int:
    """The smallest multiple of `parts` that is at least `size`."""
    return -(-size // parts) * parts


def _powers(first: int, end: int, times: int) -> list[int]:
    """first, times first, times^2 first ... below `end`."""
    sizes = []
    while first < end:
        sizes.append(first)
        first *= times
    return sizes


def _check_positive(sizes: dict[str, int]) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
