"""What an arena came to, as JSON, Markdown and one page of HTML. The latter two are made of the JSON alone."""

import dataclasses
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rljax.analysis.arena import Record, Size, Task, compare_task
from rljax.analysis.arena_statistics import LEVEL, MARGIN, NO_VERDICT
from rljax.analysis.compare import draw_curves

COLUMNS = ("method", "beside", "predicted", "score", "difference", "95% interval", "p", "p (Holm)", "verdict", "tokens")
"""Of the table of a task."""

READING = (
    "Score: mean held-out avg@4 over the tokens sampled, warm start to end (without training: the share of problems "
    "with a right leaf, over the tokens of a prompt). Difference: of the scores of one seed, over the tokens that both "
    "have spent. p: exact two-sided sign-flip test over seeds; Holm corrects for the comparisons of the task. "
    f"Interval: bootstrap over seeds. A difference counts at a corrected p of {LEVEL:g}; methods are level when the "
    f"interval lies within {MARGIN:.0%} of the other's score. Tokens: sampled in training, of all seeds, beside those "
    "of the method compared with."
)


HOW_TO = """## Run it

    rljax arena --preset=small --workdir=runs/arena                       # two seeds: it runs, and proves nothing
    rljax arena --preset=full --tasks=late --seeds=0,1 --records=docs/arena --workdir=runs/arena
    rljax arena --preset=full --norun --keep --records=docs/arena --json=docs/arena.json --report=docs/arena.md

Every run (task, method, seed) is a file of its own, named by the digest of its config, in `--records`. A run whose file
is there is not made again unless the code that decides it has changed (`--keep` takes it as it is). So the same command
goes on where it broke off, and pieces can be made on several machines. The last command makes this page of the files,
whatever has become of the code since.

A run repeats digit for digit where a process has as many cores: more of them divide sums otherwise, and a last bit is
enough for another sample. The records in `docs/arena` have one core each (`taskset -c 0 rljax arena ...`), which is
also the fastest way to fill a machine: models are so small that a second core adds next to nothing.

For a task of your own write a module with an `rljax.analysis.arena.Task` and name it with `--task=my.module:Task`;
`rljax/analysis/arena_tasks.py` has those below. `rljax snr` ([snr.md](snr.md)) says what forks should bring on it, and
`--calibrate` prints the share of prompts at which the methods of a task sample as many tokens a step.
"""


def summarise(tasks: Sequence[Task], records: Sequence[Record], preset: str, size: Size) -> dict[str, Any]:
    """The report as JSON: for each task its prediction, `methods` with their comparisons, and `runs` with the curves
    that they were made of."""
    report: dict[str, Any] = {"preset": preset, "size": dataclasses.asdict(size)}
    report["tasks"] = {}
    for task in tasks:
        own = [record for record in records if record.task == task.name]
        compared = compare_task(task, own)

        # Those that others are compared with, and those without runs, have no comparison.
        methods = {}
        for method in task.methods:
            if method.name not in compared:
                continue
            found = compared[method.name]
            methods[method.name] = {
                "against": method.against,
                "expected": method.expected,
                "claim": method.claim,
                "tokens_share": _tokens_share(own, method.name, method.against),
                **found._asdict(),
            }

        runs = [
            {"method": r.method, "seed": r.seed, "curve": r.curve, "figures": r.figures, "key": r.key, "code": r.code}
            for r in own
        ]
        report["tasks"][task.name] = {
            "about": task.about,
            "prediction": task.prediction,
            # Of a smaller run it would say what that one does not show.
            "found": task.found if preset == "full" and own else "",
            "claims": {m.name: [m.against, m.expected, m.claim] for m in task.methods},
            "methods": methods,
            "runs": runs,
        }
    return report


def _tokens_share(records: Sequence[Record], method: str, against: str) -> float:
    """Tokens that a method has sampled as a share of those of the other one, over the seeds that both have."""
    ends = {(r.method, r.seed): r.curve[-1].tokens for r in records}
    seeds = [seed for name, seed in ends if name == method and (against, seed) in ends]
    return sum(ends[method, seed] for seed in seeds) / sum(ends[against, seed] for seed in seeds)


def scores(task: dict[str, Any]) -> dict[str, float]:
    """The mean score of each method of a task, over its own tokens and seeds."""
    found: dict[str, list[float]] = {}
    for run in task["runs"]:
        tokens, values = np.array(run["curve"], np.float64).T
        span = tokens[-1] - tokens[0]
        area = float(np.trapezoid(values, tokens) / span) if span else float(values[0])
        found.setdefault(run["method"], []).append(area)
    return {name: float(np.mean(values)) for name, values in found.items()}


