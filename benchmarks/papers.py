"""Every config of configs/papers, trained from one warmed-up model: the measured table of docs/papers.md.

    python benchmarks/papers.py                       # all of them, then the table; goes on where it stopped
    python benchmarks/papers.py --configs=fipo,owpo   # these alone
    python benchmarks/papers.py --size=smoke          # two steps each of a tiny model, to see that it works

Configs of one task share its warm-up, which is done once. A method whose task is not the common one has GRPO on its
task beside it, on plain rollouts. Each finished run is one JSON line in the work folder. It is one seed, on one easy
task: enough to see that a method learns, too little to rank methods by.
"""

import argparse
import dataclasses
import importlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from _environments import HOME, relaunch_with_allocator

from rljax.algorithms import GRPO
from rljax.experiment import Config, Guided, MultiTurn, PretrainedModel, WarmupConfig
from rljax.experiment.build import build
from rljax.experiment.sft import warm_up
from rljax.experiment.train import train
from rljax.models import save_hf
from rljax.parallel import use_mesh
from rljax.training import RunFolder, read_jsonl

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "papers"
PAGE = ROOT / "docs" / "papers.md"
SHARED = ("spelling", "turns", "diary")
"""What configs of the folder import."""
OTHERS = (
    "dpo",
    "reward_model",
    "expert_iteration",
    "teacherlm",
    "agenttuning",
    "coevolve",
    "d2evo",
    "skillclaw",
    "curriculum_study",
    "role_agent_world",
)
"""Configs of other commands (`rljax prefer`, `rljax stages`, `rljax study`), and of curricula, which
benchmarks/evolve.py measures."""
COMMON = "half_scrambled"
"""Demonstrations of the task that most configs share."""
TASKS = {
    "with_restarts": "Spelling, where demonstrations start over after wrong beginnings: a start over is right more "
    "often than going on, which is the contrast of ReSum.",
    "flawed_shopping": "Episodes over turns: prices that only a tool tells, and their sums (turns.py). Two kinds of "
    "questions are the two tasks of AgentRL, older weights speak a quarter of its turns, and VCPO has a step's worth "
    "of groups under way. Few tokens of an episode decide, which is what HighEntropy counts on; some ask twice, which "
    "DeepDive counts; turns from one state are what RoleAgent compares.",
}
"""What the other tasks show, by their demonstrations."""
CONTROL = "+control"
"""Ends the name of a config whose task GRPO learns in its place."""
BEGIN, END = "<!-- measured: written by benchmarks/papers.py -->", "<!-- end of measured -->"


def configs(size: str = "full") -> list[str]:
    """Names of the configs, in the order of docs/papers.md; before the first of each task but the common one, that of
    its control."""
    order = re.findall(r"\(\.\./configs/papers/(\w+)\.py\)", PAGE.read_text())
    names: list[str] = []
    tasks = {COMMON}
    for name in dict.fromkeys(order):
        if name in SHARED or name in OTHERS:
            continue
        task = task_of(get_config(name, size))
        if task not in tasks:
            tasks.add(task)
            names.append(name + CONTROL)
        names.append(name)
    return names


def get_config(name: str, size: str) -> Config:
    if str(CONFIGS) not in sys.path:
        sys.path.append(str(CONFIGS))
    return importlib.import_module(name).get_config(size)


def task_of(config: Config) -> str:
    """What a config trains on, by the demonstrations of its warm-up."""
    assert config.warmup.demonstrations is not None
    return config.warmup.demonstrations.__name__


def control_of(config: Config) -> Config:
    """GRPO on the task of a config, with rollouts of the current policy alone."""
    actor = config.actor.actor if isinstance(config.actor, Guided) else config.actor
    if isinstance(actor, MultiTurn):
        actor = dataclasses.replace(actor, groups_in_flight=0, stale_share=0.0)
    group = config.algorithm.build().plan.group_size
    return dataclasses.replace(config, algorithm=GRPO(group_size=group, kl_coef=0.0), actor=actor)


def initial_model(config: Config, folder: Path) -> Path:
    """The warmed-up model of the config's task as a Hugging Face folder, made once."""
    target = folder / f"initial_{task_of(config)}"
    if not (target / "config.json").exists():
        run = build(control_of(config))
        with run.actor, RunFolder(folder / "warmup", fresh=True) as log, use_mesh(run.mesh):
            params = warm_up(run, log)
            save_hf(target, run.decoder, params, tokenizer=run.tokenizer)
    return target


