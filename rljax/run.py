"""The loop: sample, score, update, evaluate, checkpoint; top to bottom."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from rljax.algorithms import Algorithm
from rljax.config import Config, Dataset, FreshModel, check, make_rewards, make_tokenizer, model_path, to_dict
from rljax.evaluation.evaluate import Evaluation, evaluate
from rljax.models import DecoderConfig, init_params, load_model
from jax.sharding import Mesh

from rljax.parallel import make_mesh, use_mesh
from rljax.report import comparison_table, sample_table
from rljax.rollouts.batching import PackSpec, stack
from rljax.rollouts.collect import Rollout, collect
from rljax.sampling import Sampler, SamplingParams, compile_count, sampling_params
from rljax.tasks import RewardRunner, UniformCurriculum
from rljax.text import Tokenizer, render_prompt
from rljax.training import Checkpointer, Learner, PhaseTimer, RunFolder, add_metrics, sft_loss
from rljax.types import TrainState, Trajectory


@dataclasses.dataclass
class Run:
    """Everything a run holds, built once from its config; `state` is replaced at every update."""

    config: Config
    algorithm: Algorithm
    dataset: Dataset
    tokenizer: Tokenizer
    rewards: RewardRunner
    curriculum: UniformCurriculum
    mesh: Mesh
    decoder: DecoderConfig
    sampling: SamplingParams
    sampler: Sampler
    learner: Learner
    state: TrainState | None = None

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
        }


def train(config: Config, workdir: str, *, fresh: bool = False) -> dict[str, Any]:
    """Runs `config` in the folder `workdir`, going on from its newest checkpoint if there is one; returns the summary.

    `fresh` empties the folder first. Raises ValueError, before any device work, for a config or data that cannot work.
    """
    started = time.perf_counter()
    run, params = build(config)
    folder = RunFolder(workdir, config=to_dict(config), fresh=fresh)
    checkpoints = Checkpointer(folder.checkpoints, config.checkpoint)
    with run.rewards, folder, use_mesh(run.mesh):
        first = resume(run, checkpoints, folder)
        if run.state is None:
            run.state = run.learner.init_state(warm_up(run, params, folder))
        del params
        before = held_out(run, folder, 0)
        for step in range(first, config.steps):
            metrics, rollout = train_step(run, step)
            done = step + 1
            if config.evaluation.every and done % config.evaluation.every == 0 and done < config.steps:
                metrics |= {f"eval/{k}": v for k, v in held_out(run, folder, done).metrics.items()}
            folder.log_step(done, metrics, rollout.records if step % config.log.rollouts_every == 0 else ())
            if config.checkpoint.every and (done % config.checkpoint.every == 0 or done == config.steps):
                checkpoints.save(done, run.state, host_state(run), metrics)
        run.learner.check()
        checkpoints.wait()
        after = held_out(run, folder, config.steps)
        return finish(run, folder, before, after, time.perf_counter() - started)


def build(config: Config) -> tuple[Run, Any]:
    """The run and its initial params. What can be wrong in the config or the data is refused before weights load."""
    algorithm = check(config, jax.device_count())
    tokenizer = make_tokenizer(config.model)
    dataset = config.data.load()
    rewards = make_rewards(config, dataset)
    curriculum = UniformCurriculum(dataset.train, seed=config.seed)
    check_prompts(config, dataset, tokenizer)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    decoder, params = load_params(config, tokenizer)
    s = config.sampling
    sampling = sampling_params(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)
    sampler = Sampler(
        decoder,
        prompt_buckets=s.prompt_buckets,
        max_new_tokens=s.max_new_tokens,
        prompt_slots=s.prompt_slots or config.prompts_per_step,
        sample_slots=s.sample_slots or algorithm.plan.group_size,
        stop_tokens=tokenizer.stop_ids,
        stop_strings=s.stop_strings,
        decode_text=tokenizer.decode,
        mesh=mesh,
    )
    learner = make_learner(config, decoder, algorithm, sampling, mesh)
    return Run(
        config, algorithm, dataset, tokenizer, rewards, curriculum, mesh, decoder, sampling, sampler, learner
    ), params


def make_learner(config: Config, decoder: DecoderConfig, algorithm: Algorithm, sampling, mesh: Mesh) -> Learner:
    update = config.update
    return Learner(
        decoder,
        config.optimizer,
        algorithm.loss,
        pack_spec(config),
        sampling=sampling,
        mesh=mesh,
        chunk=update.head_chunk,
        remat=update.remat,
        minibatches=update.minibatches,
        epochs=update.epochs,
        seed=config.seed,
        needs_reference=algorithm.plan.needs_ref,
        max_skipped=update.max_skipped,
    )


def pack_spec(config: Config) -> PackSpec:
    update = config.update
    return PackSpec(update.pack_length, packed_rows=update.packed_rows, share_prefixes=update.share_prefixes)


def load_params(config: Config, tokenizer: Tokenizer) -> tuple[DecoderConfig, Any]:
    """The decoder's config and its initial weights, on the default device."""
    model = config.model
    if isinstance(model, FreshModel):
        decoder = model.decoder(tokenizer.vocab_size)
        return decoder, init_params(decoder, jax.random.key(config.seed))
    decoder, params = load_model(model_path(model.path), dtype=model.dtype, param_dtype=model.param_dtype)
    if tokenizer.vocab_size > decoder.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but {model.path} has embeddings for "
            f"{decoder.vocab_size}; use the tokenizer that belongs to the model"
        )
    return decoder, params


