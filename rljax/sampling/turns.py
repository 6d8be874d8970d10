"""A decoder for conversations: turns are asked for one by one, and run as soon as a row is free.

A turn that waits, for a tool or for its user, holds no row. Its context's keys and values are kept, so that going on
costs what is new; of a context that is new, the part is copied that another one has computed.
"""

import bisect
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from rljax.models.cache import cache_bytes, init_cache
from rljax.models.config import DecoderConfig
from rljax.parallel import use_mesh
from rljax.sampling.contexts import (
    Moves,
    contexts_bytes,
    copy_contexts,
    extend,
    init_contexts,
    keep_turns,
    lay_contexts,
)
from rljax.sampling.generate import Rows, decode
from rljax.sampling.logits import SamplingParams
from rljax.sampling.sampler import prefill_counts, weights_program
from rljax.sampling.stopping import StopStrings
from rljax.types import Params

TurnEnd = Literal["stop", "length", "stop_string", "interrupted"]
MOST_TURNS = 2048
"""Turns of a sample that have random numbers of their own."""
LARGEST_SAMPLE_ID = 2**31 // MOST_TURNS - 1

_COUNTED = (
    "new_tokens",
    "context_tokens",
    "extended_tokens",
    "padded_tokens",
    "copied_tokens",
    "turns",
    "decode_steps",
    "busy_rows",
)
_MOST_EXTENDED = 16  # contexts extended at once: each is gathered, and scored over its whole length

_init_contexts = jax.jit(init_contexts, static_argnums=(0, 1, 2))
_init_cache = jax.jit(init_cache, static_argnums=(0, 1, 2, 3, 4))
_extend = jax.jit(extend, static_argnums=(0, 1), donate_argnums=3)
_copy_contexts = jax.jit(copy_contexts, donate_argnums=0)
_lay_contexts = jax.jit(lay_contexts, donate_argnums=0)
_keep_turns = jax.jit(keep_turns, donate_argnums=0)
_decode = jax.jit(decode, static_argnums=(0, 1, 2), donate_argnums=4)


class Turn(NamedTuple):
    """What the policy says next behind `tokens`, the whole of the context `context` so far.

    (`prompt_id`, `sample_id`, `turn`) name the random numbers. `like` is another context that may begin with the same
    tokens. `max_new_tokens` None takes the decoder's limit.
    """

    context: int
    tokens: Sequence[int]
    prompt_id: int
    sample_id: int
    turn: int = 0
    like: int | None = None
    max_new_tokens: int | None = None


class Spoken(NamedTuple):
    """What came of a turn: arrays of its new tokens as in `rljax.sampling.Sample`, none if it was cut off early."""

    turn: Turn
    tokens: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T]
    entropies: np.ndarray  # float32 [T]
    end: TurnEnd


