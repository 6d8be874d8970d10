"""The run's configuration: plain dataclasses, built in Python, overridden with `--config.a.b=value`.

Each room owns the config of what it does; here they are put together. A part that can be of several kinds (model, data,
actor, curriculum, algorithm) is an object that builds itself; there is no registry of names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from rljax.algorithms import GRPO, Algorithm
from rljax.evaluation import EvaluationConfig
from rljax.experiment.model import ModelSource, PretrainedModel
from rljax.experiment.preference_config import PreferenceConfig
from rljax.experiment.skills_config import SkillsConfig
from rljax.experiment.stages_config import StagesConfig
from rljax.experiment.teachers import TeacherSource
from rljax.parallel import MeshConfig
from rljax.rollouts import ActorConfig, Guided, RolloutConfig, SingleTurn
from rljax.sampling import SamplingConfig
from rljax.settings import field
from rljax.tasks import CurriculumSource, DataSource, ReasoningGymData, UniformTasks
from rljax.training import (
    CheckpointConfig,
    CriticConfig,
    LogConfig,
    LoraConfig,
    OptimizerConfig,
    UpdateConfig,
    WarmupConfig,
)


@runtime_checkable
class Recipe(Protocol):
    """An entry of `rljax.algorithms`: hyperparameters that build an `Algorithm`."""

    def build(self) -> Algorithm: ...


@dataclasses.dataclass
class Config:
    """One run. `prompts_per_step x algorithm.group_size` samples make a rollout; `steps` rollouts make a run."""

    name: str = "run"
    """What the run is called in its summary and in trackers."""
    seed: int = field(default=0, least=0, below=2**31)
    """Enters every random number: data order, weights of a fresh model, sampling."""
    steps: int = field(default=100, least=1)
    """Rollouts, each followed by its updates."""
    prompts_per_step: int = field(default=8, least=1)
    """Groups of a rollout. It must divide into `update.minibatches`."""
    model: ModelSource = dataclasses.field(default_factory=PretrainedModel)
    """Weights and tokenizer: `PretrainedModel` or `FreshModel`."""
    data: DataSource = dataclasses.field(default_factory=ReasoningGymData)
    """Examples: `ReasoningGymData`, `FileData`, `HubData`, `RowsData`; or `SkilledData` around one."""
    actor: ActorConfig = dataclasses.field(default_factory=SingleTurn)
    """How the policy is played and judged: `SingleTurn`, `MultiTurn` or `BlackBox`; over engines `Remote`,
    `RemoteMultiTurn` or `RemoteBlackBox`; or `Guided` around one."""
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    """Which weights sample a rollout, and on which devices."""
    curriculum: CurriculumSource = dataclasses.field(default_factory=UniformTasks)
    """Which examples are drawn: `UniformTasks`, `OrderedTasks`, `FailedTasks`, `ReflectedTasks`, `MediumTasks`,
    `TwoStageTasks`, or `CoEvolvedTasks` and `D2EvoTasks`, which make some."""
    algorithm: Recipe = dataclasses.field(default_factory=GRPO)
    """The method, an entry of `rljax.algorithms`."""
    reference_refresh: int = field(default=0, least=0)
    """Steps after which the reference becomes a copy of the policy; 0 leaves it to the algorithm."""
    reference_weight: float = field(default=1.0, above=0, most=1)
    """How far the reference then goes towards the policy: 1 is all of the way, a copy. Less makes it an exponential
    moving average of the weights, of decay 1 - this, with `reference_refresh=1` over all steps: what the KL penalty
    compares with, and what an `OwnTeacher` teaches. Of adapters their factors are averaged, not the products."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """The distribution that training samples from, and what ends a completion."""
    update: UpdateConfig = dataclasses.field(default_factory=UpdateConfig)
    """How a rollout becomes updates."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The policy's optimizer: `OptimizerConfig` (AdamW), `MuonConfig`, `LightSAMConfig`."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Adapters that are trained in place of the model's weights."""
    critic: CriticConfig = dataclasses.field(default_factory=CriticConfig)
    """The value function of an algorithm that has one; others leave it alone."""
    teachers: tuple[TeacherSource, ...] = ()
    """Who scores the samples of a method that distils, such as `OnPolicyDistillation`: `ModelTeacher`, `OwnTeacher`,
    `EngineTeacher`. With several, each names by `tasks` whose rows it teaches. Other methods have none."""
    warmup: WarmupConfig = dataclasses.field(default_factory=WarmupConfig)
    """Supervised steps before the first rollout."""
    preferences: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    """What `rljax prefer` learns from pairs of completions; other commands leave it alone."""
    stages: StagesConfig = dataclasses.field(default_factory=StagesConfig)
    """What `rljax stages` makes rows by, and trains on them; other commands leave it alone."""
    skills: SkillsConfig = dataclasses.field(default_factory=SkillsConfig)
    """What `rljax study skills` evolves a repository of skills by; other commands leave it alone."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Devices by mesh axis."""
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    """What is measured on held-out examples, and how often."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """What is saved, and how often."""
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    """What is written beside metrics."""


def to_dict(config: Any) -> Any:
    """JSON-ready form of a config, the class of each part noted beside its fields."""
    if callable(config) and hasattr(config, "__qualname__"):
        return f"{config.__module__}:{config.__qualname__}"
    if dataclasses.is_dataclass(config):
        parts = {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return {"class": type(config).__name__, **parts}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    return config


def actor_of(config: Config) -> Any:
    """What plays, whether or not guidance is around it."""
    return config.actor.actor if isinstance(config.actor, Guided) else config.actor


def changed_fields(old: Any, new: Any, path: str = "config") -> dict[str, tuple[Any, Any]]:
    """(old, new) of every field that differs in two configs as JSON holds them, by `config.part.field`. None stands for
    a field that one of them lacks."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return {} if old == new else {path: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*old, *new]):
        found |= changed_fields(old.get(name), new.get(name), f"{path}.{name}")
    return found