def check_prompts(config: Config, dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Renders every prompt once; ValueError for one that is longer than the largest bucket."""
    longest = max((len(render_prompt(tokenizer, e.prompt, config.data.chat)), e.id) for e in [*dataset.train, *dataset.test])
    if longest[0] > config.sampling.prompt_buckets[-1]:
        raise ValueError(
            f"the longest prompt has {longest[0]} tokens (id {longest[1]}), more than the largest of "
            f"config.sampling.prompt_buckets={config.sampling.prompt_buckets}; add a bucket or drop the row"
        )
    total = longest[0] + config.sampling.max_new_tokens
    if total > config.update.pack_length:
        raise ValueError(
            f"config.update.pack_length={config.update.pack_length} cannot hold the longest prompt ({longest[0]} tokens) "
            f"and config.sampling.max_new_tokens={config.sampling.max_new_tokens}; raise it to at least {total}"
        )


def resume(run: Run, checkpoints: Checkpointer, folder: RunFolder) -> int:
    """Restores the newest good checkpoint into `run`; returns the step to go on with, 0 for a new run."""
    restored = checkpoints.restore(run.learner.abstract_state())
    if restored is None:
        folder.start(0)
        return 0
    run.state, host, step = restored
    run.curriculum.load_state_dict(host["curriculum"])
    folder.start(step)
    logging.info("resuming %s at step %d", folder.path, step)
    return step


def host_state(run: Run) -> dict[str, Any]:
    return {"curriculum": run.curriculum.state_dict()}


def train_step(run: Run, step: int) -> tuple[dict[str, float], Rollout]:
    """One rollout and the updates made of it; `run.state` is replaced, the old one's buffers are donated."""
    config, timer, compiled = run.config, PhaseTimer(), compile_count()
    run.sampler.set_params(run.state.params)
    rollout = collect(
        run.algorithm.plan,
        lambda n: run.curriculum.sample(step, n),
        num_groups=config.prompts_per_step,
        step=step,
        sampling=run.sampling,
        phase=timer,
        **run.rollout_setup,
    )
    with timer("score"):
        batch = stack(rollout.trajectories)
        if run.algorithm.plan.needs_ref:
            batch = dataclasses.replace(batch, ref_logprobs=run.learner.score_rows(run.state.ref_params, batch))
        advantages = np.asarray(run.algorithm.advantage_fn(batch))
        minibatches = run.learner.prepare(run.state, batch, advantages)
    with timer("update"):
        updates = []
        for minibatch in minibatches:
            run.state, stats = run.learner.update(run.state, minibatch)
            updates.append(stats)
        metrics = add_metrics(updates)
    if config.reference_refresh and (step + 1) % config.reference_refresh == 0:
        run.state = run.learner.refresh_reference(run.state)
    run.curriculum.observe(rollout.examples, np.nan_to_num(rollout.rewards).mean(axis=1))
    for record, row in zip(rollout.records, advantages, strict=False):
        record["advantage"] = float(row[np.abs(row).argmax()])
    metrics |= {f"rollout/{k}": v for k, v in rollout.stats.items()}
    metrics |= timer.metrics()
    metrics["time/tokens_per_s"] = rollout.stats["new_tokens"] / timer.total
    metrics["compile/count"] = float(compile_count() - compiled)
    return metrics, rollout


def held_out(run: Run, folder: RunFolder, step: int) -> Evaluation:
    """Evaluates on held-out problems and keeps the result in the run folder; what is there already is read back."""
    file = folder.evaluation_file(step)
    if file.exists():
        return Evaluation.from_dict(json.loads(file.read_text()))
    config = run.config.evaluation
    run.sampler.set_params(run.state.params)
    examples = run.dataset.test[: config.problems or None]
    evaluation = evaluate(
        examples,
        samples=config.samples,
        temperature=config.temperature,
        top_p=config.top_p,
        step=step,
        batch_prompts=config.batch_prompts,
        **run.rollout_setup,
    )
    folder.write_json(file, evaluation.to_dict())
    return evaluation


def warm_up(run: Run, params: Any, folder: RunFolder) -> Any:
    """Supervised steps before the first rollout; returns the params, which it consumes."""
    config = run.config.warmup
    if not config.steps:
        return params
    learner, curriculum = supervised(run)
    state = learner.init_state(params)
    for step in range(config.steps):
        state, metrics = supervised_step(run, learner, curriculum, state, step)
        folder.progress("warm-up", step + 1, config.steps, metrics)
    return state.params


def supervised(run: Run) -> tuple[Learner, UniformCurriculum]:
    """The learner and the demonstrations of `config.warmup`."""
    config = run.config.warmup
    make = config.demonstrations or (lambda examples: examples)
    examples = make(run.dataset.train)
    missing = next((e for e in examples if config.completion_column not in e.columns), None)
    if missing is not None:
        raise ValueError(
            f"supervised examples need the column {config.completion_column!r}; one has {sorted(missing.columns)}. "
            "Name it with config.warmup.completion_column, or make it with config.warmup.demonstrations"
        )
    learner = Learner(
        run.decoder, config.optimizer, sft_loss(), pack_spec(run.config), mesh=run.mesh, chunk=run.config.update.head_chunk
    )
    return learner, UniformCurriculum(examples, seed=run.config.seed)


def supervised_step(
    run: Run, learner: Learner, curriculum: UniformCurriculum, state: TrainState, step: int
) -> tuple[TrainState, dict[str, Any]]:
    """One update on `config.warmup.batch_size` demonstrations; each ends with the end-of-sequence token."""
    config, tokenizer = run.config.warmup, run.tokenizer
    rows = []
    for index, example in enumerate(curriculum.sample(step, config.batch_size)):
        prompt = render_prompt(tokenizer, example.prompt, run.config.data.chat)
        completion = [*tokenizer.encode(str(example.columns[config.completion_column])), tokenizer.eos_id]
        rows.append(demonstration(prompt, completion, example.id, index))
    batch = stack(rows)
    (minibatch,) = learner.prepare(state, batch, np.zeros(batch.tokens.shape, np.float32))
    return learner.update(state, minibatch)


def demonstration(prompt: list[int], completion: list[int], prompt_id: int, index: int) -> Trajectory:
    """A given completion as a row: its tokens count as sampled, with unknown behavior."""
    tokens = np.array([*prompt, *completion], np.int32)
    zeros = np.zeros(len(tokens), np.float32)
    return Trajectory(
        tokens=tokens,
        action_mask=np.arange(len(tokens)) >= len(prompt),
        behavior_logprobs=zeros,
        entropies=zeros,
        turn_ids=np.zeros(len(tokens), np.int32),
        policy_version=np.zeros(len(tokens), np.int32),
        prompt_id=prompt_id,
        group_id=index,
        episode_id=index,
    )
