"""What benchmarks share that train several arms with several seeds: arguments, a warm start that arms have in common,
results that are made once, and JSON."""

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _environments import HOME, relaunch_with_allocator

from rljax.experiment import Config, PretrainedModel, RowsData
from rljax.experiment.build import Run, build
from rljax.experiment.sft import warm_up
from rljax.experiment.train import train_step
from rljax.models import save_hf
from rljax.parallel import use_mesh
from rljax.rollouts import ScoredGroup
from rljax.training import RunFolder
from rljax.types import Params

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "papers"

Result = dict[str, Any]
"""Of one run, as JSON holds it: its arm and seed, and what was measured."""


def measure_arms(
    name: str,
    description: str,
    presets: Mapping[str, Mapping[str, Any]],
    arms: Sequence[str],
    compete: Callable[[str, int, Mapping[str, Any], Path], Result],
    *,
    said: Callable[[Result], str],
    table: Callable[[Sequence[Result], Mapping[str, Any]], str],
) -> None:
    """The command of a benchmark: `--preset`, `--workdir`, `--json`, `--arms`, `--seeds`. Prints `said` of every run as
    it ends, and the `table` of all.

    `compete(arm, seed, preset, folder)` is a run; its result is kept in a file of `folder`, and not made again.
    Modules of configs/papers can be imported by it.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", choices=presets, default="small")
    parser.add_argument("--workdir", default=f"runs/{name}")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--arms", default=",".join(arms), help="comma-separated, of " + ", ".join(arms))
    parser.add_argument("--seeds", metavar="N,N", type=_seeds, help="by default those of the preset, from 0 on")
    arguments = parser.parse_args()
    chosen = arguments.arms.split(",")
    if unknown := sorted(set(chosen) - set(arms)):
        parser.error(f"--arms: {unknown[0]!r} is not one of {', '.join(arms)}")

    relaunch_with_allocator()
    jax.config.update("jax_compilation_cache_dir", str(HOME / "jax"))
    preset = presets[arguments.preset]
    folder = Path(arguments.workdir) / arguments.preset
    folder.mkdir(parents=True, exist_ok=True)

    if str(CONFIGS) not in sys.path:
        sys.path.insert(0, str(CONFIGS))

    results = []
    for seed in arguments.seeds or range(preset["seeds"]):
        for arm in chosen:
            results.append(_made_once(arm, seed, preset, folder, compete))
            print(f"{arm}, seed {seed}: {said(results[-1])}", file=sys.stderr, flush=True)

    print(table(results, preset))
    if arguments.json:
        report = {"benchmark": name, "setting": {"preset": arguments.preset, **preset}, "results": results}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them, such as 0,1,2")
    return [int(seed) for seed in text.split(",")]


def _made_once(arm: str, seed: int, preset: Mapping[str, Any], folder: Path, compete: Callable[..., Result]) -> Result:
    file = folder / f"{arm.replace(' ', '_')}-{seed}.json"
    if not file.exists():
        result = compete(arm, seed, preset, folder)
        # In one move: what is there is whole.
        file.with_suffix(".part").write_text(json.dumps(result) + "\n")
        file.with_suffix(".part").rename(file)
    return json.loads(file.read_text())


def warmed_up(config: Config, target: Path, look: Callable[[Run, Params], None] | None = None) -> PretrainedModel:
    """The model of `config` behind its warm-up, made once: the Hugging Face folder `target`. `look` sees its run."""
    if not (target / "config.json").exists():
        run = build(config)
        with run.actor, RunFolder(target.with_suffix(".log"), fresh=True) as log, use_mesh(run.mesh):
            params = warm_up(run, log)
            save_hf(target, run.decoder, params, tokenizer=run.tokenizer)
            if look is not None:
                look(run, params)
    return PretrainedModel(path=str(target), dtype="float32", param_dtype="float32")


def sized(config: Config, preset: Mapping[str, Any]) -> Config:
    """`config` with a preset's steps of warm-up, and as many held-out problems and samples of each as it says."""
    optimizer = dataclasses.replace(config.warmup.optimizer, total_steps=preset["warmup"])
    config.warmup = dataclasses.replace(config.warmup, steps=preset["warmup"], optimizer=optimizer)

    assert isinstance(config.data, RowsData)
    config.data = dataclasses.replace(config.data, test_args={**config.data.test_args, "size": preset["problems"]})
    config.evaluation = dataclasses.replace(config.evaluation, problems=preset["problems"], samples=preset["samples"])
    return config


def before_and_after(
    run: Run, steps: int, *, measure: Callable[[Run], Any], watch: Callable[[Mapping[str, float]], Any]
) -> Result:
    """Trains a run from its own weights: what `measure` finds with the sampler at its weights before and after, what
    `watch` keeps of the metrics of each step, and seconds."""
    began = time.perf_counter()
    with run.actor, use_mesh(run.mesh):
        run.state = run.init_state(run.initial_params())
        run.actor.set_params(run.policy(), 0)
        before = measure(run)

        trained = [watch(train_step(run, step)[0]) for step in range(steps)]
        run.actor.set_params(run.policy(), steps)
        after = measure(run)
    return {"before": before, "after": after, "trained": trained, "seconds": time.perf_counter() - began}


def components(groups: Sequence[ScoredGroup], names: Sequence[str]) -> dict[str, float]:
    """Means over all samples of what rewards and environments count; 0 where a sample has no such count."""
    results = [result.components for group in groups for result in group.results]
    return {name: float(np.mean([result.get(name, 0.0) for result in results])) for name in names}


def scores_of(evaluation: Any) -> tuple[float, float]:
    """Held-out avg@8 and greedy accuracy."""
    values = {name.partition("@")[0]: estimate.value for name, estimate in evaluation.estimates.items()}
    return values["avg"], values["greedy"]