def table(task: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a task's table, in the order of `COLUMNS`; what has not been run has its prediction alone."""
    known = scores(task)
    rows = []
    for name, (against, expected, claim) in task["claims"].items():
        score = f"{known[name]:.3f}" if name in known else "not run"
        predicted = f"{expected}: {claim}" if claim else expected
        row = (name, against, predicted if against else "", score)
        found = task["methods"].get(name)
        rows.append(row + (_figures(found) if found else ("",) * 6))
    return rows


def _figures(found: dict[str, Any]) -> tuple[str, ...]:
    """What the comparison of a method came to, in the order of `COLUMNS`."""
    low, high = found["interval"]
    return (
        f"{found['mean_difference']:+.4f}",
        f"[{low:+.4f}, {high:+.4f}]",
        f"{found['p']:.4f}",
        f"{found['p_holm']:.4f}",
        found["verdict"],
        f"{found['tokens_share']:.0%}",
    )


def warning(report: dict[str, Any]) -> str:
    """What must be said first of a report whose seeds are too few; empty otherwise."""
    verdicts = [found["verdict"] for task in report["tasks"].values() for found in task["methods"].values()]
    few = [verdict == NO_VERDICT for verdict in verdicts]
    if not any(few):
        return ""
    which = "These runs prove nothing" if all(few) else "Some of these comparisons prove nothing"
    return f"{which}: with so few seeds no difference could pass the test. The full preset has eight."


def markdown(report: dict[str, Any], command: str, picture: str = "arena.png") -> str:
    """The report as Markdown; `command` is what made it."""
    lines = ["# Arena", "", f"    {command}", "", "Which method helps on which kind of task? " + READING, ""]
    if said := warning(report):
        lines += [f"**{said}**", ""]
    if any(task["runs"] for task in report["tasks"].values()):
        lines += [f"![held-out scores over sampled tokens]({picture})", ""]
    lines += [HOW_TO]
    for name, task in report["tasks"].items():
        lines += [f"## {name}", "", task["about"], "", f"**Predicted:** {task['prediction']}", ""]
        lines += [_markdown_row(COLUMNS), "|---" * len(COLUMNS) + "|"]
        lines += [_markdown_row(row) for row in table(task)]
        lines += ["", _cost(task), ""]
        if task["found"]:
            lines += [f"**Found:** {task['found']}", ""]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cost(task: dict[str, Any]) -> str:
    if not task["runs"]:
        return "No runs."
    seeds = sorted({run["seed"] for run in task["runs"]})
    seconds = sum(run["figures"]["seconds"] for run in task["runs"])
    return f"{len(task['runs'])} runs, seeds {', '.join(map(str, seeds))}; {seconds / 60:.0f} minutes in all."


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top; }
.warning { background: #fff3cd; padding: .6rem 1rem; }
svg { max-width: 100%; height: auto; }
"""


def page(report: dict[str, Any], command: str) -> str:
    """The report as one page of HTML that needs nothing else: its curves are in it."""
    say = html.escape
    parts = [f"<h1>Arena</h1><pre>{say(command)}</pre><p>{say(READING)}</p>"]
    if said := warning(report):
        parts.append(f'<p class="warning">{say(said)}</p>')
    for name, task in report["tasks"].items():
        parts.append(f"<h2>{say(name)}</h2><p>{say(task['about'])}</p>")
        parts.append(f"<p><b>Predicted:</b> {say(task['prediction'])}</p>")
        head = "".join(f"<th>{say(cell)}</th>" for cell in COLUMNS)
        body = "".join("<tr>" + "".join(f"<td>{say(cell)}</td>" for cell in row) + "</tr>" for row in table(task))
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        parts.append(f"<p>{say(_cost(task))}</p>{_svg({name: task}) if task['runs'] else ''}")
        if task["found"]:
            parts.append(f"<p><b>Found:</b> {say(task['found'])}</p>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Arena</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def write_report(report: dict[str, Any], command: str, folder: Path, *, markdown_file: Path | None = None) -> Path:
    """Writes `arena.json`, `arena.md`, `arena.html` and `arena.png` into `folder`; with `markdown_file` the Markdown
    and the picture go there instead, the picture beside it under the same name. Returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arena.json").write_text(json.dumps(report, indent=1) + "\n")
    text_file = markdown_file or folder / "arena.md"
    picture = text_file.with_suffix(".png")
    text_file.parent.mkdir(parents=True, exist_ok=True)
    text_file.write_text(markdown(report, command, picture.name))
    if shown := {name: task for name, task in report["tasks"].items() if task["runs"]}:
        _figure(shown).savefig(picture, dpi=90)
    html_file = folder / "arena.html"
    html_file.write_text(page(report, command))
    return html_file


def _figure(tasks: dict[str, Any]) -> Any:
    """Curves of each task: the mean over seeds, and the band of one standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(tasks)) or 1
    rows = -(-len(tasks) // columns) or 1
    figure = Figure(figsize=(7 * columns, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    for axes, (name, task) in zip(panels, tasks.items(), strict=False):
        curves: dict[str, list[list[tuple[float, float]]]] = {}
        for run in task["runs"]:
            curves.setdefault(run["method"], []).append([tuple(look) for look in run["curve"]])
        draw_curves(axes, curves)
        axes.set(title=name, xlabel="tokens (thousands)", ylabel="held-out score")
        axes.legend(fontsize=8)
    return figure


def _svg(tasks: dict[str, Any]) -> str:
    file = io.StringIO()
    _figure(tasks).savefig(file, format="svg", metadata={"Date": None})
    # Without the XML declaration, which has no place inside a page.
    return file.getvalue().partition("<svg")[2].join(("<svg", ""))
