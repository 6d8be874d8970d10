"""What the page asks and what it is told: a path and its parameters in, plain JSON out."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rljax.viewer.alarms import find_alarms
from rljax.viewer.forest import lay_out
from rljax.viewer.index import SEARCHES, Index, cache_folder
from rljax.viewer.run import RolloutFile, RunReader, parse
from rljax.viewer.texts import metric_texts

_MOST_POINTS = 2000
MOST_FOUND = 100
"""Rollouts that a search lists."""
_SHOWN_PROMPT = 160


class Answers:
    """The runs in `folders`, asked by the page (`rljax.viewer.server`) or put into one file (`rljax.viewer.export`).

    A context manager: index threads work in it. ValueError for a folder that is none, or that no run has written.
    """

    def __init__(self, folders: Sequence[str | Path], *, index_folder: Path | None = None):
        paths = [Path(folder) for folder in folders]
        for path in paths:
            _check_run(path)
        self._runs = [RunReader(path) for path in paths]
        self._names = _distinct_names(paths)
        self._index_folder = index_folder or cache_folder()
        self._indexes: list[Index] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Answers":
        for run in self._runs:
            index = Index(run, self._index_folder)
            self._stack.callback(index.close)
            self._indexes.append(index)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, path: str, params: Mapping[str, str]) -> Any:
        """The answer to one question, as JSON takes it. KeyError for an unknown path, ValueError for bad parameters."""
        return plain(_PATHS[path](self, params))

    def runs(self, params: Mapping[str, str]) -> Any:
        """All runs: name, folder, steps, alarms; and what their metrics mean."""
        shown = []
        names: set[str] = set()
        for number, run in enumerate(self._runs):
            lines = run.metrics()
            files = run.rollout_files()
            config = run.config()
            names.update(*lines[:1], *lines[-1:])
            self._indexes[number].look()
            shown.append(
                {
                    "name": self._names[number],
                    "path": str(run.path),
                    "is_live": run.is_live(),
                    "step": lines[-1]["step"] if lines else 0,
                    "total": config.get("steps"),
                    "algorithm": (config.get("algorithm") or {}).get("class", ""),
                    "alarms": [alarm._asdict() for alarm in find_alarms(lines, config)],
                    "rollouts": [[file.step, file.is_untrained] for file in files],
                }
            )
        return {"runs": shown, "texts": metric_texts(sorted(names)), "searches": {k: v[0] for k, v in SEARCHES.items()}}

    def stamp(self, params: Mapping[str, str]) -> Any:
        """Changes when there is something new to show."""
        return [[run.metrics()[-1:], len(run.rollout_files()), run.is_live()] for run in self._runs]

    def metrics(self, params: Mapping[str, str]) -> Any:
        """The lines of a run as columns; every k-th of a long run, the last one among them."""
        lines = self._run(params).metrics()
        stride = -(-len(lines) // _MOST_POINTS) or 1
        lines = list(reversed(lines[::-1][::stride]))
        names = sorted({name for line in lines for name in line})
        return {name: [line.get(name) for line in lines] for name in names}

    def groups(self, params: Mapping[str, str]) -> Any:
        """The groups of a step, each with the beginning of its prompt."""
        file = self._file_of(params)
        index = self._index(params)
        found = index.groups(file)
        firsts = index.first_places(file)
        for group in found:
            offset, size = firsts[group["group"]]
            record = _read(file.path, offset, size)
            group["prompt"] = prompt_text(record.get("prompt", ""))[-_SHOWN_PROMPT:]
        return found

    def group(self, params: Mapping[str, str]) -> Any:
        """The records of a group, whole, and their tree."""
        file = self._file_of(params)
        places = self._index(params).places(file, _number(params, "group"))
        records = [_read(file.path, offset, size) for offset, size in places]
        prompt = prompt_text(records[0].get("prompt", "")) if records else ""
        forest = lay_out(records)
        branches = [
            {**branch._asdict(), "stretches": [stretch._asdict() for stretch in branch.stretches]}
            for branch in forest.branches
        ]
        return {"prompt": prompt, "records": records, "forest": {"branches": branches, "length": forest.length}}

    def find(self, params: Mapping[str, str]) -> Any:
        """The first rollouts of a search over all steps, and how many files have not been read yet."""
        search = params.get("search", "")
        if search not in SEARCHES:
            raise ValueError(f"search={search!r} must be one of {', '.join(SEARCHES)}")
        index = self._index(params)
        limit = _number(params, "limit") if "limit" in params else MOST_FOUND
        return {"pending": index.pending, "found": index.find(search, limit)}

    def _run(self, params: Mapping[str, str]) -> RunReader:
        return self._runs[self._number_of_run(params)]

    def _index(self, params: Mapping[str, str]) -> Index:
        return self._indexes[self._number_of_run(params)]

    def _number_of_run(self, params: Mapping[str, str]) -> int:
        number = _number(params, "run")
        if not 0 <= number < len(self._runs):
            raise ValueError(f"run={number} must be from 0 to {len(self._runs) - 1}")
        return number

    def _file_of(self, params: Mapping[str, str]) -> RolloutFile:
        step = _number(params, "step")
        is_untrained = params.get("untrained", "0") == "1"
        for file in self._run(params).rollout_files():
            if (file.step, file.is_untrained) == (step, is_untrained):
                return file
        raise ValueError(f"step={step}: the run has no such rollouts")


_PATHS = {
    "runs": Answers.runs,
    "stamp": Answers.stamp,
    "metrics": Answers.metrics,
    "groups": Answers.groups,
    "group": Answers.group,
    "find": Answers.find,
}


def plain(value: Any) -> Any:
    """The value as strict JSON takes it, which has no word for nan and inf: their names, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def prompt_text(prompt: Any) -> str:
    """A prompt as one text: its messages, each under its role."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        return str(prompt)
    parts = []
    for message in prompt:
        known = message if isinstance(message, Mapping) else {"content": message}
        parts.append(f"[{known.get('role', '?')}]\n{known.get('content', '')}")
    return "\n\n".join(parts)


def _read(file: Path, offset: int, size: int) -> dict[str, Any]:
    with open(file, "rb") as opened:
        opened.seek(offset)
        return parse(opened.read(size)) or {}


def _number(params: Mapping[str, str], name: str) -> int:
    text = params.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} must be a number")
    return int(text)


def _check_run(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; name the --workdir of a run")
    if not any((path / name).exists() for name in ("metrics.jsonl", "config.json", "rollouts")):
        below = sorted({str(file.parent) for file in path.glob("*/config.json")})[:5]
        hint = f"; runs below it: {', '.join(below)}" if below else ""
        raise ValueError(f"{path} holds no run (no metrics.jsonl, config.json or rollouts/){hint}")


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
