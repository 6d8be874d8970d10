"""Sampling from the model: logits processing, the decoder, scoring."""

from rljax.sampling.compile_counter import compile_count
from rljax.sampling.logits import SamplingParams, process_logits, sampling_params
from rljax.sampling.sampler import Sampler
from rljax.sampling.slots import Fork, Request, Rounds, Sample
from rljax.sampling.turns import Spoken, Turn, TurnDecoder

__all__ = [
    "Fork",
    "Request",
    "Rounds",
    "Sample",
    "Sampler",
    "SamplingParams",
    "Spoken",
    "Turn",
    "TurnDecoder",
    "compile_count",
    "process_logits",
    "sampling_params",
]