def measure(name: str, size: str, folder: Path) -> dict[str, Any]:
    """Trains one config, or of a name that ends in `CONTROL` the control on its task; the line of it."""
    config = get_config(name.removesuffix(CONTROL), size)
    if name.endswith(CONTROL):
        config = control_of(config)
    task = task_of(config)
    model = str(initial_model(config, folder))
    config.model = PretrainedModel(path=model, dtype="float32", param_dtype="float32")
    config.warmup = WarmupConfig()
    run_folder = folder / name
    summary = train(config, str(run_folder), fresh=True)
    lines = read_jsonl(run_folder / "metrics.jsonl")
    samples = config.evaluation.samples
    line = {
        "config": name,
        "task": task,
        "recipe": type(config.algorithm).__name__,
        "seed": config.seed,
        "steps": len(lines),
        "samples": samples,
        "prompts": sum(x["rollout/prompts_drawn"] for x in lines),
        "new_tokens": summary["new_tokens"],
        "seconds": sum(x["time/total_s"] for x in lines),
    }
    for when in ("before", "after"):
        line[when] = {key: summary[when][key] for key in ("greedy", f"avg@{samples}", f"pass@{samples}")}
    shutil.rmtree(run_folder)
    return line


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The measured section of docs/papers.md: the common task, then each of the others."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_task.setdefault(line["task"], []).append(line)
    own = [_own_task(task, rows) for task, rows in by_task.items() if task != COMMON]
    return "\n\n".join([*(_common_task(by_task[COMMON]) if COMMON in by_task else []), *own])


def _common_task(lines: Sequence[dict[str, Any]]) -> list[str]:
    text = [
        "## Measured",
        f"Seed {lines[0]['seed']} alone, {lines[0]['steps']} steps from one warmed-up model, held-out words; time of "
        "sampling and training on two cores, compiling included. It shows that a method learns and ranks none: samples "
        "per prompt, updates and learning rate are the same for all, and tuned for no one.",
        "",
        *_rows(lines),
        "",
        "Tokens are those of the groups that were trained on; dynamic sampling draws more prompts than that.",
    ]
    return ["\n".join(text)]


def _own_task(task: str, lines: Sequence[dict[str, Any]]) -> str:
    # Without times: what two rows cost is told by the common task.
    about = f"{TASKS[task]} Seed {lines[0]['seed']} alone, {lines[0]['steps']} steps from one warmed-up model."
    head, separator, *rest = _rows(lines)
    head, *rest = (row.rpartition(" | ")[0] + " |" for row in (head, *rest))
    heading = f"### {task.replace('_', ' ').capitalize()}"
    return "\n".join([heading, about, "", head, separator.removesuffix("---|"), *rest])


def _rows(lines: Sequence[dict[str, Any]]) -> list[str]:
    n = lines[0]["samples"]
    text = [
        f"| method | avg@{n} | greedy | pass@{n} | prompts | tokens sampled | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for x in lines:
        before, after = x["before"], x["after"]
        scores = " | ".join(f"{before[k]:.3f} → {after[k]:.3f}" for k in (f"avg@{n}", "greedy", f"pass@{n}"))
        text.append(
            f"| [{x['recipe']}](#{x['recipe'].lower()}) | {scores} | {x['prompts']:.0f} | "
            f"{x['new_tokens'] / 1e3:.0f}k | {x['seconds']:.0f} |"
        )
    return text


def with_table(page: str, text: str) -> str:
    """`page` with `text` between the markers, at its end where there are none yet."""
    block = f"{BEGIN}\n{text}\n{END}\n"
    if BEGIN in page:
        return page[: page.index(BEGIN)] + block + page[page.index(END) + len(END) :].lstrip("\n")
    return page.rstrip("\n") + "\n\n" + block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("full", "smoke"), default="full")
    parser.add_argument("--workdir", default="runs/papers")
    parser.add_argument("--configs", help="comma-separated names; all when left out")
    parser.add_argument("--page", default=str(PAGE), help="where the table goes when no config is missing")
    arguments = parser.parse_args()

    known = configs(arguments.size)
    names = arguments.configs.split(",") if arguments.configs else known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"--configs: {unknown[0]!r} is not one of {', '.join(known)}")

    relaunch_with_allocator()
    jax.config.update("jax_compilation_cache_dir", str(HOME / "jax"))
    folder = Path(arguments.workdir) / arguments.size
    folder.mkdir(parents=True, exist_ok=True)

    # What earlier calls have measured stands in the folder, so that a call goes on where the last one ended.
    file = folder / "results.jsonl"
    done = {x["config"]: x for x in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    for number, name in enumerate(names, 1):
        if name not in done:
            done[name] = measure(name, arguments.size, folder)
            with file.open("a") as out:
                out.write(json.dumps(done[name]) + "\n")

        line = done[name]
        avg = f"avg@{line['samples']}"
        print(
            f"[{number}/{len(names)}] {name}: {avg} {line['before'][avg]:.3f} -> {line['after'][avg]:.3f}, "
            f"{line['new_tokens'] / 1e3:.0f}k tokens, {line['seconds']:.0f} s",
            flush=True,
        )

    text = table([done[name] for name in known if name in done])
    print(f"\n{text}")
    missing = [name for name in known if name not in done]
    if arguments.size == "smoke":
        return
    if missing:
        # It would lose the rows of the others.
        print(f"\n{arguments.page} is left as it is: {folder} has no results of {', '.join(missing)}")
        return
    page = Path(arguments.page)
    page.write_text(with_table(page.read_text(), text))


if __name__ == "__main__":
    main()
