"""What has changed in a run's config since its last start: said, or refused where the run could not end."""

from collections.abc import Mapping
from typing import Any

from rljax.experiment.config import changed_fields
from rljax.experiment.report import say

_OF_THE_FIRST_EVALUATION = tuple(
    f"config.evaluation.{name}" for name in ("problems", "samples", "temperature", "top_p", "solved_by")
)
"""Settings that the evaluation before training was made with; its weights are gone."""


def review_changes(
    old: Mapping[str, Any] | None, new: Mapping[str, Any], done: int, steps_field: str, *, is_evaluated: bool = False
) -> None:
    """Prints what has changed since the start that wrote `old`, of a run that has done `done` steps.

    ValueError for fewer steps than those (`steps_field` names the number of steps, `config.steps` or
    `config.warmup.steps`), and, where the run `is_evaluated` before training, for an evaluation that could not be
    compared with that; and where versions would count something else.
    """
    if old is None:
        return
    changed = changed_fields(old, new)

    steps = new
    for name in steps_field.split(".")[1:]:
        steps = steps[name]
    if isinstance(steps, int) and steps < done:
        raise ValueError(
            f"{steps_field}={steps}, but the run in this folder has done {done}; raise it, or start in a new folder "
            "(or with --fresh)"
        )

    for name in _OF_THE_FIRST_EVALUATION:
        was, value = changed.get(name, (None, None))
        # A config of before the field was there says nothing of it, and could not be set back.
        if is_evaluated and was is not None:
            raise ValueError(
                f"{name}={value!r}, but the evaluation before training was made with {was!r}, and its weights are "
                "gone; set it back, and measure what else you want to know with `rljax eval`"
            )

    pushed = "config.rollout.push_every"
    if pushed in changed and steps_field == "config.steps" and None not in changed[pushed]:
        raise ValueError(
            f"{pushed}={changed[pushed][1]!r}, but the run in this folder counts versions by {changed[pushed][0]!r} "
            "steps; set it back, or start in a new folder (or with --fresh)"
        )

    if changed:
        lines = [f"  {name}: {was!r} -> {value!r}" for name, (was, value) in changed.items()]
        say("\n".join([f"going on at step {done} with another config than at the last start:", *lines]))
