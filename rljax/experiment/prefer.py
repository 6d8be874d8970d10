"""What `rljax prefer` does."""

import contextlib

from rljax.experiment.build import Run, build
from rljax.experiment.config import Config
from rljax.experiment.fine_tune import run_in_folder
from rljax.experiment.preferences import check_preferences, preferring
from rljax.experiment.report import evaluation_table, say
from rljax.experiment.sft import check_demonstrations, warm_up
from rljax.experiment.stage import Stage
from rljax.experiment.train import evaluate_run, open_warmup
from rljax.settings import check_config, placed
from rljax.tasks import Dataset
from rljax.training import RunFolder
from rljax.types import Params, TrainState


def prefer(config: Config, workdir: str, *, fresh: bool = False) -> dict[str, float]:
    """`config.preferences.steps` updates on preferences in a run folder, behind the supervised steps of `config.warmup`
    if there are any; goes on from the newest checkpoint. Returns the metrics of the last update.

    The trained policy answers held-out problems at the end where the data or `config.actor` says how to judge it, and
    `config.evaluation.problems` is not -1. On SIGTERM, SIGUSR1 or Ctrl-C it saves and raises `Stopped`.
    """
    # Before any field is compared with anything.
    check_config(config)
    if config.checkpoint.keep_best:
        raise ValueError(
            f"config.checkpoint.keep_best={config.checkpoint.keep_best} has no effect in learning from preferences, "
            "whose steps have losses alone and the highest is no best; set it to 0, config.checkpoint.keep_last keeps "
            "more"
        )
    with placed("config.preferences.method"):
        method = config.preferences.method.build()

    def plays(dataset: Dataset) -> bool:
        is_judged = bool(getattr(config.actor, "rewards", True)) or dataset.verifier is not None
        return config.evaluation.problems >= 0 and not method.scores_values and is_judged and bool(dataset.test)

    def check(run: Run) -> None:
        check_demonstrations(run)
        check_preferences(run)

    def finish(run: Run, stage: Stage, state: TrainState) -> None:
        if run.actor is not None:
            say(evaluation_table(evaluate_run(run, stage.learner.policy_params(state), config.preferences.steps)))

    return run_in_folder(
        config,
        workdir,
        lambda source: build(config, plays=plays, source=source),
        lambda run: preferring(run, lambda folder: _first_params(run, folder)),
        check=check,
        finish=finish,
        fresh=fresh,
    )


def _first_params(run: Run, folder: RunFolder) -> Params:
    """The weights that preferences are learned from."""
    if not run.config.warmup.steps:
        return run.initial_params()
    with contextlib.closing(open_warmup(folder)) as checkpoints:
        return warm_up(run, folder, checkpoints)
