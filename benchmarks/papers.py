"""Every config of configs/papers, trained from one warmed-up model: the measured table of docs/papers.md.

    python benchmarks/papers.py                       # all of them, then the table; goes on where it stopped
    python benchmarks/papers.py --configs=fipo,owpo   # these alone
    python benchmarks/papers.py --size=smoke          # two steps each of a tiny model, to see that it works

The warm-up of the configs is the same for all, so it is done once. Each finished config is one JSON line in the work
folder. It is one seed, on one easy task: enough to see that a method learns, too little to rank methods by.
"""

import argparse
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

from rljax.experiment import Config, PretrainedModel, WarmupConfig
from rljax.experiment.build import build
from rljax.experiment.sft import warm_up
from rljax.experiment.train import train
from rljax.models import save_hf
from rljax.parallel import use_mesh
from rljax.training import RunFolder, read_jsonl

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "papers"
PAGE = ROOT / "docs" / "papers.md"
BEGIN, END = "<!-- measured: written by benchmarks/papers.py -->", "<!-- end of measured -->"


def configs() -> list[str]:
    """Names of the configs, in the order of docs/papers.md."""
    order = re.findall(r"\(\.\./configs/papers/(\w+)\.py\)", PAGE.read_text())
    return [name for name in dict.fromkeys(order) if name != "spelling"]


def get_config(name: str, size: str) -> Config:
    if str(CONFIGS) not in sys.path:
        sys.path.append(str(CONFIGS))
    return importlib.import_module(name).get_config(size)


def initial_model(size: str, folder: Path) -> Path:
    """The warmed-up model as a Hugging Face folder, made once."""
    target = folder / "initial"
    if not (target / "config.json").exists():
        run = build(get_config("grpo", size))
        with run.actor, RunFolder(folder / "warmup", fresh=True) as log, use_mesh(run.mesh):
            params = warm_up(run, log)
            save_hf(target, run.decoder, params, tokenizer=run.tokenizer)
    return target


def measure(name: str, size: str, folder: Path) -> dict[str, Any]:
    """Trains one config; the line of it."""
    config = get_config(name, size)
    model = str(initial_model(size, folder))
    config.model = PretrainedModel(path=model, dtype="float32", param_dtype="float32")
    config.warmup = WarmupConfig()
    run_folder = folder / name
    summary = train(config, str(run_folder), fresh=True)
    lines = read_jsonl(run_folder / "metrics.jsonl")
    samples = config.evaluation.samples
    line = {
        "config": name,
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
    """The measured section of docs/papers.md."""
    n = lines[0]["samples"]
    text = [
        "## Measured",
        f"Seed {lines[0]['seed']} alone, {lines[0]['steps']} steps from one warmed-up model, held-out words; time of "
        "sampling and training on two cores, compiling included. It shows that a method learns and ranks none: samples "
        "per prompt, updates and learning rate are the same for all, and tuned for no one.",
        "",
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
    text.append("\nTokens are those of the groups that were trained on; dynamic sampling draws more prompts than that.")
    return "\n".join(text)


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
    parser.add_argument("--page", default=str(PAGE), help="where the table goes; at smoke size it is only printed")
    arguments = parser.parse_args()
    names = arguments.configs.split(",") if arguments.configs else configs()
    if unknown := sorted(set(names) - set(configs())):
        parser.error(f"--configs: {unknown[0]!r} is not one of {', '.join(configs())}")
    relaunch_with_allocator()
    jax.config.update("jax_compilation_cache_dir", str(HOME / "jax"))
    folder = Path(arguments.workdir) / arguments.size
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.jsonl"
    done = {x["config"]: x for x in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    for number, name in enumerate(names, 1):
        if name not in done:
            done[name] = measure(name, arguments.size, folder)
            with file.open("a") as out:
                out.write(json.dumps(done[name]) + "\n")
        x = done[name]
        avg = f"avg@{x['samples']}"
        print(
            f"[{number}/{len(names)}] {name}: {avg} {x['before'][avg]:.3f} -> {x['after'][avg]:.3f}, "
            f"{x['new_tokens'] / 1e3:.0f}k tokens, {x['seconds']:.0f} s",
            flush=True,
        )
    text = table([done[name] for name in configs() if name in done])
    print(f"\n{text}")
    if arguments.size == "full":
        page = Path(arguments.page)
        page.write_text(with_table(page.read_text(), text))


if __name__ == "__main__":
    main()
