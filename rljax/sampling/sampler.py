"""The decoder as its users see it: requests in, samples out, shapes from a bucket table."""

import bisect
import contextlib
import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from rljax.models.cache import KVCache, PathMoves, init_cache, keep_paths, lay_paths
from rljax.models.config import DecoderConfig
from rljax.parallel import use_mesh
from rljax.sampling.generate import Rows, copy_prompt, decode, prefill
from rljax.sampling.logits import SamplingParams, sampling_params
from rljax.sampling.slots import FinishReason, Load, Path, Request, Sample, Slots
from rljax.sampling.stopping import StopStrings
from rljax.sampling.weights import decode_shardings, decode_weights
from rljax.types import Params

# Tokens of one prefill: products of this many rows run at full speed, and `warmup` has to compute them once.
_PREFILL_TOKENS = {"cpu": 2048}
_PREFILL_TOKENS_ELSEWHERE = 16384
_LARGEST_ID = 2**31 - 1
_COUNTED = ("decode_steps", "row_steps", "prefill_tokens", "new_tokens", "forced_tokens", "reused_tokens", "runs")

_init_cache = jax.jit(init_cache, static_argnums=(0, 1, 2, 3, 4, 5))
_keep_paths = jax.jit(keep_paths, donate_argnums=0)
_lay_paths = jax.jit(lay_paths, donate_argnums=0)
_prefill = jax.jit(prefill, static_argnums=0, donate_argnums=2)
_copy_prompt = jax.jit(copy_prompt, donate_argnums=0)
_decode = jax.jit(decode, static_argnums=(0, 1, 2), donate_argnums=4)


