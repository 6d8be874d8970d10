"""The loop: sample, score, update, evaluate, checkpoint; top to bottom."""

import contextlib
import dataclasses
import difflib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from rljax.evaluation import Answered, Evaluation, evaluate
from rljax.experiment.build import Run, build, held_out_examples, stack_rows
from rljax.experiment.changes import review_changes
from rljax.experiment.commits import COMMIT_FILE, source_of
from rljax.experiment.config import Config, changed_fields, to_dict
from rljax.experiment.dry_run import check_run
from rljax.experiment.journal import Journal, Made
from rljax.experiment.model import files_of
from rljax.experiment.profile import Profile
from rljax.experiment.pulse import Pulse
from rljax.experiment.recording import Recorder, Recording
from rljax.experiment.report import describe_run, finish, say
from rljax.experiment.sft import warm_up
from rljax.experiment.stops import Stopped, Stops
from rljax.experiment.token_log import log_tokens
from rljax.experiment.watchdog import Watchdog
from rljax.models import (
    ADAPTER_FILE,
    DecoderConfig,
    base_config,
    base_params,
    cast_params,
    dequantized_params,
    described_adapter,
    save_hf,
    written_metadata,
)
from rljax.parallel import check_equal, end_together, is_main_process, on_main, use_mesh
from rljax.rollouts import Rollout, RolloutConfig
from rljax.rollouts.shared import check_processes
from rljax.rollouts.trajectories import allowed_in
from rljax.sampling import compile_count_here
from rljax.settings import check_config
from rljax.tasks import added_by
from rljax.training import (
    AnyPath,
    Checkpointer,
    PhaseTimer,
    RunFolder,
    add_metrics,
    as_json,
    as_path,
    local_folder,
    move_tree,
    read_json,
    remove_tree,
    with_critic,
    writable,
)
from rljax.types import Params

SETTLE_S = 20.0
"""How long a run that is asked to end waits for rollouts that are under way: schedulers kill it after 30 s or so."""


class RunFailed(RuntimeError):
    """A run that cannot go on as it is, for a reason that its user can mend; the message is one line."""


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


def train(config: Config, workdir: str, *, fresh: bool = False, replay: str = "") -> dict[str, Any]:
    """Runs `config` in the folder `workdir`, going on from its newest checkpoint if there is one; returns the summary.

    `fresh` empties the folder first. `replay` is the folder of a run whose recorded rollouts are trained on; nothing is
    sampled but for evaluations. Raises ValueError, before any device work, for a config or data that cannot work.
    On SIGTERM, SIGUSR1 or Ctrl-C it gives up the rollout or evaluation under way, saves, and raises `Stopped`, which
    ends the process with status 143. Steps without a valid reward, or without the groups that dynamic sampling needs,
    update nothing and are counted; `RunFailed` after `config.update.max_empty` of them in a row.
    """
    started = time.perf_counter()
    with end_together(), Stops() as stops:
        with stops.abandonable():
            path = as_path(workdir)
            on_main(lambda: writable(path))
            check_config(config)
            source, commit = source_of(config, ([] if fresh else [path]) + ([as_path(replay)] if replay else []))
            run = build(config, source=source)
        run.stops = stops
        check_run(run)
        recording = open_recording(run, path, replay) if replay else None

        # Processes that were started with other configs or data would train apart, or wait for each other.
        check_equal(config=to_dict(config), data=[example.id for example in [*run.dataset.train, *run.dataset.test]])
        say(describe_run(run))

        folder = RunFolder(path, config=to_dict(config), fresh=fresh)
        if commit is not None:
            folder.write_json(COMMIT_FILE, commit)
        journal = Journal(folder.journal, folder.check_lease)
        checkpoints = open_checkpoints(config, folder, journal)

        # Innermost again: what is closed on the way out would wait for the processes that are left behind.
        run.pulse = Pulse(folder.status, config.log.pulse_s)
        run.pipeline.journal = journal
        run.pipeline.until = config.steps
        run.pipeline.recording = recording
        if config.log.recordings:
            run.pipeline.recorder = Recorder(folder.recorded, folder.config, run.tokenizer, folder.check_lease)
        watchdog = Watchdog(run.pulse, folder.stacks, config.log.stall_s)
        with (
            watchdog,
            run.actor,
            folder,
            contextlib.closing(checkpoints),
            use_mesh(run.mesh),
            run.pulse,
            run.pipeline,
            end_together(),
        ):
            loop = Loop(run, folder, checkpoints, journal)
            try:
                with loop.profile:
                    before, after = loop.run_to_the_end()
            except Stopped:
                loop.save_place()
                loop.settle()
                raise
            seconds = time.perf_counter() - started
            return on_main(lambda: finish(folder, before, after, wall_seconds=seconds))


