"""Do tasks that a run makes for itself beat the set that it was given, at equal tokens?

    python benchmarks/evolve.py --workdir=runs/evolve --json=evolve.json        # goes on where it stopped

The training set is poor by design: 24 short words, while held-out words have up to six letters (configs/papers/
evolving.py). Every arm begins with the same warmed-up weights and, for each seed, has the same settings; what differs
is which tasks are drawn. A run ends when it has sampled `tokens` tokens, those that its curriculum asked for among
them. Held-out avg@8 and greedy accuracy are measured at its beginning and its end.
"""

import importlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _arms import Result, measure_arms, scores_of, warmed_up

from rljax.analysis.compare import train_on_budget
from rljax.experiment import Config, UniformTasks, WarmupConfig
from rljax.experiment.build import build
from rljax.experiment.train import evaluate_run
from rljax.parallel import use_mesh
from rljax.tasks import medium_share

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(size="smoke", tokens=1200, warmup=2, seeds=1),
    "small": dict(size="full", tokens=60_000, warmup=150, seeds=3),
    "long": dict(size="full", tokens=150_000, warmup=150, seeds=3),
}
BASELINE = "fixed set"
ARMS = {BASELINE: "coevolve", "CoEvolve": "coevolve", "D2Evo": "d2evo"}
"""The config of each arm; the baseline draws the data's tasks alone."""


def config_of(arm: str, preset: Mapping[str, Any]) -> Config:
    """The run of an arm, with its warm-up."""
    config: Config = importlib.import_module(ARMS[arm]).get_config(preset["size"])
    config.warmup.steps = preset["warmup"]
    if arm == BASELINE:
        config.curriculum = UniformTasks()
    return config


def compete(arm: str, seed: int, preset: Mapping[str, Any], folder: Path) -> Result:
    """One run: the score at its beginning and its end, and what became of proposed tasks."""
    config = config_of(arm, preset)
    config.seed = seed
    config.model = warmed_up(config_of(BASELINE, preset), folder / "initial")
    config.warmup = WarmupConfig()
    run = build(config)
    curve: list[list[float]] = []
    medium: list[float] = []
    last: dict[str, float] = {}
    began = time.perf_counter()

    def look(spent):
        curve.append([spent.sampled, *scores_of(evaluate_run(run, run.policy(), spent.steps))])

    def after(metrics, rollout):
        # Steps of a questioner have no tasks, and NaN for their share.
        if not math.isnan(share := medium_share(rollout.seen())):
            medium.append(share)
        last.update({k.rpartition("/")[2]: v for k, v in metrics.items() if k.startswith("rollout/curriculum/")})

    with run.actor, use_mesh(run.mesh):
        run.state = run.init_state(run.initial_params())
        spent = train_on_budget(run, preset["tokens"], look, after=after)
    quarter = max(1, len(medium) // 4)
    return {
        "arm": arm,
        "seed": seed,
        "steps": spent.steps,
        "seconds": time.perf_counter() - began,
        "curve": curve,
        "medium_first": float(np.mean(medium[:quarter])),
        "medium_last": float(np.mean(medium[-quarter:])),
        "curriculum": last,
    }


def show(results: Sequence[Result], preset: Mapping[str, Any]) -> str:
    """The table, in Markdown: means over seeds, and each seed's difference from the baseline."""
    base = {r["seed"]: r["curve"][-1][1] for r in results if r["arm"] == BASELINE}
    rows = [
        "| arm | avg@8 before | after | greedy after | minus the fixed set, by seed | medium tasks, first to last "
        "quarter | steps | accepted of proposed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(r["arm"] for r in results):
        runs = [r for r in results if r["arm"] == arm]
        first, last = (np.mean([r["curve"][i] for r in runs], axis=0) for i in (0, -1))
        gaps = " ".join(f"{r['curve'][-1][1] - base[r['seed']]:+.3f}" for r in runs if r["seed"] in base)
        medium = " to ".join(f"{np.mean([r[k] for r in runs]):.2f}" for k in ("medium_first", "medium_last"))
        accepted, proposed = (sum(r["curriculum"].get(k, 0) for r in runs) for k in ("accepted", "proposed"))
        steps = np.mean([r["steps"] for r in runs])
        gained = "" if arm == BASELINE else gaps
        rows.append(
            f"| {arm} | {first[1]:.3f} | {last[1]:.3f} | {last[2]:.3f} | {gained} | {medium} | {steps:.0f} | "
            f"{accepted:.0f} of {proposed:.0f} |"
        )
    return "\n".join(rows)


def said(result: Result) -> str:
    return f"avg@8 {result['curve'][0][1]:.3f} -> {result['curve'][-1][1]:.3f} in {result['seconds']:.0f} s"


def main() -> None:
    measure_arms("evolve", __doc__.splitlines()[0], PRESETS, list(ARMS), compete, said=said, table=show)


if __name__ == "__main__":
    main()
