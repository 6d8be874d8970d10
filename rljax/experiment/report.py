"""What a run prints at its end: the before / after table, samples, and where the files are."""

import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rljax.evaluation.evaluate import Evaluation
from rljax.experiment.build import Run
from rljax.experiment.memory import runs_kernels
from rljax.experiment.prompts import describe_prompts
from rljax.models import KERNEL_LENGTH, count_weights
from rljax.parallel import is_main_process
from rljax.training import RunFolder, versions


def say(text: str) -> None:
    """Prints a line at once, on the main process."""
    if is_main_process():
        print(text, flush=True)


def describe_run(run: Run) -> str:
    """Model, data and how prompts become tokens, a line each; and what a machine or config makes otherwise."""
    count = count_weights(run.decoder)
    describe = getattr(run.dataset, "describe", None)
    data = describe() if describe else f"{len(run.dataset.train)} training examples, {len(run.dataset.test)} held out"
    lines = [
        f"model    {count / 1e6:.1f}M parameters, {run.decoder.family}, {run.decoder.dtype}",
        f"data     {data}",
        f"prompts  {describe_prompts(run.config, run.dataset, run.tokenizer)}",
    ]
    if run.beside is not None or run.config.rollout.staleness:
        lines.append(f"rollouts {describe_schedule(run)}")
    if runs_kernels(run.learner, run.config.update.pack_length):
        lines.append(f"updates  attend in kernels, from {KERNEL_LENGTH} tokens of a packed sequence on")
    return "\n".join(lines)


def describe_schedule(run: Run) -> str:
    """Which weights sample a rollout, and on which devices."""
    staleness = run.config.rollout.staleness
    weights = f"by weights {staleness} steps old" if staleness else "by the newest weights"
    if run.beside is None:
        return f"{weights}, in turn with updates"
    own = run.rollout_mesh
    if not run.config.rollout.devices:
        return f"{weights}, by engines in other processes, beside updates"
    where = f"on {own.devices.size} devices of each process, {dict(own.shape)}"
    return f"{weights}, {where}, {'beside updates' if staleness else 'in turn with updates: nothing overlaps'}"


def finish(folder: RunFolder, before: Evaluation, after: Evaluation, *, wall_seconds: float) -> dict[str, Any]:
    """Writes `summary.json` and the learning curve, prints the tables; returns the summary. For the main process, which
    has written what is summed up.

    `wall_seconds` are those of this process: of a resumed run, since it was resumed.
    """
    # Closed first, so that all metrics are on disk.
    folder.close()
    history = folder.metrics()
    summary = {
        "name": folder.config.get("name"),
        "seed": folder.config.get("seed"),
        "before": before.metrics,
        "after": after.metrics,
        "intervals": {
            when: {name: [e.low, e.high] for name, e in evaluation.estimates.items()}
            for when, evaluation in (("before", before), ("after", after))
        },
        "steps": len(history),
        "wall_seconds": round(wall_seconds, 1),
        "empty_steps": sum(m.get("rollout/empty_steps", 0) > 0 for m in history),
        "new_tokens": int(sum(m["rollout/new_tokens"] for m in history)),
        # A step without an update trains on nothing.
        "trained_tokens": int(sum(m.get("pack/unique_tokens", 0) for m in history)),
        "compiles_after_warmup": int(sum(m.get("compile/count", 0) for m in history[2:])),
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "versions": versions(),
    }
    folder.write_json("summary.json", summary)

    held_out = [(m["step"], m[key]) for m in history for key in m if key.startswith("eval/avg@")]
    name = f"avg@{after.samples}"
    curve = folder.plot([(before.step, before.metrics[name]), *held_out, (after.step, after.metrics[name])])

    say(f"\n{comparison_table(before, after)}\n\n{sample_table(before, after)}\n")
    say(
        f"{summary['steps']} steps, {summary['new_tokens']} new tokens, {wall_seconds:.0f} s, "
        f"{summary['peak_memory_gib']} GiB resident at most"
    )
    say(f"learning curve  {curve}\nsummary         {folder.path / 'summary.json'}\nrun folder      {folder.path}")
    return summary


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def comparison_table(before: Evaluation, after: Evaluation) -> str:
    """Held-out metrics before and after, those that both have, each with its 95% interval over problems."""
    rows = [("", "before", "after", "change")]
    for name, old in before.estimates.items():
        # A run may go on with rewards that extract no answers to vote on, or with others that do.
        new = after.estimates.get(name)
        if new is not None:
            rows.append((name, str(old), str(new), f"{new.value - old.value:+.3f}"))
    for name in ("length_mean", "truncated_share"):
        was, became = before.metrics[name], after.metrics[name]
        rows.append((name.replace("_", " "), f"{was:.2f}", f"{became:.2f}", f"{became - was:+.2f}"))
    title = (
        f"held-out problems: {before.num_problems}, {before.samples} samples each at temperature {before.temperature:g}"
    )
    return title + "\n" + aligned(rows)


def evaluation_table(evaluation: Evaluation) -> str:
    """Held-out metrics of one model, each with its 95% interval over problems."""
    rows = [("", "estimate"), *((name, str(estimate)) for name, estimate in evaluation.estimates.items())]
    rows += [(name.replace("_", " "), f"{value:.2f}") for name, value in evaluation.metrics.items() if "_" in name]
    return (
        f"held-out problems: {evaluation.num_problems}, {evaluation.samples} samples each at temperature "
        f"{evaluation.temperature:g}, top-p {evaluation.top_p:g}\n{aligned(rows)}"
    )


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
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _last_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
