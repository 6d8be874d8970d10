"""From a config to everything a run holds. What can be wrong is refused before weights load, and nothing is opened."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from rljax.algorithms import Algorithm
from rljax.batching import stack
from rljax.evaluation import Evaluation
from rljax.experiment.check import check, check_forks, is_over_engines
from rljax.experiment.config import Config
from rljax.experiment.model import model_path
from rljax.experiment.pipeline import Beside, Pipeline
from rljax.experiment.prompts import check_chat_settings
from rljax.experiment.pulse import Pulse
from rljax.experiment.stops import Stops
from rljax.models import DecoderConfig, load_config, load_model, param_shardings
from rljax.parallel import (
    DECODE_RULES,
    decoding_mesh,
    make_mesh,
    mesh_beside,
    num_processes,
    on_one_host,
    own_mesh,
    split_devices,
    use_mesh,
)
from rljax.plans import RolloutPlan
from rljax.rollouts import Actor, ActorParts, RolloutSettings
from rljax.settings import placed
from rljax.tasks import Curriculum, Dataset, Example
from rljax.text import Tokenizer, WithinText
from rljax.training import Critic, Learner, LossNeeds, with_before, with_critic, with_pushed
from rljax.types import Params, RolloutBatch, TrainState, Trajectory


@dataclasses.dataclass
class Run:
    """Everything a run holds, built once from its config.

    Attributes:
        mesh: what trains.
        rollout_mesh: what samples: on several processes the devices of this one, unless all decode in step.
        actor: plays the policy; a context manager.
        beside: devices that it has of its own; None where it takes turns with the learner.
        pipeline: gives it its work, in order; a context manager.
        evaluation: the last one.
        reference_scores: held-out avg@k per problem when the reference was last refreshed.
        state: replaced at every update; None until weights are loaded or restored.
        stops: tells when the run is asked to end.
        pulse: names what is under way, and shows it where it is open.
        empty_steps: steps without an update up to now, in a row.
        lacking: what the last of them lacked.
    """

    config: Config
    algorithm: Algorithm
    dataset: Dataset
    tokenizer: Tokenizer
    curriculum: Curriculum
    mesh: Mesh
    rollout_mesh: Mesh
    decoder: DecoderConfig
    actor: Actor
    learner: Learner
    critic: Critic | None = None
    evaluation: Evaluation | None = None
    reference_scores: list[float] = dataclasses.field(default_factory=list)
    state: TrainState = None  # type: ignore[assignment]
    stops: Stops = dataclasses.field(default_factory=Stops)
    pulse: Pulse = dataclasses.field(default_factory=Pulse)
    empty_steps: int = 0
    lacking: str = ""
    beside: Beside | None = None
    pipeline: Pipeline = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.pipeline = Pipeline(
            self.actor,
            self.algorithm.plan,
            self.curriculum,
            self.config.rollout,
            prompts=self.config.prompts_per_step,
            beside=self.beside,
        )

    def abstract_state(self) -> TrainState:
        """What a checkpoint of `state` is restored into."""
        critic = None if self.critic is None else self.critic.abstract_state()
        state = self.learner.abstract_state()
        state = with_before(state, state.trainable if self.lags else None)
        return with_pushed(with_critic(state, critic), state.trainable if self.pushes_seldom else None)

    def init_state(self, params: Params) -> TrainState:
        """The state at step 0, which owns `params`; a critic starts from a copy of them, or from its own model."""
        critic = None if self.critic is None else self.critic.init_state(critic_params(self, params))
        state = with_critic(self.learner.init_state(params), critic)
        # A push makes a copy of what is only named here.
        if self.pushes_seldom:
            state = self.learner.push(with_pushed(state, state.trainable))
        return self.learner.remember(state) if self.lags else state

    def initial_params(self) -> Params:
        """The model that the config names, on the mesh."""
        return self.config.model.params_of(self.decoder, param_shardings(self.decoder, self.mesh), self.config.seed)

    def policy(self) -> Params:
        """The weights of the policy as it stands: what is sampled with, evaluated and exported."""
        return self.learner.policy_params(self.state)

    @property
    def pushes_seldom(self) -> bool:
        """Whether rollouts keep weights for several steps."""
        return self.config.rollout.push_every > 1

    def push(self, step: int) -> None:
        """Hands the policy's weights to the rollouts that are ordered from `step` on, if it is one that does; nothing
        is reset before the first update. What is pushed is pushed again by a run that is resumed here."""
        rollout = self.config.rollout
        if step % rollout.push_every == 0:
            self.state = self.learner.push(self.state, rollout.reset_moments if step else "none")

    @property
    def lags(self) -> bool:
        """Whether rollouts also sample with older weights than the newest that they have."""
        return self.actor.older(1) != 1

    def remember(self, step: int) -> None:
        """Before the updates of `step`: keeps the weights that rollouts have, if they are the older ones of the next
        step."""
        version, following = (self.config.rollout.version_of(s) for s in (step, step + 1))
        if self.lags and self.actor.older(following) == version:
            self.state = self.learner.remember(self.state)

    def policy_moves(self, step: int) -> bool:
        """Whether this step updates the policy, rather than the critic alone."""
        return self.critic is None or step >= self.config.critic.warmup_steps

    def check(self) -> None:
        """Raises FloatingPointError if the last updates were all skipped."""
        for learner in (self.learner, self.critic):
            if learner is not None:
                learner.check()


def build(config: Config, devices: Sequence[jax.Device] | None = None) -> Run:
    """The run without weights, on `devices` (all of them when None). ValueError for what can be wrong in the config or
    the data."""
    algorithm = check(config)
    with placed("config.rollout"):
        training, rolling = split_devices(jax.devices() if devices is None else devices, config.rollout.devices)
    config.mesh.check(len(training))

    # In the order of what fails fastest: tokenizer, data, rewards and environments, then the model's shape.
    tokenizer = config.model.tokenizer_of()
    if algorithm.bind is not None:
        algorithm = algorithm.bind(WithinText(tokenizer))
        check_forks(config, algorithm.plan)
    algorithm = algorithm._replace(advantage_fn=jax.jit(algorithm.advantage_fn))
    dataset = config.data.load()
    check_chat_settings(config, dataset)
    # None lets JAX order all of its devices by their places in the machine.
    is_every = devices is None and not config.rollout.devices
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=None if is_every else training)
    # On the mesh, since the dtype that is chosen by itself depends on what its devices are.
    with use_mesh(mesh):
        decoder = config.model.decoder_of(tokenizer)
    beside = None
    if config.rollout.devices:
        own = mesh_beside(mesh, rolling)
        beside = Beside(own, param_shardings(decoder, own, DECODE_RULES))
    elif config.rollout.staleness and is_over_engines(config):
        # Engines need no device of this process, and what is done for them here (weights are written, probes scored)
        # must not wait for the learner's programs.
        own = mesh_beside(mesh, [host_device()])
        beside = Beside(own, param_shardings(decoder, own, DECODE_RULES))
    rollout_mesh = rollout_mesh_of(config, mesh, beside)
    processes = num_processes(mesh) // num_processes(rollout_mesh)
    actor, dataset = build_actor(config, algorithm.plan, dataset, tokenizer, decoder, rollout_mesh, processes)

    return Run(
        config=config,
        algorithm=algorithm,
        dataset=dataset,
        tokenizer=tokenizer,
        curriculum=config.curriculum.make(dataset.train, config.seed),
        mesh=mesh,
        rollout_mesh=rollout_mesh,
        decoder=decoder,
        actor=actor,
        learner=make_learner(config, decoder, algorithm, mesh),
        critic=make_critic(config, decoder, algorithm, mesh),
        beside=beside,
    )


def host_device() -> jax.Device:
    """The CPU of this process. ValueError where JAX was told to leave it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError(
            "config.rollout.staleness over engines scores their probes on the CPU, which JAX_PLATFORMS leaves out "
            f"({error}); add cpu to it, or give rollouts a device (config.rollout.devices=1)"
        ) from None


