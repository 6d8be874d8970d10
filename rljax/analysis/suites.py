"""What studies of suites share: the answers of a config's own model, or of a run's, as figures, page and picture."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rljax.evaluation import greedy_answers
from rljax.experiment.build import Run, build
from rljax.experiment.config import Config, to_dict
from rljax.experiment.evaluate import checkpoint_params, of_answers, run_checkpoints
from rljax.experiment.report import describe_run, say
from rljax.experiment.sft import warm_up
from rljax.parallel import use_mesh
from rljax.rollouts import ScoredGroup
from rljax.tasks import Example
from rljax.training import RunFolder, versions

Report = Mapping[str, Any]
"""What a study found, as JSON has it."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """A study of held-out rows, each answered once."""

    name: str
    """Of the study and its files."""
    asked: Callable[[Run], list[Example]]
    """The rows of a run that are asked. ValueError for others than the suite's."""
    record: Callable[[ScoredGroup], dict[str, Any]]
    """What is kept of an answer."""
    summarise: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    """The figures of all records."""
    table: Callable[[Report], str]
    """A line for each of them, to print."""
    page: Callable[[Report, str], str]
    """The page in Markdown, with the picture of that name."""
    draw: Callable[[Report, Path], Path]
    """Writes the picture, and returns its file."""


def study_suite(suite: Suite, config: Config, workdir: str, *, checkpoint: str | None = None) -> dict[str, Any]:
    """Answers the held-out rows of `config` greedily, prints the suite's table, writes its `.json`, `.md` and `.png`
    into `workdir`, and returns what the first holds.

    The model is the newest checkpoint of the run folder `checkpoint`, or the config's own, after its warm-up.
    ValueError, before weights load, for rows that are not the suite's.
    """
    if checkpoint is not None:
        run_checkpoints(checkpoint)
    run = build(of_answers(config, samples=1))
    asked = suite.asked(run)
    say(describe_run(run))

    with RunFolder(workdir, config=to_dict(config), fresh=True) as folder:
        greedy, step = answered(run, folder, asked, checkpoint=checkpoint)
        records = [suite.record(group) for group in greedy]
        report = {"study": suite.name, "checkpoint": checkpoint, "step": step, **suite.summarise(records)}
        report |= {"answers": records, "versions": versions()}
        file = folder.write_json(f"{suite.name}.json", report)
        picture = suite.draw(report, Path(folder.path) / f"{suite.name}.png")
        page = Path(folder.path) / f"{suite.name}.md"
        page.write_text(suite.page(report, picture.name))
    say(f"\n{suite.table(report)}\n\npage    {page}\nfigures {file}")
    return report


def answered(
    run: Run, folder: RunFolder, asked: Sequence[Example], *, checkpoint: str | None
) -> tuple[list[ScoredGroup], int]:
    """A greedy answer to every example, in order, and the training step of the weights: those of the newest checkpoint
    of the run folder `checkpoint`, or of the config's own model after its warm-up, whose curve `folder` keeps. `folder`
    shows how far it is."""

    def report(count: int) -> None:
        folder.progress("answers", count, len(asked), {}, unit="answer")

    with run.actor, use_mesh(run.mesh):
        if checkpoint is None:
            params = warm_up(run, folder)
            step = 0
        else:
            params, step = checkpoint_params(run, checkpoint)
        run.actor.set_params(params, step)
        return greedy_answers(run.actor, asked, run.config.evaluation, report=report), step


def finite(value: Any) -> Any:
    """Plain data with None for NaN, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
