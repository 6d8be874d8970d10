"""What `rljax sft` does, and what all stages without rollouts do in a run folder."""

import contextlib
from collections.abc import Callable

from rljax.experiment.build import Run, build, held_out_examples
from rljax.experiment.changes import review_changes
from rljax.experiment.commits import COMMIT_FILE, source_of
from rljax.experiment.config import Config, to_dict
from rljax.experiment.pulse import Pulse
from rljax.experiment.report import describe_run, evaluation_table, say
from rljax.experiment.sft import check_demonstrations, supervised
from rljax.experiment.stage import Stage, run_stage
from rljax.experiment.stops import Stops
from rljax.experiment.train import evaluate_run, open_checkpoints, save_base, save_description
from rljax.experiment.watchdog import Watchdog
from rljax.parallel import check_equal, end_together, on_main, use_mesh
from rljax.settings import check_config
from rljax.tasks import DataSource
from rljax.training import RunFolder, as_path, writable
from rljax.types import TrainState


def fine_tune(config: Config, workdir: str, *, fresh: bool = False) -> dict[str, float]:
    """`config.warmup.steps` supervised steps in a run folder, going on from its newest checkpoint; returns the metrics
    of the last one. On SIGTERM, SIGUSR1 or Ctrl-C it saves and raises `Stopped`."""
    # Before any field is compared with anything.
    check_config(config)
    if config.warmup.steps < 1:
        raise ValueError(f"config.warmup.steps={config.warmup.steps} must be at least 1 for supervised fine-tuning")

    if config.checkpoint.keep_best:
        raise ValueError(
            f"config.checkpoint.keep_best={config.checkpoint.keep_best} has no effect in supervised fine-tuning, whose "
            "steps have losses alone and the highest is no best; set it to 0, config.checkpoint.keep_last keeps more"
        )

    def check(run: Run) -> None:
        check_demonstrations(run)
        if config.evaluation.problems >= 0:
            held_out_examples(run)

    def finish(run: Run, stage: Stage, state: TrainState) -> None:
        if config.evaluation.problems >= 0:
            evaluation = evaluate_run(run, stage.learner.policy_params(state), config.warmup.steps)
            say(evaluation_table(evaluation))

    return run_in_folder(
        config,
        workdir,
        lambda source: build(config, source=source),
        supervised,
        check=check,
        finish=finish,
        fresh=fresh,
    )


def run_in_folder(
    config: Config,
    workdir: str,
    build_run: Callable[[DataSource], Run],
    stage_of: Callable[[Run], Stage],
    *,
    check: Callable[[Run], None],
    finish: Callable[[Run, Stage, TrainState], None],
    fresh: bool = False,
) -> dict[str, float]:
    """A stage in a run folder, going on from its newest checkpoint; returns the metrics of the last update.

    `build_run(source)` makes the run, of rows read from there. `check(run)` refuses data that cannot be learned from
    before the folder is touched; `finish(run, stage, state)` is what comes behind the last update. On SIGTERM, SIGUSR1
    or Ctrl-C it saves and raises `Stopped`.
    """
    with end_together(), Stops() as stops:
        with stops.abandonable():
            path = as_path(workdir)
            on_main(lambda: writable(path))
            source, commit = source_of(config, [] if fresh else [path])
            run = build_run(source)
            stage = stage_of(run)
        run.stops = stops
        check(run)
        say(describe_run(run))
        check_equal(config=to_dict(config), data=[example.id for example in run.dataset.train])
        folder = RunFolder(path, config=to_dict(config), fresh=fresh, total_steps=stage.steps)
        if commit is not None:
            folder.write_json(COMMIT_FILE, commit)
        checkpoints = open_checkpoints(config, folder)
        run.pulse = Pulse(folder.status, config.log.pulse_s)
        watchdog = Watchdog(run.pulse, folder.stacks, config.log.stall_s)
        last: dict[str, float] = {}

        def begin(first: int) -> None:
            folder.start(first)
            save_description(run, folder, stage.learner.config)
            if not first:
                save_base(run, folder, run.initial_params)

        def report(done: int, metrics: dict[str, float]) -> None:
            folder.log_step(done, metrics)
            # Lines come before the checkpoint of their step, and cost nothing here: there are no rollouts.
            folder.flush()
            last.update(metrics)

        actor = contextlib.nullcontext() if run.actor is None else run.actor
        opened = contextlib.closing(checkpoints)
        with watchdog, actor, folder, opened, use_mesh(run.mesh), run.pulse, end_together():
            if checkpoints.steps:
                review_changes(folder.previous_config, folder.config, checkpoints.steps[-1], stage.steps_field)
            state = run_stage(run, stage, folder, checkpoints, report=report, begin=begin)
            checkpoints.wait()
            if checkpoints.steps:
                # What came first has no use beside a whole checkpoint.
                folder.drop_warmup()
            finish(run, stage, state)
        say(f"run folder      {folder.path}")
        return {name: value for name, value in last.items() if not name.startswith("time/")}
