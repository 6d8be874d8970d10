"""What does a teacher save? Tokens that a student samples until it spells, with a teacher and without.

    python benchmarks/distill.py --workdir=runs/distill --json=distill.json        # goes on where it stopped

`spelling`: words backwards, from one warmed-up student. GRPO samples 8 answers for each prompt; on-policy distillation
(OnPolicyDistillation) samples 2 and asks a teacher, which was trained on right demonstrations alone. A run ends at the
first look with held-out avg@8 of `goal` or more, or with its budget.

`two tasks`: words backwards, or their letters sorted, from one student that was warmed up on both. It has the two
teachers, each on its own task, or one of them for all rows, and the same number of sampled tokens in every arm.

The teachers' own training is not counted: they are what somebody has already.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _environments import HOME, relaunch_with_allocator

from rljax.algorithms import GRPO, OnPolicyDistillation
from rljax.experiment import Config, ModelTeacher, PretrainedModel, WarmupConfig
from rljax.experiment.build import build
from rljax.experiment.sft import warm_up
from rljax.experiment.train import evaluate_run, train_step
from rljax.models import save_hf
from rljax.parallel import use_mesh
from rljax.tasks import Example
from rljax.training import RunFolder

# What configs of papers share is no package.
sys.path.append(str(Path(__file__).resolve().parent.parent / "configs" / "papers"))

from spelling import spelling_config, two_tasks_config

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(size="smoke", goal=2.0, tokens=100, warmup=2, teacher_steps=2, seeds=1, problems=4),
    "small": dict(size="full", goal=0.8, tokens=320_000, warmup=300, teacher_steps=600, seeds=3, problems=128),
}
LOOKS = 32
"""A run looks at held-out words after every such share of its budget."""
BASELINE = "GRPO"
TAUGHT = "OnPolicyDistillation"
TAUGHT_SHARE = 8
"""GRPO's budget over that of a run with a teacher."""
BOTH = "both teachers"
ARMS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    TAUGHT: ("spelling",),
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


def student_config(arm: str, preset: dict[str, Any]) -> Config:
    """The run of an arm, with its warm-up and without its teachers."""
    algorithm = OnPolicyDistillation(group_size=2) if ARMS[arm] else GRPO(group_size=8, kl_coef=0.0)
    make = two_tasks_config if is_of_two_tasks(arm) else spelling_config
    config = make(algorithm, preset["size"])
    config.warmup.steps = preset["warmup"]
    config.evaluation = dataclasses.replace(config.evaluation, problems=preset["problems"])
    return config


def teacher_config(name: str, preset: dict[str, Any]) -> Config:
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
    """What the warm-up of `config` makes, as a Hugging Face folder, made once."""
    if not (target / "config.json").exists():
        run = build(config)
        with run.actor, RunFolder(target.with_suffix(".log"), fresh=True) as log, use_mesh(run.mesh):
            params = warm_up(run, log)
            save_hf(target, run.decoder, params, tokenizer=run.tokenizer)
            run.state = run.init_state(params)
            found = _scores(evaluate_run(run, run.policy(), 0))
        print(f"{target.name}: avg@8 {found[0]:.3f}, greedy {found[1]:.3f}", file=sys.stderr, flush=True)
    return PretrainedModel(path=str(target), dtype="float32", param_dtype="float32")


def _scores(evaluation: Any) -> tuple[float, float]:
    """Held-out avg@8 and greedy accuracy."""
    values = {name.partition("@")[0]: estimate.value for name, estimate in evaluation.estimates.items()}
    return values["avg"], values["greedy"]


def compete(arm: str, seed: int, preset: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run: (sampled tokens, avg@8, greedy) at each look."""
    config = student_config(arm, preset)
    start = folder / ("student_of_two_tasks" if is_of_two_tasks(arm) else "student")
    config.model = model_of(dataclasses.replace(config, algorithm=GRPO(group_size=2)), start)
    config.warmup = WarmupConfig()
    config.seed = seed
    teachers = [(name, model_of(teacher_config(name, preset), folder / f"teacher_{name}")) for name in ARMS[arm]]
    config.teachers = tuple(ModelTeacher(model, tasks=(name,) if len(teachers) > 1 else ()) for name, model in teachers)

    budget = preset["tokens"] // (TAUGHT_SHARE if teachers else 1)
    # Two tasks ask who is best in the end.
    goal = np.inf if is_of_two_tasks(arm) else preset["goal"]
    looks = 4 if is_of_two_tasks(arm) else LOOKS
    run = build(config)
    if run.teachers is not None:
        run.teachers.open()
    curve: list[tuple[int, float, float]] = []
    began = time.perf_counter()
    with run.actor, use_mesh(run.mesh):
        run.state = run.init_state(run.initial_params())
        spent = 0
        step = 0
        curve.append((0, *_scores(evaluate_run(run, run.policy(), 0))))
        while spent < budget and curve[-1][1] < goal:
            metrics, _ = train_step(run, step)
            step += 1
            spent += int(metrics["rollout/new_tokens"])
            if spent >= curve[-1][0] + budget / looks or spent >= budget:
                curve.append((spent, *_scores(evaluate_run(run, run.policy(), step))))

    reached = [tokens for tokens, avg, _ in curve if avg >= goal]
    return {
        "arm": arm,
        "seed": seed,
        "steps": step,
        "seconds": time.perf_counter() - began,
        "curve": curve,
        "reached": reached[0] if reached else None,
    }


def measured(arm: str, seed: int, preset: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result of one run, from its file if it has been made."""
    file = folder / f"{arm.replace(' ', '_')}-{seed}.json"
    if not file.exists():
        result = compete(arm, seed, preset, folder)
        # In one move: what is there is whole.
        file.with_suffix(".part").write_text(json.dumps(result) + "\n")
        file.with_suffix(".part").rename(file)
    return json.loads(file.read_text())


def show(results: Sequence[dict[str, Any]], goal: float) -> str:
    """Two tables, in Markdown: tokens to the goal, and the end of two tasks."""
    base = {r["seed"]: r["reached"] for r in results if r["arm"] == BASELINE}
    rows = [
        f"| arm | avg@8 before | tokens sampled to avg@8 >= {goal}, by seed | share of GRPO's, by seed |",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--workdir", default="runs/distill")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated, of " + ", ".join(ARMS))
    arguments = parser.parse_args()
    arms = arguments.arms.split(",")
    if unknown := sorted(set(arms) - set(ARMS)):
        parser.error(f"--arms: {unknown[0]!r} is not one of {', '.join(ARMS)}")

    relaunch_with_allocator()
    jax.config.update("jax_compilation_cache_dir", str(HOME / "jax"))
    preset = PRESETS[arguments.preset]
    folder = Path(arguments.workdir) / arguments.preset
    folder.mkdir(parents=True, exist_ok=True)

    results = []
    for seed in range(preset["seeds"]):
        for arm in arms:
            results.append(measured(arm, seed, preset, folder))
            last = results[-1]
            tokens, avg, greedy = last["curve"][-1]
            print(
                f"{arm}, seed {seed}: avg@8 {last['curve'][0][1]:.3f} -> {avg:.3f}, greedy {greedy:.3f}, "
                f"{tokens / 1e3:.1f}k tokens, {last['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    print(show(results, preset["goal"]))
    if arguments.json:
        report = {"benchmark": "distill", "setting": {"preset": arguments.preset, **preset}, "results": results}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
