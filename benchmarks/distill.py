"""What does a teacher save? Tokens that a student samples until it spells, with a teacher and without.

    python benchmarks/distill.py --workdir=runs/distill --json=distill.json        # goes on where it stopped

`spelling`: words backwards, from one warmed-up student. GRPO samples 8 answers for each prompt. With a teacher, trained
on right demonstrations alone, 2 are sampled: OnPolicyDistillation asks it about the letters that were drawn, and GKD
(`beta` 1) compares whole distributions, by the same reverse KL. A run ends at the first look with held-out avg@8 of
`goal` or more, or with its budget.

`two tasks`: words backwards, or their letters sorted, from one student that was warmed up on both. It has the two
teachers, each on its own task, or one of them for all rows, and the same number of sampled tokens in every arm.

The teachers' own training is not counted: they are what somebody has already.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _arms import CONFIGS, Result, measure_arms, scores_of, warmed_up

from rljax.algorithms import GKD, GRPO, OnPolicyDistillation
from rljax.analysis.compare import Spent, train_on_budget
from rljax.experiment import Config, ModelTeacher, PretrainedModel, WarmupConfig
from rljax.experiment.build import build
from rljax.experiment.train import evaluate_run
from rljax.parallel import use_mesh
from rljax.tasks import Example

# What configs of papers share is no package.
sys.path.append(str(CONFIGS))

from spelling import spelling_config, two_tasks_config

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(size="smoke", goal=2.0, tokens=100, warmup=2, teacher_steps=2, seeds=1, problems=4),
    "small": dict(size="full", goal=0.8, tokens=320_000, warmup=300, teacher_steps=600, seeds=3, problems=128),
}
LOOKS = 32
"""A run looks at held-out words after every such share of its budget."""
BASELINE = "GRPO"
TAUGHT = "OnPolicyDistillation"
EXACT = "GKD"
TAUGHT_SHARE = 3
"""GRPO's budget over that of a run with teachers."""
BOTH = "both teachers"
ARMS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    TAUGHT: ("spelling",),
    EXACT: ("spelling",),
    BOTH: ("backward", "sorted"),
    "backward's alone": ("backward",),
    "sorted's alone": ("sorted",),
}
"""By name: the teachers. Those of `backward` and `sorted` teach in the task of two tasks."""


def right(examples: list[Example]) -> list[Example]:
    """Demonstrations of a teacher: every training word with its answer."""
    return [Example(prompt=e.prompt, columns={"completion": e.columns["answer"]}) for e in examples]


def is_of_two_tasks(arm: str) -> bool:
    return "backward" in ARMS[arm] or "sorted" in ARMS[arm]


def student_config(arm: str, preset: Mapping[str, Any]) -> Config:
    """The run of an arm, with its warm-up and without its teachers."""
    taught = GKD(group_size=2, beta=1.0) if arm == EXACT else OnPolicyDistillation(group_size=2)
    algorithm = taught if ARMS[arm] else GRPO(group_size=8, kl_coef=0.0)
    make = two_tasks_config if is_of_two_tasks(arm) else spelling_config
    config = make(algorithm, preset["size"])
    config.warmup.steps = preset["warmup"]
    config.evaluation = dataclasses.replace(config.evaluation, problems=preset["problems"])
    return config


def teacher_config(name: str, preset: Mapping[str, Any]) -> Config:
    """Supervised training on right answers alone. Its algorithm has no part in it."""
    algorithm = GRPO(group_size=2)
    size = preset["size"]
    config = spelling_config(algorithm, size) if name == "spelling" else two_tasks_config(algorithm, size, (name,))
    config.warmup.steps = preset["teacher_steps"]
    config.warmup.demonstrations = right
    config.warmup.optimizer = dataclasses.replace(
        config.warmup.optimizer, total_steps=max(300, preset["teacher_steps"])
    )
    config.seed = 100
    return config


