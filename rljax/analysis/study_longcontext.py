"""What `rljax study longcontext` does: what a model finds in a long text, as PRELUDE (2508.09848) and CharToM-QA
(2501.01705) ask it.

The model judges episodes before a chronicle and answers questions about a story, which `rljax.tasks.longcontext` makes,
each with several windows of the text, with the run's own decoder and without retrieval. A page, a picture and the
figures with every answer are left in the run folder.
"""

import dataclasses
import functools
import math
from collections import Counter
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
from rljax.tasks import ChatEndpoint, Example, chartom, prelude
from rljax.tasks.chartom import CHOICE, GENERATIVE, Judge
from rljax.tasks.longcontext import SUITES, score
from rljax.tasks.stories import FULL

_NEEDED = {"suite", "item", "kind", "window", "answer", "visible"}
_TITLES = {prelude.SUITE: "Episodes before a chronicle (PRELUDE)", chartom.SUITE: "Questions about a story (CharToM)"}
_READING = (
    "A window shows the last so many characters of a chronicle, or so many before the last four scenes of a story. In "
    "view: share of items of which the window shows all that decides; the answer is that of the whole text in every "
    "window, so what is not in view can only be guessed. Reasoned: the label is right and the cited events prove it. "
    "What cannot be read counts as wrong."
)


def study_longcontext(
    config: Config, workdir: str, *, checkpoint: str | None = None, judge: Judge | None = None
) -> dict[str, Any]:
    """Runs the study greedily on the held-out rows of `config`, prints its tables, writes `longcontext.json`,
    `longcontext.md` and `longcontext.png` into `workdir`, and returns what the first holds.

    The model is the newest checkpoint of the run folder `checkpoint`, or the config's own, after its warm-up.
    `config.evaluation.problems` counts chronicles, and as many stories, each with its questions; 0 is all. `judge` is
    asked about answers in sentences; without one their points are found by their words, and faults by nobody.
    ValueError, before weights load, for data that is not of `rljax.tasks.longcontext.rows` and its like.
    """
    suite = Suite("longcontext", _asked, functools.partial(_record, judge=judge), summarise, table, page_of, draw)
    return study_suite(suite, config, workdir, checkpoint=checkpoint)


