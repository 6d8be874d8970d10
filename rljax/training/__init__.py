"""State, learner, checkpoints, metrics."""

from rljax.training.checkpoint import Checkpointer, fingerprint, restore_params
from rljax.training.learner import Learner, Loss, add_metrics
from rljax.training.metrics import MetricsWriter, PhaseTimer, read_jsonl
from rljax.training.run_folder import RunFolder, plot_learning_curve, versions
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
    "Checkpointer",
    "Learner",
    "Loss",
    "MetricsWriter",
    "OptimizerConfig",
    "PhaseTimer",
    "RunFolder",
    "abstract_state",
    "add_metrics",
    "create_state",
    "fingerprint",
    "make_optimizer",
    "make_schedule",
    "plot_learning_curve",
    "read_jsonl",
    "restore_params",
    "sft_loss",
    "state_shardings",
    "versions",
]