def open_recording(run: Run, workdir: AnyPath, replay: str) -> Recording:
    """The rollouts that the run in `replay` recorded, for `run`; says with which settings its numbers will be others.
    ValueError for those that it cannot train on."""
    config = run.config
    if as_path(replay) == workdir:
        raise ValueError(f"--replay={replay} is the folder of this run; name another one with --workdir")
    if config.log.recordings:
        raise ValueError(
            "config.log.recordings=True has no effect with --replay: its rollouts are recorded; leave it out"
        )
    recording = Recording(
        replay,
        steps=config.steps,
        config=as_json(to_dict(config)),
        tokenizer=run.tokenizer,
        examples={example.id: example for example in run.dataset.train},
    )
    say(f"training on the rollouts in {recording.folder}")
    if recording.others:
        lines = [f"  {name}: {was!r} -> {value!r}" for name, (was, value) in recording.others.items()]
        say("\n".join(["other numbers than those of the run that made them, since the learner differs:", *lines]))
    return recording


class Loop:
    """The steps of one run in its folder. `place` is None until there are weights."""

    def __init__(self, run: Run, folder: RunFolder, checkpoints: Checkpointer, journal: Journal):
        self.run = run
        self.folder = folder
        self.checkpoints = checkpoints
        self.journal = journal
        self.place: Place | None = None
        self.profile = Profile(folder.path / "profile", run.config.log.profile_steps)

    def run_to_the_end(self) -> tuple[Evaluation, Evaluation]:
        """The evaluations before and after training."""
        run = self.run
        config = run.config

        self.place = resume(run, self.checkpoints, self.folder, self.journal)
        if self.place is None:
            run.state = run.init_state(self.warmed_up())
            save_base(run, self.folder, run.policy)
            self.place = place_of(run, 0)
        save_description(run, self.folder)
        if run.teachers is not None:
            run.teachers.open()
        before = held_out(run, self.folder, 0)
        run.reference_scores = run.reference_scores or before.solved_shares()
        check_best_metric(config, [f"eval/{name}" for name in before.metrics])
        if not self.place.is_logged:
            self.report_step()

        for step in range(self.place.step, config.steps):
            # What a step draws and asks for changes the host's state, so it is taken down before.
            self.place = place_of(run, step, self.place.metrics)
            with self.profile(step + 1):
                metrics, rollout = train_step(run, step)
            # What nothing could be learned from is what a user has to look at.
            if step % config.log.rollouts_every == 0 or run.empty_steps:
                self.folder.log_rollouts(step + 1, rollout.records, rollout.untrained)
            self.place = place_of(run, step + 1, metrics, is_logged=False)
            self.report_step()
            self.stop_if_nothing_is_learned()

        run.check()
        self.checkpoints.wait()
        return before, held_out(run, self.folder, config.steps)

    def warmed_up(self) -> Params:
        """The weights that the first rollout starts from."""
        if not self.run.config.warmup.steps:
            return self.run.initial_params()
        with contextlib.closing(open_warmup(self.folder)) as checkpoints:
            return warm_up(self.run, self.folder, checkpoints)

    def report_step(self) -> None:
        """What follows the updates of a step: the reference, an evaluation, the line of metrics and the checkpoint. It
        may be given up and begun again."""
        run = self.run
        config = run.config
        assert self.place is not None
        done = self.place.step
        metrics = dict(self.place.metrics or {})
        # A step without an update lacks the metrics of one.
        if "loss/total" in metrics:
            check_best_metric(config, metrics)

        refresh_reference(run, done, lambda: held_out(run, self.folder, done))
        if config.evaluation.every and done % config.evaluation.every == 0 and done < config.steps:
            metrics |= {f"eval/{k}": v for k, v in held_out(run, self.folder, done).metrics.items()}

        # The log comes before the checkpoint: a resumed run drops the lines behind its checkpoint, and would
        # miss one that was never written.
        self.folder.log_step(done, metrics)
        self.place = place_of(run, done, metrics)
        if not config.checkpoint.every:
            # Only a run that is asked to end will save, and then these are trained on already.
            self.journal.keep(done)
        if config.checkpoint.every and (done % config.checkpoint.every == 0 or done == config.steps):
            self.save_place()

    def stop_if_nothing_is_learned(self) -> None:
        """RunFailed after `config.update.max_empty` steps in a row without an update, or where the run has no more."""
        run = self.run
        if run.empty_steps < min(run.config.update.max_empty, run.config.steps):
            return
        # A rollout of an earlier start says nothing of what has been mended since.
        if run.pipeline.is_recorded:
            return
        # What was drawn does not come again, so that a repaired reward goes on behind it.
        self.save_place()
        self.checkpoints.wait()
        raise RunFailed(
            f"{run.empty_steps} steps in a row had nothing to learn from; in the last one {run.lacking} "
            f"(rollouts of all of them: {self.folder.path / 'rollouts'})"
        )

    def save_place(self) -> None:
        """Begins a checkpoint of the place, if there is none. Without weights there is nothing to save."""
        place = self.place
        if place is None or place.step in self.checkpoints.steps:
            return
        host = json.loads(place.host)
        if not place.is_logged:
            host["unlogged"] = {name: str(value) for name, value in (place.metrics or {}).items()}
        self.folder.flush()
        self.checkpoints.save(place.step, self.run.state, host, place.metrics)
        self.run.pipeline.checkpointed()
        # What no checkpoint would go on with is of no use; the one being written may still be lost.
        first = self.checkpoints.first_kept
        if first is not None:
            self.journal.keep(first)
        # What is being written is not whole, so the warm-up's own go when the next one is begun.
        if any(step < place.step for step in self.checkpoints.steps):
            self.folder.drop_warmup()

    def settle(self) -> None:
        """Waits a while for rollouts that the newest checkpoint goes on with; without them the run goes on from the one
        before."""
        if self.place is None:
            return
        stop = json.loads(self.place.host)["ordered"]
        missing = self.run.pipeline.num_missing(stop)
        if missing:
            say(f"waiting up to {SETTLE_S:.0f} s for {missing} rollouts that the checkpoint needs")
            self.run.pipeline.settle(stop, SETTLE_S)


