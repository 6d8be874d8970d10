"""What benchmarks share that train several arms with several seeds: arguments, results that are made once, and JSON."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from _environments import HOME, relaunch_with_allocator

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
    """The command of a benchmark: `--preset`, `--workdir`, `--json`, `--arms`. Prints `said` of every run as it ends,
    and the `table` of all.

    `compete(arm, seed, preset, folder)` is a run; its result is kept in a file of `folder`, and not made again.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", choices=presets, default="small")
    parser.add_argument("--workdir", default=f"runs/{name}")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--arms", default=",".join(arms), help="comma-separated, of " + ", ".join(arms))
    arguments = parser.parse_args()
    chosen = arguments.arms.split(",")
    if unknown := sorted(set(chosen) - set(arms)):
        parser.error(f"--arms: {unknown[0]!r} is not one of {', '.join(arms)}")

    relaunch_with_allocator()
    jax.config.update("jax_compilation_cache_dir", str(HOME / "jax"))
    preset = presets[arguments.preset]
    folder = Path(arguments.workdir) / arguments.preset
    folder.mkdir(parents=True, exist_ok=True)

    results = []
    for seed in range(preset["seeds"]):
        for arm in chosen:
            results.append(_made_once(arm, seed, preset, folder, compete))
            print(f"{arm}, seed {seed}: {said(results[-1])}", file=sys.stderr, flush=True)

    print(table(results, preset))
    if arguments.json:
        report = {"benchmark": name, "setting": {"preset": arguments.preset, **preset}, "results": results}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


def _made_once(arm: str, seed: int, preset: Mapping[str, Any], folder: Path, compete: Callable[..., Result]) -> Result:
    file = folder / f"{arm.replace(' ', '_')}-{seed}.json"
    if not file.exists():
        result = compete(arm, seed, preset, folder)
        # In one move: what is there is whole.
        file.with_suffix(".part").write_text(json.dumps(result) + "\n")
        file.with_suffix(".part").rename(file)
    return json.loads(file.read_text())


def scores_of(evaluation: Any) -> tuple[float, float]:
    """Held-out avg@8 and greedy accuracy."""
    values = {name.partition("@")[0]: estimate.value for name, estimate in evaluation.estimates.items()}
    return values["avg"], values["greedy"]
