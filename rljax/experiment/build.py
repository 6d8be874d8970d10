"""From a config to everything a run holds. What can be wrong is refused before weights load."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from rljax.algorithms import Algorithm
from rljax.batching import PackSpec, stack
from rljax.envs import EnvironmentPool, check_chat_template, get_format
from rljax.evaluation import Evaluation
from rljax.experiment.config import (
    Config,
    Dataset,
    FreshModel,
    check,
    check_forks,
    make_rewards,
    make_tokenizer,
    model_path,
)
from rljax.models import (
    DecoderConfig,
    forest_attention,
    init_params,
    kernel_attention,
    load_config,
    load_model,
    param_shardings,
)
from rljax.parallel import make_mesh
from rljax.rollouts.black_box.actor import BlackBoxPlayer
from rljax.rollouts.black_box.endpoint import ChatEndpoint
from rljax.rollouts.collect import Play, sample_and_score
from rljax.rollouts.cross_policy import stale_turns
from rljax.rollouts.guided.actor import GuidedPlayer
from rljax.rollouts.multi_turn import Player
from rljax.sampling import Sampler, SamplerSpec, SamplingParams, Stops, TurnDecoder, TurnDecoderSpec
from rljax.tasks import Curriculum, RewardRunner, load_callable
from rljax.text import Dialogue, Tokenizer, render_prompt
from rljax.training import Critic, Learner, with_critic
from rljax.types import Params, RolloutBatch, TrainState, Trajectory


@dataclasses.dataclass
class Run:
    """Everything a run holds, built once from its config; `state` is replaced at every update."""

    config: Config
    algorithm: Algorithm
    dataset: Dataset
    tokenizer: Tokenizer
    rewards: RewardRunner | EnvironmentPool | BlackBoxPlayer  # what judges; a context manager
    curriculum: Curriculum
    mesh: Mesh
    decoder: DecoderConfig
    sampling: SamplingParams
    sampler: Sampler
    learner: Learner
    critic: Critic | None = None
    player: Player | BlackBoxPlayer | None = None  # plays episodes, where there is an environment or an agent
    evaluation: Evaluation | None = None  # the last one
    reference_scores: list[float] = dataclasses.field(default_factory=list)  # per problem, of the reference
    state: TrainState = None  # type: ignore[assignment]  # until weights are loaded or restored

    def abstract_state(self) -> TrainState:
        """What a checkpoint of `state` is restored into."""
        critic = None if self.critic is None else self.critic.abstract_state()
        return with_critic(self.learner.abstract_state(), critic)

    def init_state(self, params: Params) -> TrainState:
        """The state at step 0, which owns `params`; a critic starts from a copy of them, or from its own model."""
        critic = None if self.critic is None else self.critic.init_state(critic_params(self, params))
        return with_critic(self.learner.init_state(params), critic)

    def policy_moves(self, step: int) -> bool:
        """Whether this step updates the policy, rather than the critic alone."""
        return self.critic is None or step >= self.config.critic.warmup_steps

    def check(self) -> None:
        """Raises FloatingPointError if the last updates were all skipped."""
        for learner in (self.learner, self.critic):
            if learner is not None:
                learner.check()

    def set_policy(self, params: Params, version: int) -> None:
        """The weights to sample with, those of step `version`."""
        if self.player is None:
            self.sampler.set_params(params)
        else:
            self.player.set_params(params, version=version)

    @property
    def play(self) -> Play | None:
        """How training collects, where it is not by `sample_and_score` alone."""
        guidance = self.config.guidance
        if not guidance.column:
            return self.player
        options = {"probe_samples": guidance.probes, "budget": guidance.budget or None}
        plain = self.player or sample_and_score
        return GuidedPlayer(plain, column=guidance.column, threshold=guidance.threshold, **options)

    @property
    def rollout_setup(self) -> dict[str, Any]:
        """What collecting and evaluating have in common."""
        return {
            "sampler": self.sampler,
            "tokenizer": self.tokenizer,
            "reward_runner": self.rewards,
            "seed": self.config.seed,
            "chat": self.config.data.chat,
            "stop_strings": self.config.sampling.stop_strings,
            "truncated_is_wrong": self.config.sampling.truncated_is_wrong,
        }


def plan(config: Config) -> Run:
    """The run without weights. ValueError for what can be wrong in the config or the data."""
    algorithm = check(config, jax.device_count())
    tokenizer = make_tokenizer(config.model)
    if algorithm.bind is not None:
        algorithm = algorithm.bind(tokenizer.encode, tokenizer.vocab_size)
        check_forks(config, algorithm.plan)
    algorithm = algorithm._replace(advantage_fn=jax.jit(algorithm.advantage_fn))
    dataset = config.data.load()
    judges = make_rewards(config, dataset, tokenizer)
    curriculum = config.curriculum.make(dataset.train, config.seed)
    check_prompts(config, dataset, tokenizer)
    decoder = load_decoder(config, tokenizer)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    s, forks = config.sampling, algorithm.plan.forks
    sampling = s.params()
    spec = SamplerSpec(
        prompt_buckets=s.prompt_buckets,
        max_new_tokens=s.max_new_tokens,
        prompt_slots=s.prompt_slots or config.prompts_per_step,
        sample_slots=s.sample_slots or (forks.chains if forks else algorithm.plan.group_size),
        path_slots=forks.parents if forks else 0,
        max_injected=forks.max_injected if forks else 0,
    )
    stops = Stops(tokenizer.stop_ids, s.stop_strings, tokenizer.decode)
    sampler = Sampler(decoder, spec, stops, mesh)
    learner = make_learner(config, decoder, algorithm, sampling, mesh)
    player = make_player(config, algorithm, tokenizer, judges, decoder, mesh, dataset)
    rewards = player if isinstance(player, BlackBoxPlayer) else judges
    assert rewards is not None
    parts = (config, algorithm, dataset, tokenizer, rewards, curriculum, mesh, decoder, sampling, sampler, learner)
    return Run(*parts, critic=make_critic(config, decoder, algorithm, mesh), player=player)


def make_player(
    config: Config,
    algorithm: Algorithm,
    tokenizer: Tokenizer,
    judges: RewardRunner | EnvironmentPool | None,
    decoder: DecoderConfig,
    mesh: Mesh,
    dataset: Dataset,
) -> Player | BlackBoxPlayer | None:
    """Who plays the episodes of `config.environment`, if there is one. ValueError for a chat template that rewrites
    earlier turns, and on several processes."""
    own = config.environment
    if not own.make and not own.agent:
        return None
    if jax.process_count() > 1:
        raise ValueError("environments are served by one process today; run this config on one, with all its devices")
    style, chat = get_format(own.tool_format), config.data.chat
    dialogue = Dialogue(tokenizer, role=style.role, wrap=style.wrap, chat=chat)
    if own.agent or any(dialogue.is_chat(e.prompt) for e in [*dataset.train, *dataset.test]):
        check_chat_template(tokenizer, role=style.role)
    plan, groups = algorithm.plan, config.prompts_per_step + own.groups_in_flight
    conversations = own.contexts or groups * (plan.forks.leaves if plan.forks else plan.group_size)
    rows = own.rows or config.prompts_per_step * (plan.forks.chains if plan.forks else plan.group_size)
    spec = TurnDecoderSpec(
        conversations=conversations,
        rows=min(rows, conversations),
        context_length=own.context_length,
        max_new_tokens=config.sampling.max_new_tokens,
        prefill_chunks=own.extend_buckets,
        check_every=own.check_every,
    )
    strings = (*(() if own.agent else style.stop_strings), *config.sampling.stop_strings)
    stops = Stops(tokenizer.stop_ids, strings, tokenizer.decode)
    decoders = [TurnDecoder(decoder, spec, stops, mesh) for _ in range(2 if own.stale_share else 1)]
    if not isinstance(judges, EnvironmentPool):
        endpoint = ChatEndpoint(
            decoders[0], tokenizer, tool_format=own.tool_format, stop_strings=config.sampling.stop_strings
        )
        return BlackBoxPlayer(
            endpoint,
            load_callable(own.agent),
            judges,
            workers=own.workers,
            timeout_s=own.episode_s,
            most_conversations=own.conversations,
        )
    return Player(
        decoders,
        judges,
        dialogue,
        pick=stale_turns(config.seed, own.stale_share) if own.stale_share else None,
        unfinished_reward=own.unfinished_reward,
        groups_in_flight=own.groups_in_flight,
        stale_every=own.stale_every,
    )


def make_learner(config: Config, decoder: DecoderConfig, algorithm: Algorithm, sampling, mesh: Mesh) -> Learner:
    update = config.update
    return Learner(
        decoder,
        config.optimizer,
        algorithm.loss,
        pack_spec(config),
        sampling=sampling,
        epochs=update.epochs,
        needs_reference=algorithm.plan.needs_ref,
        needs_uniforms=algorithm.plan.needs_uniforms,
        anchor_to_behavior=update.anchor_to_behavior,
        **shared_options(config, mesh),
    )


def make_critic(config: Config, decoder: DecoderConfig, algorithm: Algorithm, mesh: Mesh) -> Critic | None:
    """The critic that the algorithm's plan asks for. ValueError for a model that it cannot start from."""
    plan, critic = algorithm.plan.critic, config.critic
    if plan is None:
        return None
    if critic.model:
        own = load_config(model_path(critic.model), dtype=decoder.dtype, param_dtype=decoder.param_dtype)
        if own.vocab_size < decoder.vocab_size:
            raise ValueError(
                f"config.critic.model={critic.model!r} has embeddings for {own.vocab_size} tokens, but the policy "
                f"samples {decoder.vocab_size}; take a model with its vocabulary, or none to start from the policy"
            )
        decoder = own
    options = shared_options(config, mesh)
    spec = pack_spec(config)
    returns_fn = jax.jit(plan.returns_fn)
    return Critic(decoder, critic.optimizer, plan.loss, returns_fn, spec, epochs=critic.epochs, **options)