class Sampler:
    """Samples completions with a grid of `prompt_slots` prompts x `sample_slots` samples of each.

    `prompt_buckets` are the prompt lengths that programs are compiled for; a call uses the smallest that fits its
    longest prompt, and after `warmup` no call compiles. `sample_slots` = group size decodes a group over one copy of
    its prompt; 1 is plain continuous batching, best for ragged lengths. A token of `stop_tokens` ends a sample, and so
    does text containing one of `stop_strings`, which needs `decode_text` (token ids -> text) and is looked for every
    `check_every` steps. `refill_rows`: how many rows must be idle before decoding pauses to give them waiting work.

    Requests with `rounds` fork: later samples start from any token of the first `path_slots` samples of their request,
    whose keys and values are kept (memory for as many completions in each prompt slot), and nothing is computed again.
    A fork may begin with up to `max_injected` given tokens.

    Rows are split over the `data` and `fsdp` axes of `mesh`, key-value heads over `tensor`.

    Raises ValueError for impossible settings.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        prompt_buckets: Sequence[int],
        max_new_tokens: int,
        prompt_slots: int,
        sample_slots: int,
        stop_tokens: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        decode_text: Callable[[list[int]], str] | None = None,
        check_every: int = 16,
        refill_rows: int | None = None,
        path_slots: int = 0,
        max_injected: int = 0,
        mesh: jax.sharding.Mesh | None = None,
    ):
        for name, value in (
            ("max_new_tokens", max_new_tokens),
            ("prompt_slots", prompt_slots),
            ("sample_slots", sample_slots),
            ("check_every", check_every),
            ("refill_rows", 1 if refill_rows is None else refill_rows),
            ("smallest prompt bucket", min(prompt_buckets, default=0)),
            ("path_slots + 1", path_slots + 1),
            ("max_injected + 1", max_injected + 1),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if outside := [token for token in stop_tokens if not 0 <= token < config.vocab_size]:
            raise ValueError(f"stop token {outside[0]} is outside the vocabulary of {config.vocab_size}; leave it out")
        self.config, self.mesh = config, mesh
        self.prompt_buckets = tuple(sorted(set(prompt_buckets)))
        self.max_new_tokens, self.prompt_slots, self.sample_slots = max_new_tokens, prompt_slots, sample_slots
        self.stop_tokens, self._stops = tuple(sorted(set(stop_tokens))), StopStrings(stop_strings, decode_text)
        self.stop_strings, self.check_every = self._stops.strings, check_every
        self.refill_rows = refill_rows or max(1, prompt_slots * sample_slots // 16)
        self.path_slots, self.max_injected = path_slots, max_injected
        self.last_stats: dict[str, float] = {}
        self._params = None

    def set_params(self, params: Params) -> None:
        """Takes a copy of the weights to sample with, layer by layer; the last copy is freed first."""
        self._params = None
        with self._on_mesh():
            self._params = weights_program(self.config, self.mesh)(params)

    def drop_params(self) -> None:
        """Frees the sampler's copy of the weights, for instance during an update."""
        self._params = None

    def warmup(self) -> None:
        """Compiles every program that `generate` can need."""
        idle = self._slots([])
        with self._on_mesh():
            for bucket in self.prompt_buckets:
                cache = self._new_cache(bucket)
                # The compiler may lay out a program's result otherwise than its argument on a mesh: go round twice.
                for _ in range(1 if self.mesh is None else 2):
                    for length in (b for b in self.prompt_buckets if b <= bucket):
                        for count in prefill_counts(length, self.prompt_slots):
                            zeros = np.zeros((count, length), np.int32)
                            cache = _prefill(self.config, self._weights(), cache, zeros, np.zeros(count, np.int32))
                    cache = _copy_prompt(cache, np.int32(0), np.int32(0))
                    cache, *_ = self._run(cache, 0, idle, sampling_params(), 0, 0)
                    if self.path_slots:
                        cache = _lay_paths(_keep_paths(cache, self._moves([], [])), self._moves([], []))
                jax.block_until_ready(cache)

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, *, seed: int, step: int
    ) -> list[list[Sample]]:
        """Samples every request, in order: one list per request, one `Sample` per sample id.

        A token is a function of the weights, the prompt, `sampling` and (seed, step, prompt id, sample id, position
        in the completion): it does not depend on what else is in the call or where it runs, except that matrix
        products of other shapes may round otherwise. `last_stats` then describes the call. Raises ValueError for a
        request that cannot be served.
        """
        for index, request in enumerate(requests):
            self._check(index, request)
        for name, value in (("seed", seed), ("step", step)):
            if not 0 <= value <= _LARGEST_ID:
                raise ValueError(f"{name}={value} must lie between 0 and {_LARGEST_ID}")
        params = self._weights()
        slots = self._slots(requests)
        stats = dict.fromkeys(_COUNTED, 0)
        seconds = {"prefill_seconds": 0.0, "decode_seconds": 0.0}
        bucket = self._bucket(max((len(request.prompt) for request in requests), default=1))
        with self._on_mesh():
            cache, column = self._new_cache(bucket), 0
            loads, paths = slots.assign()
            while slots.active.any():
                start = time.perf_counter()
                cache = self._load(params, cache, slots, loads)
                if paths:
                    cache = _lay_paths(cache, self._moves(paths, [column] * len(paths)))
                jax.block_until_ready(cache)
                loaded = time.perf_counter()
                before = slots.rows()
                cache, *out = self._run(cache, column, slots, sampling, seed, step)
                next_column, steps, active, emitted = jax.device_get(out)
                grown, forced = steps - before.steps, _forced_in_run(before, steps)
                if ended := self._harvest(slots, grown, active, emitted):
                    ends = [column + int(grown[path.slot, path.row]) for path in ended]
                    cache = _keep_paths(cache, self._moves(ended, ends))
                column = int(next_column)
                stats["decode_steps"] += int(grown.max())
                stats["row_steps"] += int(grown.max()) * active.size
                stats["forced_tokens"] += forced
                stats["new_tokens"] += int(grown.sum()) - forced
                stats["reused_tokens"] += sum(path.steps for path in paths)
                stats["runs"] += 1
                stats["prefill_tokens"] += sum(len(requests[x.request].prompt) - 1 for x in loads if x.source is None)
                seconds["prefill_seconds"] += loaded - start
                loads, paths = slots.assign()
                seconds["decode_seconds"] += time.perf_counter() - loaded
        busy = stats["new_tokens"] + stats["forced_tokens"]
        self.last_stats = {**stats, **seconds, "slot_occupancy": busy / max(stats.pop("row_steps"), 1)}
        return [[sample for sample in group if sample is not None] for group in slots.results]

    def _run(self, cache: KVCache, column: int, slots: Slots, sampling: SamplingParams, seed: int, step: int):
        """One call of `decode` for the rows as they stand."""
        return _decode(
            self.config,
            self.stop_tokens,
            self.max_new_tokens,
            self._weights(),
            cache,
            np.int32(column),
            slots.rows(),
            sampling,
            np.int32(seed),
            np.int32(step),
            np.int32(min(self.check_every, self.max_new_tokens) if self.stop_strings else self.max_new_tokens),
            slots.other_work(),
            np.int32(self.refill_rows),
        )

    def _slots(self, requests: Sequence[Request]) -> Slots:
        return Slots(
            requests, self.prompt_slots, self.sample_slots, self.max_new_tokens, self.path_slots, self.max_injected
        )

    def _moves(self, paths: Sequence[Path], ends: Sequence[int]) -> PathMoves:
        """What the device needs to move these paths; `ends` are the ring columns after the last of each."""
        size = self.prompt_slots * self.sample_slots
        columns = np.zeros((4, size), np.int32)
        for i, (path, end) in enumerate(zip(paths, ends, strict=True)):
            columns[:, i] = path.slot, path.row, path.path, (end - path.steps) % self.max_new_tokens
        slot, row, index, first = columns
        return PathMoves(slot=slot, row=row, path=index, column=first, count=np.array(len(paths), np.int32))

    def _harvest(self, slots: Slots, grown: np.ndarray, active: np.ndarray, emitted) -> list[Path]:
        """Takes over what the rows emitted, and frees those that are done; returns the paths to keep."""
        ended = []
        for row, owner in slots.owners():
            new = (slice(grown[row]), *row)
            slots.advance(row, emitted.tokens[new], emitted.logprobs[new], emitted.entropies[new])
            tokens, given = slots.tokens(owner), slots.first_sampled(owner)
            reason: FinishReason = "stop" if tokens[-1] in self.stop_tokens else "length"
            length: int | None = None
            if self.stop_strings:
                own = self._stops.end(tokens[given:], max(len(tokens) - int(grown[row]) - given, 0))
                length = None if own is None else given + own
            path = None
            if length is not None:
                path = slots.finish(row, "stop_string", length)
            elif not active[row]:
                path = slots.finish(row, reason)
            if path is not None:
                ended.append(path)
        return ended

    def _load(self, params: Params, cache: KVCache, slots: Slots, loads: list[Load]) -> KVCache:
        """Prefills and copies prompts. Prompts of one length bucket go together, in the compiled counts."""
        by_bucket: dict[int, list[Load]] = {}
        for load in loads:
            if load.source is None:
                by_bucket.setdefault(self._bucket(len(slots.requests[load.request].prompt)), []).append(load)
        for bucket, group in by_bucket.items():
            for count in prefill_counts(bucket, self.prompt_slots):
                while len(group) >= count:
                    part, group = group[:count], group[count:]
                    tokens = np.zeros((count, bucket), np.int32)
                    for line, load in zip(tokens, part, strict=True):
                        prefix = slots.requests[load.request].prompt[:-1]
                        line[: len(prefix)] = prefix
                    cache = _prefill(self.config, params, cache, tokens, np.array([x.slot for x in part], np.int32))
        for load in loads:
            if load.source is not None:
                cache = _copy_prompt(cache, np.int32(load.source), np.int32(load.slot))
        return cache

    def _bucket(self, length: int) -> int:
        return self.prompt_buckets[bisect.bisect_left(self.prompt_buckets, length)]

    def _new_cache(self, bucket: int) -> KVCache:
        return _init_cache(
            self.config, self.prompt_slots, self.sample_slots, bucket, self.max_new_tokens, self.path_slots
        )

    def _weights(self) -> Params:
        if self._params is None:
            raise ValueError("the sampler has no weights; call set_params(params) first")
        return self._params

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else use_mesh(self.mesh)

    def _check(self, index: int, request: Request) -> None:
        config, where = self.config, f"request {index} (prompt_id {request.prompt_id})"
        prompt = np.asarray(request.prompt)
        if not len(prompt):
            raise ValueError(f"{where}: the prompt is empty; give at least one token, for instance the BOS token")
        if len(prompt) > self.prompt_buckets[-1]:
            raise ValueError(
                f"{where}: prompt of {len(prompt)} tokens is longer than the largest bucket of prompt_buckets="
                f"{self.prompt_buckets}; add a bucket or shorten the prompt"
            )
        if len(outside := prompt[(prompt < 0) | (prompt >= config.vocab_size)]):
            raise ValueError(
                f"{where}: token {outside[0]} is outside the vocabulary of {config.vocab_size}; "
                "check that tokenizer and model belong together"
            )
        limit = self.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        if not 1 <= limit <= self.max_new_tokens:
            raise ValueError(
                f"{where}: max_new_tokens={limit} must lie between 1 and the sampler's {self.max_new_tokens}"
            )
        scaling = config.rope_scaling
        dynamic = scaling.type == "dynamic"
        longest = (scaling.original_max_position or config.max_position) if dynamic else config.max_position
        if len(prompt) + limit > longest:
            reason = "dynamic RoPE scaling would change all earlier keys" if dynamic else "the model knows no position"
            raise ValueError(
                f"{where}: {len(prompt)} prompt + {limit} new tokens exceed {longest}, beyond which {reason}; "
                "shorten the prompt or lower max_new_tokens"
            )
        ids = [request.prompt_id, *request.sample_ids]
        if wrong := [value for value in ids if not 0 <= value <= _LARGEST_ID]:
            raise ValueError(f"{where}: id {wrong[0]} must lie between 0 and {_LARGEST_ID}; hash it to 31 bits")


def _forced_in_run(before: Rows, steps: np.ndarray) -> int:
    """How many of the tokens emitted in a run were given."""
    start = np.clip(before.steps, before.forced_start, before.forced_start + before.forced_length)
    stop = np.clip(steps, before.forced_start, before.forced_start + before.forced_length)
    return int((stop - start).sum())


def prefill_counts(length: int, rows: int) -> list[int]:
    """How many prompts of `length` a prefill takes: powers of 4 up to `rows`, largest first; any number is a sum of few
    of them."""
    counts = [4**i for i in range(16) if 4**i <= rows]
    most = _PREFILL_TOKENS.get(jax.default_backend(), _PREFILL_TOKENS_ELSEWHERE)
    return [count for count in reversed(counts) if count == 1 or count * length <= most]


@functools.lru_cache(maxsize=16)
def weights_program(config: DecoderConfig, mesh: jax.sharding.Mesh | None):
    """`decode_weights` as a jitted program for this model and mesh."""
    layout = None if mesh is None else decode_shardings(config, mesh)
    return jax.jit(functools.partial(decode_weights, config), out_shardings=layout)
