"""What cannot work is refused in one line, before any data is read or device touched."""

import dataclasses
import importlib.util
import math

import numpy as np

from rljax.algorithms import Algorithm
from rljax.evaluation import EvaluationConfig
from rljax.experiment.config import Config, actor_of
from rljax.experiment.teachers import EngineTeacher, ModelTeacher, OwnTeacher
from rljax.plans import RolloutPlan
from rljax.rollouts import BlackBox, MultiTurn, Remote, RemoteBlackBox, RemoteMultiTurn, SingleTurn
from rljax.sampling import SamplingConfig
from rljax.settings import Switch, check_config, check_effect, placed, shown
from rljax.tasks import FailedTasks, FileData, HubData, ReasoningGymData, ReflectedTasks, RowsData
from rljax.training import CheckpointConfig, OptimizerConfig, has_first_moment
from rljax.types import NO_PARENT, RolloutBatch

SWITCHES = (
    Switch(CheckpointConfig, "keep_best", lambda n: not n, ("best_metric",), "set that to how many of the best stay"),
    Switch(CheckpointConfig, "every", lambda n: not n, ("keep_best",), "set that above 0"),
    Switch(EvaluationConfig, "temperature", lambda t: t == 0, ("top_p",), "set that above 0"),
    Switch(SamplingConfig, "temperature", lambda t: t == 0, ("top_k", "top_p", "min_p"), "set that above 0"),
    Switch(OptimizerConfig, "schedule", lambda s: s == "constant", ("total_steps",), "set that to linear or cosine"),
    Switch(MultiTurn, "hosts", lambda hosts: hosts != "ray", ("ray",), "set that to ray"),
    Switch(MultiTurn, "stale_share", lambda p: not p, ("stale_every",), "set that above 0"),
    Switch(MultiTurn, "groups_in_flight", lambda n: not n, ("steps_in_flight", "at_hand_over"), "set that above 0"),
    Switch(
        RemoteMultiTurn,
        "engines",
        bool,
        ("decode_rows", "prefill_chunks", "check_every", "at_hand_over", "answers_after", "stale_share"),
        "take MultiTurn, which decodes in this process",
    ),
    Switch(
        RemoteBlackBox,
        "engines",
        bool,
        ("decode_rows", "prefill_chunks", "check_every"),
        "take BlackBox, which decodes in this process",
    ),
    *(
        Switch(teacher, "context_column", lambda column: not column, ("context_format",), "name a column")
        for teacher in (ModelTeacher, OwnTeacher, EngineTeacher)
    ),
    Switch(FailedTasks, "forgets", lambda forgets: not forgets, ("eta", "decay"), "leave that on"),
    Switch(FileData, "test", bool, ("test_fraction",), "leave that out"),
    Switch(HubData, "test_split", bool, ("test_fraction",), "leave that out"),
    Switch(RowsData, "test_args", bool, ("test_fraction",), "leave that out"),
)
"""Fields that nobody sets for another reason than their effect. Those that stay in place while their switch is tried on
and off (a warm-up's, a critic's) are not among them."""