def shared_options(config: Config, mesh: Mesh) -> dict[str, Any]:
    """What the learners of policy and critic have in common."""
    update = config.update
    return {
        "mesh": mesh,
        "chunk": update.head_chunk,
        "remat": update.remat,
        "attention": kernel_attention if update.attention_kernel else forest_attention,
        "minibatches": update.minibatches,
        "seed": config.seed,
        "max_skipped": update.max_skipped,
    }


def pack_spec(config: Config) -> PackSpec:
    update = config.update
    return PackSpec(
        update.pack_length,
        packed_rows=update.packed_rows,
        share_prefixes=update.share_prefixes,
        length_buckets=update.length_buckets or None,
        score_buckets=update.score_buckets or None,
        row_buckets=update.row_buckets or None,
        microbatch_buckets=update.microbatch_buckets or None,
    )


def stack_rows(config: Config, trajectories: Sequence[Trajectory], rows: int | None = None) -> RolloutBatch:
    """`stack` by the bucket tables of `config`; into exactly `rows` rows if told so."""
    tables = {"length_buckets": config.update.trajectory_buckets, "row_buckets": () if rows is None else (rows,)}
    return stack(trajectories, **{name: table for name, table in tables.items() if table})


def load_decoder(config: Config, tokenizer: Tokenizer) -> DecoderConfig:
    """The decoder's config, read without its weights. ValueError when the tokenizer belongs to another model."""
    model = config.model
    if isinstance(model, FreshModel):
        return model.decoder(tokenizer.vocab_size)
    decoder = load_config(model_path(model.path), dtype=model.dtype, param_dtype=model.param_dtype)
    if tokenizer.vocab_size > decoder.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but {model.path} has embeddings for "
            f"{decoder.vocab_size}; use the tokenizer that belongs to the model"
        )
    return decoder


