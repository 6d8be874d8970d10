"""From a config to everything a run holds. What can be wrong is refused before weights load, and nothing is opened."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from rljax.algorithms import Algorithm
from rljax.batching import stack
from rljax.evaluation import Evaluation
from rljax.experiment.check import check, check_forks, is_over_engines
from rljax.experiment.config import Config, actor_of
from rljax.experiment.model import model_path
from rljax.experiment.pipeline import Beside, Pipeline
from rljax.experiment.player import PolicyPlayer
from rljax.experiment.prompts import check_chat_settings
from rljax.experiment.pulse import Pulse
from rljax.experiment.stops import Stops
from rljax.experiment.teachers import StudentWeights, TeacherParts, Teachers
from rljax.models import (
    DecoderConfig,
    adapters_of,
    base_config,
    cast_params,
    init_adapters,
    load_config,
    load_model,
    load_peft,
    merged_params,
    param_shardings,
    quantized_params,
    with_adapters,
)
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
from rljax.rollouts import (
    Actor,
    ActorParts,
    BlackBox,
    MultiTurn,
    Remote,
    RemoteBlackBox,
    RemoteMultiTurn,
    RolloutSettings,
    SingleTurn,
)
from rljax.sampling import SamplingConfig, SamplingParams
from rljax.sampling.config import GRAMMARS, PENALTIES
from rljax.sampling.divergence import DivergenceHead
from rljax.sampling.logits import MASKED, logit_biases
from rljax.sampling.slots import Grammar
from rljax.settings import placed, shown
from rljax.tasks import Curriculum, Dataset, DataSource, Evolving, Example, FileRows
from rljax.text import Grammars, Tokenizer, WithinText, control_tokens_of, token_of
from rljax.training import Critic, Learner, LossNeeds, trained_of, with_base, with_before, with_critic, with_pushed
from rljax.types import Params, RolloutBatch, TrainState, Trajectory

MASTER_DTYPE = "float32"
"""What trained weights are kept in."""


@dataclasses.dataclass
class Run:
    """Everything a run holds, built once from its config.

    Attributes:
        mesh: what trains.
        rollout_mesh: what samples: on several processes the devices of this one, unless all decode in step.
        actor: plays the policy; a context manager. None where nothing is sampled.
        beside: devices that it has of its own; None where it takes turns with the learner.
        grammars: those that completions follow, by name.
        pipeline: gives it its work, in order; a context manager. There is none without an actor.
        teachers: score rollouts, where the algorithm distils.
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
    learner: Learner
    actor: Actor = None  # type: ignore[assignment]
    critic: Critic | None = None
    teachers: Teachers | None = None
    evaluation: Evaluation | None = None
    reference_scores: list[float] = dataclasses.field(default_factory=list)
    state: TrainState = None  # type: ignore[assignment]
    stops: Stops = dataclasses.field(default_factory=Stops)
    pulse: Pulse = dataclasses.field(default_factory=Pulse)
    empty_steps: int = 0
    lacking: str = ""
    beside: Beside | None = None
    pipeline: Pipeline = dataclasses.field(init=False)
    grammars: Grammars = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.grammars = grammars_over(self.config, self.tokenizer, self.decoder)
        if self.actor is None:
            return
        self.pipeline = Pipeline(
            self.actor,
            self.algorithm.plan,
            self.curriculum,
            self.config.rollout,
            prompts=self.config.prompts_per_step,
            beside=self.beside,
            player=self.player() if isinstance(self.curriculum, Evolving) else None,
        )

    def player(self) -> PolicyPlayer:
        """What a curriculum may ask of the policy."""
        config = self.config
        parts = actor_parts(config, self.algorithm.plan, self.dataset, self.tokenizer, self.decoder, self.rollout_mesh)

        def can_play(example: Example) -> bool:
            alone = dataclasses.replace(parts, dataset=FileRows([example], [], self.dataset.verifier))
            try:
                config.actor.check_prompts(alone, config.update.pack_length)
            except ValueError:
                return False
            return True

        return PolicyPlayer(self.actor, parts.settings.sampling, config.prompts_per_step, can_play)

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

    def target_state(self) -> TrainState:
        """`abstract_state` over the frozen weights, which are loaded for it where there are any."""
        state = self.abstract_state()
        if self.decoder.lora is None:
            return state
        params = self.initial_params()
        if self.critic is not None and self.config.critic.adapters:
            of_critic = self.critic.base_of(critic_params(self, params))
            state = with_critic(state, with_base(state.critic, of_critic))
        return with_base(state, self.learner.base_of(params))

    def initial_params(self) -> Params:
        """The model that the config names, with adapters where it asks for them, on the mesh."""
        base = base_config(self.decoder)
        params = self.config.model.params_of(base, param_shardings(base, self.mesh), self.config.seed)
        params = quantized_params(self.decoder, params)
        if not self.config.lora.path:
            return fresh_adapters(self.decoder, params, self.mesh, self.config.seed)
        adapters = load_peft(self.config.lora.path, self.decoder, shardings=param_shardings(self.decoder, self.mesh))
        return with_adapters(params, adapters)

    def policy(self) -> Params:
        """The weights of the policy as it stands: what is sampled with, evaluated and exported."""
        return self.learner.policy_params(self.state)

    def student(self) -> StudentWeights:
        """What a teacher may ask of the policy's own weights."""
        return StudentWeights(self.policy, lambda: self.learner.reference_params(self.state))

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
        return self.actor is not None and self.actor.older(1) != 1

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


