"""Does a policy that searches a memory answer better where opened evidence pays, too?

    python benchmarks/memory.py --workdir=runs/memory --json=memory.json        # goes on where it stopped

The task and the run are those of configs/papers/memory_agent.py. All runs begin with the weights of one warm-up; the
rewards of the arms differ by what a wrong answer earns for the evidence that was opened. Held-out questions are
answered `samples` times, before and after.
"""

import dataclasses
import importlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _arms import Result, components, measure_arms, warmed_up

from rljax.evaluation import sampled_answers
from rljax.experiment import Config, MultiTurn, WarmupConfig
from rljax.experiment.build import Run, build
from rljax.experiment.train import train_step
from rljax.parallel import use_mesh

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(size="smoke", warmup=2, steps=1, problems=4, samples=2, seeds=1),
    "small": dict(size="full", warmup=1300, steps=40, problems=128, samples=8, seeds=3),
}
ARMS = {"answers and evidence": "diary:paid", "answers alone": "diary:paid_for_answers"}
COUNTS = ("is_right", "evidence_recall", "sufficient", "tool_calls", "read_share")


def config_of(preset: Mapping[str, Any]) -> Config:
    """The run of the config, in the sizes of a preset."""
    config: Config = importlib.import_module("memory_agent").get_config(preset["size"])
    optimizer = dataclasses.replace(config.warmup.optimizer, total_steps=preset["warmup"])
    config.warmup = dataclasses.replace(config.warmup, steps=preset["warmup"], optimizer=optimizer)
    config.evaluation = dataclasses.replace(config.evaluation, problems=preset["problems"], samples=preset["samples"])
    config.data = dataclasses.replace(config.data, test_args={**config.data.test_args, "size": preset["problems"]})
    return config


def compete(arm: str, seed: int, preset: Mapping[str, Any], folder: Path) -> Result:
    """One run: what is counted in held-out episodes before and after, and in those that it trained on."""
    config = config_of(preset)
    config.model = warmed_up(config, folder / "initial")
    config.seed = seed
    config.warmup = WarmupConfig()
    assert isinstance(config.actor, MultiTurn)
    config.actor = dataclasses.replace(config.actor, args={"reward": ARMS[arm]})
    run = build(config)
    began = time.perf_counter()

    trained = []
    with run.actor, use_mesh(run.mesh):
        run.state = run.init_state(run.initial_params())
        before = _counted(run, 0)
        for step in range(preset["steps"]):
            metrics, _ = train_step(run, step)
            trained.append({name: metrics.get(f"rollout/component/{name}", math.nan) for name in COUNTS})
        after = _counted(run, preset["steps"])
    seconds = time.perf_counter() - began
    return {"arm": arm, "seed": seed, "before": before, "after": after, "trained": trained, "seconds": seconds}


def _counted(run: Run, version: int) -> dict[str, float]:
    run.actor.set_params(run.policy(), version)
    asked = run.dataset.test[: run.config.evaluation.problems]
    return components(sampled_answers(run.actor, asked, run.config.evaluation), COUNTS)


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
