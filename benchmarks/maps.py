"""Acc@km of the map agent before and after training, and of many samples from which a verifier takes one.

    python benchmarks/maps.py --workdir=runs/maps --json=maps.json

The task and the run are those of configs/papers/map_agent.py, from its warm-up on. Every held-out question is answered
`samples` times; the rules of `rljax.evaluation` take one answer of k of them, on average over subsets. The verifier is
no model: it compares the coordinates of each answer with the distances that the question tells, which a policy may
check as well (`atlas.read_by_clues`).
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _environments import HOME, relaunch_with_allocator

from rljax.envs.library import distance_km, distance_reward
from rljax.evaluation import Candidates, answers, at_k, by_verifier, fewest_calls, majority, medoid
from rljax.experiment import Config
from rljax.experiment.build import Run, build
from rljax.experiment.sft import warm_up
from rljax.experiment.train import train_step
from rljax.parallel import use_mesh
from rljax.rollouts import ScoredGroup
from rljax.training import RunFolder

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "papers"
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(size="smoke", warmup=2, steps=1, problems=4, samples=2),
    "small": dict(size="full", warmup=1200, steps=24, problems=48, samples=8),
}
THRESHOLDS = ("within_25_km", "within_200_km", "within_750_km", "within_2500_km")


def config_of(preset: Mapping[str, Any]) -> Config:
    """The run of the config, in the sizes of a preset."""
    import map_agent

    config: Config = map_agent.get_config(preset["size"])
    config.steps = preset["steps"]
    warmup = preset["warmup"]
    optimizer = dataclasses.replace(config.warmup.optimizer, total_steps=warmup)
    config.warmup = dataclasses.replace(config.warmup, steps=warmup, optimizer=optimizer)
    config.evaluation = dataclasses.replace(config.evaluation, problems=preset["problems"], samples=preset["samples"])
    return config


def measured(run: Run, params: Any, version: int) -> dict[str, Any]:
    """Acc@km and mean reward of a policy: greedy, sampled, and of what rules take of k samples."""
    import atlas

    config = run.config.evaluation
    run.actor.set_params(params, version)
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
        "greedy": {name: _mean(greedy, name) for name in THRESHOLDS},
        "sampled": {name: _mean(sampled, name) for name in THRESHOLDS},
        "reward": float(np.mean([result.value for group in sampled for result in group.results])),
        "tool_calls": _mean(sampled, "tool_calls"),
        "at_k": at_k(rules, table, [_scores(group, "within_25_km") for group in sampled], ks),
        "reward_at_k": at_k(rules, table, [[r.value for r in group.results] for group in sampled], ks),
        "episodes": [sampled[0].texts[i] for i in range(min(4, config.samples))],
    }


def candidates_of(group: ScoredGroup) -> Candidates:
    """What rules may read of a group, which is not what it earned."""
    import atlas

    calls = [int(result.components.get("tool_calls", 0.0)) for result in group.results]
    return Candidates([atlas.answer_of(text) for text in group.texts], texts=group.texts, calls=calls)


def _scores(group: ScoredGroup, name: str) -> list[float]:
    return [result.components.get(name, 0.0) for result in group.results]


def _mean(groups: Sequence[ScoredGroup], name: str) -> float:
    return float(np.mean([_scores(group, name) for group in groups]))


def show(found: Mapping[str, Any]) -> str:
    """Two tables in Markdown: Acc@km, and what rules come to."""
    names = [name.removeprefix("within_").replace("_", " ") for name in THRESHOLDS]
    lines = [f"| policy | {' | '.join(f'Acc@{name}' for name in names)} | reward | tool calls |", "|---" * 7 + "|"]
    for when in ("before", "after"):
        one = found[when]
        cells = [f"{one['sampled'][name]:.3f}" for name in THRESHOLDS]
        lines.append(f"| {when} | {' | '.join(cells)} | {one['reward']:.3f} | {one['tool_calls']:.2f} |")

    rules = list(found["after"]["at_k"])
    lines += ["", f"| Acc@25 km | k | {' | '.join(rules)} |", "|---" * (len(rules) + 2) + "|"]
    for when in ("before", "after"):
        for k in found[when]["at_k"]["mean"]:
            cells = [f"{found[when]['at_k'][rule][k]:.3f}" for rule in rules]
            lines.append(f"| {when} | {k} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--workdir", default="runs/maps")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    arguments = parser.parse_args()
    relaunch_with_allocator()
    jax.config.update("jax_compilation_cache_dir", str(HOME / "jax"))
    if str(CONFIGS) not in sys.path:
        sys.path.insert(0, str(CONFIGS))

    preset = PRESETS[arguments.preset]
    run = build(config_of(preset))
    say = functools.partial(print, file=sys.stderr, flush=True)
    began = time.perf_counter()
    with run.actor, RunFolder(arguments.workdir, fresh=True) as folder, use_mesh(run.mesh):
        params = warm_up(run, folder)
        before = measured(run, params, 0)
        say(f"before {before['sampled']}, reward {before['reward']:.3f}, {time.perf_counter() - began:.0f} s")

        run.state = run.init_state(params)
        for step in range(preset["steps"]):
            metrics, _ = train_step(run, step)
            say(f"step {step} reward {metrics['rollout/reward_mean']:.3f}, {time.perf_counter() - began:.0f} s")
        after = measured(run, run.policy(), preset["steps"])

    found = {"before": before, "after": after, "seconds": time.perf_counter() - began}
    print(show(found))
    if arguments.json:
        report = {"benchmark": "maps", "setting": {"preset": arguments.preset, **preset}, **found}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