def build(
    config: Config,
    devices: Sequence[jax.Device] | None = None,
    *,
    plays: Callable[[Dataset], bool] = lambda dataset: True,
    source: DataSource | None = None,
) -> Run:
    """The run without weights, on `devices` (all of them when None). Where `plays` does not hold of the data, nothing
    is sampled, and the run has no actor. `source` is where rows are read; None is `config.data`. ValueError for what
    can be wrong in the config or the data."""
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
    dataset = (config.data if source is None else source).load()
    check_chat_settings(config, dataset)
    # None lets JAX order all of its devices by their places in the machine.
    is_every = devices is None and not config.rollout.devices
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=None if is_every else training)
    # On the mesh, since the dtype that is chosen by itself depends on what its devices are.
    with use_mesh(mesh):
        decoder = config.lora.decoder_of(config.model.decoder_of(tokenizer))
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
    playing: dict[str, Any] = {}
    if plays(dataset):
        actor, dataset = build_actor(config, algorithm.plan, dataset, tokenizer, decoder, rollout_mesh, processes)
        playing["actor"] = actor
        playing["teachers"] = make_teachers(config, algorithm.plan, dataset, tokenizer, decoder, mesh)

    return Run(
        config=config,
        algorithm=algorithm,
        dataset=dataset,
        tokenizer=tokenizer,
        curriculum=make_curriculum(config, dataset),
        mesh=mesh,
        rollout_mesh=rollout_mesh,
        decoder=decoder,
        learner=make_learner(
            config, decoder, algorithm, mesh, sampled_by(config, tokenizer, decoder), playing.get("teachers")
        ),
        **playing,
        critic=make_critic(config, decoder, algorithm, mesh),
        beside=beside,
    )


def make_curriculum(config: Config, dataset: Dataset) -> Curriculum:
    """What draws the examples of steps; none of the tasks that it makes is a held-out one."""
    with placed("config.curriculum"):
        curriculum = config.curriculum.make(dataset.train, config.seed)
    if isinstance(curriculum, Evolving):
        curriculum.keep_out(dataset.test)
    return curriculum


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
    parts = actor_parts(config, plan, dataset, tokenizer, decoder, mesh, processes)
    check_sampled_so(config)
    check_scored(config, plan)
    check_stops(config, parts.settings, dataset, tokenizer)
    actor = config.actor.build(parts)
    return actor, config.actor.check_prompts(parts, config.update.pack_length)


def actor_parts(
    config: Config,
    plan: RolloutPlan,
    dataset: Dataset,
    tokenizer: Tokenizer,
    decoder: DecoderConfig,
    mesh: Mesh,
    processes: int = 1,
) -> ActorParts:
    """What the config's actor is built from. ValueError for tokens that there are none of, and for grammars."""
    sampling = config.sampling
    settings = RolloutSettings(
        seed=config.seed,
        sampling=sampled_by(config, tokenizer, decoder),
        chat=config.data.chat,
        stop_strings=sampling.stop_strings,
        truncated_is_wrong=sampling.truncated_is_wrong,
        solved_by=config.evaluation.solved_by,
        stop_column=sampling.stop_column,
        grammar_of=grammars_of(config, grammars_over(config, tokenizer, decoder), dataset),
    )
    return ActorParts(
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


def sampled_by(config: Config, tokenizer: Tokenizer, decoder: DecoderConfig) -> SamplingParams:
    """The distribution that training samples from, and trains. ValueError for tokens that there are none of."""
    with placed("config.sampling"):
        params = config.sampling.params(functools.partial(token_of, tokenizer))
    if (largest := max(logit_biases(params), default=0)) >= decoder.num_ids:
        raise ValueError(
            f"config.sampling.logit_bias and config.sampling.banned name the token {largest}, outside the vocabulary "
            f"of {decoder.num_ids}; leave it out"
        )
    if len(banned_tokens(params)) >= decoder.num_ids:
        raise ValueError(
            f"config.sampling.banned names all {decoder.num_ids} tokens of the vocabulary, and something must be "
            "sampled; leave some out"
        )
    return params


def banned_tokens(params: SamplingParams) -> list[int]:
    """Ids that are never sampled."""
    return [token for token, added in logit_biases(params).items() if added <= MASKED / 2]


def grammars_over(config: Config, tokenizer: Tokenizer, decoder: DecoderConfig) -> Grammars:
    """Those that completions of a run may follow. ValueError where nothing could end one."""
    # Most runs have none, and may ban what they like.
    if not config.sampling.follows_grammar:
        return Grammars(tokenizer, decoder.num_ids)
    with placed("config.sampling.banned"):
        return Grammars(tokenizer, decoder.num_ids, banned_tokens(sampled_by(config, tokenizer, decoder)))


_SAMPLED_BY: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*GRAMMARS, *PENALTIES), (SingleTurn, MultiTurn, BlackBox)),
    "stop_column": (SingleTurn, Remote),
    "top_logprobs": (SingleTurn, BlackBox),
}
"""Options of sampling that not all actors have, and those that do."""

