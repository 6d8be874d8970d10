"""pass@k and its relatives, and evaluation runs."""

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
from rljax.evaluation.evaluate import Estimate, Evaluation, evaluate

__all__ = [
    "Difference",
    "Estimate",
    "Evaluation",
    "all_at_k",
    "avg_at_k",
    "bootstrap_interval",
    "evaluate",
    "maj_at_k",
    "paired_difference",
    "pass_at_k",
    "standard_error",
]
