"""What composes a run. A config file needs this one import: `Config` and everything that can stand in it.

The loop itself is `rljax.experiment.train.train`.
"""

from rljax.envs import EnvironmentLimits, RayConfig
from rljax.evaluation import EvaluationConfig
from rljax.experiment.config import Config, Recipe
from rljax.experiment.model import FreshModel, ModelSource, PretrainedModel, RunModel
from rljax.experiment.preference_config import PreferenceConfig
from rljax.experiment.skills_config import SkillsConfig
from rljax.experiment.stages_config import StagesConfig
from rljax.experiment.teachers import EngineTeacher, ModelTeacher, OwnTeacher, TeacherSource
from rljax.parallel import MeshConfig
from rljax.rollouts import (
    ActorConfig,
    BlackBox,
    EndpointConfig,
    EngineFailed,
    GroupsConfig,
    Guided,
    MultiTurn,
    Remote,
    RemoteBlackBox,
    RemoteMultiTurn,
    RolloutConfig,
    SingleTurn,
)
from rljax.sampling import SamplingConfig
from rljax.tasks import (
    CoEvolvedTasks,
    CurriculumSource,
    D2EvoTasks,
    Dataset,
    DataSource,
    FailedTasks,
    FileData,
    HubData,
    MediumTasks,
    OrderedTasks,
    ReasoningGymData,
    ReflectedTasks,
    RewardConfig,
    RowsData,
    SkilledData,
    TwoStageTasks,
    UniformTasks,
    WorkersFailed,
)
from rljax.training import (
    CheckpointConfig,
    CriticConfig,
    LightSAMConfig,
    LogConfig,
    LoraConfig,
    MuonConfig,
    OptimizerConfig,
    UpdateConfig,
    WarmupConfig,
)

__all__ = [
    "ActorConfig",
    "BlackBox",
    "CheckpointConfig",
    "CoEvolvedTasks",
    "Config",
    "CriticConfig",
    "CurriculumSource",
    "D2EvoTasks",
    "DataSource",
    "Dataset",
    "EndpointConfig",
    "EngineFailed",
    "EngineTeacher",
    "EnvironmentLimits",
    "EvaluationConfig",
    "FailedTasks",
    "FileData",
    "FreshModel",
    "GroupsConfig",
    "Guided",
    "HubData",
    "LightSAMConfig",
    "LogConfig",
    "LoraConfig",
    "MediumTasks",
    "MeshConfig",
    "ModelSource",
    "ModelTeacher",
    "MultiTurn",
    "MuonConfig",
    "OptimizerConfig",
    "OrderedTasks",
    "OwnTeacher",
    "PreferenceConfig",
    "PretrainedModel",
    "RayConfig",
    "ReasoningGymData",
    "Recipe",
    "ReflectedTasks",
    "Remote",
    "RemoteBlackBox",
    "RemoteMultiTurn",
    "RewardConfig",
    "RolloutConfig",
    "RowsData",
    "RunModel",
    "SamplingConfig",
    "SingleTurn",
    "SkilledData",
    "SkillsConfig",
    "StagesConfig",
    "TeacherSource",
    "TwoStageTasks",
    "UniformTasks",
    "UpdateConfig",
    "WarmupConfig",
    "WorkersFailed",
]
