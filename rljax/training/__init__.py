"""State, learner, checkpoints, metrics."""

from rljax.training.checkpoint import Checkpointer, fingerprint, restore_params
from rljax.training.config import CheckpointConfig, CriticConfig, LogConfig, UpdateConfig, WarmupConfig
from rljax.training.critic import Critic, explained_variance
from rljax.training.learner import Learner
from rljax.training.lightsam import scale_by_lightsam_adagrad, scale_by_lightsam_adam, scale_by_lightsam_norm
from rljax.training.lora import LoraConfig, trained_of
from rljax.training.metrics import MetricsWriter, PhaseTimer, read_json, read_jsonl
from rljax.training.objective import LossNeeds, Objective
from rljax.training.optimizers import (
    LightSAMConfig,
    MuonConfig,
    OptimizerConfig,
    has_first_moment,
    make_optimizer,
    make_schedule,
)
from rljax.training.run_folder import BASE_FOLDER, RECORDED, RunFolder, as_json, plain, plot_learning_curve, versions
from rljax.training.sft import sft_loss
from rljax.training.sinks import Sink, Trackers
from rljax.training.state import (
    abstract_state,
    create_state,
    frozen_base,
    state_shardings,
    with_base,
    with_before,
    with_critic,
    with_pushed,
)
from rljax.training.storage import (
    AnyPath,
    as_path,
    is_remote,
    local_copy,
    local_folder,
    move_tree,
    reachable,
    remove_tree,
    replace_bytes,
    writable,
    writable_file,
)
from rljax.training.teacher import TeacherModel, abstract_said
from rljax.training.trainable import EVERYTHING, Subtree, policy_params, reference_params, subtree_of
from rljax.training.update import add_metrics

__all__ = [
    "BASE_FOLDER",
    "EVERYTHING",
    "RECORDED",
    "AnyPath",
    "CheckpointConfig",
    "Checkpointer",
    "Critic",
    "CriticConfig",
    "Learner",
    "LightSAMConfig",
    "LogConfig",
    "LoraConfig",
    "LossNeeds",
    "MetricsWriter",
    "MuonConfig",
    "Objective",
    "OptimizerConfig",
    "PhaseTimer",
    "RunFolder",
    "Sink",
    "Subtree",
    "TeacherModel",
    "Trackers",
    "UpdateConfig",
    "WarmupConfig",
    "abstract_said",
    "abstract_state",
    "add_metrics",
    "as_json",
    "as_path",
    "create_state",
    "explained_variance",
    "fingerprint",
    "frozen_base",
    "has_first_moment",
    "is_remote",
    "local_copy",
    "local_folder",
    "make_optimizer",
    "make_schedule",
    "move_tree",
    "plain",
    "plot_learning_curve",
    "policy_params",
    "reachable",
    "read_json",
    "read_jsonl",
    "reference_params",
    "remove_tree",
    "replace_bytes",
    "restore_params",
    "scale_by_lightsam_adagrad",
    "scale_by_lightsam_adam",
    "scale_by_lightsam_norm",
    "sft_loss",
    "state_shardings",
    "subtree_of",
    "trained_of",
    "versions",
    "with_base",
    "with_before",
    "with_critic",
    "with_pushed",
    "writable",
    "writable_file",
]
