"""What `rljax stages` does: rows are made in stages and trained on, in rounds.

WORKDIR/start/            the run of `config.warmup`, if it has steps
WORKDIR/round-01/rows/    the files of the stages (`rljax.tasks.run_stages`)
WORKDIR/round-01/trained/ the supervised run on them
WORKDIR/round-00.json     the config, and what the start scores on held-out problems
WORKDIR/round-01.json     the same behind round 1
WORKDIR/summary.json      the scores of all rounds
WORKDIR/data.json         the commit of the hub's data, of which all rounds are
"""

import contextlib
import dataclasses
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rljax.evaluation import Evaluation
from rljax.experiment.build import Run, build, held_out_examples
from rljax.experiment.commits import COMMIT_FILE, source_of
from rljax.experiment.config import Config, changed_fields, to_dict
from rljax.experiment.evaluate import checkpoint_params
from rljax.experiment.fine_tune import run_in_folder
from rljax.experiment.report import aligned, say
from rljax.experiment.sft import check_demonstrations, supervised
from rljax.experiment.stage import Stage
from rljax.experiment.stage_parts import StageParts, weights_name
from rljax.experiment.train import evaluate_run
from rljax.parallel import use_mesh
from rljax.settings import check_config, shown
from rljax.tasks import DataStage, Example, Row, run_stages
from rljax.training import WarmupConfig, fingerprint, is_remote, writable
from rljax.training.lock import lock, unlock
from rljax.training.storage import replace_text
from rljax.types import Params

_FREE = ("name", "log", "checkpoint")
"""Fields that may change between rounds, since no number depends on them."""


def run_rounds(config: Config, workdir: str, *, fresh: bool = False) -> list[dict[str, Any]]:
    """`config.stages` in `workdir`, going on from what is there; returns the scores of the start and of each round, as
    `summary.json` holds them. ValueError for what cannot work, an address in place of a folder, a folder of another
    config, and one in use by another process."""
    check_config(config)
    _check(config)
    if is_remote(workdir):
        raise ValueError(f"--workdir={workdir} is an address; rounds keep their files in a local folder")
    path = Path(str(writable(workdir)))
    path.mkdir(parents=True, exist_ok=True)
    # The order is important: what another process writes must not be taken away.
    lock(path)
    try:
        if fresh:
            _empty(path)
        return _rounds_in(config, path)
    finally:
        unlock(path)


def _rounds_in(config: Config, path: Path) -> list[dict[str, Any]]:
    # All rounds read the rows of one commit, whatever the hub has by then.
    source, commit = source_of(config, [path])
    if commit is not None:
        _write_json(path / COMMIT_FILE, commit)
        config = dataclasses.replace(config, data=source)

    # Mistakes in the stages before hours of updates.
    run = build(config)
    _stages_of(StageParts(run, "", 1, path))
    if config.evaluation.problems >= 0:
        held_out_examples(run)
    if config.warmup.steps:
        check_demonstrations(run)
    del run

    rounds = config.stages.rounds
    scores = [_read_score(config, path, number) for number in range(rounds + 1)]
    for number in range(rounds + 1):
        # A score is written when the weights behind its round are whole: where the round that follows has one, its rows
        # and updates are there too.
        is_behind = number < rounds and scores[number + 1] is not None
        if scores[number] is not None and (is_behind or number == rounds):
            continue

        if number == 0 and config.warmup.steps:
            _train(config, _trained(path, 0), lambda run: run.initial_params(), "config.warmup.steps")
        score, rows = _look(config, path, number, is_scored=scores[number] is not None)
        scores[number] = scores[number] or score
        if number < rounds:
            first = number if config.stages.keeps_weights else 0
            _train_on(config, path, number + 1, rows, first)

    found = [score["scores"] for score in scores if score is not None]
    _write_json(path / "summary.json", found)
    say(_table(found))
    return found


def _check(config: Config) -> None:
    if config.stages.make is None:
        raise ValueError(
            "config.stages.make=None names no stages; give a function that returns them, such as that of "
            "configs/papers/expert_iteration.py"
        )
    if config.checkpoint.every < 1:
        raise ValueError(
            f"config.checkpoint.every={config.checkpoint.every} saves no weights that the next round could sample "
            "with; set it above 0"
        )
    if config.checkpoint.keep_best:
        raise ValueError(
            f"config.checkpoint.keep_best={config.checkpoint.keep_best} has no effect in supervised rounds, whose "
            "steps have losses alone and the highest is no best; set it to 0"
        )


def _stages_of(parts: StageParts) -> Sequence[DataStage]:
    make = parts.run.config.stages.make
    assert make is not None
    stages = list(make(parts))
    if not stages or not all(isinstance(one, DataStage) for one in stages):
        raise ValueError(f"config.stages.make returns {stages!r:.80}; it must be a list of rljax.tasks.stage(...)")
    return stages


def _look(config: Config, path: Path, number: int, *, is_scored: bool) -> tuple[dict[str, Any] | None, list[Row]]:
    """The score of the weights behind round `number`, unless there is one; and the rows of the round that follows, if
    one does."""
    run = build(config)
    with run.actor, use_mesh(run.mesh):
        params = _weights(config, run, path, number)
        score = None if is_scored else _write_score(run, path, number, params)
        if number == config.stages.rounds:
            return score, []

        say(f"round {number + 1}")
        run.actor.set_params(params, number)
        folder = _round(path, number + 1)
        parts = StageParts(run, weights_name(fingerprint(params)), number + 1, folder)
        given = [{"prompt": example.prompt, **example.columns} for example in run.dataset.train]
        rows = run_stages(
            given, _stages_of(parts), folder / "rows", report=lambda report: say(f"  {report.describe()}")
        )
    return score, rows