def check_best_metric(config: Config, known: Iterable[str]) -> None:
    """ValueError if `config.checkpoint` ranks by a metric that is not among those known of its kind: of evaluations,
    whose names begin with `eval/`, or of steps."""
    own = config.checkpoint
    names = list(known)
    is_of_evaluation = own.best_metric.startswith("eval/")
    is_other_kind = bool(names) and names[0].startswith("eval/") != is_of_evaluation
    if not own.keep_best or is_other_kind or own.best_metric in names:
        return
    near = difflib.get_close_matches(own.best_metric, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(names))}"
    raise ValueError(f"config.checkpoint.best_metric={own.best_metric!r} is no metric of this run; {hint}")


def place_of(run: Run, step: int, metrics: dict[str, float] | None = None, *, is_logged: bool = True) -> Place:
    """The place of a run that has done `step` steps and has nothing under way."""
    return Place(step, json.dumps(host_state(run, step)), metrics, is_logged)


def open_checkpoints(config: Config, folder: RunFolder, journal: Journal | None = None) -> Checkpointer:
    """The checkpoints of a run; those of a loop count as whole when the rollouts that they need are in its journal."""
    own = config.checkpoint
    return Checkpointer(
        folder.checkpoints,
        keep_last=own.keep_last,
        keep_best=own.keep_best,
        best_metric=own.best_metric,
        is_complete=None if journal is None else lambda step, host: journal.holds(step, host.get("ordered", step)),
        check=folder.check_lease,
    )


