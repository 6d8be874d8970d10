"""What studies of suites share: greedy answers of a config's own model or of a run's, and figures as JSON has them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rljax.evaluation import answers
from rljax.experiment.build import Run
from rljax.experiment.evaluate import checkpoint_params
from rljax.experiment.sft import warm_up
from rljax.parallel import use_mesh
from rljax.rollouts import ScoredGroup
from rljax.tasks import Example
from rljax.training import RunFolder


def greedy_answers(
    run: Run, folder: RunFolder, asked: Sequence[Example], *, checkpoint: str | None
) -> tuple[list[ScoredGroup], int]:
    """A greedy answer to every example, in order, and the training step of the weights: those of the newest checkpoint
    of the run folder `checkpoint`, or of the config's own model after its warm-up, whose curve `folder` keeps."""
    with run.actor, use_mesh(run.mesh):
        if checkpoint is None:
            params = warm_up(run, folder)
            step = 0
        else:
            params, step = checkpoint_params(run, checkpoint)
        run.actor.set_params(params, step)
        greedy, _ = answers(run.actor, asked, dataclasses.replace(run.config.evaluation, samples=1))
    return greedy, step


def finite(value: Any) -> Any:
    """Plain data with None for NaN, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
