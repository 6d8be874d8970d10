"""What `rljax sft` does."""

import contextlib

from rljax.experiment.build import build, held_out_examples
from rljax.experiment.changes import review_changes
from rljax.experiment.config import Config, to_dict
from rljax.experiment.pulse import Pulse
from rljax.experiment.report import describe_run, evaluation_table, say
from rljax.experiment.sft import check_demonstrations, supervised, train_supervised
from rljax.experiment.stops import Stops
from rljax.experiment.train import evaluate_run, open_checkpoints, save_description
from rljax.experiment.watchdog import Watchdog
from rljax.parallel import check_equal, end_together, use_mesh
from rljax.training import RunFolder, reachable


def fine_tune(config: Config, workdir: str, *, fresh: bool = False) -> dict[str, float]:
    """`config.warmup.steps` supervised steps in a run folder, going on from its newest checkpoint; returns the metrics
    of the last one. On SIGTERM, SIGUSR1 or Ctrl-C it saves and raises `Stopped`."""
    if config.warmup.steps < 1:
        raise ValueError(f"config.warmup.steps={config.warmup.steps} must be at least 1 for supervised fine-tuning")

    if config.checkpoint.keep_best:
        raise ValueError(
            f"config.checkpoint.keep_best={config.checkpoint.keep_best} has no effect in supervised fine-tuning, whose "
            "steps have losses alone and the highest is no best; set it to 0, config.checkpoint.keep_last keeps more"
        )

    with end_together(), Stops() as stops:
        with stops.abandonable():
            path = reachable(workdir)
            run = build(config)
            learner, curriculum = supervised(run)
        run.stops = stops
        check_demonstrations(run)
        if config.evaluation.problems >= 0:
            held_out_examples(run)
        say(describe_run(run))
        check_equal(config=to_dict(config), data=[example.id for example in run.dataset.train])
        folder = RunFolder(path, config=to_dict(config), fresh=fresh, total_steps=config.warmup.steps)
        checkpoints = open_checkpoints(config, folder)
        run.pulse = Pulse(folder.status, config.log.pulse_s)
        watchdog = Watchdog(run.pulse, folder.stacks, config.log.stall_s)
        last: dict[str, float] = {}

        def begin(first: int) -> None:
            folder.start(first)
            save_description(run, folder)

        def report(done: int, metrics: dict[str, float]) -> None:
            folder.log_step(done, metrics)
            # Lines come before the checkpoint of their step, and cost nothing here: there are no rollouts.
            folder.flush()
            last.update(metrics)

        opened = contextlib.closing(checkpoints)
        with watchdog, run.actor, folder, opened, use_mesh(run.mesh), run.pulse, end_together():
            if checkpoints.steps:
                review_changes(folder.previous_config, folder.config, checkpoints.steps[-1], "config.warmup.steps")
            state = train_supervised(run, learner, curriculum, checkpoints, report=report, begin=begin)
            checkpoints.wait()
            if config.evaluation.problems >= 0:
                evaluation = evaluate_run(run, learner.policy_params(state), config.warmup.steps)
                say(evaluation_table(evaluation))
        say(f"run folder      {folder.path}")
        return {name: value for name, value in last.items() if not name.startswith("time/")}