def model_of(config: Config, target: Path) -> PretrainedModel:
    """What the warm-up of `config` makes, made once, and what it can do."""

    def look(run, params):
        run.state = run.init_state(params)
        found = scores_of(evaluate_run(run, run.policy(), 0))
        print(f"{target.name}: avg@8 {found[0]:.3f}, greedy {found[1]:.3f}", file=sys.stderr, flush=True)

    return warmed_up(config, target, look)


def compete(arm: str, seed: int, preset: Mapping[str, Any], folder: Path) -> Result:
    """One run: (sampled tokens, avg@8, greedy) at each look."""
    of_two = is_of_two_tasks(arm)
    config = student_config(arm, preset)
    start = folder / ("student_of_two_tasks" if of_two else "student")
    config.model = model_of(dataclasses.replace(config, algorithm=GRPO(group_size=2)), start)
    config.warmup = WarmupConfig()
    config.seed = seed

    # A teacher that is alone has all rows; of two each has the rows of its task.
    models = {name: model_of(teacher_config(name, preset), folder / f"teacher_{name}") for name in ARMS[arm]}
    tasks = {name: (name,) if len(models) > 1 else () for name in models}
    config.teachers = tuple(ModelTeacher(model, tasks=tasks[name]) for name, model in models.items())

    # Two tasks ask who is best in the end.
    goal = math.inf if of_two else preset["goal"]
    run = build(config)
    if run.teachers is not None:
        run.teachers.open()
    curve: list[tuple[int, float, float]] = []
    began = time.perf_counter()

    def look(spent: Spent) -> bool:
        curve.append((spent.sampled, *scores_of(evaluate_run(run, run.policy(), spent.steps))))
        return curve[-1][1] >= goal

    with run.actor, use_mesh(run.mesh):
        run.state = run.init_state(run.initial_params())
        budget = preset["tokens"] // (TAUGHT_SHARE if models else 1)
        spent = train_on_budget(run, budget, look, looks=4 if of_two else LOOKS)

    reached = [tokens for tokens, avg, _ in curve if avg >= goal]
    return {
        "arm": arm,
        "seed": seed,
        "steps": spent.steps,
        "seconds": time.perf_counter() - began,
        "curve": curve,
        "reached": reached[0] if reached else None,
    }


def show(results: Sequence[Result], preset: Mapping[str, Any]) -> str:
    """Two tables, in Markdown: tokens to the goal, and the end of two tasks."""
    base = {r["seed"]: r["reached"] for r in results if r["arm"] == BASELINE}
    rows = [
        f"| arm | avg@8 before | tokens sampled to avg@8 >= {preset['goal']}, by seed | share of GRPO's, by seed |",
        "|---|---|---|---|",
    ]
    of_two = ["| teachers | avg@8 before | after, by seed | mean | greedy after |", "|---|---|---|---|---|"]
    for arm in dict.fromkeys(r["arm"] for r in results):
        runs = [r for r in results if r["arm"] == arm]
        first, last = (np.mean([r["curve"][i] for r in runs], axis=0) for i in (0, -1))
        if is_of_two_tasks(arm):
            ends = " ".join(f"{r['curve'][-1][1]:.3f}" for r in runs)
            of_two.append(f"| {arm} | {first[1]:.3f} | {ends} | {last[1]:.3f} | {last[2]:.3f} |")
            continue
        tokens = " ".join(f"{r['reached'] / 1e3:.0f}k" if r["reached"] else "not reached" for r in runs)
        shares = " ".join(f"{r['reached'] / base[r['seed']]:.3f}" for r in runs if r["reached"] and base.get(r["seed"]))
        rows.append(f"| {arm} | {first[1]:.3f} | {tokens} | {shares} |")
    return "\n".join([*rows, "", *of_two])


def said(result: Result) -> str:
    tokens, avg, greedy = result["curve"][-1]
    return (
        f"avg@8 {result['curve'][0][1]:.3f} -> {avg:.3f}, greedy {greedy:.3f}, {tokens / 1e3:.1f}k tokens, "
        f"{result['seconds']:.0f} s"
    )


def main() -> None:
    measure_arms("distill", __doc__.splitlines()[0], PRESETS, list(ARMS), compete, said=said, table=show)


if __name__ == "__main__":
    main()