def check(config: Config, device_count: int | None = None) -> Algorithm:
    """Builds the algorithm and refuses impossible combinations with a `ValueError` of one line.

    Types and ranges are those of the fields (`rljax.settings`), and what a part can see by itself it checks itself;
    here is what takes two. `device_count` is checked against the mesh when given.
    """
    check_config(config)
    check_effect(config, SWITCHES)
    with placed("config.algorithm"):
        algorithm = config.algorithm.build()
        plan = algorithm.plan
        if plan.forks is not None:
            plan.forks.check()

    if config.prompts_per_step % config.update.minibatches:
        raise ValueError(
            f"config.prompts_per_step={config.prompts_per_step} does not divide into config.update.minibatches="
            f"{config.update.minibatches}; a minibatch holds whole groups, so choose a divisor"
        )
    check_forks(config, plan)
    check_best(config)
    check_verifier(config)
    check_reflections(config)

    # A teacher may be the reference, so a method without a KL penalty can have one all the same.
    needs_ref = plan.needs_ref or any(teacher.needs_reference for teacher in config.teachers)
    if config.reference_refresh and not needs_ref:
        raise ValueError(
            f"config.reference_refresh={config.reference_refresh} has no effect: {type(config.algorithm).__name__} has "
            "no reference model; set config.algorithm.kl_coef above 0, or leave it out"
        )

    if config.reference_weight != 1 and not (config.reference_refresh or plan.refresh_every):
        raise ValueError(
            f"config.reference_weight={config.reference_weight:g} has no effect: the reference never moves; set "
            "config.reference_refresh to the steps after which it does, e.g. 1"
        )

    config.actor.check(plan, config.sampling, config.update.pack_length)
    check_off_policy(config, algorithm)
    check_entropies(config, algorithm)
    check_groups(config, plan)
    check_adapters(config)
    check_teachers(config, plan)
    check_pushes(config)

    if config.sampling.temperature <= 0 and plan.group_size > 1:
        raise ValueError(
            f"config.sampling.temperature={config.sampling.temperature} makes all {plan.group_size} samples of a group "
            "equal; training needs a temperature above 0 (evaluation is greedy on its own)"
        )
    check_log(config)

    if device_count is not None:
        config.mesh.check(device_count)
    return algorithm


_TRACKERS = {"wandb_project": "wandb", "trackio_project": "trackio", "mlflow_experiment": "mlflow"}
"""The package, which is also the name of the extra, that a field of `config.log` needs."""


def check_log(config: Config) -> None:
    """Refuses logs whose package is missing, and steps to trace that the run does not have."""
    log = config.log
    for field, package in _TRACKERS.items():
        name = getattr(log, field)
        if name and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"config.log.{field}={name!r} needs {package}, which is not installed; "
                f"pip install 'rljax-lm[{package}]', or leave it empty"
            )

    if log.recordings and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            "config.log.recordings=True needs pyarrow, which is not installed; pip install 'rljax-lm[parquet]', or "
            "leave it out"
        )

    traced = log.profile_steps
    if traced and (len(traced) != 2 or not 1 <= traced[0] <= traced[1] <= config.steps):
        raise ValueError(
            f"config.log.profile_steps={traced} must be the first and the last step to trace, between 1 and "
            f"config.steps={config.steps}, such as (2, 3); leave it empty to trace none"
        )


def check_off_policy(config: Config, algorithm: Algorithm) -> None:
    """Refuses rollouts of other policies for a loss that takes them for the current one's, and old log-probs that would
    leave a correction nothing to correct."""
    staleness = config.rollout.staleness
    push_every = config.rollout.push_every
    source = config.actor.off_policy or (f"config.rollout.staleness={staleness}" if staleness else "")
    source = source or (f"config.rollout.push_every={push_every}" if push_every > 1 else "")
    uses_sampler = config.update.use_sampler_logprobs
    if not source and not uses_sampler:
        return

    # A correction weighs old log-probs against the sampler's: taken for the same, they leave it nothing.
    name = type(config.algorithm).__name__
    compared = algorithm.compared_with()
    if uses_sampler and compared.old and compared.behavior:
        raise ValueError(
            f"config.update.use_sampler_logprobs=True makes old and sampler's log-probs one, and {name} corrects by "
            "their difference; set it to False"
        )

    if source and not compared.behavior and not (uses_sampler and compared.old):
        raise ValueError(
            f"{source} trains on tokens that other policies sampled, and {name} takes them for the current one's; set "
            "config.update.use_sampler_logprobs=True, which takes ratios to the policy that sampled, or choose a "
            "method that corrects, e.g. DecoupledPPO, DIS or AgentRL"
        )


def check_groups(config: Config, plan: RolloutPlan) -> None:
    """Refuses rules for groups that do not fit the actor, or that nothing could fall under."""
    actor = config.actor
    own = config.rollout.groups
    if isinstance(actor, MultiTurn) and not actor.stale_share and None not in (actor.steps_in_flight, own.max_age):
        raise ValueError(
            f"config.rollout.groups.max_age={own.max_age} and config.actor.steps_in_flight={actor.steps_in_flight} "
            "both bound the age of groups: the one wastes what the other has let in, or leaves nothing out; set one"
        )
    own.check(
        plan,
        spans_updates=isinstance(actor, MultiTurn) and bool(actor.groups_in_flight or actor.stale_share),
        rows_per_member=actor.trained_conversations if isinstance(actor, BlackBox) else 1,
    )


