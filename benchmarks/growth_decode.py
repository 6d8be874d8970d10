"""What decoding costs as limits and completions grow: a tiny model on the CPU. `growth.py` writes the figures down."""

import time
from types import SimpleNamespace

import jax
import numpy as np

from rljax.models import DecoderConfig, init_params
from rljax.sampling import Request, Sampler, SamplerSpec, Stops, sampling_params

CONFIG = DecoderConfig(
    vocab_size=256, num_layers=4, embed_dim=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=256
)


def _sampler(cap: int, rows: int, stops: Stops) -> Sampler:
    spec = SamplerSpec(prompt_buckets=(8,), max_new_tokens=cap, prompt_slots=1, sample_slots=rows)
    sampler = Sampler(CONFIG, spec, stops)
    sampler.set_params(init_params(CONFIG, jax.random.key(0)))
    return sampler


def _requests(rows: int, new_tokens: int) -> list[Request]:
    return [Request([1, 2, 3, 4], 0, range(rows), max_new_tokens=new_tokens)]


def cap_seconds(caps: tuple[int, ...] = (64, 4096), *, new_tokens: int = 64, repeats: int = 5) -> dict[int, float]:
    """Median seconds of 16 completions of `new_tokens` tokens, by the most that the sampler allows."""
    samplers = {cap: _sampler(cap, 16, Stops()) for cap in caps}
    requests = _requests(16, new_tokens)
    seconds: dict[int, list[float]] = {cap: [] for cap in caps}
    # The first round compiles. Samplers take turns, so that what else the machine does falls on all of them.
    for repeat in range(repeats + 1):
        for cap, sampler in samplers.items():
            start = time.perf_counter()
            sampler.generate(requests, sampling_params(), seed=0, step=repeat)
            if repeat:
                seconds[cap].append(time.perf_counter() - start)
    return {cap: float(np.median(times)) for cap, times in seconds.items()}


def cap_cost(*, repeats: int = 5) -> float:
    """How many times as long 64 tokens take where 4096 are allowed as where 64 are."""
    seconds = cap_seconds(repeats=repeats)
    return seconds[4096] / seconds[64]


def stop_string_us(lengths: tuple[int, ...] = (256, 8192), *, rows: int = 4, repeats: int = 3) -> dict[int, float]:
    """Least host microseconds a token, by the length of completions, of looking for stop strings that never come."""
    stops = Stops(strings=("</answer>", "\n\nQuestion:"), decode_text=lambda ids: bytes(ids).decode(errors="replace"))
    us: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(repeats):
        for length, times in us.items():
            times.append(_search_seconds(length, rows, stops) / (rows * length) * 1e6)
    return {length: min(times) for length, times in us.items()}


def _search_seconds(length: int, rows: int, stops: Stops) -> float:
    """Seconds of the processor in which the host takes over `rows` completions, run by run, without a device."""
    spec = SamplerSpec(prompt_buckets=(8,), max_new_tokens=length, prompt_slots=1, sample_slots=rows)
    sampler = Sampler(CONFIG, spec, stops)
    slots = sampler._slots(_requests(rows, length))
    slots.assign()
    shape = (spec.check_every, 1, rows)
    zeros = np.zeros(shape, np.float32)
    emitted = SimpleNamespace(
        tokens=np.random.default_rng(0).integers(97, 123, shape, np.int32), logprobs=zeros, entropies=zeros
    )
    grown = np.full((1, rows), spec.check_every)

    start = time.process_time()
    for done in range(spec.check_every, length + 1, spec.check_every):
        sampler._harvest(slots, grown, np.full((1, rows), done < length), emitted)
    return time.process_time() - start


def stop_string_growth(*, repeats: int = 3) -> float:
    """How many times as long the host takes for a token of a completion of 8192 tokens as for one of 256."""
    us = stop_string_us(repeats=repeats)
    return us[8192] / us[256]
