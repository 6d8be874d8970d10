"""A pipeline of pure stages from rows to rows, each of which leaves a file that can be looked at and gone on from.

    Row           one JSON object of a data set: a `prompt`, and whatever columns stages read and add
    stage         a function `rows -> rows` with its settings, such as `stage("kept", kept, rules={...})`
    run_stages    runs stages in order in a folder; `00-kept.jsonl` holds the rows behind the first

Beside the rows of a stage lie `00-kept.json`, which says what they were made of (settings and digests), and, where it
left rows out, `00-kept.dropped.jsonl` with the reason of each. Run again, the pipeline reads what is whole and makes
the rest; what was made of other rows or with other settings is refused.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from rljax.settings import shown

Row: TypeAlias = dict[str, Any]
"""A JSON object. A stage adds keys in a copy; it never changes the row that it was given."""

DROPPED = "dropped"
"""Column of a row that was left out: why."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class StageResult(NamedTuple):
    """What a stage makes of rows, where it has more to say than the rows."""

    rows: Sequence[Row]
    """In the order in which the next stage sees them."""
    dropped: Sequence[tuple[Row, str]] = ()
    """Rows that it left out, each with the reason."""
    figures: Mapping[str, float] = {}
    """Numbers for a person, by name."""


StageFunction: TypeAlias = Callable[..., "Sequence[Row] | StageResult"]


@dataclasses.dataclass(frozen=True)
class DataStage:
    """One step of a pipeline. Made by `stage`."""

    name: str
    """Of its files."""
    make: Callable[[Sequence[Row]], Sequence[Row] | StageResult]
    """The function with its settings."""
    settings: Mapping[str, Any]
    """All that its result depends on beside the rows, JSON-ready: `function`, and the settings as `described`."""


class StageReport(NamedTuple):
    """What is said of a stage when it is done."""

    file: Path
    """Its rows."""
    rows: int
    """How many they are."""
    dropped: Mapping[str, int]
    """How many were left out, by reason."""
    figures: Mapping[str, float]
    """Its own numbers."""
    is_new: bool
    """Whether it ran, rather than being read."""

    def describe(self) -> str:
        """One line for a person."""
        parts = [f"{self.rows} rows"]
        parts += [f"{count} dropped: {reason}" for reason, count in self.dropped.items()]
        parts += [
            f"{name} {value:.0f}" if value == int(value) else f"{name} {value:.3f}"
            for name, value in self.figures.items()
        ]
        return f"{self.file.name:<28} {', '.join(parts)}{'' if self.is_new else ' (was there)'}"


def stage(name: str, function: StageFunction, **settings: Any) -> DataStage:
    """The stage `function(rows, **settings)`, whose files are called `name`.

    ValueError for a name that is none of a file, for settings that the function does not take or that it lacks, and for
    a value that cannot be described.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"stage {name!r}: a name has small letters, digits, - and _, since files are called so")
    try:
        inspect.signature(function).bind([], **settings)
    except TypeError as error:
        raise ValueError(f"stage {name}: {described(function)} {error}") from None

    told = {key: described(value) for key, value in settings.items()}
    return DataStage(name, functools.partial(function, **settings), {"function": described(function), **told})


def described(value: Any) -> Any:
    """A setting as JSON: what has `settings` by these, dataclasses by their fields, functions by their names. Code is
    known by its name alone. ValueError for anything else that JSON lacks."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if hasattr(value, "settings"):
        return described(value.settings)
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    raise ValueError(
        f"{shown(value)} cannot be a setting of a stage, which is compared when the pipeline goes on; give it an "
        "attribute `settings` that JSON can hold"
    )


def run_stages(
    rows: Iterable[Mapping[str, Any]],
    stages: Sequence[DataStage],
    folder: str | os.PathLike,
    *,
    report: Callable[[StageReport], None] = lambda report: None,
) -> list[Row]:
    """The rows behind the last of `stages`, each of which leaves its files in `folder`; goes on behind the last whole
    one. `report` is told of each.

    Every stage sees rows as its predecessor's file holds them, so that a pipeline that was interrupted makes what it
    would have made. ValueError for what JSON lacks, for a stage that leaves no row, and for a folder that holds other
    stages, rows of other settings, or files that have changed since.
    """
    _check_names(stages)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    _refuse_others(path, stages)

    # As a file would hold them: tuples become lists, and what JSON lacks is refused before anything is asked.
    text = to_lines(rows, "the data")
    found = read_rows(text)
    made_of = digest_of(text)
    for index, one in enumerate(stages):
        file = path / f"{index:02d}-{one.name}.jsonl"
        wanted = {"stage": one.name, "settings": _through_json(one.settings), "input": made_of}
        note = _read_note(file)

        if is_new := note is None:
            note = _make(one, found, file, wanted)
        _refuse_changed(file, note, wanted)

        text = file.read_bytes()
        made_of = digest_of(text)
        if made_of != note["output"]:
            raise ValueError(f"{file} has changed since it was written; take it and what lies behind it away")
        found = read_rows(text)
        report(StageReport(file, len(found), note["dropped"], note["figures"], is_new))
    return found