def rollout_mesh_of(config: Config, mesh: Mesh, beside: Beside | None) -> Mesh:
    """What this process samples on, where `mesh` trains. ValueError for a setting that takes several processes on one,
    or one mesh."""
    whole = decoding_mesh(mesh)
    if config.rollout.in_step and num_processes(mesh) == 1:
        raise ValueError(
            "config.rollout.in_step=True has no effect on one process; leave it out, or start the run on several"
        )
    if config.rollout.in_step and beside is not None:
        raise ValueError(
            f"config.rollout.in_step=True decodes on the devices of all processes together, and config.rollout.devices="
            f"{config.rollout.devices} on those of each by itself; leave one of them out"
        )
    if beside is not None:
        return beside.mesh
    if num_processes(mesh) == 1 or config.rollout.in_step:
        return whole
    # Of a machine that is not here, whose plan this is, all hosts are alike.
    return (
        own_mesh(whole)
        if jax.process_count() > 1
        else on_one_host(own_mesh(whole, whole.devices.flat[0].process_index))
    )


def build_actor(
    config: Config,
    plan: RolloutPlan,
    dataset: Dataset,
    tokenizer: Tokenizer,
    decoder: DecoderConfig,
    mesh: Mesh,
    processes: int = 1,
) -> tuple[Actor, Dataset]:
    """What plays the policy on `mesh`, with nothing open, and the rows that it can play; one of `processes` that share
    the groups. ValueError for prompts that cannot be sampled or trained on."""
    sampling = config.sampling
    settings = RolloutSettings(
        seed=config.seed,
        sampling=sampling.params(),
        chat=config.data.chat,
        stop_strings=sampling.stop_strings,
        truncated_is_wrong=sampling.truncated_is_wrong,
        solved_by=config.evaluation.solved_by,
    )
    parts = ActorParts(
        decoder=decoder,
        tokenizer=tokenizer,
        mesh=mesh,
        plan=plan,
        dataset=dataset,
        sampling=sampling,
        settings=settings,
        groups=config.prompts_per_step,
        processes=processes,
    )
    actor = config.actor.build(parts)
    return actor, config.actor.check_prompts(parts, config.update.pack_length)