def open_warmup(folder: RunFolder) -> Checkpointer:
    return Checkpointer(folder.warmup_checkpoints, keep_last=1, check=folder.check_lease)


def review_warmup(folder: RunFolder) -> None:
    """`review_changes` of a warm-up that goes on. Before the start is written down, which a refused one is not."""
    if not on_main(folder.warmup_checkpoints.exists):
        return
    with contextlib.closing(open_warmup(folder)) as checkpoints:
        steps = checkpoints.steps
    if steps:
        review_changes(folder.previous_config, folder.config, steps[-1], "config.warmup.steps")


def review_run(folder: RunFolder, done: int) -> None:
    """`review_changes` of a run that has done `done` steps. ValueError too where its first evaluation is missing."""
    is_evaluated = on_main(folder.evaluation_file(0).exists)
    if done and not is_evaluated:
        raise ValueError(
            f"{folder.evaluation_file(0)} is missing, and the weights that it was made with are gone; put it back, "
            "or start in a new folder (or with --fresh)"
        )
    review_changes(folder.previous_config, folder.config, done, "config.steps", is_evaluated=is_evaluated)


def resume(run: Run, checkpoints: Checkpointer, folder: RunFolder, journal: Journal) -> Place | None:
    """Restores the newest good checkpoint into `run`, and says where it stands; None for a new run. ValueError for a
    config that the run cannot go on with.

    Rollouts that an earlier start has made of the same config are taken from the journal, behind the checkpoint too.
    """
    if checkpoints.steps:
        review_run(folder, checkpoints.steps[-1])

    restored = checkpoints.restore(run.target_state()) if checkpoints.steps else None
    if restored is None and checkpoints.steps:
        # Before the first one is complete all rollouts are there, and the run begins again with them.
        if not on_main(lambda: journal.holds(0, 1)):
            raise ValueError(
                f"no checkpoint in {folder.checkpoints} can be gone on from: rollouts that they need are missing in "
                f"{journal.folder}; put them back, or start anew with --fresh"
            )
        checkpoints.drop(checkpoints.steps)

    if restored is None:
        review_warmup(folder)
        if is_main_process():
            folder.evaluation_file(0).unlink(missing_ok=True)
        go_on(run, folder, journal, 0, {})
        folder.start(0)
        return None

    run.state, host, step = restored
    run.reference_scores = host.get("reference_scores", [])
    run.empty_steps = host.get("empty_steps", 0)

    # The next rollout is sampled by the weights restored, and may ask for older ones too.
    version = run.config.rollout.version_of(step)
    if (older := run.actor.older(version)) < version:
        run.pipeline.remember(run.learner.params_before(run.state), older)
    go_on(run, folder, journal, step, host)

    unlogged = host.get("unlogged")
    folder.start(step, is_logged=unlogged is None)
    logging.info("resuming %s at step %d", folder.path, step)
    if unlogged is None:
        return place_of(run, step)
    return place_of(run, step, {name: float(value) for name, value in unlogged.items()}, is_logged=False)


