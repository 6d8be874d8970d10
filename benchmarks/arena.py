"""Which method for which task? Methods side by side from one initial model, at equal measured tokens.

    python benchmarks/arena.py --preset=small --workdir=runs/arena
    python benchmarks/arena.py --preset=small --workdir=runs/arena --json=arena.json      # goes on where it stopped

For each task one character model is warmed up on half wrong demonstrations; every method then trains from it with the
same seeds and optimizer until it has spent the same number of *sampled* tokens, measured and not planned. Its rows:

    GRPO                       independent samples
    GRPO, more samples         as many samples of a prompt as the forests have leaves, until as many tokens have been
                               *trained on* as under random forks: what the forests save in sampling, paid
    random forks               forests forked at random tokens, GRPO's credit: what the sampler alone does
    random forks, X's credit   the same forests, credit of method X: what the credit does
    X                          the whole method: what its fork rule does

Held-out avg@4 and greedy accuracy are measured at equal shares of the budget; the table gives mean and standard
deviation over seeds, the curves mean and band. Every (task, method, seed) is one file in the work folder, so that an
interrupted arena goes on where it stopped.
"""

import argparse
import dataclasses
import json
import random
import re
import string
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _environments import HOME, relaunch_with_allocator

from rljax.advantages import global_and_local, intra_and_inter_tree
from rljax.algorithms import GRPO, RandomForks, TreeGRPO, TreeRL
from rljax.algorithms.base import Algorithm
from rljax.analysis.compare import draw_curves, train_on_budget
from rljax.experiment import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    FreshModel,
    OptimizerConfig,
    PretrainedModel,
    ReasoningGymData,
    Recipe,
    SamplingConfig,
    SingleTurn,
    UpdateConfig,
    WarmupConfig,
)
from rljax.experiment.build import build
from rljax.experiment.sft import warm_up
from rljax.experiment.train import evaluate_run
from rljax.models import save_hf
from rljax.parallel import use_mesh
from rljax.tasks import Example, final_number
from rljax.training import RunFolder

CHAINS, POINTS = 4, 2  # 4 x (1 + 2) = 12 leaves


