"""State, learner, checkpoints, metrics."""

from rljax.training.learner import Learner, Loss, add_metrics
from rljax.training.sft import sft_loss
from rljax.training.state import (
    OptimizerConfig,
    abstract_state,
    create_state,
    make_optimizer,
    make_schedule,
    state_shardings,
)

__all__ = [
    "Learner",
    "Loss",
    "OptimizerConfig",
    "abstract_state",
    "add_metrics",
    "create_state",
    "make_optimizer",
    "make_schedule",
    "sft_loss",
    "state_shardings",
]
