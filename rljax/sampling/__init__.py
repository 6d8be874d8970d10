"""Sampling from the model: logits processing, the decoder, scoring."""

from rljax.sampling.compile_counter import compile_count, compile_count_here
from rljax.sampling.config import SamplingConfig
from rljax.sampling.logits import SamplingParams, process_logits, sampling_params
from rljax.sampling.plan import DecoderPlan, lower_copies
from rljax.sampling.prompt_scores import PromptScores
from rljax.sampling.row_scorer import RowScorer
from rljax.sampling.sampler import Sampler
from rljax.sampling.slots import Fork, Request, Rounds, Sample
from rljax.sampling.spec import NO_STOPS, SamplerSpec, Stops, TurnDecoderSpec
from rljax.sampling.token_counter import token_count
from rljax.sampling.turns import Turn, TurnDecoder, TurnResult

__all__ = [
    "NO_STOPS",
    "DecoderPlan",
    "Fork",
    "PromptScores",
    "Request",
    "Rounds",
    "RowScorer",
    "Sample",
    "Sampler",
    "SamplerSpec",
    "SamplingConfig",
    "SamplingParams",
    "Stops",
    "Turn",
    "TurnDecoder",
    "TurnDecoderSpec",
    "TurnResult",
    "compile_count",
    "compile_count_here",
    "lower_copies",
    "process_logits",
    "sampling_params",
    "token_count",
]
