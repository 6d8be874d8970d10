"""What decoding costs as limits and completions grow: a tiny model on the CPU. `growth.py` writes the figures down."""

import time

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
