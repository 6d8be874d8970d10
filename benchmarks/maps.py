"""Acc@km of the map agent before and after training, and of many samples from which a verifier takes one.

    python benchmarks/maps.py --workdir=runs/maps --json=maps.json              # goes on where it stopped

The task and the run are those of configs/papers/map_agent.py, a warm-up for every seed. Every held-out question is
answered `samples` times; the rules of `rljax.evaluation` take one answer of k of them, on average over subsets. The
verifier is no model: it compares the place of each answer with the distances that the question tells, which a policy
may check as well (`atlas.read_by_clues`).
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _arms import Result, before_and_after, components, measure_arms, sized, warmed_up

from rljax.envs.library import distance_km, distance_reward
from rljax.evaluation import Candidates, answers, at_k, by_verifier, fewest_calls, majority, medoid
from rljax.experiment import Config, WarmupConfig
from rljax.experiment.build import Run, build
from rljax.rollouts import ScoredGroup

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(size="smoke", warmup=2, steps=1, problems=4, samples=2, seeds=1),
    "small": dict(size="full", warmup=1200, steps=60, problems=128, samples=8, seeds=3),
}
ARM = "GRPO"
THRESHOLDS = ("within_25_km", "within_200_km", "within_750_km", "within_2500_km")


def compete(arm: str, seed: int, preset: Mapping[str, Any], folder: Path) -> Result:
    """One run: `measured` before and after, and the mean reward of each step that it trained on."""
    config: Config = sized(importlib.import_module("map_agent").get_config(preset["size"]), preset)
    config.seed = seed
    config.model = warmed_up(config, folder / f"initial-{seed}")
    config.warmup = WarmupConfig()

    def reward(metrics: Mapping[str, float]) -> float:
        return metrics["rollout/reward_mean"]

    found = before_and_after(build(config), preset["steps"], measure=measured, watch=reward)
    return {"arm": arm, "seed": seed, **found}


def measured(run: Run) -> dict[str, Any]:
    """Acc@km and mean reward of the policy: greedy, sampled, and of what rules take of k samples."""
    atlas = importlib.import_module("atlas")
    config = run.config.evaluation
    greedy, sampled = answers(run.actor, run.dataset.test[: config.problems], config)
    table = [candidates_of(group) for group in sampled]
    questions = [str(group.example.prompt) for group in sampled]

    def verifier(index: int) -> Any:
        return by_verifier(questions[index], atlas.read_by_clues)

    def utility(answer: Any, right: Any) -> float:
        return distance_reward(distance_km(answer, right))

    rules = {
        "majority": lambda _: majority,
        "medoid": lambda _: medoid(utility),
        "fewest calls": lambda _: fewest_calls,
        "verifier": verifier,
    }
    ks = [k for k in (1, 2, 4, 8, 16) if k <= config.samples]
    return {
        "greedy": components(greedy, THRESHOLDS),
        "sampled": components(sampled, (*THRESHOLDS, "tool_calls")),
        "reward": float(np.mean([result.value for group in sampled for result in group.results])),
        "at_k": at_k(rules, table, [_scores(group, "within_25_km") for group in sampled], ks),
        "reward_at_k": at_k(rules, table, [[r.value for r in group.results] for group in sampled], ks),
        "episodes": [sampled[0].texts[i] for i in range(min(4, config.samples))],
    }


def candidates_of(group: ScoredGroup) -> Candidates:
    """What rules may read of a group, which is not what it earned."""
    atlas = importlib.import_module("atlas")
    calls = [int(result.components.get("tool_calls", 0.0)) for result in group.results]
    return Candidates([atlas.answer_of(text) for text in group.texts], texts=group.texts, calls=calls)


def _scores(group: ScoredGroup, name: str) -> list[float]:
    return [result.components.get(name, 0.0) for result in group.results]


def show(results: Sequence[Result], preset: Mapping[str, Any]) -> str:
    """Two tables in Markdown, of means over seeds: Acc@km, and what rules come to."""
    names = [name.removeprefix("within_").replace("_", " ") for name in THRESHOLDS]
    lines = [
        f"| policy | {' | '.join(f'Acc@{name}' for name in names)} | Acc@25 km by seed | greedy | reward | calls |",
        "|---" * 9 + "|",
    ]

    for when in ("before", "after"):
        runs = [result[when] for result in results]
        cells = [f"{np.mean([run['sampled'][name] for run in runs]):.3f}" for name in THRESHOLDS]
        cells.append(" ".join(f"{run['sampled']['within_25_km']:.3f}" for run in runs))
        cells += [
            f"{np.mean([run['greedy']['within_25_km'] for run in runs]):.3f}",
            f"{np.mean([run['reward'] for run in runs]):.3f}",
            f"{np.mean([run['sampled']['tool_calls'] for run in runs]):.1f}",
        ]
        lines.append(f"| {when} | {' | '.join(cells)} |")

    rules = list(results[0]["after"]["at_k"])
    lines += ["", f"| Acc@25 km | k | {' | '.join(rules)} |", "|---" * (len(rules) + 2) + "|"]
    for when in ("before", "after"):
        for k in results[0][when]["at_k"]["mean"]:
            # the mean over seeds of every rule
            cells = [f"{np.mean([result[when]['at_k'][rule][k] for result in results]):.3f}" for rule in rules]
            lines.append(f"| {when} | {k} | {' | '.join(cells)} |")
    return "\n".join(lines)


def said(result: Result) -> str:
    before, after = (result[when]["sampled"]["within_25_km"] for when in ("before", "after"))
    return f"Acc@25 km {before:.3f} -> {after:.3f} in {result['seconds']:.0f} s"


def main() -> None:
    measure_arms("maps", __doc__.splitlines()[0], PRESETS, [ARM], compete, said=said, table=show)


if __name__ == "__main__":
    main()
