"""What grows with a limit that nobody reaches: caps of lengths, stop strings, ragged rows, programs.

    python benchmarks/growth.py --preset=full --json=growth.json

`cap_cost`: the time of the same short completions under the largest `max_new_tokens` over that under the smallest;
`context_cost`: that of the same short conversations under the largest `context_length` and `max_new_tokens`.
`stop_string_growth`: what taking a token over and looking for stop strings costs the host, in long completions over
short ones. `rows_bytes_per_token`: bytes of `RaggedRows` for a token of rows whose lengths are lognormal, mean over
ragged minibatches; `pack_us_per_token`: microseconds of the host to lay one out and fill it, median.
`update_programs`: programs that the updates of ragged rollouts take; `compiles_after_warmup`: of all kinds, once those
that are likely have been compiled.

`small` and `smoke` are shorter forms of `full`; all are a tiny model on the CPU. No rivals: this is growth, not speed.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from _common import TINY, finish, machine, parse_arguments, random_prompts, write_model
from _probe import probe

from rljax.batching import layout, loss_mask, pack, stack
from rljax.losses import clipped, policy_loss, token_mean, token_ratio
from rljax.models import load_model
from rljax.sampling import (
    Request,
    Sampler,
    SamplerSpec,
    Stops,
    Turn,
    TurnDecoder,
    TurnDecoderSpec,
    compile_count,
    sampling_params,
)
from rljax.sampling.slots import Slots
from rljax.sampling.stopping import StopStrings
from rljax.training import Learner, UpdateConfig
from rljax.types import RolloutBatch, Trajectory

_LARGE = dict(new=64, rows=4, groups=16, size=8, median=40, cap=256)
SIZES: dict[str, dict[str, Any]] = {
    "smoke": dict(new=8, rows=2, groups=4, size=4, median=12, cap=64)
    | dict(caps=(8, 32), contexts=((64, 16), (128, 32)), stops=(16, 32), steps=3),
    "small": _LARGE | dict(caps=(64, 1024), contexts=((512, 64), (2048, 1024)), stops=(64, 512), steps=20),
    "full": _LARGE | dict(caps=(64, 4096), contexts=((512, 64), (8192, 4096)), stops=(256, 8192), steps=60),
}
SIZES["gpu"] = SIZES["small"]
REQUESTS = 16
PROMPT = 16


def cap_seconds(model, caps: Sequence[int], new: int, repeats: int) -> dict[int, list[float]]:
    """Of `REQUESTS` completions of `new` tokens by `max_new_tokens`, all programs compiled."""
    config, params = model
    samplers = {}
    for cap in caps:
        spec = SamplerSpec(prompt_buckets=(PROMPT,), max_new_tokens=cap, prompt_slots=REQUESTS, sample_slots=1)
        samplers[cap] = Sampler(config, spec)
        samplers[cap].set_params(params)
        samplers[cap].warmup()

    prompts = random_prompts(TINY, REQUESTS, PROMPT, seed=1)
    asked = [Request(prompt, i, (0,), max_new_tokens=new) for i, prompt in enumerate(prompts)]
    seconds: dict[int, list[float]] = {cap: [] for cap in caps}
    # Samplers take turns, so that what else the machine does falls on all of them; the first round is not timed.
    for repeat in range(repeats + 1):
        for cap, sampler in samplers.items():
            begin = time.perf_counter()
            sampler.generate(asked, sampling_params(), seed=0, step=repeat)
            if repeat:
                seconds[cap].append(time.perf_counter() - begin)
    return seconds


Limits = tuple[int, int]
"""Tokens of a conversation, and of a turn."""


def context_seconds(model, limits: Sequence[Limits], new: int, repeats: int) -> dict[Limits, list[float]]:
    """Of `REQUESTS` conversations of two turns of half of `new` tokens each, by limits, all programs compiled."""
    config, params = model
    decoders = {}
    for context, cap in limits:
        spec = TurnDecoderSpec(REQUESTS, REQUESTS, context, max_new_tokens=cap, prefill_chunks=(PROMPT,))
        decoders[context, cap] = decoder = TurnDecoder(config, spec)
        decoder.set_params(params)
        decoder.begin(sampling_params(), seed=0, step=0)
        decoder.warmup()

    prompts = random_prompts(TINY, REQUESTS, PROMPT, seed=1)
    observations = random_prompts(TINY, REQUESTS, PROMPT, seed=2)

    def talk(decoder: TurnDecoder) -> None:
        decoder.forget()
        said = list(prompts)
        for turn in range(2):
            for i, tokens in enumerate(said):
                decoder.submit(Turn(i, tokens, prompt_id=i, sample_id=0, turn=turn, max_new_tokens=new // 2))
            while decoder.num_open:
                for result in decoder.run():
                    i = result.turn.conversation
                    said[i] = [*said[i], *result.tokens.tolist(), *observations[i]]

    seconds: dict[Limits, list[float]] = {limit: [] for limit in limits}
    # In turn, and without the first round, as in `cap_seconds`.
    for repeat in range(repeats + 1):
        for limit, decoder in decoders.items():
            begin = time.perf_counter()
            talk(decoder)
            if repeat:
                seconds[limit].append(time.perf_counter() - begin)
    return seconds


def stop_us(length: int, rows: int) -> float:
    """Microseconds of the processor for a token of `rows` completions of `length` tokens, which the host takes over run
    by run, as a `Sampler` does, and searches for stop strings that never come. The device has no part in it."""
    stops = Stops(strings=("</answer>", "\n\nQuestion:"), decode_text=lambda ids: bytes(ids).decode())
    finder = StopStrings(stops)
    spec = SamplerSpec(prompt_buckets=(PROMPT,), max_new_tokens=length, prompt_slots=1, sample_slots=rows)
    slots = Slots([Request([97] * PROMPT, 0, range(rows))], spec)
    slots.assign()
    tokens = np.random.default_rng(0).integers(97, 123, spec.check_every, np.int32)
    zeros = np.zeros(spec.check_every, np.float32)
    told = {"tokens": tokens, "logprobs": zeros, "entropies": zeros}

    begin = time.process_time()
    for _ in range(length // spec.check_every):
        for row, owner in slots.owners():
            slots.advance(row, told)
            last = functools.partial(slots.last_tokens, owner)
            assert finder.end(last, int(slots.steps[row]), spec.check_every) is None
    return (time.process_time() - begin) / (rows * length) * 1e6


def rollout(size, vocab: int, step: int) -> RolloutBatch:
    """Groups of rows of lognormal lengths, which share a prompt."""
    rng = np.random.default_rng([3, step])
    rows = []
    for group in range(size["groups"]):
        prompt = rng.integers(3, vocab, int(rng.integers(4, PROMPT)))

        for _ in range(size["size"]):
            # As lengths of answers are: a few take most of the tokens, and some reach the cap.
            new = int(np.clip(rng.lognormal(np.log(size["median"]), 1.0), 1, size["cap"]))
            tokens = np.concatenate([prompt, rng.integers(3, vocab, new)]).astype(np.int32)

            # What was sampled is trained; its numbers decide no shape.
            mask = np.arange(len(tokens)) >= len(prompt)
            zeros = np.zeros(len(tokens), np.int32)
            rows.append(
                Trajectory(
                    tokens=tokens,
                    action_mask=mask,
                    behavior_logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
                    entropies=np.zeros(len(tokens), np.float32),
                    turn_ids=zeros,
                    policy_version=zeros,
                    prompt_id=group,
                    group_id=group,
                    episode_id=len(rows),
                )
            )
    # One width, as `config.update.trajectory_buckets` sets it in a run: aggregation is no program of the update.
    return stack(rows, length_buckets=(size["cap"] + PROMPT,))


def packing(size, update: UpdateConfig, vocab: int) -> tuple[float, float]:
    """Bytes of rows, mean, and microseconds of packing, median over the ragged rollouts; of a token."""
    of_bytes = []
    of_time = []
    for step in range(size["steps"]):
        batch = rollout(size, vocab, step)
        mask = loss_mask(batch)
        begin = time.process_time()
        made = pack(batch, mask.astype(np.float32), update, packing=layout(batch, mask, update))
        of_time.append((time.process_time() - begin) / batch.lengths.sum() * 1e6)
        of_bytes.append(sum(np.asarray(x).nbytes for x in jax.tree.leaves(made.rows)) / batch.lengths.sum())
    return statistics.mean(of_bytes), statistics.median(of_time)


def programs(model, size, update: UpdateConfig, vocab: int) -> tuple[int, int]:
    """Shapes of the minibatches of ragged rollouts, and what compiled after those were that are likely."""
    config, params = model
    loss = policy_loss(token_ratio, clipped(), token_mean)
    learner = Learner(config, loss, optax.sgd(1e-3), update)
    state = learner.init_state(params)
    shapes = set()
    compiled = 0
    for step in range(size["steps"]):
        batch = rollout(size, vocab, step)
        (minibatch,) = learner.prepare(state, batch, batch.action_mask.astype(np.float32))
        if step == 0:
            state = learner.warm_up(state, minibatch)
            compiled = compile_count()
        state, _ = learner.update(state, minibatch)
        shapes.add(str(jax.tree.map(np.shape, minibatch)))
    jax.block_until_ready(state.step)
    return len(shapes), compile_count() - compiled


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[0], rivals=())
    size = SIZES[arguments.preset]
    quick = arguments.preset == "smoke"
    probes = [probe("float32", quick)]
    config, params = load_model(write_model(TINY), dtype="float32", param_dtype="float32")
    # Positions enough for the longest cap.
    model = (dataclasses.replace(config, max_position=2 * max(*size["caps"], *map(max, size["contexts"]))), params)
    update = UpdateConfig(pack_length=2 * size["cap"], microbatch_size=2)
    vocab = TINY["vocab_size"]

    lines = []

    def line(name: str, value: float, seconds: list[float] | None = None) -> None:
        more = {} if seconds is None else {"seconds": statistics.median(seconds), "all_seconds": seconds}
        lines.append({"name": name, "value": value} | more)
        print(f"{name}: {value:.3g}", flush=True)

    caps = cap_seconds(model, size["caps"], size["new"], arguments.repeats)
    contexts = context_seconds(model, size["contexts"], size["new"], arguments.repeats)
    # As many tokens of short completions as of long ones, so that the times are as long.
    tokens = size["rows"] * max(size["stops"])
    looks = {new: [stop_us(new, tokens // new) for _ in range(arguments.repeats)] for new in size["stops"]}
    of_bytes, of_time = packing(size, update, vocab)
    used, compiled = programs(model, size, update, vocab)

    for cap, found in caps.items():
        line(f"seconds of {REQUESTS} x {size['new']} tokens at max_new_tokens {cap}", statistics.median(found), found)
    for (context, cap), found in contexts.items():
        what = f"seconds of {REQUESTS} conversations at context_length {context} and max_new_tokens {cap}"
        line(what, statistics.median(found), found)
    for new, found in looks.items():
        line(f"us a token of stop strings in {new} tokens", statistics.median(found))
    line("bytes of rows a token", of_bytes)
    line("us of packing a token", of_time)
    line("update programs", used)
    line("compiles after the warm-up", compiled)

    few, many = (statistics.median(found) for found in caps.values())
    narrow, wide = (statistics.median(found) for found in contexts.values())
    short, long = (statistics.median(found) for found in looks.values())
    ratios = {
        "cap_cost": many / few,
        "context_cost": wide / narrow,
        "stop_string_growth": long / short,
        "rows_bytes_per_token": of_bytes,
        "pack_us_per_token": of_time,
        "update_programs": used,
        "compiles_after_warmup": compiled,
    }
    probes.append(probe("float32", quick))
    finish("growth", arguments, machine(probes), {"model": TINY, "dtype": "float32", **size}, lines, ratios)


if __name__ == "__main__":
    main()
