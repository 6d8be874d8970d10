"""pass@k and its relatives, and evaluation runs."""

from rljax.evaluation.config import EvaluationConfig
from rljax.evaluation.estimators import (
    Difference,
    all_at_k,
    avg_at_k,
    bootstrap_interval,
    maj_at_k,
    paired_difference,
    pass_at_k,
    standard_error,
)
from rljax.evaluation.evaluate import Estimate, Evaluation, answers, evaluate, summarize

__all__ = [
    "Difference",
    "Estimate",
    "Evaluation",
    "EvaluationConfig",
    "all_at_k",
    "answers",
    "avg_at_k",
    "bootstrap_interval",
    "evaluate",
    "maj_at_k",
    "paired_difference",
    "pass_at_k",
    "standard_error",
    "summarize",
]
