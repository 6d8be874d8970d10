"""Updates on rows that the data gives: what supervised fine-tuning and preferences have in common."""

import dataclasses
from collections.abc import Callable
from typing import Any

from rljax.experiment.build import Run
from rljax.experiment.stops import Stopped
from rljax.tasks import Curriculum
from rljax.training import Checkpointer, Learner, PhaseTimer, RunFolder, add_metrics, with_base
from rljax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Stage:
    """Updates without rollouts. The `curriculum` is what a checkpoint holds beside the state."""

    name: str
    """What one of its updates is called where a person looks."""
    learner: Learner
    curriculum: Curriculum
    steps: int
    steps_field: str
    """What sets `steps`, such as `config.warmup.steps`."""
    initial: Callable[[RunFolder], TrainState]
    """The state that it starts from; the folder shows what that takes."""
    base: Callable[[], Any]
    """The frozen weights that a restored state stands on; asked for where there are any."""
    update: Callable[[TrainState, int], tuple[TrainState, dict[str, Any]]]
    """`update(state, step)`, of which `state` is donated: the state and metrics after one more update."""
    measure: Callable[[TrainState, int], dict[str, float]] = lambda state, done: {}
    """`measure(state, done)`: further metrics after `done` updates, where they are due."""


def run_stage(
    run: Run,
    stage: Stage,
    folder: RunFolder,
    checkpoints: Checkpointer | None,
    *,
    report: Callable[[int, dict[str, float]], None],
    begin: Callable[[int], None] = lambda first: None,
) -> TrainState:
    """The state after all steps, going on from the newest of `checkpoints`.

    `begin(step)` is told where it goes on, `report(done, metrics)` every step. It saves every
    `config.checkpoint.every` steps and at the last, and before it raises `Stopped` when the run is asked to end.
    """
    every = run.config.checkpoint.every

    restored = None
    if checkpoints is not None and checkpoints.steps:
        target = stage.learner.abstract_state()
        # Checkpoints are of what is trained alone.
        restored = checkpoints.restore(target if target.base is None else with_base(target, stage.base()))
    first = 0 if restored is None else restored[2]
    run.stops.check()
    begin(first)
    if restored is None:
        state = stage.initial(folder)
    else:
        state = restored[0]
        stage.curriculum.load_state_dict(restored[1]["curriculum"])

    for done in range(first + 1, stage.steps + 1):
        timer = PhaseTimer()
        with timer("update"), run.pulse(stage.name):
            state, stats = stage.update(state, done - 1)
            metrics = add_metrics([stats])
        metrics |= stage.measure(state, done)

        # As in training, the log comes before the checkpoint that it is resumed from.
        report(done, metrics | timer.metrics())
        is_due = every > 0 and (done % every == 0 or done == stage.steps)
        try:
            run.stops.check()
        except Stopped:
            is_due = True
            raise
        finally:
            if is_due and checkpoints is not None:
                checkpoints.save(done, state, {"curriculum": stage.curriculum.state_dict()}, metrics)
    return state
