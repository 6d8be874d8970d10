"""Rollouts on disk as soon as they are made, so that none is sampled or judged a second time.

A file of `journal/` is a rollout as plain data: arrays, and JSON for the rest. It is written in one move, so that a
kill leaves all of it or nothing.
"""

import dataclasses
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.parallel import is_main_process, on_main
from rljax.rollouts import Rollout, known_example
from rljax.tasks import Example, added_by
from rljax.training import AnyPath, plain, replace_bytes
from rljax.types import Trajectory

_NAME = re.compile(r"rollout_(\d{6,})\.npz")
_JSON = "json"
"""The array that holds the JSON, as bytes in UTF-8."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A rollout, and where the host stood when it was made."""

    step: int
    """The step that trains on it, counted from 0."""
    version: int
    """That of the weights which sampled it. What was under way before may hold older tokens."""
    rollout: Rollout
    lacking: str
    """What it lacks to be learned from; "" where it lacks nothing."""
    behind: str
    """JSON: the state of curriculum and actor behind it, from which the next one is made."""
    compiled: int = 0
    """Programs that were compiled for it in another thread than the learner's."""
    idle_s: float = 0.0
    """Seconds that the actor waited before it, with nothing to do."""
    is_recorded: bool = False
    """Whether it was read from a journal, and made by an earlier start of the run."""


class Damaged(Exception):
    """A file that does not hold a whole rollout."""


class Journal:
    """The rollouts in `folder`, one file each. The main process writes; all read what it reads. `check` is called
    before a rollout is written, to raise where the folder is another run's."""

    def __init__(self, folder: AnyPath, check: Callable[[], None] = lambda: None):
        self.folder = folder
        self._check = check
        self._whole: set[int] = set()  # steps whose files this process has written, or has read

    def write(self, made: Made) -> None:
        """Writes a rollout; it is whole, or not there."""
        if not is_main_process():
            return
        self._check()
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_bytes(self._file(made.step), to_bytes(made))
        self._whole.add(made.step)

    def load(self, first: int, examples: Mapping[int, Example]) -> list[Made]:
        """The rollouts from that of step `first` on, as far as none is missing or damaged. `examples` are the data rows
        by id; ValueError where a rollout is of another one. All processes must come here."""
        found: list[Made] = []
        while (made := self._read(first + len(found), examples)) is not None:
            found.append(made)
        return found

    def steps(self) -> set[int]:
        """Steps whose rollouts are there, whole or not, as this process sees the folder."""
        if not self.folder.exists():
            return set()
        names = [_NAME.fullmatch(file.name) for file in self.folder.iterdir()]
        return {int(name.group(1)) for name in names if name}

    def holds(self, first: int, stop: int) -> bool:
        """Whether the rollouts of steps `first` to `stop - 1` are there and whole, as this process sees the folder."""
        return first >= stop or ({*range(first, stop)} <= self.steps() and all(map(self._is_whole, range(first, stop))))

    def _is_whole(self, step: int) -> bool:
        # A file that was found whole is not read again.
        if step not in self._whole:
            try:
                _arrays_of(self._file(step).read_bytes())
            except (Damaged, FileNotFoundError):
                return False
            self._whole.add(step)
        return True

    def keep(self, first: int, stop: int | None = None) -> None:
        """Removes all but the rollouts of steps `first` to `stop - 1`; None is all from `first` on."""
        if not is_main_process():
            return
        for step in self.steps():
            if step < first or (stop is not None and step >= stop):
                self._file(step).unlink()
                self._whole.discard(step)

    def _file(self, step: int) -> AnyPath:
        return self.folder / f"rollout_{step:06d}.npz"

    def _read(self, step: int, examples: Mapping[int, Example]) -> Made | None:
        file = self._file(step)
        content = on_main(lambda: file.read_bytes() if file.exists() else None)
        if content is None:
            return None
        try:
            return from_bytes(content, examples)
        except Damaged:
            return None


