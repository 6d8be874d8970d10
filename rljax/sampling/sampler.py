"""The decoder as its users see it: requests in, samples out, shapes from a bucket table."""

import bisect
import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np

from rljax.models.cache import (
    KVCache,
    PathMoves,
    cache_bytes,
    init_cache,
    keep_paths,
    lay_paths,
    resize_ring,
    resized_column,
    ring_size,
    without_prompts,
)
from rljax.models.config import DecoderConfig
from rljax.parallel import batch_parts, platform, use_mesh
from rljax.sampling.generate import Buffer, DecodeRows, DecodeRun, copy_prompt, decode, prefill
from rljax.sampling.logits import Rules, SamplingParams, rules_of, sampling_params
from rljax.sampling.path_memories import PathTokens, recall_paths
from rljax.sampling.plan import DecoderPlan, abstract_result, abstract_weights, lower_weights
from rljax.sampling.slots import FinishReason, Load, Path, Request, Sample, Slots
from rljax.sampling.spec import NO_STOPS, SamplerSpec, Stops
from rljax.sampling.stopping import StopStrings
from rljax.sampling.token_counter import count_tokens
from rljax.sampling.weights import take_weights
from rljax.types import Params

# Tokens of one prefill: products of this many rows run at full speed, and `warmup` has to compute them once.
_PREFILL_TOKENS = {"cpu": 2048}
_PREFILL_TOKENS_ELSEWHERE = 16384
_LARGEST_ID = 2**31 - 1
_COUNTED = ("decode_steps", "row_steps", "prefill_tokens", "new_tokens", "forced_tokens", "reused_tokens", "runs")

T = TypeVar("T")

# Most steps of a run: a run fetches, and draws random numbers for, as many steps as it may have.
_MOST_STEPS = 256

_init_cache = jax.jit(init_cache, static_argnums=(0, 1, 2, 3, 4, 5, 6))
_resize_ring = jax.jit(resize_ring, static_argnums=0)
_keep_paths = jax.jit(keep_paths, donate_argnums=0)
_lay_paths = jax.jit(lay_paths, donate_argnums=0)
_recall_paths = jax.jit(recall_paths, static_argnums=0, donate_argnums=2)
_prefill = jax.jit(prefill, static_argnums=(0, 6), donate_argnums=2)
_copy_prompt = jax.jit(copy_prompt, donate_argnums=0)
_decode = jax.jit(decode, static_argnums=(0, 1, 2, 7), donate_argnums=4)


