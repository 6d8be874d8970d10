"""What `rljax study geosketch` does: does drawing on a figure help to answer (GeoSketch, 2509.22460)?

The model solves held-out problems of plane geometry under the arms of `rljax.envs.library.geosketch`, with the run's
own decoder. A page, a picture and the figures with every episode are left in the run folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rljax.analysis.suites import Suite, study_suite
from rljax.envs.library.geosketch import ARMS, FULL, SketchEnvironment
from rljax.evaluation.estimators import bootstrap_interval, paired_difference
from rljax.experiment.build import Run
from rljax.experiment.config import Config
from rljax.experiment.report import aligned
from rljax.rollouts import MultiTurn, ScoredGroup
from rljax.tasks import Example, load_callable

RIGHT = "is_right"
MEASURED = (RIGHT, "reward", "proven", "is_well_formed", "constructions", "unused")
"""What the page shows of an arm: means over problems."""
COLUMNS = ("points", "answer", "solution", "family", "kind")
"""Of the rows that can be studied."""

_READING = (
    "Every arm answers the same problems. No action: the policy may only answer. Without effect: it draws, is told "
    "nothing of it, and can assert nothing of it. Full loop: it is told what is new in the figure. What drawing shows "
    "is what the full loop has beyond drawing without effect; below are both differences, paired by problem. An "
    "episode without an answer counts as wrong. A policy trained under one arm is at home there, so read differences "
    "of a run beside its config."
)


def study_geosketch(config: Config, workdir: str, *, checkpoint: str | None = None) -> dict[str, Any]:
    """Runs the study greedily on the held-out problems of `config`, prints its table, writes `geosketch.json`,
    `geosketch.md` and `geosketch.png` into `workdir`, and returns what the first holds.

    The model is the newest checkpoint of the run folder `checkpoint`, or the config's own, after its warm-up.
    `config.evaluation.problems` counts problems, each asked under every arm; 0 is all. ValueError, before weights load,
    for an environment that is no `SketchEnvironment`, and for rows that are not for it.
    """
    _check_environment(config)
    suite = Suite("geosketch", _asked, _record, summarise, table, page_of, draw)
    return study_suite(suite, config, workdir, checkpoint=checkpoint)


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of records with `problem`, `arm`, `family` and `MEASURED`: by arm the means and a 95% interval of right answers
    over problems; by family the share of right answers; and how much oftener the full loop is right than every other
    arm, paired by problem."""
    problems = sorted({record["problem"] for record in records})
    of_arm = {arm: {r["problem"]: r for r in records if r["arm"] == arm} for arm in ARMS}
    right = {arm: np.array([float(found[p][RIGHT]) for p in problems]) for arm, found in of_arm.items()}

    arms = {}
    for arm, found in of_arm.items():
        means = {name: float(np.mean([found[p][name] for p in problems])) for name in MEASURED}
        arms[arm] = {**means, "interval": [float(bound) for bound in bootstrap_interval(right[arm])]}

    families: dict[str, dict[str, float]] = {}
    for family in sorted({record["family"] for record in records}):
        is_here = np.array([of_arm[FULL][p]["family"] == family for p in problems])
        families[family] = {arm: float(right[arm][is_here].mean()) for arm in ARMS}

    gains = {arm: paired_difference(right[FULL], right[arm]) for arm in ARMS if arm != FULL}
    return {
        "problems": len(problems),
        "arms": arms,
        "families": families,
        "gains": {arm: {"mean": gain.mean, "interval": [gain.low, gain.high]} for arm, gain in gains.items()},
    }


def table(report: Mapping[str, Any]) -> str:
    """A line for each arm."""
    return aligned(_lines(report))