def _train_on(config: Config, path: Path, number: int, rows: Sequence[Row], first: int) -> None:
    """The supervised updates of round `number` on its rows, from the weights behind round `first`."""
    own = config.stages
    if len(rows) < own.batch_size:
        raise ValueError(
            f"config.stages.batch_size={own.batch_size} is more than the {len(rows)} rows of {_round(path, number)}; "
            "lower it, or have the stages keep more"
        )
    if lacking := next((row for row in rows if "completion" not in row), None):
        raise ValueError(f"the stages leave rows without a completion, such as one with {sorted(lacking)}")

    examples = [
        Example(row["prompt"], {name: value for name, value in row.items() if name != "prompt"}, place=f"row {index}")
        for index, row in enumerate(rows, start=1)
    ]
    trained = WarmupConfig(
        steps=own.steps, batch_size=own.batch_size, demonstrations=lambda given: examples, optimizer=own.optimizer
    )
    own_config = dataclasses.replace(config, warmup=trained)
    _train(own_config, _trained(path, number), lambda run: _weights(config, run, path, first), "config.stages.steps")


def _train(config: Config, folder: Path, first_params: Callable[[Run], Params], steps_field: str) -> None:
    """The updates of `config.warmup` in a run folder, from `first_params`."""

    def stage_of(run: Run) -> Stage:
        stage = supervised(run)
        start = stage.learner.init_state
        return dataclasses.replace(stage, steps_field=steps_field, initial=lambda folder: start(first_params(run)))

    run_in_folder(
        config,
        str(folder),
        lambda source: build(config, plays=lambda dataset: False, source=source),
        stage_of,
        check=check_demonstrations,
        finish=lambda run, stage, state: None,
    )


def _weights(config: Config, run: Run, path: Path, number: int) -> Params:
    """The weights behind round `number` of `config`, on the mesh of `run`, whose own warm-up may be a round's."""
    if number == 0 and not config.warmup.steps:
        return run.initial_params()
    return checkpoint_params(run, str(_trained(path, number)))[0]


def _write_score(run: Run, path: Path, number: int, params: Params) -> dict[str, Any]:
    scores: dict[str, Any] = {"round": number}
    if run.config.evaluation.problems >= 0:
        evaluation = evaluate_run(run, params, number)
        scores |= {name: estimate.value for name, estimate in evaluation.estimates.items()}
        scores |= _by_task(run, evaluation)
    score = {"config": _kept_fields(run.config), "scores": scores}
    _write_json(_score_file(path, number), score)
    say(_table([scores]))
    return score


def _by_task(run: Run, evaluation: Evaluation) -> dict[str, float]:
    """avg@k of each task, where the data tells several apart by its column `task`."""
    tasks = {example.id: example.columns.get("task") for example in run.dataset.test}
    shares: Mapping[str, list[float]] = defaultdict(list)
    for problem, share in zip(evaluation.problems, evaluation.solved_shares(), strict=True):
        if (task := tasks[problem["prompt_id"]]) is not None:
            shares[str(task)].append(share)
    return {f"avg@{evaluation.samples} of {task}": float(np.mean(shares[task])) for task in sorted(shares)}


def _read_score(config: Config, path: Path, number: int) -> dict[str, Any] | None:
    """What was found behind round `number`; None for nothing. ValueError where it was found under another config."""
    file = _score_file(path, number)
    if not file.exists():
        return None
    score = json.loads(file.read_bytes())
    changed = changed_fields(score["config"], json.loads(json.dumps(_kept_fields(config))))
    if changed:
        name, (old, new) = next(iter(changed.items()))
        raise ValueError(
            f"{path}: {name} was {shown(old)} and is {shown(new)}, since round {number}; name another --workdir, or "
            "start anew with --fresh"
        )
    return score


def _kept_fields(config: Config) -> dict[str, Any]:
    """The fields of a config that the scores of a round depend on."""
    fields = {name: value for name, value in to_dict(config).items() if name not in _FREE}
    return {**fields, "stages": {name: value for name, value in fields["stages"].items() if name != "rounds"}}


def _write_json(file: Path, value: Any) -> None:
    replace_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _table(scores: Sequence[Mapping[str, Any]]) -> str:
    """A line for each round."""
    names = list(scores[0])
    lines = [[str(score["round"]), *(f"{score[name]:.3f}" for name in names[1:])] for score in scores]
    return aligned([names, *lines])


def _round(path: Path, number: int) -> Path:
    return path / f"round-{number:02d}"


def _trained(path: Path, number: int) -> Path:
    """The run folder whose weights stand behind round `number`."""
    return _round(path, number) / "trained" if number else path / "start"


def _score_file(path: Path, number: int) -> Path:
    return path / f"round-{number:02d}.json"


def _empty(path: Path) -> None:
    """Takes away what these rounds have written, and nothing else."""
    for found in (path / "start", path / "summary.json", path / COMMIT_FILE, *path.glob("round-[0-9][0-9]*")):
        if found.is_dir():
            shutil.rmtree(found)
        else:
            with contextlib.suppress(FileNotFoundError):
                found.unlink()