@dataclasses.dataclass
class RandomForksWith(RandomForks):
    """Random forks with the credit of another method."""

    credit: Callable[[], Any] = intra_and_inter_tree

    def build(self) -> Algorithm:
        return super().build()._replace(advantage_fn=self.credit())


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table. `budget` is what ends a run: tokens sampled, or tokens trained on."""

    name: str
    make: Callable[[tuple[str, ...]], Recipe]
    budget: str = "sampled"


TWIN = "random forks"
"""The method whose runs say how much others train on."""

METHODS = (
    Method("GRPO", lambda steps: GRPO(group_size=8, kl_coef=0.0)),
    Method(TWIN, lambda steps: RandomForks(CHAINS, POINTS)),
    Method("GRPO, more samples", lambda steps: GRPO(group_size=12, kl_coef=0.0), budget="trained"),
    Method("random forks, Tree-GRPO's credit", lambda steps: RandomForksWith(CHAINS, POINTS)),
    Method("Tree-GRPO", lambda steps: TreeGRPO(CHAINS, POINTS, step_delimiters=steps, kl_coef=0.0)),
    Method("random forks, TreeRL's credit", lambda steps: RandomForksWith(CHAINS, POINTS, credit=global_and_local)),
    Method("TreeRL", lambda steps: TreeRL(CHAINS, POINTS, branches=1, kl_coef=0.0, tail=0.0, last_words=())),
)


def misspelt(examples: Sequence[Example]) -> list[Example]:
    """Words backwards; the letters of every second answer are shuffled."""
    rng, made = random.Random(0), []
    for index, example in enumerate(examples):
        letters = list(example.columns["answer"])
        if index % 2:
            rng.shuffle(letters)
        made.append(Example(prompt=example.prompt, columns={"completion": "".join(letters)}))
    return made


def miscounted(examples: Sequence[Example]) -> list[Example]:
    """Running totals of a sum, `7;-1;0`; in every second answer the signs of the terms slip at one of them, and stay so
    for the rest."""
    rng, made = random.Random(0), []
    for index, example in enumerate(examples):
        terms = [int(sign + digits) for sign, digits in re.findall(r"([+-]?) ?(\d+)", str(example.prompt))]
        slip = rng.randrange(1, len(terms)) if index % 2 else len(terms)
        total, totals = terms[0], []
        for place, term in enumerate(terms[1:], 1):
            total += term if place < slip else -term
            totals.append(str(total))
        made.append(Example(prompt=example.prompt, columns={"completion": ";".join(totals)}))
    return made


@dataclasses.dataclass(frozen=True)
class Task:
    """A reasoning-gym task for a character model; `steps` are the tokens that end a step of its solution."""

    name: str
    data: ReasoningGymData
    alphabet: str
    demonstrations: Callable[[Sequence[Example]], list[Example]]
    steps: tuple[str, ...]
    max_new_tokens: int
    prompt_length: int
    learning_rate: float
    warmup: int


TASKS = (
    Task(
        "spell_backward",
        ReasoningGymData(
            task="spell_backward",
            args={"min_word_len": 4, "max_word_len": 7},
            size=8000,
            test_size=128,
            prompt="{word} =",
            chat=False,
        ),
        string.ascii_letters + " =",
        misspelt,
        tuple(string.ascii_letters),
        9,
        10,
        3e-4,
        300,
    ),
    Task(
        "chain_sum",
        ReasoningGymData(
            task="chain_sum",
            args={"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1},
            size=8000,
            test_size=128,
            prompt="{expression} =",
            chat=False,
            extract=final_number,
        ),
        "0123456789+-=; ",
        miscounted,
        (";",),
        14,
        20,
        1e-4,
        600,
    ),
)
PRESETS = {
    "smoke": dict(prompts=8, tokens=100, points=1, seeds=1, warmup_share=0.1, layers=1, problems=8),
    "tiny": dict(prompts=8, tokens=4_000, points=2, seeds=1, warmup_share=0.1),
    "small": dict(prompts=32, tokens=100_000, points=4, seeds=3, warmup_share=1.0),
    "full": dict(prompts=64, tokens=1_000_000, points=10, seeds=5, warmup_share=1.0),
}


def config_of(task: Task, preset: dict[str, Any], **changes: Any) -> Config:
    """The run of a task; `changes` replace its fields."""
    warmup = int(task.warmup * preset["warmup_share"])

    # Eight rows of full length fill a packed sequence; every method has the row table of the largest forest.
    length = task.prompt_length + task.max_new_tokens
    rows = preset["prompts"] * CHAINS * (1 + POINTS)

    return Config(
        name=f"arena-{task.name}",
        prompts_per_step=preset["prompts"],
        model=FreshModel(
            alphabet=task.alphabet,
            num_layers=preset.get("layers", 3),
            embed_dim=96,
            num_heads=3,
            num_kv_heads=3,
            mlp_dim=288,
        ),
        data=task.data,
        actor=SingleTurn(prompt_buckets=(task.prompt_length,)),
        sampling=SamplingConfig(max_new_tokens=task.max_new_tokens),
        update=UpdateConfig(
            pack_length=8 * length,
            microbatch_size=4,
            length_buckets=(8 * length,),
            score_buckets=(8 * length,),
            row_buckets=(rows,),
            head_chunk=2048,
        ),
        optimizer=OptimizerConfig(learning_rate=task.learning_rate),
        # Supervised on flawed demonstrations, so that there is something left for each method to learn.
        warmup=WarmupConfig(
            steps=warmup,
            batch_size=128,
            demonstrations=task.demonstrations,
            optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=20, total_steps=warmup),
        ),
        evaluation=EvaluationConfig(problems=preset.get("problems", 128), samples=4, batch_prompts=32),
        checkpoint=CheckpointConfig(every=0),
        **changes,
    )


def initial_model(task: Task, preset: dict[str, Any], folder: Path) -> Path:
    """The warmed-up model of a task as a Hugging Face folder, made once."""
    target = folder / task.name / "initial"
    if not (target / "config.json").exists():
        config = config_of(task, preset)
        run = build(config)
        with run.actor, RunFolder(folder / task.name / "warmup", fresh=True) as log, use_mesh(run.mesh):
            params = warm_up(run, log)
            save_hf(target, run.decoder, params, tokenizer=run.tokenizer)
    return target


def compete(task: Task, method: Method, seed: int, preset: dict[str, Any], model: Path, budget: int) -> dict[str, Any]:
    """One run: the curve [(tokens sampled, tokens trained on, avg@4, greedy)] and what it cost."""
    config = config_of(task, preset, seed=seed, algorithm=method.make(task.steps))
    config.model = PretrainedModel(path=str(model), dtype="float32", param_dtype="float32")
    config.warmup = WarmupConfig()
    run = build(config)
    curve, began = [], time.perf_counter()

    def look(spent):
        found = evaluate_run(run, run.policy(), spent.steps)
        values = {name: estimate.value for name, estimate in found.estimates.items()}
        curve.append([spent.sampled, spent.trained, values["avg@4"], values["greedy"]])

    with run.actor, use_mesh(run.mesh):
        run.state = run.init_state(run.initial_params())
        spent = train_on_budget(run, budget, look, of=method.budget, looks=preset["points"])
    return {
        "task": task.name,
        "method": method.name,
        "seed": seed,
        "steps": spent.steps,
        "seconds": time.perf_counter() - began,
        "curve": curve,
    }


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each task and method, over seeds."""
    lines = []
    for task in dict.fromkeys(r["task"] for r in results):
        for method in dict.fromkeys(r["method"] for r in results):
            runs = [r for r in results if (r["task"], r["method"]) == (task, method)]
            if not runs:
                continue
            first, last = (np.array([r["curve"][i] for r in runs], float) for i in (0, -1))
            lines.append(
                {
                    "task": task,
                    "method": method,
                    "seeds": len(runs),
                    "before": first[:, 2].mean(),
                    "avg@4": last[:, 2].mean(),
                    "avg@4_std": last[:, 2].std(ddof=1) if len(runs) > 1 else 0.0,
                    "greedy": last[:, 3].mean(),
                    "sampled": last[:, 0].mean(),
                    "trained": last[:, 1].mean(),
                    "steps": float(np.mean([r["steps"] for r in runs])),
                    "seconds": float(np.mean([r["seconds"] for r in runs])),
                }
            )
    return lines