def go_on(run: Run, folder: RunFolder, journal: Journal, step: int, host: Mapping[str, Any]) -> None:
    """Brings the actor's side to where it stood behind `step` steps, of which a checkpoint says `host`, or behind the
    last rollout that is used again.

    Used again is what the same config has made. Where it has changed, only rollouts that were ordered before are used,
    whose weights are gone, as far as the staleness asked for allows.
    """
    examples = {example.id: example for example in run.dataset.train}
    ordered = host.get("ordered", step)
    found = journal.load(step, examples)
    is_same = folder.previous_config is not None and not sampled_otherwise(folder.previous_config, folder.config)
    # Keys and values of older weights are in no journal, and would be missing behind a rollout that is not made again.
    replays = getattr(run.config.actor, "at_hand_over", "recompute") == "recompute"
    recorded = [made for made in found if made.step < ordered or (is_same and replays)]

    # Behind a checkpoint without rollouts ahead of it this is in the checkpoint; a new run has it from its config.
    at_step = {name: host[name] for name in ("curriculum", "actor") if name in host}
    at_step = at_step or (json.loads(run.pipeline.host_state()) if ordered <= step else {})
    newest = json.loads(recorded[-1].behind) if recorded else at_step
    check_processes(newest.get("actor", {}))
    run.curriculum.load_state_dict(newest["curriculum"])
    examples |= added_by(newest["curriculum"])
    # A replay plays nothing, so nothing is under way.
    if run.pipeline.recording is None:
        run.actor.load_state_dict(newest.get("actor", {}), run.algorithm.plan, examples)

    # What was drawn does not come again, also where the rollout that was made of it is of no use.
    recorded = fitting(recorded, run.config.rollout)
    journal.keep(0, step + len(recorded))
    run.pipeline.go_on(step, ordered, recorded, json.dumps(at_step or newest))
    if recorded:
        say(f"going on with {len(recorded)} rollouts of the journal, from that of step {step + 1} on")


def fitting(recorded: list[Made], config: RolloutConfig) -> list[Made]:
    """Those of them, up to the first that is older, which a run of this staleness may train on."""
    fits = [made.version >= config.version_of(max(0, made.step - config.staleness)) for made in recorded]
    return recorded[: fits.index(False)] if False in fits else recorded


