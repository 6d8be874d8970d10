"""The loop: sample, score, update, evaluate, checkpoint; top to bottom."""

import contextlib
import dataclasses
import json
import time
from typing import Any

import numpy as np
from absl import logging

from rljax.evaluation import Evaluation, evaluate
from rljax.experiment.build import Run, build, stack_rows
from rljax.experiment.config import Config, to_dict
from rljax.experiment.report import describe_run, finish, say
from rljax.experiment.sft import warm_up
from rljax.experiment.stops import Stopped, Stops
from rljax.models import config_to_hf
from rljax.parallel import is_main_process, use_mesh
from rljax.rollouts import Rollout, collect
from rljax.sampling import compile_count
from rljax.training import Checkpointer, PhaseTimer, RunFolder, add_metrics, with_critic
from rljax.types import Params


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run stands when nothing is under way: what a checkpoint of this moment says beside the state."""

    step: int
    """Steps that are done."""

    host: str
    """`host_state` as JSON, so that later steps cannot change it."""

    metrics: dict[str, float] | None = None
    """Of the last step; None before the first, and where they are not known any more."""

    is_logged: bool = True
    """Whether these metrics are in the log. Between a step and its line lies an evaluation, which may take long."""


def train(config: Config, workdir: str, *, fresh: bool = False) -> dict[str, Any]:
    """Runs `config` in the folder `workdir`, going on from its newest checkpoint if there is one; returns the summary.

    `fresh` empties the folder first. Raises ValueError, before any device work, for a config or data that cannot work.
    On SIGTERM, SIGUSR1 or Ctrl-C it gives up the rollout or evaluation under way, saves, and raises `Stopped`, which
    ends the process with status 143.
    """
    started = time.perf_counter()
    with Stops() as stops:
        with stops.abandonable():
            run = build(config)
        run.stops = stops
        say(describe_run(run))
        folder = RunFolder(workdir, config=to_dict(config), fresh=fresh)
        checkpoints = open_checkpoints(config, folder)

        with run.actor, folder, contextlib.closing(checkpoints), use_mesh(run.mesh):
            loop = Loop(run, folder, checkpoints)
            try:
                before, after = loop.run_to_the_end()
            except Stopped:
                loop.save_place()
                raise
            return finish(folder, before, after, wall_seconds=time.perf_counter() - started)


class Loop:
    """The steps of one run in its folder. `place` is None until there are weights."""

    def __init__(self, run: Run, folder: RunFolder, checkpoints: Checkpointer):
        self.run = run
        self.folder = folder
        self.checkpoints = checkpoints
        self.place: Place | None = None

    def run_to_the_end(self) -> tuple[Evaluation, Evaluation]:
        """The evaluations before and after training."""
        run = self.run
        config = run.config

        self.place = resume(run, self.checkpoints, self.folder)
        if self.place is None:
            run.state = run.init_state(warm_up(run, self.folder))
            self.place = place_of(run, 0)
        save_description(run, self.folder)
        before = held_out(run, self.folder, 0)
        run.reference_scores = run.reference_scores or before.solved_shares()
        if not self.place.is_logged:
            self.report_step()

        for step in range(self.place.step, config.steps):
            # What a step draws and asks for changes the host's state, so it is taken down before.
            self.place = place_of(run, step, self.place.metrics)
            metrics, rollout = train_step(run, step)
            self.folder.log_rollouts(step + 1, rollout.records if step % config.log.rollouts_every == 0 else ())
            self.place = place_of(run, step + 1, metrics, is_logged=False)
            self.report_step()

        run.check()
        self.checkpoints.wait()
        return before, held_out(run, self.folder, config.steps)

    def report_step(self) -> None:
        """What follows the updates of a step: the reference, an evaluation, the line of metrics and the checkpoint. It
        may be given up and begun again."""
        run = self.run
        config = run.config
        assert self.place is not None
        done = self.place.step
        metrics = dict(self.place.metrics or {})

        refresh_reference(run, self.folder, done)
        if config.evaluation.every and done % config.evaluation.every == 0 and done < config.steps:
            metrics |= {f"eval/{k}": v for k, v in held_out(run, self.folder, done).metrics.items()}

        # The log comes before the checkpoint: a resumed run drops the lines behind its checkpoint, and would
        # miss one that was never written.
        self.folder.log_step(done, metrics)
        self.place = place_of(run, done, metrics)
        if config.checkpoint.every and (done % config.checkpoint.every == 0 or done == config.steps):
            self.save_place()

    def save_place(self) -> None:
        """Begins a checkpoint of the place, if there is none. Without weights there is nothing to save."""
        place = self.place
        if place is None or place.step in self.checkpoints.steps:
            return
        host = json.loads(place.host)
        if not place.is_logged:
            host["unlogged"] = {name: str(value) for name, value in (place.metrics or {}).items()}
        self.checkpoints.save(place.step, self.run.state, host, place.metrics)
        # What is being written is not whole, so the warm-up's own go when the next one is begun.
        if any(step < place.step for step in self.checkpoints.steps):
            self.folder.drop_warmup()


def place_of(run: Run, step: int, metrics: dict[str, float] | None = None, *, is_logged: bool = True) -> Place:
    """The place of a run that has done `step` steps and has nothing under way."""
    return Place(step, json.dumps(host_state(run)), metrics, is_logged)


def open_checkpoints(config: Config, folder: RunFolder) -> Checkpointer:
    own = config.checkpoint
    return Checkpointer(
        folder.checkpoints, keep_last=own.keep_last, keep_best=own.keep_best, best_metric=own.best_metric
    )


def resume(run: Run, checkpoints: Checkpointer, folder: RunFolder) -> Place | None:
    """Restores the newest good checkpoint into `run`, and says where it stands; None for a new run."""
    restored = checkpoints.restore(run.abstract_state())
    if restored is None:
        folder.evaluation_file(0).unlink(missing_ok=True)
        folder.start(0)
        return None

    run.state, host, step = restored
    run.curriculum.load_state_dict(host["curriculum"])
    run.reference_scores = host.get("reference_scores", [])
    examples = {example.id: example for example in run.dataset.train}
    run.actor.load_state_dict(host.get("actor", {}), run.algorithm.plan, examples)

    unlogged = host.get("unlogged")
    folder.start(step, is_logged=unlogged is None)
    logging.info("resuming %s at step %d", folder.path, step)
    if unlogged is None:
        return place_of(run, step)
    return place_of(run, step, {name: float(value) for name, value in unlogged.items()}, is_logged=False)


def save_description(run: Run, folder: RunFolder) -> None:
    """Writes `model/`: config.json and tokenizer, what `launch/convert.py` needs beside a checkpoint."""
    if is_main_process():
        run.tokenizer.save(folder.path / "model")
        folder.write_json("model/config.json", config_to_hf(run.decoder))


def host_state(run: Run) -> dict[str, Any]:
    """What a checkpoint holds beside arrays, JSON-ready."""
    return {
        "curriculum": run.curriculum.state_dict(),
        "reference_scores": run.reference_scores,
        "actor": run.actor.state_dict(),
    }


def train_step(run: Run, step: int) -> tuple[dict[str, float], Rollout]:
    """One rollout and the updates made of it; `run.state` is replaced, the old one's buffers are donated. `Stopped`
    comes before the first update or not at all."""
    config = run.config
    timer = PhaseTimer()
    compiled = compile_count()

    with run.stops.abandonable():
        run.actor.set_params(run.policy(), step)
        rollout = collect(
            run.actor, run.algorithm.plan, lambda n: run.curriculum.sample(step, n), config.prompts_per_step, step
        )
        timer.add(rollout.seconds)

    with run.stops.abandonable(), timer("score"):
        batch = stack_rows(config, rollout.trajectories, rollout.rewards.size)
        if run.algorithm.plan.needs_ref:
            reference = run.learner.reference_params(run.state)
            batch = dataclasses.replace(batch, ref_logprobs=run.learner.score_rows(reference, batch))
        if run.critic is not None:
            batch = run.critic.with_values(run.state.critic, batch)
        advantages = np.asarray(run.algorithm.advantage_fn(batch))
        minibatches = run.learner.prepare(run.state, batch, advantages) if run.policy_moves(step) else []

    with timer("update"):
        metrics: dict[str, float] = {}
        # The critic first: its minibatches hold the values that the advantages were made of.
        if run.critic is not None:
            critic_state, metrics = run.critic.update(run.state.critic, batch)
            run.state = with_critic(run.state, critic_state)
        updates = []
        for minibatch in minibatches:
            run.state, stats = run.learner.update(run.state, minibatch)
            updates.append(stats)
        metrics |= add_metrics(updates)
        # Only before the first update is the trainer still the policy that sampled.
        first = updates[0] if updates else {}
        metrics |= {name: float(value) for name, value in first.items() if name.startswith("rollout/logprob_gap")}

    run.curriculum.observe(rollout.examples, rollout.mean_rewards())
    for record, row in zip(rollout.records, advantages, strict=False):
        record["advantage"] = float(row[np.abs(row).argmax()])

    metrics |= {f"rollout/{name}": value for name, value in rollout.stats.items()}
    metrics |= {f"play/{name}": value for name, value in rollout.actor_stats.items()}
    metrics |= timer.metrics()
    metrics["time/tokens_per_s"] = rollout.stats["new_tokens"] / timer.total
    metrics["compile/count"] = float(compile_count() - compiled)
    return metrics, rollout


def refresh_reference(run: Run, folder: RunFolder, done: int) -> None:
    """Copies the policy into the reference when config or plan say that it is due, unless the plan's gate objects to
    what has become of the held-out scores since the last time."""
    plan = run.algorithm.plan
    every = run.config.reference_refresh or plan.refresh_every
    if not every or done % every:
        return
    if plan.refresh_gate is not None:
        scores = held_out(run, folder, done).solved_shares()
        if not plan.refresh_gate(np.array(scores), np.array(run.reference_scores)):
            return
        run.reference_scores = scores
    run.state = run.learner.refresh_reference(run.state)


def held_out(run: Run, folder: RunFolder, step: int) -> Evaluation:
    """Evaluates on held-out problems and keeps the result in the run folder; what is there already is read back."""
    if run.evaluation is not None and run.evaluation.step == step:
        return run.evaluation

    file = folder.evaluation_file(step)
    if file.exists():
        run.evaluation = Evaluation.from_dict(json.loads(file.read_text()))
        return run.evaluation

    if step in (0, run.config.steps):
        say(f"evaluating held-out problems {'before' if step == 0 else 'after'} training")
    run.evaluation = evaluate_run(run, run.policy(), step)
    folder.write_json(file, run.evaluation.to_dict())
    return run.evaluation


def evaluate_run(run: Run, params: Params, step: int) -> Evaluation:
    """The evaluation that `config.evaluation` describes, of `params`."""
    config = run.config.evaluation
    with run.stops.abandonable():
        run.actor.set_params(params, step)
        return evaluate(run.actor, run.dataset.test[: config.problems or None], config, step=step)