class TurnDecoder:
    """Decodes the turns of up to `contexts` conversations on `rows` rows.

    A context holds at most `context_length` tokens, a turn adds at most `max_new_tokens`. What a turn brings anew
    before it speaks is computed in chunks of the lengths `extend_buckets`; after `warmup` nothing compiles. Every
    `check_every` steps finished rows are handed over and waiting turns take them. Stop tokens and strings as in
    `Sampler`.

    Use: `set_params`, `begin`, then `submit` and `run` in turn. Not safe for several threads. Raises ValueError for
    impossible settings.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        contexts: int,
        rows: int,
        context_length: int,
        max_new_tokens: int,
        extend_buckets: Sequence[int] = (16, 64, 256),
        stop_tokens: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        decode_text: Callable[[list[int]], str] | None = None,
        check_every: int = 8,
        mesh: jax.sharding.Mesh | None = None,
    ):
        sizes = {
            "contexts": contexts,
            "rows": rows,
            "max_new_tokens": max_new_tokens,
            "check_every": check_every,
            "smallest of extend_buckets": min(extend_buckets, default=0),
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not max_new_tokens < context_length <= config.max_position:
            raise ValueError(
                f"context_length={context_length} must be above max_new_tokens={max_new_tokens} and at most the "
                f"model's {config.max_position} positions"
            )
        if config.rope_scaling.type == "dynamic":
            raise ValueError("dynamic RoPE scaling changes earlier keys as a context grows; choose another scaling")
        self.config, self.mesh = config, mesh
        self.contexts, self.rows, self.context_length = contexts, rows, context_length
        self.max_new_tokens, self.check_every = max_new_tokens, min(check_every, max_new_tokens)
        self.extend_buckets = tuple(sorted(set(extend_buckets)))
        self.stop_tokens, self._stops = tuple(sorted(set(stop_tokens))), StopStrings(stop_strings, decode_text)
        self._params = None
        self._sampling: SamplingParams | None = None
        self._seed = self._step = self._column = 0
        # A row that ended is written on until the steps of a call are over.
        self._ring = max_new_tokens + self.check_every
        # Room for what the longest chunk, or a ring, writes behind the last token.
        self._size = context_length + max(self._ring, self.extend_buckets[-1])
        self._kept = self._cache = None
        self._held: list[np.ndarray] = [np.zeros(0, np.int32)] * contexts  # tokens whose keys and values lie there
        self._waiting: deque[Turn] = deque()
        self._turns: list[Turn | None] = [None] * rows
        self._said: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[] for _ in range(rows)]
        self._grid = _Grid(rows)
        self.stats: dict[str, float] = {}
        self._clear_stats()

    def _clear_stats(self) -> None:
        self.stats = dict.fromkeys(_COUNTED, 0) | {"seconds": 0.0}

    def set_params(self, params: Params) -> None:
        """Takes a copy of the weights; what was computed with the last ones is forgotten. Raises RuntimeError while
        turns are under way: `interrupt` them first."""
        if self.num_open:
            raise RuntimeError(f"{self.num_open} turns are under way with the old weights; interrupt them first")
        self._params = None
        with self._on_mesh():
            self._params = weights_program(self.config, self.mesh)(params)
        self.forget()

    def drop_params(self) -> None:
        """Frees the copy of the weights and all memory of contexts, for instance during an update."""
        self._params = self._kept = self._cache = None
        self.forget()

    def forget(self) -> None:
        """All contexts are computed anew when they are next used."""
        self._held = [np.zeros(0, np.int32)] * self.contexts

    def begin(self, sampling: SamplingParams, *, seed: int, step: int) -> None:
        """How turns are sampled from now on; clears `stats`. (seed, step) enter the random numbers."""
        self._sampling, self._seed, self._step = sampling, seed, step
        self._clear_stats()

    def cache_bytes(self) -> int:
        """Bytes that contexts and rows take over all devices."""
        kept = contexts_bytes(self.config, self.contexts, self._size)
        return kept + cache_bytes(self.config, self.rows, 1, self._size, self._ring)

    @property
    def num_open(self) -> int:
        """Turns that wait or run."""
        return len(self._waiting) + self.num_running

    @property
    def num_running(self) -> int:
        return int(self._grid.active.sum())

    def submit(self, turn: Turn) -> None:
        """Queues a turn. Raises ValueError for one that cannot be served."""
        where, length = f"context {turn.context}", len(turn.tokens)
        if not 0 <= turn.context < self.contexts:
            raise ValueError(f"{where} must lie between 0 and {self.contexts - 1}")
        if not 1 <= length < self.context_length:
            raise ValueError(
                f"{where}: {length} tokens leave no room for a new one within context_length={self.context_length}"
            )
        limit = self.max_new_tokens if turn.max_new_tokens is None else turn.max_new_tokens
        if not 1 <= limit <= self.max_new_tokens:
            raise ValueError(f"{where}: max_new_tokens={limit} must lie between 1 and {self.max_new_tokens}")
        if not 0 <= turn.sample_id <= LARGEST_SAMPLE_ID or not 0 <= turn.turn < MOST_TURNS:
            raise ValueError(
                f"{where}: sample_id {turn.sample_id} and turn {turn.turn} must be at least 0 and at most "
                f"{LARGEST_SAMPLE_ID} and {MOST_TURNS - 1}"
            )
        self._waiting.append(turn)

    def run(self) -> list[Spoken]:
        """Starts waiting turns on free rows and decodes at most `check_every` steps; returns the turns that ended."""
        begin = time.perf_counter()
        params, sampling = self._ready()
        with self._on_mesh():
            self._allocate()
            self._admit(params)
            ended = self._decode_some(params, sampling) if self.num_running else []
        self.stats["seconds"] += time.perf_counter() - begin
        return ended

    def interrupt(self) -> list[Spoken]:
        """Ends all turns where they stand; those that had not begun say nothing."""
        spoken = []
        for row, turn in enumerate(self._turns):
            if turn is not None:
                spoken.append(self._spoken(row, "interrupted"))
                self._free(row)
        nothing = np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32)
        spoken += [Spoken(turn, *nothing, "interrupted") for turn in self._waiting]
        self._waiting.clear()
        return spoken

    def warmup(self) -> None:
        """Compiles every program that `run` can need. Raises RuntimeError while turns are under way."""
        if self.num_open:
            raise RuntimeError(f"{self.num_open} turns are under way; warm up before the first")
        params, sampling = self._ready()
        none = self._moves([])
        with self._on_mesh():
            self._allocate()
            for _ in range(1 if self.mesh is None else 2):  # see Sampler.warmup
                for bucket in self.extend_buckets:
                    for count in self._counts(bucket):
                        tokens, zeros = np.zeros((count, bucket), np.int32), np.zeros(count, np.int32)
                        for is_fresh in (True, False):
                            self._kept = _extend(self.config, is_fresh, params, self._kept, tokens, zeros, zeros)
                self._kept = _copy_contexts(self._kept, none)
                self._cache = _lay_contexts(self._cache, self._kept, none)
                self._kept = _keep_turns(self._kept, self._cache, none)
                self._call_decode(params, sampling)
            jax.block_until_ready(self._cache)
        self.forget()

    def _ready(self):
        if self._params is None:
            raise ValueError("the decoder has no weights; call set_params(params) first")
        if self._sampling is None:
            raise ValueError("the decoder was not told how to sample; call begin(sampling, seed=..., step=...) first")
        return self._params, self._sampling

    def _allocate(self) -> None:
        if self._cache is None:
            self._kept = _init_contexts(self.config, self.contexts, self._size)
            self._cache = _init_cache(self.config, self.rows, 1, self._size, self._ring)
            self._column = 0

    def _admit(self, params: Params) -> None:
        """Waiting turns onto free rows. One whose beginning another of them computes first waits for that one."""
        free = [row for row, turn in enumerate(self._turns) if turn is None]
        chosen = [(row, self._waiting.popleft()) for row in free[: len(self._waiting)]]
        if not chosen:
            return
        later = list(chosen)
        while later:
            computing = {turn.context for _, turn in later}
            now = [x for x in later if x[1].like not in computing or x[1].like == x[1].context]
            now = now or later[:1]
            later = [x for x in later if x not in now]
            self._compute(params, [turn for _, turn in now])
        self._cache = _lay_contexts(self._cache, self._kept, self._moves([(t.context, row, 0, 0) for row, t in chosen]))
        for row, turn in chosen:
            self._turns[row] = turn
            self._grid.start(row, turn, min(turn.max_new_tokens or self.max_new_tokens, self._room(turn)))
        self.stats["turns"] += len(chosen)

    def _room(self, turn: Turn) -> int:
        return self.context_length - len(turn.tokens)

    def _compute(self, params: Params, turns: Sequence[Turn]) -> None:
        """Brings the contexts of these turns up to all of their tokens but the last."""
        work, copies = [], []
        for turn in turns:
            wanted = np.asarray(turn.tokens, np.int32)[:-1]
            have = _common(self._held[turn.context], wanted)
            if turn.like is not None and (common := _common(self._held[turn.like], wanted)) > have:
                copies.append((turn.context, turn.like, 0, 0))
                self.stats["copied_tokens"] += common
                have = common
            self.stats["context_tokens"] += len(wanted)
            self.stats["extended_tokens"] += len(wanted) - have
            work.append((turn.context, wanted, have))
            self._held[turn.context] = wanted
        if copies:
            self._kept = _copy_contexts(self._kept, self._moves(copies))
        longest = self.extend_buckets[-1]
        while work := [(context, wanted, have) for context, wanted, have in work if have < len(wanted)]:
            chunks: dict[tuple[int, bool], list[tuple[int, np.ndarray, int]]] = {}
            for context, wanted, have in work:
                chunk = wanted[have : have + longest]
                bucket = self.extend_buckets[bisect.bisect_left(self.extend_buckets, len(chunk))]
                chunks.setdefault((bucket, have == 0), []).append((context, chunk, have))
            for (bucket, is_fresh), group in chunks.items():
                self._extend_group(params, bucket, is_fresh, group)
            work = [(context, wanted, have + longest) for context, wanted, have in work]

    def _extend_group(self, params, bucket: int, is_fresh: bool, group) -> None:
        for count in self._counts(bucket):
            while len(group) >= count:
                part, group = group[:count], group[count:]
                tokens = np.zeros((count, bucket), np.int32)
                for line, (_, chunk, _) in zip(tokens, part, strict=True):
                    line[: len(chunk)] = chunk
                index, start = (np.array([x[i] for x in part], np.int32) for i in (0, 2))
                self._kept = _extend(self.config, is_fresh, params, self._kept, tokens, index, start)
                self.stats["padded_tokens"] += count * bucket

    def _counts(self, bucket: int) -> list[int]:
        return prefill_counts(bucket, min(self.rows, _MOST_EXTENDED))

    def _decode_some(self, params: Params, sampling: SamplingParams) -> list[Spoken]:
        before = self._grid.steps.copy()
        steps, active, emitted, column = self._call_decode(params, sampling)
        grown = steps - before
        spoken, moves = [], []
        for row, turn in enumerate(self._turns):
            if turn is None:
                continue
            count = int(grown[row])
            new = (slice(count), row, 0)
            self._said[row].append((emitted.tokens[new], emitted.logprobs[new], emitted.entropies[new]))
            self._grid.advance(row, emitted.tokens[new])
            end = self._end(row, count, bool(active[row]))
            if end is None:
                continue
            reason, length = end
            said = self._spoken(row, reason, length)
            spoken.append(said)
            total = int(self._grid.steps[row])
            moves.append((turn.context, row, len(turn.tokens) - 1, (column + count - total) % self._ring))
            self._held[turn.context] = np.concatenate([np.asarray(turn.tokens, np.int32), said.tokens])[:-1]
            self._free(row)
        self._column = int((column + grown.max()) % self._ring)
        self.stats["decode_steps"] += int(grown.max())
        self.stats["busy_rows"] += int(grown.sum())
        self.stats["new_tokens"] += int(grown.sum())
        if moves:
            self._kept = _keep_turns(self._kept, self._cache, self._moves(moves))
        return spoken

    def _call_decode(self, params: Params, sampling: SamplingParams):
        column = self._column
        self._cache, _, *out = _decode(
            self.config,
            self.stop_tokens,
            self.check_every,
            params,
            self._cache,
            np.int32(column),
            self._grid.rows(),
            sampling,
            np.int32(self._seed),
            np.int32(self._step),
            np.int32(self.check_every),
            np.full(self.rows, bool(self._waiting)),
            np.int32(max(1, self.rows // 16)),
        )
        steps, active, emitted = jax.device_get(out)
        return steps[:, 0], active[:, 0], emitted, column

    def _end(self, row: int, grown: int, is_active: bool) -> tuple[TurnEnd, int | None] | None:
        """Why and after how many tokens the row's turn is over, if it is."""
        tokens = np.concatenate([part[0] for part in self._said[row]])
        length = self._stops.end(tokens, len(tokens) - grown)
        if length is not None:
            return "stop_string", length
        if is_active:
            return None
        return ("stop" if tokens[-1] in self.stop_tokens else "length"), None

    def _spoken(self, row: int, end: TurnEnd, length: int | None = None) -> Spoken:
        turn = self._turns[row]
        assert turn is not None
        parts = self._said[row] or [(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32))]
        tokens, logprobs, entropies = (np.concatenate(arrays)[:length] for arrays in zip(*parts, strict=True))
        return Spoken(turn, tokens, logprobs, entropies, end)

    def _free(self, row: int) -> None:
        self._turns[row], self._said[row] = None, []
        self._grid.active[row] = False

    def _moves(self, entries: Sequence[tuple[int, int, int, int]]) -> Moves:
        columns = np.zeros((4, self.rows), np.int32)
        if entries:
            columns[:, : len(entries)] = np.array(entries, np.int32).T
        context, other, start, column = columns
        count = np.array(len(entries), np.int32)
        return Moves(context=context, other=other, start=start, column=column, count=count)

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else use_mesh(self.mesh)


