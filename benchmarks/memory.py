"""Does a policy that searches a memory answer better where opened evidence pays, too?

    python benchmarks/memory.py --workdir=runs/memory --json=memory.json        # goes on where it stopped

The task and the run are those of configs/papers/memory_agent.py. All runs begin with the weights of one warm-up; the
rewards of the arms differ by what a wrong answer earns for the evidence that was opened. Held-out questions are
answered `samples` times, before and after.
"""

import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _arms import Result, before_and_after, components, measure_arms, sized, warmed_up

from rljax.evaluation import sampled_answers
from rljax.experiment import Config, MultiTurn, WarmupConfig
from rljax.experiment.build import Run, build

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(size="smoke", warmup=2, steps=1, problems=4, samples=2, seeds=1),
    "small": dict(size="full", warmup=1300, steps=40, problems=128, samples=8, seeds=3),
}
ARMS = {"answers and evidence": "diary:paid", "answers alone": "diary:paid_for_answers"}
COUNTS = ("is_right", "evidence_recall", "sufficient", "tool_calls", "read_share")


def compete(arm: str, seed: int, preset: Mapping[str, Any], folder: Path) -> Result:
    """One run: what is counted in held-out episodes before and after, and in those that it trained on."""
    config: Config = sized(importlib.import_module("memory_agent").get_config(preset["size"]), preset)
    config.model = warmed_up(config, folder / "initial")
    config.warmup = WarmupConfig()
    config.seed = seed
    assert isinstance(config.actor, MultiTurn)
    config.actor = dataclasses.replace(config.actor, args={"reward": ARMS[arm]})

    found = before_and_after(build(config), preset["steps"], measure=_counted, watch=_of_a_step)
    return {"arm": arm, "seed": seed, **found}


def _counted(run: Run) -> dict[str, float]:
    asked = run.dataset.test[: run.config.evaluation.problems]
    return components(sampled_answers(run.actor, asked, run.config.evaluation), COUNTS)


def _of_a_step(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: metrics.get(f"rollout/component/{name}", math.nan) for name in COUNTS}


def show(results: Sequence[Result], preset: Mapping[str, Any]) -> str:
    """The table, in Markdown: means over seeds, and right answers by seed."""
    lines = ["| | right answers | by seed | evidence opened | enough of it | calls | read |", "|---" * 7 + "|"]

    def line(name: str, found: Sequence[Mapping[str, float]]) -> str:
        means = {count: float(np.mean([one[count] for one in found])) for count in COUNTS}
        by_seed = " ".join(f"{one['is_right']:.3f}" for one in found)
        return (
            f"| {name} | {means['is_right']:.3f} | {by_seed} | {means['evidence_recall']:.3f} | "
            f"{means['sufficient']:.3f} | {means['tool_calls']:.1f} | {means['read_share']:.2f} |"
        )

    starts = {result["seed"]: result["before"] for result in results}
    lines.append(line("before", list(starts.values())))
    for arm in dict.fromkeys(result["arm"] for result in results):
        lines.append(line(arm, [result["after"] for result in results if result["arm"] == arm]))
    return "\n".join(lines)


def said(result: Result) -> str:
    before, after = result["before"], result["after"]
    right = f"right {before['is_right']:.3f} -> {after['is_right']:.3f}"
    recall = f"evidence {before['evidence_recall']:.3f} -> {after['evidence_recall']:.3f}"
    return f"{right}, {recall} in {result['seconds']:.0f} s"


def main() -> None:
    measure_arms("memory", __doc__.splitlines()[0], PRESETS, list(ARMS), compete, said=said, table=show)


if __name__ == "__main__":
    main()
