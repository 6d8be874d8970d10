"""Does a policy whose context holds an eighth of an episode learn, by folding, what one learns that sees all of it?

    python benchmarks/folding.py --workdir=runs/folding --json=folding.json     # goes on where it stopped

The task and the runs are those of configs/papers/context_folding.py, `characters` and `whole`, a warm-up for every
seed and arm: rows of one length do not teach the other. Held-out trails are walked `samples` times, before and after.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _arms import Result, before_and_after, measure_arms, sized, warmed_up

from rljax.evaluation import answers
from rljax.experiment import Config, WarmupConfig
from rljax.experiment.build import Run, build

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(warmup=21, steps=1, problems=2, samples=1, seeds=1),
    "small": dict(warmup=800, steps=40, problems=64, samples=4, seeds=3),
}
ARMS = {"folded": "characters", "whole": "whole"}


def compete(arm: str, seed: int, preset: Mapping[str, Any], folder: Path) -> Result:
    """One run: what held-out trails earn before and after, the mean reward of each step and the conversations of its
    episodes, and the bytes that the sampler keeps of them."""
    config: Config = sized(importlib.import_module("context_folding").get_config(ARMS[arm]), preset)
    config.seed = seed
    config.model = warmed_up(config, folder / f"initial-{arm}-{seed}")
    config.warmup = WarmupConfig()

    run = build(config)
    found = before_and_after(run, preset["steps"], measure=measured, watch=_of_a_step)
    return {"arm": arm, "seed": seed, "context_bytes": run.actor.cache_bytes(), **found}


def measured(run: Run) -> dict[str, float]:
    """Share of held-out trails that are walked to their end, greedily and sampled."""
    config = run.config.evaluation
    found = zip(("greedy", "sampled"), answers(run.actor, run.dataset.test[: config.problems], config), strict=True)
    return {
        name: float(np.mean([result.value for group in groups for result in group.results])) for name, groups in found
    }


def _of_a_step(metrics: Mapping[str, float]) -> dict[str, float]:
    names = {"reward": "rollout/reward_mean", "conversations": "rollout/component/conversations"}
    return {name: metrics[key] for name, key in names.items()}


def show(results: Sequence[Result], preset: Mapping[str, Any]) -> str:
    """The table, in Markdown: means over seeds, and by seed what is walked to its end when sampled."""
    lines = ["| context | MB | before: greedy | sampled | after: greedy | sampled | by seed | s |", "|---" * 8 + "|"]
    for arm in dict.fromkeys(result["arm"] for result in results):
        runs = [result for result in results if result["arm"] == arm]
        cells = [
            f"{np.mean([run[when][how] for run in runs]):.3f}"
            for when in ("before", "after")
            for how in ("greedy", "sampled")
        ]
        by_seed = " ".join(f"{run['after']['sampled']:.3f}" for run in runs)
        seconds = np.median([run["seconds"] for run in runs])
        lines.append(
            f"| {arm} | {runs[0]['context_bytes'] / 1e6:.1f} | {' | '.join(cells)} | {by_seed} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def said(result: Result) -> str:
    before, after = (result[when]["sampled"] for when in ("before", "after"))
    return f"walked to the end {before:.3f} -> {after:.3f} in {result['seconds']:.0f} s"


def main() -> None:
    measure_arms("folding", __doc__.splitlines()[0], PRESETS, list(ARMS), compete, said=said, table=show)


if __name__ == "__main__":
    main()
