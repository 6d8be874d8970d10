"""What a run prints at its end: the before / after table, samples, and where the files are."""

from collections.abc import Mapping, Sequence
from typing import Any

from rljax.evaluation.evaluate import Evaluation


def comparison_table(before: Evaluation, after: Evaluation) -> str:
    """Held-out metrics before and after, each with its 95% interval over problems."""
    rows = [("", "before", "after", "change")]
    for name, old in before.estimates.items():
        new = after.estimates[name]
        rows.append((name, str(old), str(new), f"{new.value - old.value:+.3f}"))
    for name in ("length_mean", "truncated_share"):
        old, new = before.metrics[name], after.metrics[name]
        rows.append((name.replace("_", " "), f"{old:.2f}", f"{new:.2f}", f"{new - old:+.2f}"))
    title = f"held-out problems: {before.num_problems}, {before.samples} samples each at temperature {before.temperature:g}"
    return title + "\n" + aligned(rows)


def sample_table(before: Evaluation, after: Evaluation, count: int = 3) -> str:
    """Greedy completions of the same problems before and after; those that changed for the better come first."""
    pairs = list(zip(before.problems, after.problems, strict=True))
    pairs.sort(key=lambda pair: pair[0]["greedy_reward"] - pair[1]["greedy_reward"])
    lines = []
    for old, new in pairs[:count]:
        lines.append(f"  prompt   {_shorten(_last_text(old['prompt']), 90)}")
        for label, record in (("before", old), ("after", new)):
            lines.append(f"    {label:<7}{record['greedy_reward']:.0f}  {_shorten(record['greedy_completion'], 90)!r}")
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table: first column left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _last_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