def to_bytes(made: Made) -> bytes:
    """A rollout as the file that holds it."""
    rollout = made.rollout
    scalars, arrays = _columns_of(rollout.trajectories)
    text = {
        "step": made.step,
        "version": made.version,
        "lacking": made.lacking,
        "behind": made.behind,
        "trajectories": scalars,
        "records": rollout.records,
        "untrained": list(rollout.untrained),
        "examples": [example.id for example in rollout.examples],
        "stats": rollout.stats,
        "actor_stats": rollout.actor_stats,
        "seconds": rollout.seconds,
    }
    arrays["rewards"] = rollout.rewards
    arrays[_JSON] = np.frombuffer(json.dumps(text, default=plain).encode(), np.uint8)

    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def from_bytes(content: bytes, examples: Mapping[int, Example]) -> Made:
    """The inverse. Damaged for content that is not whole, ValueError for an example that the data does not hold."""
    arrays = _arrays_of(content)
    text = json.loads(arrays.pop(_JSON).tobytes())
    rewards = arrays.pop("rewards")
    # Tasks that a curriculum made are in its state, which is that behind the rollout.
    known = {**examples, **added_by(json.loads(text["behind"]).get("curriculum", {}))}
    rollout = Rollout(
        trajectories=_trajectories_of(text["trajectories"], arrays),
        records=text["records"],
        examples=[known_example(known, example_id) for example_id in text["examples"]],
        rewards=rewards,
        stats=text["stats"],
        actor_stats=text["actor_stats"],
        seconds=text["seconds"],
        untrained=text["untrained"],
    )
    return Made(text["step"], text["version"], rollout, text["lacking"], text["behind"], is_recorded=True)


def _arrays_of(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a file. Damaged where a byte of them is not what was written, by the checksums in it."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError) as error:
        raise Damaged(str(error)) from error


def _columns_of(trajectories: Sequence[Trajectory]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Trajectories as their numbers, and as arrays end to end: of each, which trajectories have it and its entries."""
    scalars: list[dict[str, Any]] = []
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for index, trajectory in enumerate(trajectories):
        scalars.append({})
        for name, value in fields_of(trajectory).items():
            if isinstance(value, np.ndarray) and value.ndim:
                found.setdefault(name, []).append((index, value))
            elif value is not None:
                scalars[-1][name] = value

    arrays: dict[str, np.ndarray] = {}
    for name, parts in found.items():
        arrays[f"{name}:rows"] = np.array([index for index, _ in parts], np.int64)
        arrays[f"{name}:lengths"] = np.array([len(values) for _, values in parts], np.int64)
        arrays[name] = np.concatenate([values for _, values in parts])
    return scalars, arrays


def _trajectories_of(scalars: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]) -> list[Trajectory]:
    fields: list[dict[str, Any]] = [dict(one) for one in scalars]
    for name, values in arrays.items():
        if name.endswith((":rows", ":lengths")):
            continue
        ends = np.cumsum(arrays[f"{name}:lengths"])[:-1]
        for index, part in zip(arrays[f"{name}:rows"], np.split(values, ends), strict=True):
            fields[index][name] = part

    return [trajectory_of_fields(one) for one in fields]


_COLUMN = "column/"
"""Before the names of columns, which are the algorithm's, to keep them apart from those of fields."""


def fields_of(trajectory: Trajectory) -> dict[str, Any]:
    """The fields of a trajectory by name, and its columns as `column/NAME`."""
    fields = {field.name: getattr(trajectory, field.name) for field in dataclasses.fields(trajectory)}
    columns = fields.pop("columns")
    return fields | {f"{_COLUMN}{name}": value for name, value in columns.items()}


def trajectory_of_fields(fields: Mapping[str, Any]) -> Trajectory:
    """The inverse, also of what was written when a grammar was of a whole completion, and its beginning a field."""
    columns = {name.removeprefix(_COLUMN): value for name, value in fields.items() if name.startswith(_COLUMN)}
    own = {name: value for name, value in fields.items() if not name.startswith(_COLUMN)}
    begun = own.pop("grammar_start", None)
    if begun is not None and own.get("grammar"):
        own["grammar_turns"] = np.array([[begun, len(own["tokens"])]], np.int32)
    return Trajectory(**own, columns=columns)