def show(lines: Sequence[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    rows = [
        "| task | method | avg@4 | greedy | tokens sampled | trained on | steps | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for x in lines:
        rows.append(
            f"| {x['task']} | {x['method']} | {x['before']:.3f} -> {x['avg@4']:.3f} ± {x['avg@4_std']:.3f} | "
            f"{x['greedy']:.3f} | {x['sampled'] / 1e3:.0f}k | {x['trained'] / 1e3:.0f}k | {x['steps']:.0f} | "
            f"{x['seconds']:.0f} |"
        )
    return "\n".join(rows)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """avg@4 over tokens sampled: mean over seeds, and the band of one standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(r["task"] for r in results))
    figure = Figure(figsize=(6.5 * len(tasks), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(np.ravel(figure.subplots(1, len(tasks))), tasks, strict=True):
        curves: dict[str, list] = {}
        for run in (r for r in results if r["task"] == task):
            curves.setdefault(run["method"], []).append([(float(sampled), avg) for sampled, _, avg, _ in run["curve"]])
        draw_curves(axes, curves)
        axes.set(title=task, xlabel="tokens sampled (thousands)", ylabel="held-out avg@4")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def measured(task: Task, method: Method, seed: int, preset: dict[str, Any], folder: Path, before: list) -> dict:
    """The result of one run, from its file if it has been made. KeyError where its budget is that of a run that is not
    among those made `before`."""
    slug = re.sub(r"\W+", "_", method.name.lower())
    file = folder / task.name / f"{slug}-{seed}.json"
    if file.exists():
        return json.loads(file.read_text())

    budget = preset["tokens"]
    if method.budget == "trained":
        # It samples until it has trained on as many tokens as the forks of the same seed.
        by_run = {(run["task"], run["method"], run["seed"]): run for run in before}
        budget = by_run[task.name, TWIN, seed]["curve"][-1][1]
    result = compete(task, method, seed, preset, initial_model(task, preset, folder), budget)

    # In one move: an interrupted arena goes on with the runs that are whole.
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".part").write_text(json.dumps(result) + "\n")
    file.with_suffix(".part").rename(file)
    return result


def chosen(parser: argparse.ArgumentParser, option: str, given: list[str], known: list[str]) -> list[str]:
    """The names given, or all; ends the program for one that is not known."""
    if unknown := sorted(set(given) - set(known)):
        parser.error(f"--{option}: {unknown[0]!r} is not one of {'; '.join(known)}")
    return given or known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--workdir", default="runs/arena")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--tasks", default="", help="comma-separated, of " + ", ".join(t.name for t in TASKS))
    parser.add_argument("--seeds", type=int, help="seeds 0 .. n-1; the preset's number when left out")
    parser.add_argument("--methods", default="", help="semicolon-separated, of " + "; ".join(m.name for m in METHODS))
    arguments = parser.parse_args()

    preset = PRESETS[arguments.preset]
    seeds = range(preset["seeds"] if arguments.seeds is None else arguments.seeds)
    tasks = chosen(parser, "tasks", [t for t in arguments.tasks.split(",") if t], [t.name for t in TASKS])
    methods = chosen(parser, "methods", [m for m in arguments.methods.split(";") if m], [m.name for m in METHODS])
    if needy := [m.name for m in METHODS if m.name in methods and m.budget == "trained" and TWIN not in methods]:
        parser.error(f"--methods: {needy[0]!r} is measured by {TWIN!r}; name it as well")

    relaunch_with_allocator()
    jax.config.update("jax_compilation_cache_dir", str(HOME / "jax"))
    folder = Path(arguments.workdir) / arguments.preset

    entries = [(t, m, s) for s in seeds for t in TASKS if t.name in tasks for m in METHODS if m.name in methods]
    results: list[dict[str, Any]] = []
    for number, (task, method, seed) in enumerate(entries, 1):
        results.append(measured(task, method, seed, preset, folder, results))
        last = results[-1]
        print(
            f"[{number}/{len(entries)}] {task.name}, {method.name}, seed {seed}: avg@4 {last['curve'][0][2]:.3f} -> "
            f"{last['curve'][-1][2]:.3f} in {last['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    lines = summarise(results)
    print(show(lines))
    draw(results, folder / "arena.png")
    print(f"\ncurves: {folder / 'arena.png'}")
    if arguments.json:
        setting = {"preset": arguments.preset, **preset}
        report = {"benchmark": "arena", "setting": setting, "results": lines, "runs": results}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
