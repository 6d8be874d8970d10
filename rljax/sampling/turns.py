"""A decoder for conversations: turns are asked for one by one, and run as soon as a row is free.

A turn that waits, for a tool or for its user, holds no row. Its conversation's keys and values are kept, so that going
on costs what is new; of a conversation that is new, the part is copied that another one has computed.
"""

import bisect
import contextlib
import dataclasses
import time
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from rljax.models.cache import cache_bytes, init_cache, prompts_size, resize_prompts, without_prompts
from rljax.models.config import DecoderConfig
from rljax.parallel import batch_parts, platform, to_host, use_mesh
from rljax.sampling.conversations import (
    Moves,
    conversations_bytes,
    copy_conversations,
    extend,
    init_conversations,
    keep_turns,
    lay_conversations,
)
from rljax.sampling.generate import Buffer, DecodeRows, DecodeRun, decode
from rljax.sampling.logits import NO_TOKEN, Rules, SamplingParams, rules_of
from rljax.sampling.marked import MarkedTokens
from rljax.sampling.plan import DecoderPlan, abstract_result, abstract_weights, lower_weights
from rljax.sampling.prompt_scores import PromptScores, score_prompts
from rljax.sampling.sampler import by_part, known_rules, prefill_counts
from rljax.sampling.slots import ALL_ALLOWED, Followed, Grammar
from rljax.sampling.spec import NO_STOPS, Stops, TurnDecoderSpec
from rljax.sampling.stopping import StopStrings, last_of
from rljax.sampling.token_counter import count_tokens
from rljax.sampling.weights import take_weights
from rljax.types import Params

TurnEnd = Literal["stop", "length", "stop_string", "interrupted"]
MOST_TURNS = 2048
"""Turns of a sample that have random numbers of their own."""
LARGEST_SAMPLE_ID = 2**31 // MOST_TURNS - 1
"""Sample ids share 31 bits with the number of the turn."""

_COUNTED = (
    "new_tokens",
    "conversation_tokens",
    "prefill_tokens",
    "padded_tokens",
    "copied_tokens",
    "turns",
    "decode_steps",
    "busy_rows",
)
_LONGEST_RING = 256
"""Tokens of a turn that its row keeps to itself; a longer one is handed to its conversation part by part, since a step
reads all that a row has room for."""
_ROWS_SCORED = 8  # of several prompts, at once
_SHORTEST_SCORED = 16  # tokens that a prompt is padded to, or the next doubling of it
_MOST_EXTENDED = 16  # conversations extended at once: each is gathered, and scored over its whole length

_init_conversations = jax.jit(init_conversations, static_argnums=(0, 1, 2, 3))
_init_cache = jax.jit(init_cache, static_argnums=(0, 1, 2, 3, 4))
_resize_prompts = jax.jit(resize_prompts, static_argnums=0)
_extend = jax.jit(extend, static_argnums=(0, 1), donate_argnums=3)
_copy_conversations = jax.jit(copy_conversations, donate_argnums=0)
_lay_conversations = jax.jit(lay_conversations, donate_argnums=0)
_keep_turns = jax.jit(keep_turns, donate_argnums=0)
_decode = jax.jit(decode, static_argnums=(0, 1, 2, 7), donate_argnums=4)

_Emitted = Mapping[str, np.ndarray]


class Turn(NamedTuple):
    """A turn to be sampled. (`prompt_id`, `sample_id`, `turn`) name the random numbers."""

    conversation: int
    """The number of the conversation that it continues."""
    tokens: Sequence[int]
    """The whole of the conversation so far; what of it is computed already is found by itself."""
    prompt_id: int
    """Non-negative, 31 bits."""
    sample_id: int
    """From 0 to `LARGEST_SAMPLE_ID`."""
    turn: int = 0
    """Number of the turn in its sample, below `MOST_TURNS`."""
    prefix_of: int | None = None
    """Another conversation that may begin with the same tokens: what it has computed of them is copied."""
    max_new_tokens: int | None = None
    """Most tokens that are sampled; None is the decoder's limit."""
    begun: int = 0
    """The last `begun` of `tokens` belong to this turn, which goes on: a stop string may begin in them."""
    drawn: int = 0
    """The last `drawn` of those were drawn by this turn's own random numbers, which go on behind them: fewer than
    `begun` where a fork has the others from its parent, or was given them."""
    stop: tuple[str, ...] = ()
    """Texts that end it, beside those of the decoder."""
    suppress: bool = False
    """Whether its first token is none of those that the decoder was told to suppress."""
    own: tuple[tuple[int, int], ...] = ()
    """Spans [start, stop) of `tokens` that the policy has sampled, in this turn or before: with penalties these count
    as sampled, and all others as given."""
    grammar: Grammar | None = None
    """What the turn must follow from its beginning, which is `begun` tokens ago: of tokens that lead out of it none is
    sampled."""