class _Grid:
    """What the device is told about the rows."""

    def __init__(self, rows: int):
        self.active = np.zeros(rows, bool)
        self.steps = np.zeros(rows, np.int32)
        self._prompt_id, self._prefix, self._sample_id, self._token = np.zeros((4, rows), np.int32)
        self._limit = np.ones(rows, np.int32)

    def start(self, row: int, turn: Turn, limit: int) -> None:
        self.active[row], self.steps[row], self._limit[row] = True, 0, limit
        self._prompt_id[row], self._prefix[row] = turn.prompt_id, len(turn.tokens) - 1
        self._sample_id[row] = turn.sample_id * MOST_TURNS + turn.turn
        self._token[row] = turn.tokens[-1]

    def advance(self, row: int, tokens: np.ndarray) -> None:
        self.steps[row] += len(tokens)
        if len(tokens):
            self._token[row] = tokens[-1]

    def rows(self) -> Rows:
        none = np.zeros((len(self.active), 1), np.int32)
        return Rows(
            prompt_id=self._prompt_id,
            prefix_length=self._prefix,
            sample_id=self._sample_id[:, None],
            token=self._token[:, None],
            steps=self.steps[:, None],
            max_new_tokens=self._limit[:, None],
            active=self.active[:, None],
            waiting=np.zeros(len(self.active), np.int32),
            forced=np.zeros((len(self.active), 1, 0), np.int32),
            forced_start=none,
            forced_length=none,
        )


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
