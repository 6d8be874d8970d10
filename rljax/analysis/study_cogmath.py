"""What `rljax study cogmath` does: how much of what a model solves it has understood (CogMath, 2506.04481).

The model answers word problems and nine follow-ups to each, which `rljax.tasks.cogmath` makes, with the run's own
decoder. A page, a picture and the figures with every answer are left in the run folder.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rljax.analysis.suites import Suite, finite, study_suite
from rljax.evaluation.estimators import bootstrap_interval
from rljax.experiment.build import Run
from rljax.experiment.config import Config
from rljax.experiment.report import aligned
from rljax.rollouts import ScoredGroup
from rljax.tasks import Example
from rljax.tasks.cogmath import DIMENSIONS, NO_ANSWER, ORIGINAL, UNANSWERABLE, Summary, summary

PASSED = "passed"
READABLE = "readable"
"""Rewards of the config that the study reads."""

_READING = (
    "Passed: share of problems whose follow-up is answered. Among solved: the same where the problem itself is "
    "solved. Mastered (PR): all nine are passed; beside it what PR would be if passes were independent, since an AND "
    "of nine falls by noise alone. In 2 and 3 a pass is to say that there is no answer; a strong reader puts the words "
    "of 2 in order and answers, so PR is also given without it."
)


def study_cogmath(config: Config, workdir: str, *, checkpoint: str | None = None) -> dict[str, Any]:
    """Runs the study greedily on the held-out problems of `config`, prints its table, writes `cogmath.json`,
    `cogmath.md` and `cogmath.png` into `workdir`, and returns what the first holds.

    The model is the newest checkpoint of the run folder `checkpoint`, or the config's own, after its warm-up.
    `config.evaluation.problems` counts problems, each with its follow-ups; 0 is all. ValueError, before weights load,
    for data that is not of `rljax.tasks.cogmath.rows`, and without its rewards.
    """
    suite = Suite("cogmath", _asked, _record, summarise, table, page_of, draw)
    return study_suite(suite, config, workdir, checkpoint=checkpoint)


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of answers with `problem`, `dimension`, `passed` and `readable`: the `Summary` as plain data, a 95% interval of
    PR over problems, the share of answers that can be read, and `baseline`: what always saying that there is no answer
    passes of the nine."""
    problems = sorted({record["problem"] for record in records})
    passes = np.zeros((len(problems), len(DIMENSIONS) + 1))
    for record in records:
        passes[problems.index(record["problem"]), record["dimension"]] = record[PASSED]

    found: Summary = summary(passes[:, 1:], passes[:, ORIGINAL])
    mastered = passes[:, 1:].all(axis=1).astype(float)
    low, high = bootstrap_interval(mastered)
    return {
        "summary": finite(dataclasses.asdict(found)),
        "interval": [float(low), float(high)],
        "readable": float(np.mean([record[READABLE] for record in records])),
        "baseline": len(NO_ANSWER) / len(DIMENSIONS),
    }


def table(report: Mapping[str, Any]) -> str:
    """A line for each dimension, and what they come to."""
    return aligned([[*map(str, row)] for row in _lines(report)])


def page_of(report: Mapping[str, Any], picture: str) -> str:
    """The page, in Markdown."""
    head, *lines = _lines(report)
    rows = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines)]
    examples = [_example(record) for record in report["answers"][: len(DIMENSIONS) + 1]]
    model = f"step {report['step']} of `{report['checkpoint']}`" if report["checkpoint"] else "the config's own"
    parts = [
        "# What a model has understood of what it solves",
        f"CogMath's nine dimensions (2506.04481) on {report['summary']['problems']} generated problems; the paper's "
        f"own cannot be passed on. Model: {model}. Greedy answers, of which {report['readable']:.0%} can be read.",
        f"![shares of problems passed, by dimension]({picture})",
        "\n".join(rows),
        _READING,
        "## The first problem",
        *examples,
    ]
    return "\n\n".join(parts) + "\n"


def draw(report: Mapping[str, Any], file: Path) -> Path:
    """A bar for the problems themselves, each dimension and PR."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = report["summary"]
    names = ["as it is", *(f"{i} {name}" for i, name in DIMENSIONS.items()), "all nine"]
    heights = [found["original"], *found["rates"].values(), found["mastered"]]
    figure, axes = plt.subplots(figsize=(7, 4))
    colours = ["#444444", *["#4c72b0"] * len(DIMENSIONS), "#c44e52"]
    axes.barh(names[::-1], heights[::-1], color=colours[::-1])
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of problems passed")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def _asked(run: Run) -> list[Example]:
    """The held-out rows of the first problems, each with all its follow-ups."""
    rewards = [reward.reward.split(":")[-1] for reward in getattr(run.config.actor, "rewards", ())]
    if not {PASSED, READABLE} <= set(rewards):
        raise ValueError(
            f"config.actor.rewards has {', '.join(rewards) or 'none'}; the study needs rljax.tasks.cogmath:{PASSED} "
            f"and rljax.tasks.cogmath:{READABLE}"
        )

    limit = run.config.evaluation.problems or math.inf
    found: dict[int, list[Example]] = {}
    for example in run.dataset.test:
        columns = example.columns
        if not {"problem", "dimension", "answer"} <= set(columns):
            raise ValueError(
                f"config.data: {example.name} has the columns {sorted(columns)}; the study needs the rows of "
                "rljax.tasks.cogmath:rows"
            )
        if columns["problem"] in found or len(found) < limit:
            found.setdefault(columns["problem"], []).append(example)

    whole = sorted([ORIGINAL, *DIMENSIONS])
    for number, examples in found.items():
        if sorted(example.columns["dimension"] for example in examples) != whole:
            raise ValueError(f"config.data: problem {number} lacks some of the rows {whole}, or has them twice")
    return [example for examples in found.values() for example in examples]


def _record(group: ScoredGroup) -> dict[str, Any]:
    (result,) = group.results
    columns = group.example.columns
    return {
        "problem": columns["problem"],
        "dimension": columns["dimension"],
        "prompt": str(group.example.prompt),
        "answer": columns["answer"],
        "text": group.texts[0],
        PASSED: result.components.get(PASSED, 0.0),
        READABLE: result.components.get(READABLE, 0.0),
    }


def _lines(report: Mapping[str, Any]) -> list[list[str]]:
    found = report["summary"]
    low, high = report["interval"]
    lines = [["", "follow-up", "passed", "among solved"], ["", "the problem itself", f"{found['original']:.3f}", ""]]
    for i, name in DIMENSIONS.items():
        relative = found["relative"][i]
        shown = "-" if relative is None else f"{relative:.3f}"
        lines.append([str(i), name, f"{found['rates'][i]:.3f}", shown])
    lines += [
        ["", "all nine (PR)", f"{found['mastered']:.3f} [{low:.3f}, {high:.3f}]", ""],
        ["", "all but 2", f"{found['mastered_without_2']:.3f}", ""],
        ["", "product of the nine", f"{found['product']:.3f}", ""],
        ["", f"always '{UNANSWERABLE}', mean of nine", f"{report['baseline']:.3f}", ""],
    ]
    return lines


def _example(record: Mapping[str, Any]) -> str:
    name = DIMENSIONS.get(record["dimension"], "the problem itself")
    mark = "passed" if record[PASSED] else "not passed"
    prompt, text = (record[key].strip().replace("\n", " ") for key in ("prompt", "text"))
    return f"**{name}** ({mark}; answer {record['answer']})\n> {prompt}\n>\n> {text or '(nothing)'}"