def check_entropies(config: Config, algorithm: Algorithm) -> None:
    """Refuses an engine that says no entropies for a method whose advantages are made of them."""
    actor = actor_of(config)
    if is_over_engines(config) and not actor.says_entropies and reads_entropies(algorithm):
        raise ValueError(
            f"config.actor.engine={actor.engine!r} says no entropies, of which {type(config.algorithm).__name__} makes "
            "advantages; serve with engine='rljax', or choose another method"
        )


def reads_entropies(algorithm: Algorithm) -> bool:
    """Whether advantages depend on what the sampler said of entropies: tried on a group of samples, of which none is
    known in the second trial."""
    rows = algorithm.plan.group_size
    shape = (rows, 4)
    zeros = np.zeros(rows, np.int32)

    # All that an advantage may read is there, so that none fails for want of it, a critic's values and a reference too.
    # Rewards differ between rows and entropies between tokens, so that what depends on them shows.
    batch = RolloutBatch(
        tokens=np.arange(math.prod(shape), dtype=np.int32).reshape(shape),
        action_mask=np.ones(shape, bool),
        behavior_logprobs=np.full(shape, -1, np.float32),
        entropies=np.linspace(0, 1, math.prod(shape), dtype=np.float32).reshape(shape),
        turn_ids=np.zeros(shape, np.int32),
        policy_version=np.zeros(shape, np.int32),
        lengths=np.full(rows, shape[1], np.int32),
        reward=np.linspace(0, 1, rows, dtype=np.float32),
        is_valid=np.ones(rows, bool),
        is_truncated=np.zeros(rows, bool),
        group_id=zeros,
        episode_id=np.arange(rows, dtype=np.int32),
        source=zeros,
        parent_row=np.full(rows, NO_PARENT, np.int32),
        fork_index=zeros,
        fork_score=np.zeros(rows, np.float32),
        intervention=zeros,
        ref_logprobs=np.full(shape, -1, np.float32),
        values=np.zeros(shape, np.float32),
        turn_rewards=np.zeros(shape, np.float32),
        state_ids=np.zeros(shape, np.int32),
        columns={
            column.name: np.zeros(rows if column.per == "row" else shape, np.float32)
            for column in algorithm.plan.columns
        }
        | {name: np.zeros(shape, np.float32) for name in algorithm.plan.teacher_columns},
    )

    # What depends on NaN is NaN, which equals nothing.
    unknown = dataclasses.replace(batch, entropies=np.full(shape, np.nan, np.float32))
    known = np.asarray(algorithm.advantage_fn(batch))
    return not np.array_equal(known, np.asarray(algorithm.advantage_fn(unknown)))


def check_adapters(config: Config) -> None:
    """Refuses a critic's adapters where nothing says what they are."""
    if config.critic.adapters and not config.lora:
        raise ValueError(
            "config.critic.adapters=True trains adapters as config.lora has them, and config.lora.rank=0 has none; set "
            "config.lora.rank above 0, or leave the critic's adapters out"
        )


def check_teachers(config: Config, plan: RolloutPlan) -> None:
    """Refuses a method that distils without teachers, teachers without one, and distributions that are cut off."""
    name = type(config.algorithm).__name__
    if plan.teacher is None:
        if config.teachers:
            raise ValueError(
                f"config.teachers has no effect: {name} asks no teacher; leave it empty, or choose a method that "
                "distils, e.g. OnPolicyDistillation or MOPD"
            )
        return

    if not config.teachers:
        raise ValueError(f"config.teachers=() but {name} needs one at least; give config.teachers=(ModelTeacher(...),)")

    told = [i for i, teacher in enumerate(config.teachers) if getattr(teacher, "context_column", "")]
    if told and not isinstance(config.actor, (SingleTurn, Remote)):
        actor = type(config.actor).__name__
        raise ValueError(
            f"config.teachers[{told[0]}].context_column adds to a prompt of the data, and {actor} opens by itself; "
            "leave it empty, or take SingleTurn"
        )

    # What is cut off has no log-prob of the policy's to compare.
    own = config.sampling
    for field in ("top_k", "top_p", "min_p"):
        value = getattr(own, field)
        if value != getattr(SamplingConfig(), field):
            raise ValueError(
                f"config.sampling.{field}={value} cuts tokens off that a teacher gives a probability, and {name} "
                "compares whole distributions; leave it out"
            )