def to_lines(rows: Iterable[Mapping[str, Any]], what: str = "a row") -> bytes:
    """Rows as JSON Lines, equal for equal rows. ValueError for values that JSON lacks."""
    lines = []
    for number, row in enumerate(rows, start=1):
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what}, row {number}: {error}; a row holds what JSON can hold") from None
    # Half characters, which texts of models may hold, are escaped: in JSON they mean the same.
    return "".join(lines).encode("utf-8", "backslashreplace")


def read_rows(text: bytes) -> list[Row]:
    """The inverse of `to_lines`."""
    return [json.loads(line) for line in text.splitlines()]


def digest_of(text: bytes) -> str:
    """A 128-bit hash of a file's bytes, in hexadecimal."""
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def filled(template: str, row: Row, **more: str) -> str:
    """A template with the columns of a row that it names; `more` goes before a column of the same name. ValueError for
    a name that neither has."""
    try:
        return template.format(**{**row, **more})
    except KeyError as error:
        raise ValueError(
            f"the template {template!r:.60} names {error.args[0]!r}, which a row lacks; it has {sorted(row)}"
        ) from None


def _make(one: DataStage, rows: list[Row], file: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a stage and writes its files; returns its note."""
    made = one.make(rows)
    result = made if isinstance(made, StageResult) else StageResult(made)
    reasons = Counter(reason for _, reason in result.dropped)
    if not result.rows:
        why = "; ".join(f"{count} dropped: {reason}" for reason, count in reasons.most_common())
        raise ValueError(f"stage {one.name} leaves none of {len(rows)} rows ({why or 'it says no reason'})")

    text = to_lines(result.rows, f"stage {one.name}")
    _write_whole(file, text)
    dropped = file.with_suffix(".dropped.jsonl")
    if result.dropped:
        _write_whole(dropped, to_lines({**row, DROPPED: reason} for row, reason in result.dropped))

    # The note comes last: without it the stage has not been.
    note = {
        **wanted,
        "output": digest_of(text),
        "rows": len(result.rows),
        "dropped": dict(reasons),
        "figures": {name: float(value) for name, value in result.figures.items()},
    }
    _write_whole(_note_of(file), json.dumps(note, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    return note


def _write_whole(file: Path, text: bytes) -> None:
    """Writes a file so that a kill leaves the old or the new one, whole."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(file)


def _note_of(file: Path) -> Path:
    return file.with_suffix(".json")


def _read_note(file: Path) -> dict[str, Any] | None:
    note = _note_of(file)
    if not note.exists():
        return None
    if not file.exists():
        raise ValueError(f"{file} is missing, and {note.name} says that it was there; take that away as well")
    return json.loads(note.read_bytes())


def _refuse_changed(file: Path, note: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    remedy = "name another folder, or take its files and those behind them away"
    if note["input"] != wanted["input"]:
        raise ValueError(f"{file} was made of other rows than those before it now; {remedy}")
    old, new = note["settings"], wanted["settings"]
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            raise ValueError(
                f"{file} was made with {name}={shown(old.get(name))}, and the stage now has {shown(new.get(name))}; "
                f"{remedy}"
            )


def _refuse_others(path: Path, stages: Sequence[DataStage]) -> None:
    known = {f"{index:02d}-{one.name}.json" for index, one in enumerate(stages)}
    others = sorted(file.name for file in path.glob("[0-9][0-9]-*.json") if file.name not in known)
    if others:
        raise ValueError(
            f"{path} holds {others[0]} of another pipeline, whose stages now are "
            f"{', '.join(one.name for one in stages)}; name another folder, or take it away"
        )


def _check_names(stages: Sequence[DataStage]) -> None:
    names = [one.name for one in stages]
    if not names:
        raise ValueError("a pipeline needs at least one stage; none was given")
    if len(set(names)) < len(names):
        raise ValueError(f"names of stages {names} must differ")


def _through_json(value: Any) -> Any:
    """As it will be read."""
    return json.loads(json.dumps(value))