class TurnResult(NamedTuple):
    """What came of a turn: its new tokens as in `rljax.sampling.Sample`, none if it was cut off early."""

    turn: Turn
    """The turn as it was submitted."""
    tokens: np.ndarray
    """int32 [T]."""
    logprobs: np.ndarray
    """float32 [T], nats, of the distribution sampled from."""
    entropies: np.ndarray
    """float32 [T], nats, of the distribution sampled from."""
    end: TurnEnd
    """Why it ended."""
    top_tokens: np.ndarray | None = None
    """int32 [T, N]: as in `Sample`; None if the decoder was not made to tell them."""
    top_logprobs: np.ndarray | None = None
    """float32 [T, N]."""


class TurnDecoder:
    """Decodes the turns of up to `spec.conversations` conversations on `spec.rows` rows.

    After `warmup` nothing compiles, but for the first turn that follows a grammar: while one runs, all rows go on one
    step at a time, since the host says what may come next. Stop tokens and strings as in `Sampler`.

    Use: `set_params`, `begin`, then `submit` and `run` in turn. Not safe for several threads. Raises ValueError for
    impossible settings.
    """

    def __init__(
        self,
        config: DecoderConfig,
        spec: TurnDecoderSpec,
        stops: Stops = NO_STOPS,
        mesh: jax.sharding.Mesh | None = None,
    ):
        spec.check(config)
        stops.check(config)
        if config.lora is not None and config.lora.count:
            raise ValueError(
                f"conversations have one adapter, and this model has {config.lora.count} side by side; give it one of "
                "them, or take a Sampler"
            )
        # Devices that split the batch keep as many conversations each, and decode these on rows of their own.
        self.parts = 1 if mesh is None else batch_parts(mesh)
        spec = spec.resolved(self.parts)
        self.config = config
        self.spec = spec
        self.mesh = mesh
        self._stop_tokens = tuple(sorted(set(stops.tokens)))
        self._stop_strings = StopStrings(stops)
        self._params: Params | None = None
        self._sampling: SamplingParams | None = None
        # None until a warm-up; then those that have a program of their own.
        self._rules: set[Rules] | None = None
        self._seed = 0
        self._step = 0

        # Device memory, allocated at the first use. A row that ended is written on until the steps of a call are over,
        # and the longest chunk, or a ring, is written whole behind the last token: hence the room behind either.
        self._ring = min(spec.max_new_tokens, _LONGEST_RING) + spec.check_every
        self._size = spec.context_length + max(self._ring, spec.prefill_chunks[-1])
        # What rows have room for.
        self._sizes = (*spec.context_sizes[:-1], self._size)
        self._kept: Any = None
        self._cache: Any = None
        self._column = 0

        # Per conversation: the tokens whose keys and values lie there.
        self._held: list[np.ndarray] = [np.zeros(0, np.int32)] * spec.conversations
        self._marked = MarkedTokens(config, spec)
        # Per row: its turn, and what that has emitted.
        self._waiting: deque[Turn] = deque()
        self._turns: list[Turn | None] = [None] * spec.rows
        self._emitted: list[list[_Emitted]] = [[] for _ in range(spec.rows)]
        self._grid = _Grid(spec.rows, spec.suppressed, spec.context_length)
        self.stats: dict[str, float] = {}
        self._clear_stats()

    def _clear_stats(self) -> None:
        self.stats = dict.fromkeys(_COUNTED, 0) | {"seconds": 0.0}

    def set_params(self, params: Params, *, keep: Collection[int] = ()) -> None:
        """Takes a copy of the weights, which may lie on the devices of the decoder's mesh, on others, or on the host;
        what was computed with the last ones is forgotten, but for the conversations `keep`. Raises RuntimeError while
        turns are under way: `interrupt` them first.

        A conversation that is kept goes on over keys and values of several weights (PipelineRL, 2509.19128): its tokens
        have the log-probs of this mixture, which no single weights would give them. One that is forgotten is computed
        anew by these weights (AReaL, 2505.24298), and its next tokens have the log-probs of a forward pass by them.
        """
        self._check_idle()
        self._params = None
        with self._on_mesh():
            self._params = take_weights(self.config, self.mesh, params)
        self.forget(keep=keep)

    def score_prompts(self, prompts: Sequence[Sequence[int]]) -> list[PromptScores]:
        """What the weights say of given tokens, with `spec.top_logprobs` most probable ones beside each; turns under
        way mind nothing of it. ValueError for a prompt longer than `spec.context_length`, and before weights are set.
        """
        if self._params is None:
            raise ValueError("the decoder has no weights; call set_params(params) first")
        if too_long := [len(prompt) for prompt in prompts if len(prompt) > self.spec.context_length]:
            raise ValueError(f"a prompt of {too_long[0]} tokens is above context_length={self.spec.context_length}")

        scored: list[PromptScores] = []
        at_once = _ROWS_SCORED if len(prompts) > 1 else 1
        rows = -(-at_once // self.parts) * self.parts
        for start in range(0, len(prompts), rows):
            part = prompts[start : start + rows]
            # Doublings, so that few programs serve all lengths.
            length = _SHORTEST_SCORED
            while length < max(map(len, part)):
                length *= 2
            tokens = np.zeros((rows, min(length, max(2, self.spec.context_length))), np.int32)
            for row, prompt in enumerate(part):
                tokens[row, : len(prompt)] = prompt

            with self._on_mesh():
                found = score_prompts(self.config, self.spec.top_logprobs, self._params, tokens)
                found = jax.tree.map(to_host, found)
            # Nothing is said of a first token.
            for row, prompt in enumerate(part):
                scored.append(PromptScores(*(values[row, : len(prompt) - 1] for values in found)))
        return scored

    def drop_params(self) -> None:
        """Frees the copy of the weights, unless another decoder has adopted it. What conversations hold stays. Raises
        RuntimeError while turns are under way."""
        self._check_idle()
        self._params = None

    def adopt(self, other: "TurnDecoder") -> None:
        """Decodes with the weights that another decoder of this model and mesh holds; nothing is copied. Otherwise as
        `set_params`."""
        self._check_idle()
        self._params = other._params
        self.forget()

    def _check_idle(self) -> None:
        if self.num_open:
            raise RuntimeError(f"{self.num_open} turns are under way with the old weights; interrupt them first")

    def forget(self, *, keep: Collection[int] = ()) -> None:
        """All conversations but those of `keep` are computed anew when they are next used."""
        nothing = np.zeros(0, np.int32)
        self._held = [self._held[i] if i in keep else nothing for i in range(self.spec.conversations)]
        self._marked.forget(keep)
        # No row is under way, so the ring may begin anew: a decoder that is new to the weights adds up keys in the same
        # order, to the last bit.
        self._column = 0

    def begin(self, sampling: SamplingParams, *, seed: int, step: int) -> None:
        """How turns are sampled from now on; clears `stats`. (seed, step) enter the random numbers."""
        self._sampling = sampling
        self._seed = seed
        self._step = step
        self._clear_stats()

    def set_stops(self, stops: Stops) -> None:
        """What ends turns from now on; other stop tokens are another program. Raises RuntimeError while turns are under
        way, and ValueError for a token that the model does not know."""
        if self.num_open:
            raise RuntimeError(f"{self.num_open} turns are under way; interrupt them first")
        stops.check(self.config)
        self._stop_tokens = tuple(sorted(set(stops.tokens)))
        self._stop_strings = StopStrings(stops)

    def cache_bytes(self) -> int:
        """Bytes that conversations and rows take over all devices, with rows as long as they may be."""
        return conversations_bytes(*self._kept_sizes()) + cache_bytes(*self._cache_sizes(self._size))

    def plan(self) -> DecoderPlan:
        """What it holds from its first turn on, in shapes."""
        chunk = self.spec.prefill_chunks[-1]
        with self._on_mesh():
            kept = abstract_result(_init_conversations.lower(*self._kept_sizes()))
            cache = abstract_result(_init_cache.lower(*self._cache_sizes(self._size)))
            return DecoderPlan(
                weights=abstract_weights(self.config, self.mesh),
                cache=(kept, cache),
                keeps_cache=True,
                rows=self.spec.rows,
                prefill=(self.parts * self._counts(chunk)[0], chunk),
            )

    def lower(self, plan: DecoderPlan, sampling: SamplingParams) -> dict[str, jax.stages.Lowered]:
        """The programs of the longest chunk, by what they do: `weights` copies a trainer's, `extend` computes chunks
        behind conversations, `copy`, `lay` and `keep` move conversations, `decode` steps the rows. To compile and
        inspect; nothing runs."""
        kept, cache = plan.cache
        none = self._moves([])

        # A chunk behind what is there: of a conversation's first tokens there is less to be read.
        count, chunk = plan.prefill
        tokens = np.zeros((count, chunk), np.int32)
        zeros = np.zeros(count, np.int32)
        marks = self._marked.told(zeros, zeros, zeros)

        with self._on_mesh():
            return {
                "weights": lower_weights(self.config, self.mesh),
                "extend": _extend.lower(self.config, self._sizes, plan.weights, kept, tokens, zeros, zeros, marks),
                "copy": _copy_conversations.lower(kept, none, none),
                "lay": _lay_conversations.lower(cache, kept, none),
                "keep": _keep_turns.lower(kept, without_prompts(cache), none),
                "decode": _decode.lower(
                    self.config,
                    self._stop_tokens,
                    Buffer(self.spec.check_every, self.spec.top_logprobs),
                    plan.weights,
                    cache,
                    self._grid.rows(history=sampling.penalises),
                    self._run(sampling),
                    rules_of(sampling),
                ),
            }

    def _kept_sizes(self) -> tuple[DecoderConfig, int, int, int]:
        """The arguments of `init_conversations`."""
        return self.config, self.spec.conversations, self._size, self.spec.memories

    def _cache_sizes(self, size: int) -> tuple[DecoderConfig, int, int, int, int]:
        """The arguments of `init_cache`, for rows with room for `size` tokens."""
        return self.config, self.spec.rows, 1, size, self._ring

    @property
    def room(self) -> int:
        """Tokens of a conversation that rows have room for now, of which a step of each reads all; 0 before the first
        turn."""
        return prompts_size(self._cache) if self._cache is not None else 0

    @property
    def finds_strings(self) -> bool:
        """Whether turns may have stop strings of their own."""
        return self._stop_strings.reads_text

    @property
    def num_open(self) -> int:
        """Turns that wait or run."""
        return len(self._waiting) + self.num_running

    @property
    def num_running(self) -> int:
        """Turns that hold a row."""
        return int(self._grid.active.sum())

    def submit(self, turn: Turn) -> None:
        """Queues a turn. Raises ValueError for one that cannot be served."""
        spec = self.spec
        where = f"conversation {turn.conversation}"
        length = len(turn.tokens)
        if not 0 <= turn.conversation < spec.conversations:
            raise ValueError(f"{where} must lie between 0 and {spec.conversations - 1}")
        # Python would take a negative number for one counted from the end, and the device for another one still.
        if turn.prefix_of is not None and not 0 <= turn.prefix_of < spec.conversations:
            raise ValueError(f"{where}: prefix_of={turn.prefix_of} must lie between 0 and {spec.conversations - 1}")
        if not 0 <= turn.begun <= length:
            raise ValueError(f"{where}: begun={turn.begun} must lie between 0 and its {length} tokens")
        if not 0 <= turn.drawn <= turn.begun:
            raise ValueError(f"{where}: drawn={turn.drawn} must lie between 0 and begun={turn.begun}")
        if not 1 <= length < spec.context_length:
            raise ValueError(
                f"{where}: {length} tokens leave no room for a new one within context_length={spec.context_length}"
            )
        if wrong := [span for span in turn.own if not 0 <= span[0] <= span[1] <= length]:
            raise ValueError(f"{where}: own={wrong[0]} must be a span [start, stop) of its {length} tokens")

        limit = spec.max_new_tokens if turn.max_new_tokens is None else turn.max_new_tokens
        if not 1 <= limit <= spec.max_new_tokens:
            raise ValueError(f"{where}: max_new_tokens={limit} must lie between 1 and {spec.max_new_tokens}")

        try:
            self._stop_strings.beside(turn.stop)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

        # Beyond these two turns of different samples would share random numbers.
        if not 0 <= turn.sample_id <= LARGEST_SAMPLE_ID or not 0 <= turn.turn < MOST_TURNS:
            raise ValueError(
                f"{where}: sample_id {turn.sample_id} and turn {turn.turn} must be at least 0 and at most "
                f"{LARGEST_SAMPLE_ID} and {MOST_TURNS - 1}"
            )
        self._waiting.append(turn)

    def run(self) -> list[TurnResult]:
        """Starts waiting turns on free rows and decodes at most `check_every` steps; returns the turns that ended."""
        begin = time.perf_counter()
        params, sampling = self._ready()
        with self._on_mesh():
            self._allocate()
            self._admit(params)
            ended = self._decode_some(params, sampling) if self.num_running else []
        self.stats["seconds"] += time.perf_counter() - begin
        return ended

    def interrupt(self, *, keep: bool = False) -> list[TurnResult]:
        """Ends all turns where they stand; those that had not begun have no tokens. What the others have computed since
        they began is computed again when they go on, unless told to `keep` it."""
        results = []
        moves = []
        for row, turn in enumerate(self._turns):
            if turn is None:
                continue
            results.append(self._result(row, "interrupted"))
            # A row before its first step has nothing that its conversation has not.
            if keep and self._grid.steps[row]:
                moves.append(self._hand_over(row, results[-1].tokens, self._column))
            if not keep:
                conversation = turn.conversation
                self._held[conversation] = self._held[conversation][: len(turn.tokens) - 1]
            self._free(row)
        if moves:
            with self._on_mesh():
                self._kept = _keep_turns(self._kept, without_prompts(self._cache), self._moves(moves))

        results += [_result_of(turn, (), "interrupted", None, self.spec.top_logprobs) for turn in self._waiting]
        self._waiting.clear()
        return results

    def warmup(self) -> None:
        """Compiles every program that `run` can need without grammars. What draws as `begin` has said last then has a
        faster program of its own; all else shares one. Raises RuntimeError while turns are under way."""
        if self.num_open:
            raise RuntimeError(f"{self.num_open} turns are under way; warm up before the first")
        params, sampling = self._ready()
        none = self._moves([])

        with self._on_mesh():
            self._allocate()
            # Twice round on a mesh, as in Sampler.warmup.
            for _ in range(1 if self.mesh is None else 2):
                for chunk in self.spec.prefill_chunks:
                    for count in self._counts(chunk):
                        tokens = np.zeros((self.parts * count, chunk), np.int32)
                        zeros = tokens[:, 0]
                        marks = self._marked.told(zeros, zeros, zeros)
                        for sizes in ((), self._sizes):
                            self._kept = _extend(self.config, sizes, params, self._kept, tokens, zeros, zeros, marks)
                self._kept = _copy_conversations(self._kept, none, none)
                self._kept = _keep_turns(self._kept, without_prompts(self._cache), none)
                for size in (*self._sizes, *reversed(self._sizes)):
                    self._make_room(size)
                    self._cache = _lay_conversations(self._cache, self._kept, none)
                    for rules in (None, rules_of(sampling)):
                        self._call_decode(params, sampling, rules)
            jax.block_until_ready(self._cache)

        self._rules = {rules_of(sampling)}
        # What was computed above lies over whatever the conversations held.
        self.forget()

    def _ready(self):
        if self._params is None:
            raise ValueError("the decoder has no weights; call set_params(params) first")
        if self._sampling is None:
            raise ValueError("the decoder was not told how to sample; call begin(sampling, seed=..., step=...) first")
        return self._params, self._sampling

    def _allocate(self) -> None:
        if self._cache is None:
            self._kept = _init_conversations(*self._kept_sizes())
            self._cache = _init_cache(*self._cache_sizes(self._sizes[0]))
            self._column = 0

    def _make_room(self, longest: int) -> None:
        """The rows' prompts with the least room that there are programs for, of at least `longest` tokens. By what
        decodes now alone: a run that goes on adds up in the same order as one that was never broken off."""
        index = self._sizes.index(self.room)
        wanted = bisect.bisect_left(self._sizes, longest)
        while index != wanted:
            index += 1 if index < wanted else -1
            # One layer at a time, so that old and new never lie there both as a whole.
            resized: dict[str, list[jax.Array]] = {"prefix_k": [], "prefix_v": []}
            for name, layers in resized.items():
                for old in getattr(self._cache, name):
                    layers.append(_resize_prompts(self._sizes[index], old))
                    old.delete()
            self._cache = dataclasses.replace(self._cache, **{name: tuple(new) for name, new in resized.items()})

    def _admit(self, params: Params) -> None:
        """Waiting turns onto free rows. One whose beginning another of them computes first waits for that one."""
        chosen = self._choose()
        if not chosen:
            return

        later = list(chosen)
        while later:
            computing = {turn.conversation for _, turn in later}
            now = [x for x in later if x[1].prefix_of not in computing or x[1].prefix_of == x[1].conversation]
            # Turns that wait for each other in a circle: the first begins, and the others find its tokens.
            now = now or later[:1]
            later = [x for x in later if x not in now]
            self._compute(params, [turn for _, turn in now])

        moves = []
        for row, turn in chosen:
            mark = self._marked.place(turn.conversation, len(turn.tokens) - 1)
            moves.append(_Move(turn.conversation, row, mark=mark))
        for row, turn in chosen:
            limit = min(turn.max_new_tokens or self.spec.max_new_tokens, self._room(turn))
            self._turns[row] = turn
            self._grid.start(row, turn, limit)
        self._lay(moves)
        self.stats["turns"] += len(chosen)

    def _lay(self, moves: Sequence["_Move"]) -> None:
        """Conversations into their rows, all of which have room for the longest of those that decode."""
        self._make_room(int(self._grid.prefix[self._grid.active].max()))
        self._cache = _lay_conversations(self._cache, self._kept, self._moves(moves))

    def _choose(self) -> list[tuple[int, Turn]]:
        """Takes the turns that begin now, with the row of each: one on the devices that keep its conversation."""
        free: list[deque[int]] = [deque() for _ in range(self.parts)]
        for row, turn in enumerate(self._turns):
            if turn is None:
                free[row // (self.spec.rows // self.parts)].append(row)

        chosen = []
        waiting = self._waiting
        self._waiting = deque()
        for turn in waiting:
            if rows := free[self.part_of(turn.conversation)]:
                chosen.append((rows.popleft(), turn))
            else:
                self._waiting.append(turn)
        return chosen

    def part_of(self, conversation: int) -> int:
        """Which of the `parts` of the devices keeps a conversation."""
        return conversation // (self.spec.conversations // self.parts)

    def pick(self, free: Sequence[int], near: int | None = None) -> int:
        """Which of the conversations `free`, the first to be used first, a new one takes.

        On one device the first. On a mesh one of the devices with most of them, as rows wait for turns of their own
        devices; or one beside `near`, whose beginning it shares, unless other devices have twice as many.
        """
        if self.parts == 1:
            return free[0]
        counts = Counter(self.part_of(conversation) for conversation in free)
        part, most = counts.most_common(1)[0]
        if near is not None and 2 * counts[self.part_of(near)] >= most:
            part = self.part_of(near)
        return next(conversation for conversation in free if self.part_of(conversation) == part)

    def _room(self, turn: Turn) -> int:
        return self.spec.context_length - len(turn.tokens)

    def _compute(self, params: Params, turns: Sequence[Turn]) -> None:
        """Brings the conversations of these turns up to all of their tokens but the last."""
        work = []
        near: list[_Move] = []
        far: list[_Move] = []
        for turn in turns:
            # What is there already: the conversation's own beginning, or another's if that is longer.
            conversation, other = turn.conversation, turn.prefix_of
            wanted = np.asarray(turn.tokens, np.int32)[:-1]
            have = self._begun(conversation, wanted)
            if other is not None and (common := self._begun(other, wanted)) > have:
                is_near = self.part_of(conversation) == self.part_of(other)
                (near if is_near else far).append(_Move(conversation, other))
                self._marked.copy(conversation, other)
                self.stats["copied_tokens"] += common
                have = common

            self.stats["conversation_tokens"] += len(wanted)
            self.stats["prefill_tokens"] += len(wanted) - have
            self._held[conversation] = wanted
            if have < len(wanted):
                source = self._marked.place(conversation, have)
                target = self._marked.set(conversation, have, len(wanted))
                work.append(_Work(conversation, wanted, have, source, target))
        if near or far:
            self._kept = _copy_conversations(self._kept, self._moves(near), self._moves(far))

        # The rest chunk by chunk, since a chunk is computed behind the one before; conversations whose chunks have the
        # same shape go together.
        longest = self.spec.prefill_chunks[-1]
        while work:
            groups: dict[tuple[int, bool], list[_Work]] = {}
            for one in work:
                chunk = min(len(one.wanted) - one.have, longest)
                length = self.spec.prefill_chunks[bisect.bisect_left(self.spec.prefill_chunks, chunk)]
                groups.setdefault((length, one.have == 0), []).append(one)
            for (length, is_fresh), group in groups.items():
                self._extend_group(params, length, is_fresh, group)
            work = [one._replace(have=one.have + longest, source=one.target) for one in work]
            work = [one for one in work if one.have < len(one.wanted)]

    def _begun(self, conversation: int, wanted: np.ndarray) -> int:
        """How many of the tokens `wanted` a conversation has computed, and can go on from."""
        return self._marked.last(conversation, _common(self._held[conversation], wanted))

    def _extend_group(self, params, length: int, is_fresh: bool, group: Sequence["_Work"]) -> None:
        """Extends conversations by chunks of at most `length` tokens, in the compiled counts."""
        places = [self.part_of(one.conversation) for one in group]
        for batch in by_part(group, places, self.parts, self._counts(length)):
            tokens = np.zeros((len(batch), length), np.int32)
            index = np.full(len(batch), -1, np.int32)
            start, source, target, size = np.zeros((4, len(batch)), np.int32)
            for i, one in enumerate(batch):
                if one is not None:
                    chunk = one.wanted[one.have : one.have + length]
                    index[i], start[i], size[i] = one.conversation, one.have, len(chunk)
                    source[i], target[i] = one.source, one.target
                    tokens[i, : len(chunk)] = chunk
            marks = self._marked.told(source, target, size)
            sizes = () if is_fresh else self._sizes
            self._kept = _extend(self.config, sizes, params, self._kept, tokens, index, start, marks)
            self.stats["padded_tokens"] += tokens.size

    def _counts(self, length: int) -> list[int]:
        """Conversations that each part of the devices extends at once."""
        return prefill_counts(length, min(self.spec.rows // self.parts, _MOST_EXTENDED), platform(self.mesh))

    def _decode_some(self, params: Params, sampling: SamplingParams) -> list[TurnResult]:
        before = self._grid.steps.copy()
        column = self._column
        steps, active, emitted = self._call_decode(params, sampling, known_rules(sampling, self._rules))
        grown = steps - before

        results = []
        moves = []
        for row, turn in enumerate(self._turns):
            if turn is None:
                continue
            count = int(grown[row])
            new = emitted.of_row((row, 0), count)
            self._emitted[row].append(new)
            self._grid.advance(row, new["tokens"])
            end = self._end(row, count, bool(active[row]))
            if end is None:
                continue

            reason, length = end
            results.append(self._result(row, reason, length))
            moves.append(self._hand_over(row, results[-1].tokens, column + count))
            self._free(row)

        self._column = int((column + grown.max()) % self._ring)
        self.stats["decode_steps"] += int(grown.max())
        self.stats["busy_rows"] += int(grown.sum())
        self.stats["new_tokens"] += int(grown.sum())
        count_tokens(int(grown.sum()))

        full = self._full_rows()
        moves += [self._hand_over(row, self._said(row), self._column) for row in full]
        if moves:
            self._kept = _keep_turns(self._kept, without_prompts(self._cache), self._moves(moves))
        if full:
            # They go on behind it, as turns that have begun.
            for row in full:
                self._grid.go_on(row)
            self._lay(moves[-len(full) :])
        return results

    def _full_rows(self) -> list[int]:
        """Rows whose part of the ring would not hold what another run adds."""
        is_full = self._grid.active & (self._grid.steps + self.spec.check_every > self._ring)
        return np.flatnonzero(is_full).tolist()

    def _said(self, row: int) -> np.ndarray:
        """What the row's turn has said so far."""
        return np.concatenate([part["tokens"] for part in self._emitted[row]])

    def _call_decode(self, params: Params, sampling: SamplingParams, rules: Rules | None):
        """(steps [E], active [E], emitted) of the rows after up to `check_every` steps."""
        buffer = Buffer(self._most_steps, self.spec.top_logprobs)
        rows = self._grid.rows(history=sampling.penalises)
        self._cache, _, *out = _decode(
            self.config, self._stop_tokens, buffer, params, self._cache, rows, self._run(sampling), rules
        )
        steps, active, emitted = jax.device_get(out)
        return steps[:, 0], active[:, 0], emitted

    @property
    def _most_steps(self) -> int:
        """Steps of a run at most: what may come next in a grammar is known when a token is."""
        return 1 if self._grid.is_guided else self.spec.check_every

    def _run(self, sampling: SamplingParams) -> DecodeRun:
        # A row finds other work only among the turns of its own devices.
        waits = np.zeros(self.parts, bool)
        waits[[self.part_of(turn.conversation) for turn in self._waiting]] = True
        return DecodeRun(
            column=np.array(self._column, np.int32),
            sampling=sampling,
            seed=np.array(self._seed, np.int32),
            step=np.array(self._step, np.int32),
            max_steps=np.array(self._most_steps, np.int32),
            other_work=np.repeat(waits, self.spec.rows // self.parts),
            refill_rows=np.array(max(1, self.spec.rows // 16), np.int32),
        )

    def _end(self, row: int, grown: int, is_active: bool) -> tuple[TurnEnd, int | None] | None:
        """Why and after how many tokens the row's turn is over, if it is."""
        turn = self._turns[row]
        assert turn is not None
        parts = self._emitted[row]

        def last(count: int) -> list[int]:
            return last_of(turn.tokens, (part["tokens"] for part in reversed(parts)), count)

        # The text of a turn that goes on begins with what was said of it before.
        length = self._stop_strings.beside(turn.stop).end(last, self._grid.num_said(row), grown, begun=turn.begun)
        if length is not None:
            return "stop_string", length
        if is_active:
            return None
        return ("stop" if parts[-1]["tokens"][-1] in self._stop_tokens else "length"), None

    def _result(self, row: int, end: TurnEnd, length: int | None = None) -> TurnResult:
        turn = self._turns[row]
        assert turn is not None
        return _result_of(turn, self._emitted[row], end, length, self.spec.top_logprobs)

    def _hand_over(self, row: int, said: np.ndarray, column: int) -> "_Move":
        """What a row has computed goes to its conversation, to be gone on from behind it: the move that brings it
        there. The turn has `said` so much, and `column` is where the row would have written next."""
        turn = self._turns[row]
        assert turn is not None
        # The last token has been sampled and not yet fed, so that it has no keys and values.
        self._held[turn.conversation] = np.concatenate([np.asarray(turn.tokens, np.int32), said])[:-1]
        first, steps = int(self._grid.prefix[row]), int(self._grid.steps[row])
        # What is recalled is behind all that was fed. Of a turn that was cut before that, it is behind more than is
        # held, where nothing is gone on from. Of a turn's parts the last one's is kept, beside that of its beginning.
        mark = self._marked.set(turn.conversation, len(turn.tokens) - 1, first + steps)
        return _Move(turn.conversation, row, first, (column - steps) % self._ring, mark)

    def _free(self, row: int) -> None:
        self._turns[row] = None
        self._emitted[row] = []
        self._grid.free(row)

    def _moves(self, entries: Sequence["_Move"]) -> Moves:
        """For one program whatever their number."""
        columns = np.zeros((len(_Move._fields), self.spec.rows), np.int32)
        if entries:
            columns[:, : len(entries)] = np.array(entries, np.int32).T
        return Moves(**dict(zip(_Move._fields, columns, strict=True)), count=np.array(len(entries), np.int32))

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else use_mesh(self.mesh)


class _Move(NamedTuple):
    """An entry of `Moves`."""

    conversation: int
    other: int
    start: int = 0
    column: int = 0
    mark: int = 0


class _Work(NamedTuple):
    """A conversation that is computed up to the last of the tokens `wanted`."""

    conversation: int
    wanted: np.ndarray
    have: int
    """How many of them are computed."""
    source: int
    """The memory that it goes on from."""
    target: int
    """The one that is kept then."""


class _Grid:
    """What the device is told about the rows."""

    def __init__(self, rows: int, suppressed: Sequence[int], context_length: int):
        self.active = np.zeros(rows, bool)
        self.steps = np.zeros(rows, np.int32)
        # Tokens of the conversation that come before these steps, and how many of them the turn has said itself.
        self.prefix = np.zeros(rows, np.int32)
        self._handed_over = np.zeros(rows, np.int32)
        self._prompt_id = np.zeros(rows, np.int32)
        self._sample_id = np.zeros(rows, np.int32)
        self._drawn = np.zeros(rows, np.int32)
        self._token = np.zeros(rows, np.int32)
        self._limit = np.ones(rows, np.int32)
        self._suppressed = np.array(suppressed, np.int32)
        self._suppress_at = np.full(rows, -1, np.int32)
        # Of the whole conversation, for penalties.
        self._said = np.full((rows, context_length), NO_TOKEN, np.int32)
        self._is_own = np.zeros((rows, context_length), bool)
        # Where rows stand in their grammars, and what may come next in them; None before the first that has one.
        self._followed: dict[int, Followed] = {}
        self._allowed: np.ndarray | None = None

    @property
    def is_guided(self) -> bool:
        """Whether a row follows a grammar."""
        return bool(self._followed)

    def start(self, row: int, turn: Turn, limit: int) -> None:
        self.active[row] = True
        self.steps[row] = 0
        self._handed_over[row] = 0
        self._limit[row] = limit
        self._prompt_id[row] = turn.prompt_id
        self.prefix[row] = len(turn.tokens) - 1
        # A turn counts as a sample of its own, so that no two turns share numbers.
        self._sample_id[row] = turn.sample_id * MOST_TURNS + turn.turn
        self._drawn[row] = turn.drawn
        self._token[row] = turn.tokens[-1]
        self._suppress_at[row] = 0 if turn.suppress else -1

        length = len(turn.tokens)
        self._said[row] = NO_TOKEN
        self._said[row, :length] = turn.tokens
        self._is_own[row] = False
        for start, stop in turn.own:
            self._is_own[row, start:stop] = True

        if turn.grammar is not None:
            if self._allowed is None:
                self._allowed = np.full((len(self.active), 1, turn.grammar.width), ALL_ALLOWED, np.uint32)
            self._followed[row] = turn.grammar.begin()
            self._follow(row, list(turn.tokens)[length - turn.begun :])

    def advance(self, row: int, tokens: np.ndarray) -> None:
        place = int(self.prefix[row]) + 1 + int(self.steps[row])
        self._said[row, place : place + len(tokens)] = tokens
        self._is_own[row, place : place + len(tokens)] = True
        # Not drawn as the policy would: no token of its own, here as in `decode`.
        if self._suppress_at[row] == self.steps[row]:
            self._is_own[row, place] = False

        self.steps[row] += len(tokens)
        if len(tokens):
            self._token[row] = tokens[-1]
        self._follow(row, tokens.tolist())

    def num_said(self, row: int) -> int:
        """How many tokens the row's turn has."""
        return int(self._handed_over[row] + self.steps[row])

    def go_on(self, row: int) -> None:
        """What the row has said is part of its conversation from now on."""
        steps = self.steps[row]
        self.prefix[row] += steps
        self._handed_over[row] += steps
        self._drawn[row] += steps
        self._limit[row] -= steps
        self._suppress_at[row] = -1
        self.steps[row] = 0

    def free(self, row: int) -> None:
        self.active[row] = False
        if self._followed.pop(row, None) is not None and self._allowed is not None:
            self._allowed[row] = ALL_ALLOWED

    def _follow(self, row: int, tokens: Sequence[int]) -> None:
        """Takes the row's grammar on by these tokens, and notes what may come behind them."""
        followed = self._followed.get(row)
        if followed is not None and self._allowed is not None:
            followed.advance(tokens)
            self._allowed[row] = followed.allowed()

    def rows(self, *, history: bool) -> DecodeRows:
        """As the device wants them; with penalties it needs the `history` of conversations too."""
        none = np.zeros((len(self.active), 1), np.int32)
        # All tokens stand in one array, since turns before, and in them the policy's own, are part of the prompt.
        said: dict[str, Any] = {}
        if history:
            said = {"prompt": np.full_like(none, NO_TOKEN), "said": self._said[:, None]}
            said["said_sampled"] = self._is_own[:, None]

        # A slot has one row, and no turn has tokens that are given: those that it begins with are its prompt's.
        return DecodeRows(
            prompt_id=self._prompt_id,
            prefix_length=self.prefix,
            sample_id=self._sample_id[:, None],
            drawn=self._drawn[:, None],
            token=self._token[:, None],
            steps=self.steps[:, None],
            max_new_tokens=self._limit[:, None],
            active=self.active[:, None],
            waiting=np.zeros(len(self.active), np.int32),
            forced=np.zeros((len(self.active), 1, 0), np.int32),
            forced_start=none,
            forced_length=none,
            suppressed=self._suppressed if len(self._suppressed) else None,
            suppress_at=self._suppress_at[:, None] if len(self._suppressed) else None,
            allowed=self._allowed if self.is_guided else None,
            **said,
        )


def _result_of(turn: Turn, parts: Sequence[_Emitted], end: TurnEnd, length: int | None, top: int) -> TurnResult:
    """What a row emitted, cut to `length` tokens, with as many most probable ones as are told."""
    nothing: dict[str, np.ndarray] = dict.fromkeys(("logprobs", "entropies"), np.zeros(0, np.float32))
    nothing |= {"tokens": np.zeros(0, np.int32)}
    if top:
        nothing |= {"top_tokens": np.zeros((0, top), np.int32), "top_logprobs": np.zeros((0, top), np.float32)}
    told = {name: np.concatenate([part[name] for part in (nothing, *parts)])[:length] for name in nothing}
    return TurnResult(turn, end=end, **told)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
