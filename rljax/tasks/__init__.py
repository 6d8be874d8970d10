"""Data sets, verifiers, the reward runner and curricula. Nothing here imports jax.

A data row is an `Example`; a reward is a plain callable (`rljax.tasks.callables` says what it may ask for); the
`RewardRunner` calls rewards so that one that fails costs a sample and never the run.
"""

from rljax.tasks.answers import (
    AfterMarker,
    Extractor,
    InTag,
    final_number,
    in_box,
    last_number,
    whole_completion,
    whole_number,
)
from rljax.tasks.callables import RewardInput, batch_reward, load_callable
from rljax.tasks.curriculum import Curriculum, UniformCurriculum
from rljax.tasks.examples import Example, Prompt, Split, hold_apart, split_by_hash
from rljax.tasks.files import load_jsonl, load_parquet
from rljax.tasks.reasoning_gym import (
    ReasoningGymTask,
    ReasoningGymVerifier,
    reasoning_gym_names,
    reasoning_gym_task,
)
from rljax.tasks.rewards import FAILURES, RewardResult, RewardRunner, RewardSpec
from rljax.tasks.verifiers import ExactMatch, LengthReward, MathVerify, NumberMatch, RegexMatch

__all__ = [
    "FAILURES",
    "AfterMarker",
    "Curriculum",
    "ExactMatch",
    "Example",
    "Extractor",
    "InTag",
    "LengthReward",
    "MathVerify",
    "NumberMatch",
    "Prompt",
    "ReasoningGymTask",
    "ReasoningGymVerifier",
    "RegexMatch",
    "RewardInput",
    "RewardResult",
    "RewardRunner",
    "RewardSpec",
    "Split",
    "UniformCurriculum",
    "batch_reward",
    "final_number",
    "hold_apart",
    "in_box",
    "last_number",
    "load_callable",
    "load_jsonl",
    "load_parquet",
    "reasoning_gym_names",
    "reasoning_gym_task",
    "split_by_hash",
    "whole_completion",
    "whole_number",
]