def load_params(run: Run) -> Any:
    """The initial weights; each shard goes straight to its device."""
    model, where = run.config.model, param_shardings(run.decoder, run.mesh)
    if isinstance(model, FreshModel):
        make = jax.jit(lambda key: init_params(run.decoder, key), out_shardings=where)
        return make(jax.random.key(run.config.seed))
    return load_model(model_path(model.path), dtype=model.dtype, param_dtype=model.param_dtype, shardings=where)[1]


def critic_params(run: Run, params: Params) -> Params:
    """The language model that the critic starts from: `params`, or `config.critic.model`."""
    config, critic = run.config, run.critic
    if critic is None or not config.critic.model:
        return params
    where = param_shardings(dataclasses.replace(critic.config, value_head=False), run.mesh)
    dtypes = {"dtype": critic.config.dtype, "param_dtype": critic.config.param_dtype}
    return load_model(model_path(config.critic.model), shardings=where, **dtypes)[1]


def check_prompts(config: Config, dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Renders every prompt once; ValueError for one that is longer than the largest bucket. What an environment opens
    with is known when it does."""
    if config.environment.make or config.environment.agent:
        return
    longest = max(
        (len(render_prompt(tokenizer, e.prompt, config.data.chat)), e.id) for e in [*dataset.train, *dataset.test]
    )
    if longest[0] > config.sampling.prompt_buckets[-1]:
        raise ValueError(
            f"the longest prompt has {longest[0]} tokens (id {longest[1]}), more than the largest of "
            f"config.sampling.prompt_buckets={config.sampling.prompt_buckets}; add a bucket or drop the row"
        )
    total = longest[0] + config.sampling.max_new_tokens
    if total > config.update.pack_length:
        raise ValueError(
            f"config.update.pack_length={config.update.pack_length} cannot hold the longest prompt "
            f"({longest[0]} tokens) and config.sampling.max_new_tokens={config.sampling.max_new_tokens}; "
            f"raise it to at least {total}"
        )