def endpoint_judge(base_url: str, model: str, api_key_variable: str = "") -> Judge:
    """A judge behind a chat endpoint. An endpoint that gives no reply ends the study (`JudgeError`)."""
    endpoint = ChatEndpoint(base_url=base_url, model=model, api_key_variable=api_key_variable)
    return lambda text: endpoint.ask([{"role": "user", "content": text}])


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of answers, what each suite comes to in each window, as plain data; a suite without answers is left out.

    An entry of "prelude" has the `Summary` of labels, `reasoned`, `visible`, `interval` (95%, of the accuracy, over
    chronicles) and `kinds`, the accuracy of each. One of "chartom" has `right`, `interval`, `readable`, `visible` and
    `kinds` of the answers by letter, `errors` (how often which sort of wrong option was chosen of a belief), and
    `sentences`: the coverage and faults of the others.
    """
    found: dict[str, Any] = {}
    for suite, summed in ((prelude.SUITE, _prelude), (chartom.SUITE, _chartom)):
        own = [record for record in records if record["suite"] == suite]
        by_window = [
            {"window": window, **summed([record for record in own if record["window"] == window])}
            for window in _windows(own)
        ]
        if by_window:
            found[suite] = by_window
    return finite(found)


def table(report: Mapping[str, Any]) -> str:
    """A table for each suite, a line for each window."""
    parts = [f"{_TITLES[suite]}\n{aligned(_lines(suite, report[suite]))}" for suite in SUITES if suite in report]
    return "\n\n".join(parts)


def page_of(report: Mapping[str, Any], picture: str) -> str:
    """The page, in Markdown."""
    model = f"step {report['step']} of `{report['checkpoint']}`" if report["checkpoint"] else "the config's own"
    parts = [
        "# What a model finds in a long text",
        "PRELUDE (2508.09848) and CharToM-QA (2501.01705) on generated texts; no score of the published suites. Model: "
        f"{model}. Greedy answers, without retrieval.",
        f"![accuracy by window]({picture})",
        _READING,
    ]
    for suite in SUITES:
        if suite not in report:
            continue
        head, *lines = _lines(suite, report[suite])
        rows = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines)]
        # With the smallest window, the shortest prompt.
        smallest = report[suite][0]["window"]
        first = next(r for r in report["answers"] if r["suite"] == suite and r["window"] == smallest)
        said = [_errors(report[suite]), _sentences(report[suite])]
        parts += [f"## {_TITLES[suite]}", "\n".join(rows), *said, _example(first)]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(report: Mapping[str, Any], file: Path) -> Path:
    """A panel for each suite: accuracy by window, of all and of each kind, beside what guessing makes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    suites = [suite for suite in SUITES if suite in report]
    figure, panels = plt.subplots(1, len(suites), figsize=(5 * len(suites), 4), squeeze=False)
    for axes, suite in zip(panels[0], suites, strict=True):
        entries = report[suite]
        ticks = range(len(entries))
        whole = "accuracy" if suite == prelude.SUITE else "right"
        for kind in entries[0]["kinds"]:
            axes.plot(ticks, [entry["kinds"][kind] for entry in entries], marker=".", alpha=0.6, label=kind)
        axes.plot(ticks, [entry[whole] for entry in entries], color="#222222", marker="o", label="all")
        axes.axhline(0.5 if suite == prelude.SUITE else 0.25, color="#222222", linestyle=":", label="guessed")
        axes.set_xticks(ticks, [_name(entry["window"]) for entry in entries])
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("window (characters)")
        axes.set_title(_TITLES[suite], fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    panels[0][0].set_ylabel("accuracy")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def _asked(run: Run) -> list[Example]:
    """The held-out rows of the first chronicles and stories, each with all its questions and windows."""
    limit = run.config.evaluation.problems or math.inf
    kept: dict[str, set[int]] = {suite: set() for suite in SUITES}
    found = []
    for example in run.dataset.test:
        columns = example.columns
        if not set(columns) >= _NEEDED or columns["suite"] not in SUITES:
            raise ValueError(
                f"config.data: {example.name} has the columns {sorted(columns)}; the study needs the rows of "
                "rljax.tasks.longcontext:rows, rljax.tasks.prelude:rows or rljax.tasks.chartom:rows"
            )
        items = kept[columns["suite"]]
        if columns["item"] in items or len(items) < limit:
            items.add(columns["item"])
            found.append(example)
    return found


def _record(group: ScoredGroup, judge: Judge | None) -> dict[str, Any]:
    """An answer with its row and scores, and the verdict of a judge where one is asked."""
    columns = {name: value for name, value in group.example.columns.items() if name != "completion"}
    text = group.texts[0]
    record = {**columns, "prompt": str(group.example.prompt), "text": text, "scores": score(columns, text)}
    if judge is None or columns.get("mode") != GENERATIVE:
        return record
    verdict = chartom.judged(columns, text, judge)
    covered, defects = (None if part is None else sorted(part) for part in (verdict.covered, verdict.defects))
    return record | {"verdict": {"covered": covered, "defects": defects}}


def _windows(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """From the smallest to everything."""
    return sorted({record["window"] for record in records}, key=lambda window: (window == FULL, window))


def _prelude(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = prelude.summary([r["answer"] for r in records], [prelude.read_label(r["text"]) for r in records])
    always = prelude.summary([r["answer"] for r in records], [prelude.CONSISTENT] * len(records))
    return {
        **dataclasses.asdict(found),
        "interval": _interval(records),
        "reasoned": _mean(record["scores"]["reasoned"] for record in records),
        "visible": _mean(record["visible"] for record in records),
        "kinds": _by_kind(records, prelude.KINDS),
        "always_consistent": dataclasses.asdict(always),
    }


def _chartom(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    letters = [record for record in records if record["mode"] == CHOICE]
    others = [record for record in records if record["mode"] == GENERATIVE]
    chosen = [record for record in letters if record["kind"].startswith("belief") and record["scores"]["readable"]]
    roles = Counter(
        record["roles"][chartom.LETTERS.index(chartom.read_letter(record["text"], record["options"]) or "")]
        for record in chosen
    )
    return {
        "items": len(letters),
        "right": _mean(record["scores"]["right"] for record in letters),
        "interval": _interval(letters),
        "readable": _mean(record["scores"]["readable"] for record in letters),
        "visible": _mean(record["visible"] for record in records),
        "kinds": _by_kind(letters, chartom.KINDS),
        "errors": {role: roles[role] for role in ("truth", "other", "earlier", "further")},
        "sentences": _sentence_figures(others) if others else None,
    }


def _sentence_figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Coverage by words over all points, and what a judge's verdicts come to if there are any."""
    told = sum(record["scores"]["covered"] * len(record["points"]) for record in records)
    found: dict[str, Any] = {
        "items": len(records),
        "covered": told / sum(len(record["points"]) for record in records),
        "readable": _mean(record["scores"]["readable"] for record in records),
    }
    verdicts = [_verdict(record) for record in records if "verdict" in record]
    return found | {"judged": dataclasses.asdict(chartom.summary(verdicts)) if verdicts else None}


def _verdict(record: Mapping[str, Any]) -> chartom.Verdict:
    covered, defects = (
        None if record["verdict"][name] is None else frozenset(record["verdict"][name])
        for name in ("covered", "defects")
    )
    return chartom.Verdict(points=len(record["points"]), covered=covered, defects=defects)


def _by_kind(records: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> dict[str, float]:
    return {
        kind: _mean(record["scores"]["right"] for record in records if record["kind"] == kind)
        for kind in kinds
        if any(record["kind"] == kind for record in records)
    }


def _interval(records: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """95% of the accuracy; texts are drawn anew, each with all its questions."""
    items: dict[int, list[float]] = {}
    for record in records:
        items.setdefault(record["item"], []).append(record["scores"]["right"])
    return [*bootstrap_interval([float(np.mean(values)) for values in items.values()])] if items else None


def _mean(values: Any) -> float:
    found = [float(value) for value in values]
    return float(np.mean(found)) if found else math.nan


def _name(window: int) -> str:
    return "all" if window == FULL else str(window)


def _lines(suite: str, entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    kinds = list(entries[0]["kinds"])
    if suite == prelude.SUITE:
        head = ["window", "items", "macro F1", "accuracy", "F1 consistent", "F1 contradict", "reasoned", "unreadable"]
    else:
        head = ["window", "items", "right", "unreadable"]
    lines = [[*head, "in view", *kinds]]
    for entry in entries:
        shares = [_shown(entry["visible"]), *(_shown(entry["kinds"][kind]) for kind in kinds)]
        start = [_name(entry["window"]), str(entry["items"])]
        if suite == prelude.SUITE:
            found = [_shown(entry["macro_f1"]), _shown(entry["accuracy"], entry["interval"]), *_f1(entry)]
            lines.append([*start, *found, _shown(entry["reasoned"]), _shown(entry["unreadable"]), *shares])
        else:
            unreadable = None if entry["readable"] is None else 1 - entry["readable"]
            lines.append([*start, _shown(entry["right"], entry["interval"]), _shown(unreadable), *shares])

    blank = [""] * len(kinds)
    if suite == prelude.SUITE:
        always = entries[-1]["always_consistent"]
        found = [_shown(always["macro_f1"]), _shown(always["accuracy"]), *_f1(always)]
        lines.append(["always consistent", str(always["items"]), *found, "", "", "", *blank])
    else:
        lines.append(["guessed", "", "0.250", "", "", *blank])
    return lines


def _f1(found: Mapping[str, Any]) -> list[str]:
    return [_shown(found["f1"][label]) for label in prelude.LABELS]


def _shown(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _errors(entries: Sequence[Mapping[str, Any]]) -> str:
    """What is taken for a belief where all is shown; "" without any."""
    counts = entries[-1].get("errors")
    if counts is None or not sum(counts.values()):
        return ""
    return (
        f"Wrong beliefs with all in view: {counts['truth']} are the truth, {counts['other']} are another one's, "
        f"{counts['earlier']} are of before, {counts['further']} are none of these."
    )


def _sentences(entries: Sequence[Mapping[str, Any]]) -> str:
    """What answers in sentences come to; "" without any."""
    lines = []
    for entry in entries:
        found = entry.get("sentences")
        if found is None:
            continue
        judge = found["judged"]
        said = (
            f"; by the judge {_shown(judge['bpc'])}, with a fault {_shown(judge['penalty_rate'])}, replies missing "
            f"{_shown(judge['missing'])}"
            if judge
            else ""
        )
        window = _name(entry["window"])
        lines.append(f"- window {window}: of {found['items']} answers, points told {_shown(found['covered'])}{said}")
    return "\n".join(["In sentences:", "", *lines]) if lines else ""


def _example(record: Mapping[str, Any]) -> str:
    prompt = record["prompt"].strip().replace("\n", "\n> ")
    text = record["text"].strip().replace("\n", " ")
    return f"**{record['kind']}** (answer {record['answer']})\n\n> {prompt}\n>\n> {text or '(nothing)'}"