class Sampler:
    """Samples completions with a grid of `spec.prompt_slots` prompts x `spec.sample_slots` samples of each.

    After `warmup` no call compiles, but for the first with a request that follows a grammar: its rows go on one step at
    a time, since the host says what may come next. A token of `stops.tokens` ends a sample, and so does text containing
    one of `stops.strings`.

    Requests with `rounds` fork: later samples start from any token of the first `spec.path_slots` samples of their
    request, whose keys and values are kept, and nothing is computed again but what a delta rule recalls there. A fork
    may begin with up to `spec.max_injected` given tokens.

    Where the model has several adapters side by side, each request names its own.

    Rows are split over the `data` and `fsdp` axes of `mesh`, key-value heads over `tensor`.

    Raises ValueError for impossible settings.
    """

    def __init__(
        self,
        config: DecoderConfig,
        spec: SamplerSpec,
        stops: Stops = NO_STOPS,
        mesh: jax.sharding.Mesh | None = None,
    ):
        spec.check()
        stops.check(config)
        self.config = config
        self.mesh = mesh
        self._parts = 1 if mesh is None else batch_parts(mesh)
        self.spec = spec.resolved(self._parts)
        self._num_adapters = 0 if config.lora is None else config.lora.count
        if spec.record_experts and config.experts is None:
            raise ValueError("record_experts=True needs a model with experts; this one has an MLP in every layer")
        self._recorded = config.experts.per_token if config.experts is not None and spec.record_experts else 0
        self.last_stats: dict[str, float] = {}
        self._stop_tokens = tuple(sorted(set(stops.tokens)))
        self._stop_strings = StopStrings(stops)
        self._params: Params | None = None
        # None until a warm-up; then those that have a program of their own.
        self._rules: set[Rules] | None = None

    def set_params(self, params: Params) -> None:
        """Takes a copy of the weights to sample with; the last copy is freed first. `params` may lie on the devices of
        the sampler's mesh, on others, or on the host."""
        self._params = None
        with self._on_mesh():
            self._params = take_weights(self.config, self.mesh, params)

    def drop_params(self) -> None:
        """Frees the copy of the weights, unless another sampler has adopted it."""
        self._params = None

    def adopt(self, other: "Sampler") -> None:
        """Samples with the weights that another sampler of this model and mesh holds; nothing is copied."""
        self._params = other._weights()

    def warmup(self, *samplings: SamplingParams) -> None:
        """Compiles every program that `generate` can need. One that draws by `samplings`, or by others that have the
        same parts on, then has a faster program of its own; all others share one."""
        spec = self.spec
        self._rules = {rules_of(sampling) for sampling in samplings}
        # Programs are compiled for what is adjusted, whatever the values.
        like = samplings[0] if samplings else sampling_params()
        idle = self._slots([])

        # A cache belongs to a bucket, and prompts of all smaller buckets are prefilled into it too.
        with self._on_mesh():
            for bucket in spec.prompt_buckets:
                cache = self._new_cache(bucket)
                # The compiler may lay out a program's result otherwise than its argument on a mesh: go round twice.
                for _ in range(1 if self.mesh is None else 2):
                    for length in (b for b in spec.prompt_buckets if b <= bucket):
                        for count in self._prefill_counts(length):
                            tokens = np.zeros((self._parts * count, length), np.int32)
                            zeros = tokens[:, 0]
                            cache, _ = self._prefill(self._weights(), cache, tokens, zeros, zeros, zeros)
                    cache = self._copy_prompt(cache, 0, 0)
                    if spec.path_slots and self.config.delta is not None:
                        for length in spec.path_lengths:
                            for count in self._path_counts(length):
                                paths = self._no_paths(self._parts * count, length)
                                cache = self._recall(self._weights(), cache, paths)

                    # The ring grows and shrinks from one of its sizes to the next.
                    for size in (*spec.ring_sizes, *reversed(spec.ring_sizes[:-1])):
                        cache, _ = self._resize_once(cache, 0, size)
                        for rules in (None, *self._rules):
                            run = self._run(cache, 0, idle, like, 0, 0)
                            cache, *_ = self._decode(cache, idle, run, rules)
                        if spec.path_slots:
                            none = self._moves(cache, [], [])
                            cache = self._lay_paths(self._keep_paths(cache, none), none)
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
        rules = known_rules(sampling, self._rules)
        slots = self._slots(requests)
        bucket = self._bucket(max((len(request.prompt) for request in requests), default=1))
        stats = dict.fromkeys(_COUNTED, 0)
        seconds = {"prefill_seconds": 0.0, "decode_seconds": 0.0}

        with self._on_mesh():
            cache = self._new_cache(bucket)
            column = 0
            loads, paths = slots.assign()
            while slots.active.any():
                # Give the idle rows what the host assigned to them.
                start = time.perf_counter()
                cache = self._load(params, cache, slots, loads)
                cache, column = self._fit_ring(cache, column, slots.oldest() + 1)
                if paths:
                    cache = self._lay_paths(cache, self._moves(cache, paths, [column] * len(paths)))
                    if self.config.delta is not None:
                        cache = self._recall_paths(params, cache, slots, paths)
                        stats["prefill_tokens"] += sum(path.steps for path in paths)
                jax.block_until_ready(cache)
                loaded = time.perf_counter()

                # Decode until rows want new work.
                before = slots.rows()
                cache, *out = self._decode(cache, slots, self._run(cache, column, slots, sampling, seed, step), rules)
                next_column, steps, active, emitted = jax.device_get(out)
                grown = steps - before.steps
                forced = _forced_in_run(before, steps)

                # A row that ended keeps its columns until the next call: what forks may start from is copied now.
                if ended := self._harvest(slots, grown, active, emitted):
                    ends = [column + int(grown[path.slot, path.row]) for path in ended]
                    cache = self._keep_paths(cache, self._moves(cache, ended, ends))
                column = int(next_column)

                stats["decode_steps"] += int(grown.max())
                stats["row_steps"] += int(grown.max()) * active.size
                stats["forced_tokens"] += forced
                stats["new_tokens"] += int(grown.sum()) - forced
                count_tokens(int(grown.sum()) - forced)
                stats["reused_tokens"] += sum(path.steps for path in paths)
                stats["runs"] += 1
                stats["prefill_tokens"] += sum(len(requests[x.request].prompt) - 1 for x in loads if x.source is None)
                seconds["prefill_seconds"] += loaded - start
                loads, paths = slots.assign()
                seconds["decode_seconds"] += time.perf_counter() - loaded

        busy = stats["new_tokens"] + stats["forced_tokens"]
        self.last_stats = {**stats, **seconds, "slot_occupancy": busy / max(stats.pop("row_steps"), 1)}
        groups = [[sample for sample in group if sample is not None] for group in slots.results]
        if sampling.penalises:
            groups = [[sample._replace(is_penalised=True) for sample in group] for group in groups]
        return groups

    def _decode(self, cache: KVCache, slots: Slots, run: DecodeRun, rules: Rules | None):
        """One call of `decode` for the rows as they stand."""
        buffer = Buffer(self._most_steps(cache, slots), self.spec.top_logprobs)
        rows = self._rows(slots, run.sampling)
        return _decode(self.config, self._stop_tokens, buffer, self._weights(), cache, rows, run, rules)

    def _rows(self, slots: Slots, sampling: SamplingParams) -> DecodeRows:
        """The grid as the device wants it for this sampling."""
        rows = slots.rows()
        return slots.with_history(rows, self.spec.prompt_buckets[-1]) if sampling.penalises else rows

    def _most_steps(self, cache: KVCache, slots: Slots) -> int:
        """Steps of a run at most."""
        # What may come next in a grammar is known when a token is.
        if slots.is_guided:
            return 1
        most = self.spec.check_every if self._stop_strings.strings else _MOST_STEPS
        return min(most, ring_size(cache))

    def _run(
        self, cache: KVCache, column: int, slots: Slots, sampling: SamplingParams, seed: int, step: int
    ) -> DecodeRun:
        # No row may become older than the ring is long.
        most = min(self._most_steps(cache, slots), slots.steps_within(ring_size(cache)))
        # Of the same program, whatever requests bring.
        if slots.has_stops:
            most = min(most, self.spec.check_every)
        return DecodeRun(
            column=np.array(column, np.int32),
            sampling=sampling,
            seed=np.array(seed, np.int32),
            step=np.array(step, np.int32),
            max_steps=np.array(most, np.int32),
            other_work=slots.other_work(),
            refill_rows=np.array(self.spec.rows_to_refill, np.int32),
        )

    def _fit_ring(self, cache: KVCache, column: int, needed: int) -> tuple[KVCache, int]:
        """The cache with a ring of at least `needed` columns, and its next column. A ring shrinks when half of the next
        smaller size would do, so that it does not grow again at once."""
        sizes = self.spec.ring_sizes
        index = sizes.index(ring_size(cache))
        while sizes[index] < needed:
            index += 1
            cache, column = self._resize_once(cache, column, sizes[index])
        while index and 2 * needed <= sizes[index - 1]:
            index -= 1
            cache, column = self._resize_once(cache, column, sizes[index])
        return cache, column

    def _resize_once(self, cache: KVCache, column: int, size: int) -> tuple[KVCache, int]:
        """The cache with a ring of `size` columns, and its next column."""
        old = ring_size(cache)
        if size == old:
            return cache, column

        # One layer at a time, so that the old ring and the new one never lie there both as a whole.
        keys = []
        values = []
        for k, v in zip(cache.suffix_k, cache.suffix_v, strict=True):
            new_k, new_v = _resize_ring(size, k, v, np.int32(column))
            k.delete()
            v.delete()
            keys.append(new_k)
            values.append(new_v)
        cache = dataclasses.replace(cache, suffix_k=tuple(keys), suffix_v=tuple(values))
        return cache, resized_column(column, old, size)

    # Programs are compiled for what they see of the cache: what prompts need goes without the ring, whose sizes are
    # many, and what paths need without the prompts.

    def _prefill(
        self,
        params: Params,
        cache: KVCache,
        tokens: np.ndarray,
        slots: np.ndarray,
        adapters: np.ndarray,
        lengths: np.ndarray,
    ) -> tuple[KVCache, jax.Array | None]:
        """The cache with these prompts, and the experts of their tokens [N, S, L, k] where they are recorded."""
        more = self._of_prompts(adapters, lengths)
        prompts, experts = _prefill(self.config, params, _prompts(cache), tokens, slots, *more)
        return _with_prompts(cache, prompts), experts

    def _of_prompts(
        self, adapters: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray | None, int, np.ndarray | None]:
        """The last arguments of `prefill`, None where the model does not ask for them."""
        chosen = adapters if self._num_adapters else None
        return chosen, self._recorded, lengths if self.config.delta is not None else None

    def _copy_prompt(self, cache: KVCache, source: int, target: int) -> KVCache:
        return _with_prompts(cache, _copy_prompt(_prompts(cache), np.int32(source), np.int32(target)))

    def _keep_paths(self, cache: KVCache, moves: PathMoves) -> KVCache:
        return _with_prompts(_keep_paths(without_prompts(cache), moves), cache)

    def _lay_paths(self, cache: KVCache, moves: PathMoves) -> KVCache:
        return _with_prompts(_lay_paths(without_prompts(cache), moves), cache)

    def _recall_paths(self, params: Params, cache: KVCache, slots: Slots, paths: Sequence[Path]) -> KVCache:
        """The cache with what rows recall that begin on these paths. Those of one length go together."""
        rows = slots.rows()
        by_length: dict[int, list[Path]] = {}
        for path in paths:
            lengths = self.spec.path_lengths
            by_length.setdefault(lengths[bisect.bisect_left(lengths, path.steps)], []).append(path)

        own_slots = self.spec.prompt_slots // self._parts
        for length, group in by_length.items():
            places = [path.slot // own_slots for path in group]
            for batch in by_part(group, places, self._parts, self._path_counts(length)):
                begun = self._no_paths(len(batch), length)
                for i, entry in enumerate(batch):
                    if entry is not None:
                        begun.tokens[i, : entry.steps] = slots.fed_before(entry)
                        begun.length[i], begun.slot[i], begun.row[i] = entry.steps, entry.slot, entry.row
                        begun.prefix_length[i] = rows.prefix_length[entry.slot]
                        if begun.adapter is not None and rows.adapter is not None:
                            begun.adapter[i] = rows.adapter[entry.slot]
                cache = self._recall(params, cache, begun)
        return cache

    def _recall(self, params: Params, cache: KVCache, paths: PathTokens) -> KVCache:
        part = dataclasses.replace(_prompts(cache), row_memory=cache.row_memory)
        part = _recall_paths(self.config, params, part, paths)
        return dataclasses.replace(_with_prompts(cache, part), row_memory=part.row_memory)

    def _no_paths(self, count: int, length: int) -> PathTokens:
        """Room for `count` of them; none counts yet."""
        zeros = np.zeros((4, count), np.int32)
        return PathTokens(
            tokens=np.zeros((count, length), np.int32),
            length=zeros[0],
            slot=zeros[1] - 1,
            row=zeros[2],
            prefix_length=zeros[3],
            adapter=np.zeros(count, np.int32) if self._num_adapters else None,
        )

    def _path_counts(self, length: int) -> list[int]:
        """Paths that each part of the devices computes at once: as many as a prefill takes, or one."""
        rows = self.spec.prompt_slots * self.spec.sample_slots // self._parts
        return sorted({prefill_counts(length, rows, platform(self.mesh))[0], 1}, reverse=True)

    def _slots(self, requests: Sequence[Request]) -> Slots:
        has_several = self._num_adapters > 0
        return Slots(requests, self.spec, self._parts, chooses_adapter=has_several, recorded=self._recorded)

    def _moves(self, cache: KVCache, paths: Sequence[Path], ends: Sequence[int]) -> PathMoves:
        """What the device needs to move these paths; `ends` are the ring columns after the last of each."""
        # Of one size, whatever the number of paths, so that one program serves all.
        columns = np.zeros((4, self.spec.prompt_slots * self.spec.sample_slots), np.int32)
        for i, (path, end) in enumerate(zip(paths, ends, strict=True)):
            columns[:, i] = path.slot, path.row, path.path, (end - path.steps) % ring_size(cache)
        slot, row, index, first = columns
        return PathMoves(slot=slot, row=row, path=index, column=first, count=np.array(len(paths), np.int32))

    def _harvest(self, slots: Slots, grown: np.ndarray, active: np.ndarray, emitted) -> list[Path]:
        """Takes over what the rows emitted, and frees those that are done; returns the paths to keep."""
        ended = []
        for row, owner in slots.owners():
            new = emitted.of_row(row, int(grown[row]))
            tokens = new["tokens"]
            slots.advance(row, new)
            # A stop string is found at a token of this run at the earliest: the text before was searched after the
            # run before.
            length = self._stop_strings.beside(slots.requests[owner[0]].stop).end(
                functools.partial(slots.last_tokens, owner),
                int(slots.steps[row]),
                len(tokens),
                begun=slots.requests[owner[0]].begun,
                given=slots.first_sampled(owner),
            )

            path = None
            if length is not None:
                path = slots.finish(row, "stop_string", length)
            elif not active[row]:
                reason: FinishReason = "stop" if tokens[-1] in self._stop_tokens else "length"
                path = slots.finish(row, reason)
            if path is not None:
                ended.append(path)
        return ended

    def _load(self, params: Params, cache: KVCache, slots: Slots, loads: list[Load]) -> KVCache:
        """Prefills and copies prompts. Prompts of one length bucket go together, in the compiled counts."""
        by_bucket: dict[int, list[Load]] = {}
        for load in loads:
            if load.source is None:
                bucket = self._bucket(len(slots.requests[load.request].prompt))
                by_bucket.setdefault(bucket, []).append(load)

        for bucket, group in by_bucket.items():
            own_slots = self.spec.prompt_slots // self._parts
            places = [load.slot // own_slots for load in group]
            for batch in by_part(group, places, self._parts, self._prefill_counts(bucket)):
                tokens = np.zeros((len(batch), bucket), np.int32)
                where = np.full(len(batch), -1, np.int32)
                adapters = np.zeros(len(batch), np.int32)
                lengths = np.zeros(len(batch), np.int32)
                for i, entry in enumerate(batch):
                    if entry is not None:
                        prefix = slots.requests[entry.request].prompt[:-1]
                        tokens[i, : len(prefix)] = prefix
                        lengths[i] = len(prefix)
                        where[i] = entry.slot
                        adapters[i] = slots.requests[entry.request].adapter
                cache, experts = self._prefill(params, cache, tokens, where, adapters, lengths)
                if experts is not None:
                    self._record(slots, batch, jax.device_get(experts))

        # Copies come last: their source may have been prefilled just now.
        for load in loads:
            if load.source is not None:
                cache = self._copy_prompt(cache, load.source, load.slot)
        return cache

    def _record(self, slots: Slots, batch: Sequence[Load | None], experts: np.ndarray) -> None:
        """Hands over the experts of the prompts of one prefill."""
        for entry, of_prompt in zip(batch, experts, strict=True):
            if entry is not None:
                fed = len(slots.requests[entry.request].prompt) - 1
                slots.record_prompt(entry.request, of_prompt[:fed])

    def _bucket(self, length: int) -> int:
        return self.spec.prompt_buckets[bisect.bisect_left(self.spec.prompt_buckets, length)]

    def _prefill_counts(self, length: int) -> list[int]:
        """Prompts that each part of the devices computes at once."""
        return prefill_counts(length, self.spec.prompt_slots // self._parts, platform(self.mesh))

    def cache_bytes(self) -> int:
        """Bytes of keys and values over all devices, for the longest prompts."""
        spec = self.spec
        return cache_bytes(*self._cache_sizes(spec.prompt_buckets[-1], spec.max_new_tokens)[:-1])

    def plan(self) -> DecoderPlan:
        """What it holds while it samples the longest prompts and completions, in shapes."""
        length = self.spec.prompt_buckets[-1]
        with self._on_mesh():
            return DecoderPlan(
                weights=abstract_weights(self.config, self.mesh),
                cache=abstract_result(_init_cache.lower(*self._cache_sizes(length, self.spec.max_new_tokens))),
                keeps_cache=False,
                rows=self.spec.prompt_slots * self.spec.sample_slots,
                prefill=(self._parts * self._prefill_counts(length)[0], length),
            )

    def lower(self, plan: DecoderPlan, sampling: SamplingParams) -> dict[str, jax.stages.Lowered]:
        """The programs that run at the longest prompts, by what they do: `weights` copies a trainer's, `prefill` takes
        as many prompts as one call does, `decode` steps until rows want new work. To compile and inspect; nothing
        runs."""
        count, length = plan.prefill
        idle = self._slots([])
        with self._on_mesh():
            zeros = np.zeros((count, length), np.int32)
            first = zeros[:, 0]
            more = self._of_prompts(first, first)
            return {
                "weights": lower_weights(self.config, self.mesh),
                "prefill": _prefill.lower(self.config, plan.weights, plan.cache, zeros, first, *more),
                "decode": _decode.lower(
                    self.config,
                    self._stop_tokens,
                    Buffer(self._most_steps(plan.cache, idle), self.spec.top_logprobs),
                    plan.weights,
                    plan.cache,
                    self._rows(idle, sampling),
                    self._run(plan.cache, 0, idle, sampling, 0, 0),
                    rules_of(sampling),
                ),
            }

    def _new_cache(self, bucket: int) -> KVCache:
        return _init_cache(*self._cache_sizes(bucket, self.spec.ring_sizes[0]))

    def _cache_sizes(self, bucket: int, ring: int) -> tuple[DecoderConfig, int, int, int, int, int, int]:
        """The arguments of `init_cache`."""
        spec = self.spec
        slots = (spec.prompt_slots, spec.sample_slots)
        return self.config, *slots, bucket, ring, spec.path_slots, spec.max_new_tokens

    def _weights(self) -> Params:
        if self._params is None:
            raise ValueError("the sampler has no weights; call set_params(params) first")
        return self._params

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else use_mesh(self.mesh)

    def _check(self, index: int, request: Request) -> None:
        config = self.config
        spec = self.spec
        where = f"request {index} (prompt_id {request.prompt_id})"
        prompt = np.asarray(request.prompt)
        if not len(prompt):
            raise ValueError(f"{where}: the prompt is empty; give at least one token, for instance the BOS token")
        if len(prompt) > spec.prompt_buckets[-1]:
            raise ValueError(
                f"{where}: prompt of {len(prompt)} tokens is longer than the largest bucket of prompt_buckets="
                f"{spec.prompt_buckets}; add a bucket or shorten the prompt"
            )
        if len(outside := prompt[(prompt < 0) | (prompt >= config.num_ids)]):
            raise ValueError(
                f"{where}: token {outside[0]} is outside the vocabulary of {config.num_ids}; "
                "check that tokenizer and model belong together"
            )

        if not 0 <= request.adapter < max(self._num_adapters, 1):
            raise ValueError(
                f"{where}: adapter={request.adapter} is none of the model's {self._num_adapters}, which count from 0"
            )
        if not 0 <= request.begun <= len(prompt):
            raise ValueError(f"{where}: begun={request.begun} must lie between 0 and the prompt's {len(prompt)} tokens")

        limit = spec.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        if not 1 <= limit <= spec.max_new_tokens:
            raise ValueError(
                f"{where}: max_new_tokens={limit} must lie between 1 and the sampler's {spec.max_new_tokens}"
            )

        scaling = config.rope_scaling
        dynamic = scaling.type == "dynamic"
        longest = (scaling.original_max_position or config.max_position) if dynamic else config.longest_sequence
        if len(prompt) + limit > longest:
            reason = "dynamic RoPE scaling would change all earlier keys" if dynamic else "the model knows no position"
            raise ValueError(
                f"{where}: {len(prompt)} prompt + {limit} new tokens exceed {longest}, beyond which {reason}; "
                "shorten the prompt or lower max_new_tokens"
            )

        try:
            self._stop_strings.beside(request.stop)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

        ids = [request.prompt_id, *request.sample_ids]
        if wrong := [value for value in ids if not 0 <= value <= _LARGEST_ID]:
            raise ValueError(f"{where}: id {wrong[0]} must lie between 0 and {_LARGEST_ID}; hash it to 31 bits")


def _prompts(cache: KVCache) -> KVCache:
    """The prompts of a cache alone."""
    return _with_prompts(KVCache(prefix_k=(), prefix_v=(), suffix_k=(), suffix_v=()), cache)


def _with_prompts(cache: KVCache, prompts: KVCache) -> KVCache:
    """A cache with the prompts of another."""
    return dataclasses.replace(
        cache, prefix_k=prompts.prefix_k, prefix_v=prompts.prefix_v, prompt_memory=prompts.prompt_memory
    )


def _forced_in_run(before: DecodeRows, steps: np.ndarray) -> int:
    """How many of the tokens emitted in a run were given."""
    start = np.clip(before.steps, before.forced_start, before.forced_start + before.forced_length)
    stop = np.clip(steps, before.forced_start, before.forced_start + before.forced_length)
    return int((stop - start).sum())


def by_part(entries: Sequence[T], places: Sequence[int], parts: int, counts: Sequence[int]) -> Iterator[list[T | None]]:
    """Entries in batches of `parts` stretches of one of `counts` (largest first, the last is 1) each: every part of the
    devices gets what belongs to it (`places`), and None where it has nothing left."""
    own: list[list[T]] = [[] for _ in range(parts)]
    for entry, place in zip(entries, places, strict=True):
        own[place].append(entry)

    for count in counts:
        while max(map(len, own)) >= count:
            batch: list[T | None] = []
            for mine in own:
                batch += mine[:count] + [None] * (count - len(mine))
                del mine[:count]
            yield batch


def known_rules(sampling: SamplingParams, warm: set[Rules] | None) -> Rules | None:
    """The rules of `sampling`, unless there was a warm-up that compiled no program for them."""
    rules = rules_of(sampling)
    return rules if warm is None or rules in warm else None


def prefill_counts(length: int, rows: int, on: str) -> list[int]:
    """How many prompts of `length` a device's part of a prefill takes on the platform `on`: powers of 4 up to `rows`,
    largest first; any number is a sum of few of them."""
    counts = [4**i for i in range(16) if 4**i <= rows]
    most = _PREFILL_TOKENS.get(on, _PREFILL_TOKENS_ELSEWHERE)
    return [count for count in reversed(counts) if count == 1 or count * length <= most]