_BY_ENGINES = (RemoteMultiTurn, RemoteBlackBox)
"""Actors of turns that have none of them: engines say no more of a turn than its tokens and their log-probs."""


def check_sampled_so(config: Config) -> None:
    """ValueError for what is set of sampling and that the actor does not do."""
    actor = actor_of(config)
    defaults = SamplingConfig()
    for name, actors in _SAMPLED_BY.items():
        value = getattr(config.sampling, name)
        is_done = isinstance(actor, actors) and not isinstance(actor, _BY_ENGINES)
        if is_done or value == getattr(defaults, name):
            continue
        known = " or ".join(f"{kind.__name__}(...)" for kind in actors)
        raise ValueError(
            f"config.sampling.{name}={shown(value)} has no effect with config.actor={type(config.actor).__name__}(...);"
            f" use config.actor={known}, or leave it out"
        )


def check_scored(config: Config, plan: RolloutPlan) -> None:
    """ValueError for distributions that depend on more than the hidden state, where they are not scored so."""
    sampling = config.sampling
    defaults = SamplingConfig()
    binding = [name for name in (*GRAMMARS, *PENALTIES) if getattr(sampling, name) != getattr(defaults, name)]
    if not binding:
        return

    # The remedy is the same for all: whatever binds first is named.
    is_grammar = binding[0] in GRAMMARS
    what = "completions that follow a grammar" if is_grammar else "penalties of tokens before"
    where = f"config.sampling.{binding[0]}={shown(getattr(sampling, binding[0]))}"
    if config.mesh.sequence > 1:
        raise ValueError(
            f"{where}: config.mesh.sequence={config.mesh.sequence}: devices that share sequences do not score {what}; "
            "set it to 1, or leave them out"
        )
    if plan.teacher is not None:
        raise ValueError(
            f"{where}: teachers do not score {what}; leave them out, or choose an algorithm without teachers"
        )
    if plan.forks is not None and plan.forks.lagged_chains:
        raise ValueError(
            f"{where}: forks from older weights do not go with {what}; choose another algorithm, or leave them out"
        )
    if plan.forks is not None and plan.forks.max_injected and is_grammar:
        raise ValueError(f"{where}: forks that are given tokens do not go with {what}; choose another algorithm")


def check_stops(config: Config, settings: RolloutSettings, dataset: Dataset, tokenizer: Tokenizer) -> None:
    """ValueError for stop texts of rows that no completion can hold."""
    column = config.sampling.stop_column
    if not column:
        return
    for example in (*dataset.train, *dataset.test):
        stops = settings.stops_of(example)
        # Ids that end completions are those of the run, and the text of a completion does not show them.
        problem = f"{example.name}, column {column}: {{}} never ends a completion"
        controls = control_tokens_of(tokenizer, stops, problem)
        if unknown := set(controls) - set(tokenizer.stop_ids):
            raise ValueError(
                f"{example.name}, column {column}: the control token {min(unknown)} ends completions of all rows or of "
                "none; name it in config.sampling.stop_strings"
            )


def grammars_of(config: Config, grammars: Grammars, dataset: Dataset) -> Callable[[Example], Grammar | None]:
    """What completions of a row follow. ValueError for a grammar that cannot be read, of the config or of any row."""
    sampling = config.sampling
    if not sampling.follows_grammar:
        return lambda example: None

    def name_of(example: Example) -> str:
        if not sampling.schema_column:
            return sampling.grammar
        schema = example.columns.get(sampling.schema_column)
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return "" if schema in (None, "") else f"json_schema {text}"

    for example in (*dataset.train, *dataset.test):
        try:
            name = name_of(example)
            if name:
                grammars(name)
        except (ValueError, TypeError) as error:
            where = f"{example.name}, column {sampling.schema_column}" if sampling.schema_column else "config.sampling"
            raise ValueError(f"{where}: {error}") from None
        if not sampling.schema_column:
            break
    return lambda example: grammars(name) if (name := name_of(example)) else None