def sampled_otherwise(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two configs, as JSON, may lead to other rollouts."""
    of_no_matter = ("config.name", "config.steps", "config.log", "config.checkpoint", "config.rollout.devices")
    return any(not name.startswith(of_no_matter) for name in changed_fields(old, new))


def save_description(run: Run, folder: RunFolder, decoder: DecoderConfig | None = None) -> None:
    """Writes `model/`: metadata and tokenizer, what `rljax convert` needs beside a checkpoint. `decoder` is what the
    checkpoints are of; None is the policy's."""
    decoder = decoder or run.decoder
    if is_main_process():
        # The files of another tokenizer, of a run that was here before, would be read along with the new ones. So they
        # are made beside the old ones, and whoever looks for `model/config.json` finds a whole folder or none.
        new = folder.path / "model.tmp"
        remove_tree(new)
        with local_folder(new) as path:
            run.tokenizer.save(path)
        metadata = written_metadata(base_config(decoder), run.config.model.metadata_of(), run.tokenizer)
        if decoder.lora is not None:
            adapter = described_adapter(decoder, files_of(run.config.model))
            # PEFT's modules may hold several matrices each, so what is adapted is said apart.
            own = {"base_dtype": decoder.param_dtype, "quantized": decoder.quantized, "targets": decoder.lora.targets}
            folder.write_json(new / ADAPTER_FILE, adapter | own)
        folder.write_json(new / "generation_config.json", metadata.generation)
        folder.write_json(new / "config.json", metadata.config)
        move_tree(new, folder.path / "model", last="config.json")


def save_base(run: Run, folder: RunFolder, policy: Callable[[], Params]) -> None:
    """Writes `base/`: of `policy()` the frozen weights beneath a run's adapters, as a model's folder, where no other
    files hold them. Before the first checkpoint: whoever exports one or goes on from it needs them bit for bit."""
    if run.decoder.lora is None or files_of(run.config.model):
        return
    decoder = base_config(run.decoder)
    params = base_params(policy())
    if run.decoder.quantized is not None:
        # What codes stand for, in full: it becomes the same codes again.
        params = cast_params(dequantized_params(run.decoder, params), "float32")
    said = run.config.model.metadata_of()

    # Whole or not there, as `model/`.
    new = folder.path / "base.tmp"
    on_main(lambda: remove_tree(new))
    with local_folder(new) as path:
        save_hf(
            path,
            decoder,
            params,
            tokenizer=run.tokenizer,
            hf_config=said.config,
            generation_config=said.generation,
        )
    on_main(lambda: move_tree(new, folder.base, last="config.json"))


def host_state(run: Run, step: int) -> dict[str, Any]:
    """What a checkpoint of `step` done steps holds beside arrays, JSON-ready."""
    return {
        "reference_scores": run.reference_scores,
        "empty_steps": run.empty_steps,
        **run.pipeline.place(step),
    }


def train_step(run: Run, step: int) -> tuple[dict[str, float], Rollout]:
    """One rollout and the updates made of it; `run.state` is replaced, the old one's buffers are donated. `Stopped`
    comes before the first update or not at all."""
    config = run.config
    timer = PhaseTimer()
    compiled = compile_count_here()

    with run.stops.abandonable(), run.pulse("rollout"):
        run.push(step)
        run.pipeline.order(step, run.learner.pushed_params(run.state))
        made = run.pipeline.take(step)
        rollout = made.rollout
        timer.add(rollout.seconds)
    if made.lacking:
        run.remember(step)
        metrics = empty_step(run, rollout, made.lacking, timer)
        metrics |= waits(run, made)
        metrics["compile/count"] = float(compile_count_here() - compiled + made.compiled)
        return metrics, rollout

    taught: dict[str, float] = {}
    head = None
    with run.stops.abandonable(), timer("score"), run.pulse("scoring"):
        batch = stack_rows(config, rollout.trajectories, rollout.rewards.size)
        # Before anything is computed of it, in which processes with other shapes would wait for each other.
        check_equal(rollout=(batch.tokens, batch.action_mask, batch.is_valid, batch.reward))
        allowed = None
        if config.sampling.follows_grammar:
            allowed = allowed_in(rollout.trajectories, run.grammars, np.asarray(batch.tokens))
        if run.algorithm.plan.needs_ref:
            reference = run.learner.reference_params(run.state)
            scored = run.learner.score_rows(reference, batch, allowed=allowed)
            batch = dataclasses.replace(batch, ref_logprobs=scored)
        if run.critic is not None:
            batch = run.critic.with_values(run.state.critic, batch)
        if run.teachers is not None:
            examples = [rollout.examples[trajectory.group_id] for trajectory in rollout.trajectories]
            batch, taught = run.teachers.taught(batch, examples, run.student())
            head = run.teachers.head(run.student())
        advantages = np.asarray(run.algorithm.advantage_fn(batch))
        minibatches = []
        if run.policy_moves(step):
            minibatches = run.learner.prepare(run.state, batch, advantages, allowed=allowed, teacher_head=head)
        if config.log.per_token and step % config.log.rollouts_every == 0:
            before = run.learner.score_rows(run.learner.policy_params(run.state), batch, allowed=allowed)
            log_tokens(rollout.records, rollout.trajectories, batch, advantages, before, run.tokenizer)
        check_equal(shapes=[[np.shape(x) for x in jax.tree.leaves(minibatch)] for minibatch in minibatches])

    if run.critic is not None and not run.critic.learner.is_warm:
        with timer("compile"), run.pulse("compiling updates of the critic"):
            critic_state = run.critic.warm_up(run.state.critic, batch, tell_compiled("critic's update programs"))
            run.state = with_critic(run.state, critic_state)
    if minibatches and not run.learner.is_warm:
        with timer("compile"), run.pulse("compiling updates"):
            run.state = run.learner.warm_up(run.state, minibatches[0], tell_compiled("update programs"))

    with timer("update"), run.pulse("update"):
        run.remember(step)
        metrics = {}
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

    for record, row in zip(rollout.records, advantages, strict=False):
        record["advantage"] = float(row[np.abs(row).argmax()])

    run.empty_steps = 0
    metrics |= taught
    metrics |= rollout_metrics(run, rollout, timer)
    metrics |= waits(run, made)
    metrics["compile/count"] = float(compile_count_here() - compiled + made.compiled)
    return metrics, rollout


def waits(run: Run, made: Made) -> dict[str, float]:
    """Seconds that the learner waited for a rollout, and the actor for an order, where they work beside each other."""
    if run.beside is None:
        return {}
    return {"time/learner_wait_s": run.pipeline.waited_s, "time/actor_wait_s": made.idle_s}


def tell_compiled(what: str) -> Callable[[int, int], None]:
    """Says how many of how many programs are compiled, and since when."""
    started = time.perf_counter()

    def progress(done: int, total: int) -> None:
        say(f"{what}: {done} of {total} compiled, {time.perf_counter() - started:.0f} s")

    return progress


def empty_step(run: Run, rollout: Rollout, lacking: str, timer: PhaseTimer) -> dict[str, float]:
    """The metrics of a step that nothing can be learned from, and which updates nothing."""
    run.empty_steps += 1
    run.lacking = lacking
    logging.warning("a step without an update (%d in a row): %s", run.empty_steps, lacking)
    return rollout_metrics(run, rollout, timer)


def rollout_metrics(run: Run, rollout: Rollout, timer: PhaseTimer) -> dict[str, float]:
    """What the log says of a rollout and of the time that its step took."""
    metrics = {f"rollout/{name}": value for name, value in rollout.stats.items()}
    metrics["rollout/empty_steps"] = float(run.empty_steps)
    metrics |= {f"play/{name}": value for name, value in rollout.actor_stats.items()}
    metrics |= timer.metrics()
    metrics["time/tokens_per_s"] = rollout.stats["new_tokens"] / timer.total
    return metrics


def refresh_reference(run: Run, done: int, evaluation: Callable[[], Evaluation]) -> None:
    """Moves the reference to the policy, `config.reference_weight` of the way, when config or plan say that it is due
    after `done` steps, unless the plan's gate objects to what has become of the held-out scores since the last time.
    Where there is a gate, `evaluation` is asked for them."""
    plan = run.algorithm.plan
    every = run.config.reference_refresh or plan.refresh_every
    if not every or done % every:
        return
    if plan.refresh_gate is not None:
        scores = evaluation().solved_shares()
        if not plan.refresh_gate(np.array(scores), np.array(run.reference_scores)):
            return
        run.reference_scores = scores
    run.state = run.learner.refresh_reference(run.state, run.config.reference_weight)


def held_out(run: Run, folder: RunFolder, step: int) -> Evaluation:
    """Evaluates on held-out problems and keeps the result in the run folder; what is there already is read back."""
    if run.evaluation is not None and run.evaluation.step == step:
        return run.evaluation

    # One process looks, since another may see the folder as it was a while ago, or not at all.
    file = folder.evaluation_file(step)
    kept = on_main(lambda: read_json(file) if file.exists() else None)
    if kept is not None:
        run.evaluation = Evaluation.from_dict(kept)
        check_same_problems(run, run.evaluation, file)
        return run.evaluation

    if step in (0, run.config.steps):
        say(f"evaluating held-out problems {'before' if step == 0 else 'after'} training")
    run.evaluation = evaluate_run(run, run.policy(), step)
    folder.write_json(file, run.evaluation.to_dict())
    return run.evaluation


def check_same_problems(run: Run, evaluation: Evaluation, file: AnyPath) -> None:
    """ValueError unless an evaluation that was read is of the problems that the data holds out now."""
    if [problem["prompt_id"] for problem in evaluation.problems] != [e.id for e in held_out_examples(run)]:
        raise ValueError(
            f"{file} is of other held-out problems than the data has now; go on with the data that the run began with, "
            "or start in a new folder"
        )


def evaluate_run(run: Run, params: Params, step: int, report: Answered = lambda count: None) -> Evaluation:
    """The evaluation that `config.evaluation` describes, of `params`. `report` is told how many answers there are of
    two for each held-out example."""
    config = run.config.evaluation
    examples = held_out_examples(run)
    with run.stops.abandonable(), run.pulse("evaluation"):
        return run.pipeline.evaluate(
            step, params, lambda: evaluate(run.actor, examples, config, step=step, report=report)
        )