def make_learner(config: Config, decoder: DecoderConfig, algorithm: Algorithm, mesh: Mesh) -> Learner:
    """The policy's learner."""
    plan = algorithm.plan
    needs = LossNeeds(reference=plan.needs_ref, uniforms=plan.needs_uniforms, sampling=config.sampling.params())
    return Learner(
        decoder,
        algorithm.loss,
        config.optimizer,
        config.update,
        needs=needs,
        mesh=mesh,
        seed=config.seed,
    )


def make_critic(config: Config, decoder: DecoderConfig, algorithm: Algorithm, mesh: Mesh) -> Critic | None:
    """The critic that the algorithm's plan asks for. ValueError for a model that it cannot start from."""
    spec = algorithm.plan.critic
    if spec is None:
        return None

    critic = config.critic
    if critic.model:
        own = load_config(model_path(critic.model), dtype=decoder.dtype, param_dtype=decoder.param_dtype)
        if own.vocab_size < decoder.vocab_size:
            raise ValueError(
                f"config.critic.model={critic.model!r} has embeddings for {own.vocab_size} tokens, but the policy "
                f"samples {decoder.vocab_size}; take a model with its vocabulary, or none to start from the policy"
            )
        decoder = own
    update = dataclasses.replace(config.update, epochs=critic.epochs)
    returns_fn = jax.jit(spec.returns_fn)
    return Critic(decoder, spec.loss, critic.optimizer, returns_fn, update, mesh=mesh, seed=config.seed)


def critic_params(run: Run, params: Params) -> Params:
    """The language model that the critic starts from: `params`, or `config.critic.model`."""
    config = run.config
    critic = run.critic
    if critic is None or not config.critic.model:
        return params
    decoder = dataclasses.replace(critic.config, value_head=False)
    dtypes = {"dtype": decoder.dtype, "param_dtype": decoder.param_dtype}
    return load_model(model_path(config.critic.model), shardings=param_shardings(decoder, run.mesh), **dtypes)[1]


def stack_rows(config: Config, trajectories: Sequence[Trajectory], rows: int | None = None) -> RolloutBatch:
    """`stack` by the bucket tables of `config`; into exactly `rows` rows if told so."""
    tables = {"length_buckets": config.update.trajectory_buckets, "row_buckets": () if rows is None else (rows,)}
    return stack(trajectories, **{name: table for name, table in tables.items() if table})


def held_out_examples(run: Run) -> list[Example]:
    """The examples that are evaluated. ValueError where there are none."""
    problems = run.config.evaluation.problems
    if problems < 0:
        raise ValueError(f"config.evaluation.problems={problems} must be at least 0 here; 0 is all held-out examples")
    examples = list(run.dataset.test[: problems or None])
    if not examples:
        raise ValueError(
            "the data holds out no example, and a run is evaluated before and after training; raise "
            "config.data.test_fraction (or test_size), or name held-out data"
        )
    return examples