def make_learner(
    config: Config,
    decoder: DecoderConfig,
    algorithm: Algorithm,
    mesh: Mesh,
    sampling: SamplingParams,
    teachers: Teachers | None = None,
) -> Learner:
    """The policy's learner; `sampling` is the distribution that its log-probs are of."""
    plan = algorithm.plan
    divergence = None
    # Where nothing is sampled there are no teachers, and nothing is distilled.
    if plan.teacher is not None and plan.teacher.divergence is not None and teachers is not None:
        divergence = DivergenceHead(plan.teacher.divergence, teachers.head_config, config.update.head_chunk)
    needs = LossNeeds(
        reference=plan.needs_ref or any(teacher.needs_reference for teacher in config.teachers),
        uniforms=plan.needs_uniforms,
        divergence=divergence,
        sampling=sampling,
    )
    return Learner(
        decoder,
        algorithm.loss,
        config.optimizer,
        config.update,
        needs=needs,
        mesh=mesh,
        seed=config.seed,
        subtree=trained_of(decoder),
    )


def make_critic(config: Config, decoder: DecoderConfig, algorithm: Algorithm, mesh: Mesh) -> Critic | None:
    """The critic that the algorithm's plan asks for. ValueError for a model that it cannot start from."""
    spec = algorithm.plan.critic
    if spec is None:
        return None

    critic = config.critic
    if decoder.lora is not None and not critic.adapters:
        # All of its weights are trained, so they are loaded as those of a policy without adapters are.
        decoder = dataclasses.replace(base_config(decoder), param_dtype=MASTER_DTYPE)
    if critic.model:
        own = load_config(model_path(critic.model), dtype=decoder.dtype, param_dtype=decoder.param_dtype)
        if own.vocab_size < decoder.vocab_size:
            raise ValueError(
                f"config.critic.model={critic.model!r} has embeddings for {own.vocab_size} tokens, but the policy "
                f"samples {decoder.vocab_size}; take a model with its vocabulary, or none to start from the policy"
            )
        decoder = dataclasses.replace(own, lora=decoder.lora, quantized=decoder.quantized)
    update = dataclasses.replace(config.update, epochs=critic.epochs)
    returns_fn = jax.jit(spec.returns_fn)
    # The head is the critic's alone, so what is trained is asked of its own config.
    subtree = trained_of(decoder)
    return Critic(
        decoder, spec.loss, critic.optimizer, returns_fn, update, mesh=mesh, seed=config.seed, subtree=subtree
    )


def make_teachers(
    config: Config, plan: RolloutPlan, dataset: Dataset, tokenizer: Tokenizer, decoder: DecoderConfig, mesh: Mesh
) -> Teachers | None:
    """The teachers that the config names. ValueError for those that cannot teach this run's policy."""
    if plan.teacher is None:
        return None
    parts = TeacherParts(
        tokenizer=tokenizer,
        decoder=decoder,
        update=config.update,
        mesh=mesh,
        sampling=sampled_by(config, tokenizer, decoder),
        spec=plan.teacher,
        chat=config.data.chat,
        examples=dataset.train,
        room=config.sampling.max_new_tokens,
    )
    with use_mesh(mesh):
        return Teachers(config.teachers, parts)


def critic_params(run: Run, params: Params) -> Params:
    """The language model that the critic starts from: `params`, or `config.critic.model`."""
    config = run.config
    critic = run.critic
    if critic is None:
        return params
    if not config.critic.model:
        if run.decoder.lora is None or config.critic.adapters:
            return params
        return merged_params(run.decoder, cast_params(params, MASTER_DTYPE))

    decoder = base_config(dataclasses.replace(critic.config, value_head=False))
    dtypes = {"dtype": decoder.dtype, "param_dtype": decoder.param_dtype}
    loaded = load_model(model_path(config.critic.model), shardings=param_shardings(decoder, run.mesh), **dtypes)[1]
    adapted = dataclasses.replace(decoder, lora=critic.config.lora, quantized=critic.config.quantized)
    return fresh_adapters(adapted, quantized_params(adapted, loaded), run.mesh, config.seed)


def fresh_adapters(decoder: DecoderConfig, params: Params, mesh: Mesh, seed: int) -> Params:
    """`params` with adapters as `decoder` has them, which add nothing yet; `params` themselves where it has none."""
    if decoder.lora is None:
        return params
    make = jax.jit(functools.partial(init_adapters, decoder), out_shardings=adapters_of(param_shardings(decoder, mesh)))
    return with_adapters(params, make(jax.random.key(seed), params))


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