def check_pushes(config: Config) -> None:
    """Refuses hand-overs that never come, and resets of what an optimizer does not have."""
    own = config.rollout
    # A run of one push samples all of its rollouts by the weights that it began with.
    if own.push_every > 1 and own.push_every >= config.steps:
        raise ValueError(
            f"config.rollout.push_every={own.push_every} hands no trained weights to the rollouts of config.steps="
            f"{config.steps}; lower it, or raise the steps"
        )
    if own.reset_moments == "first" and not has_first_moment(config.optimizer):
        raise ValueError(
            f"config.rollout.reset_moments='first' has no effect: {type(config.optimizer).__name__} averages no "
            "gradients as it is set; take 'all', or leave it out"
        )
    if own.reset_moments != "none" and config.steps < 2:
        raise ValueError(
            f"config.rollout.reset_moments={own.reset_moments!r} has no effect with config.steps=1; leave it out"
        )


def check_best(config: Config) -> None:
    """Refuses to rank checkpoints by an evaluation where no saved step has one."""
    own = config.checkpoint
    if not own.keep_best or not own.best_metric.startswith("eval/"):
        return
    every = math.lcm(own.every, config.evaluation.every)
    if not 0 < every < config.steps:
        raise ValueError(
            f"config.checkpoint.best_metric={own.best_metric!r} is measured every config.evaluation.every="
            f"{config.evaluation.every} steps, and config.checkpoint.every={own.every} saves none of them before the "
            f"last of {config.steps}; let one divide the other"
        )


def check_verifier(config: Config) -> None:
    """Refuses settings of the data's own verifier where something else rewards."""
    data = config.data
    actor = actor_of(config)
    is_judged = bool(getattr(actor, "rewards", ()))
    if not isinstance(data, ReasoningGymData) or not (is_judged or isinstance(actor, MultiTurn)):
        return
    by = "the rewards of config.actor" if is_judged else "the environment"
    for name in ("full_score_only", "extract"):
        value = getattr(data, name)
        if value != getattr(ReasoningGymData(), name):
            raise ValueError(
                f"config.data.{name}={shown(value)} has no effect: {by} and not the data's verifier say what a sample "
                "is worth; leave one of them out"
            )


def check_reflections(config: Config) -> None:
    """Refuses questions to a policy that only a program of its own talks to."""
    actor = actor_of(config)
    if isinstance(config.curriculum, ReflectedTasks) and isinstance(actor, (BlackBox, RemoteBlackBox)):
        raise ValueError(
            f"config.curriculum=ReflectedTasks(...) has the policy read its own rollouts, and config.actor="
            f"{type(actor).__name__}(...) asks it nothing but what its agents ask; take FailedTasks, or SingleTurn or "
            "MultiTurn"
        )


def is_over_engines(config: Config) -> bool:
    """Whether engines in other processes sample."""
    return isinstance(actor_of(config), (Remote, RemoteMultiTurn, RemoteBlackBox))


def check_forks(config: Config, plan: RolloutPlan) -> None:
    """Refuses forks that cannot be made. A plan that speaks of words is checked again once it knows a tokenizer."""
    if plan.forks is None:
        return
    plan.forks.check()
    if plan.forks.max_injected + 1 >= config.sampling.max_new_tokens:
        raise ValueError(
            f"config.sampling.max_new_tokens={config.sampling.max_new_tokens} leaves no room beside the tokens that a "
            f"fork of {type(config.algorithm).__name__} begins with; raise it to at least {plan.forks.max_injected + 2}"
        )
