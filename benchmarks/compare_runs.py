"""Whether two runs, or two folders of runs, gave the same numbers.

    python benchmarks/compare_runs.py runs/before runs/after
    python benchmarks/compare_runs.py runs/before/arena.json runs/after/arena.json
    python benchmarks/compare_runs.py runs/before runs/after --ignore='play/*'

Compared are metrics, evaluations, rollouts and summaries of run folders, and the JSON results of scripts, wherever they
lie below the two paths. Numbers must be equal to the last bit. Times, memory, compiles, versions and what depends on
how fast the machine was may differ. Configs are not compared: one run may be written down in several ways. The first
differences are printed with file and step, and the exit status is 1 if there are any.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

OF_THE_MACHINE = (
    "time/*",
    "compile/*",
    "compiles_*",
    "memory*",
    "versions",
    "seconds",
    "*_seconds",
    "*_s",
    "peak_memory*",
    "play/busy_share",  # shares of the wall time
    "play/row_occupancy",
)
"""Keys that tell of the machine or of the process; what lies below them is not compared either."""
NO_RESULTS = ("checkpoints", "model", "initial", "tensorboard", "config.json", "versions.json")
"""Files and folders that hold no numbers of a run."""
MISSING = object()


class Counts:
    """How much was compared."""

    def __init__(self) -> None:
        self.files = 0
        self.records = 0
        self.values = 0


def result_files(path: Path) -> dict[str, Path]:
    """The files to compare, by their path below `path`; a file is itself."""
    if path.is_file():
        return {"": path}
    found = (file for file in sorted(path.rglob("*")) if file.suffix in (".json", ".jsonl"))
    relative = {str(file.relative_to(path)): file for file in found}
    return {name: file for name, file in relative.items() if not set(Path(name).parts) & set(NO_RESULTS)}


def differences(a: Path, b: Path, ignore: Sequence[str], counts: Counts) -> Iterator[str]:
    """One line for each difference, files in order and records in the order of the file."""
    files_a = result_files(a)
    files_b = result_files(b)
    for name in sorted(files_a.keys() | files_b.keys()):
        if name not in files_a or name not in files_b:
            yield f"{name}: only in {a if name in files_a else b}"
            continue

        counts.files += 1
        records_a = read_records(files_a[name])
        records_b = read_records(files_b[name])
        for key in [*records_a, *(key for key in records_b if key not in records_a)]:
            if key not in records_a or key not in records_b:
                yield f"{name or a.name}{key}: only in {a if key in records_a else b}"
                continue
            counts.records += 1
            for path, x, y in unequal(records_a[key], records_b[key], ignore, counts):
                yield f"{name or a.name}{key}{path}: {shown(x)} != {shown(y)}"


def read_records(file: Path) -> dict[str, Any]:
    """The records of a file by what they are called in a report: the step of a metric, or else the number of a line."""
    if file.suffix == ".json":
        return {"": json.loads(file.read_text())}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [line.get("step") if isinstance(line, dict) else None for line in lines]
    by_step = None not in steps and len(set(steps)) == len(steps)
    return {f" step {step}" if by_step else f" line {i}": line for i, (step, line) in enumerate(zip(steps, lines), 1)}


def unequal(x: Any, y: Any, ignore: Sequence[str], counts: Counts, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, value, value) of every leaf in which two values differ; `MISSING` stands for one that is not there."""
    if isinstance(x, dict) and isinstance(y, dict):
        for key in [*x, *(key for key in y if key not in x)]:
            if not any(fnmatch.fnmatchcase(key, pattern) for pattern in ignore):
                yield from unequal(x.get(key, MISSING), y.get(key, MISSING), ignore, counts, f"{path} {key}")
    elif isinstance(x, list) and isinstance(y, list):
        if len(x) != len(y):
            yield f"{path} length", len(x), len(y)
        for i, (a, b) in enumerate(zip(x, y)):
            yield from unequal(a, b, ignore, counts, f"{path}[{i}]")
    else:
        counts.values += 1
        both_nan = x != x and y != y
        if not both_nan and (x != y or isinstance(x, bool) != isinstance(y, bool)):
            yield path, x, y


def shown(value: Any) -> str:
    """A value in a report; all digits of a number."""
    text = "nothing" if value is MISSING else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 for equal runs, 1 for different ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path, help="a run folder, a folder of many, or a JSON file")
    parser.add_argument("b", type=Path, help="the same of the other side")
    parser.add_argument("--ignore", action="append", default=[], help="one more key that may differ, `*` for any text")
    parser.add_argument("--show", type=int, default=20, help="differences to print")
    options = parser.parse_args(arguments)

    for path in (options.a, options.b):
        if not path.exists():
            parser.error(f"{path} does not exist")
    if options.a.is_file() != options.b.is_file():
        parser.error("one path is a file and the other a folder")

    counts = Counts()
    found = list(differences(options.a, options.b, (*OF_THE_MACHINE, *options.ignore), counts))
    for line in found[: options.show]:
        print(line)
    if len(found) > options.show:
        print(f"... {len(found) - options.show} more (--show={len(found)})")

    compared = f"{counts.values} values of {counts.records} records in {counts.files} files"
    # Two empty folders are no proof.
    if not counts.files:
        print("nothing to compare")
        return 1
    print(f"{len(found)} differences in {compared}" if found else f"equal: {compared}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