def page_of(report: Mapping[str, Any], picture: str) -> str:
    """The page, in Markdown."""
    families = [["family", *ARMS], *([name, *_figures(row)] for name, row in report["families"].items())]
    gains = [
        f"- beyond {ARMS[arm]}: {gain['mean']:+.3f} [{gain['interval'][0]:+.3f}, {gain['interval'][1]:+.3f}]"
        for arm, gain in report["gains"].items()
    ]
    first = report["answers"][0]["problem"]
    examples = [_example(record) for record in report["answers"] if record["problem"] == first]
    model = f"step {report['step']} of `{report['checkpoint']}`" if report["checkpoint"] else "the config's own"
    parts = [
        "# Does drawing help?",
        f"GeoSketch (2509.22460) as text, on {report['problems']} generated problems; the paper's own cannot be passed "
        f"on. Model: {model}. Greedy episodes.",
        f"![share of problems answered right, by arm and family]({picture})",
        _markdown(_lines(report)),
        _READING,
        "The full loop is right so much oftener:",
        "\n".join(gains),
        "## Right answers by family",
        _markdown(families),
        "## The first problem",
        *examples,
    ]
    return "\n\n".join(parts) + "\n"


def draw(report: Mapping[str, Any], file: Path) -> Path:
    """Bars of right answers for every family and for all, one for each arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    overall = {arm: figures[RIGHT] for arm, figures in report["arms"].items()}
    rows = {"all": overall, **report["families"]}
    figure, axes = plt.subplots(figsize=(7, 1.5 + 0.45 * len(rows)))
    middle = np.arange(len(rows))[::-1]
    for index, (arm, colour) in enumerate(zip(ARMS, ("#999999", "#dd8452", "#4c72b0"), strict=True)):
        axes.barh(middle + 0.27 * (1 - index), [row[arm] for row in rows.values()], 0.25, color=colour, label=ARMS[arm])
    axes.set_yticks(middle, list(rows))
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of problems answered right")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def _check_environment(config: Config) -> None:
    make = config.actor.make if isinstance(config.actor, MultiTurn) else ""
    found = load_callable(make) if make else None
    if not (isinstance(found, type) and issubclass(found, SketchEnvironment)):
        raise ValueError(
            f"config.actor plays {make or 'no environment'}; the study needs MultiTurn with "
            "make='rljax.envs.library:SketchEnvironment', or a subclass of it"
        )


def _asked(run: Run) -> list[Example]:
    """The first held-out problems, each under every arm."""
    limit = run.config.evaluation.problems or len(run.dataset.test)
    asked = []
    for number, example in enumerate(run.dataset.test[:limit]):
        if not set(COLUMNS) <= set(example.columns):
            raise ValueError(
                f"config.data: {example.name} has the columns {sorted(example.columns)}; the study needs the rows of "
                "rljax.envs.library.sketches:rows"
            )
        columns = {**example.columns, "problem": number}
        asked += [Example(example.prompt, {**columns, "arm": arm}, place=example.place) for arm in ARMS]
    return asked


def _record(group: ScoredGroup) -> dict[str, Any]:
    (result,) = group.results
    columns = group.example.columns
    counts = {name: result.components.get(name, 0.0) for name in MEASURED if name != "reward"}
    return {
        **{name: columns[name] for name in ("problem", "arm", "family", "kind", "answer")},
        "prompt": str(group.example.prompt),
        "text": group.texts[0],
        "reward": result.value,
        **counts,
    }


def _lines(report: Mapping[str, Any]) -> list[list[str]]:
    head = ["arm", "right", "reward", "proven", "well formed", "drawn", "unused"]
    lines = [head]
    for arm, found in report["arms"].items():
        low, high = found["interval"]
        right = f"{found[RIGHT]:.3f} [{low:.3f}, {high:.3f}]"
        lines.append([ARMS[arm].partition(":")[0], right, *(f"{found[name]:.3f}" for name in MEASURED[1:])])
    return lines


def _figures(row: Mapping[str, float]) -> list[str]:
    return [f"{row[arm]:.3f}" for arm in ARMS]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *lines = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines))


def _example(record: Mapping[str, Any]) -> str:
    mark = "right" if record[RIGHT] else "not right"
    text = record["text"].strip() or "(nothing)"
    quoted = "\n".join(f"> {line}" for line in f"{record['prompt'].strip()}\n{text}".splitlines())
    return f"**{ARMS[record['arm']].partition(':')[0]}** ({mark}; answer {record['answer']})\n\n{quoted}"
