"""Rollouts kept for good, one Parquet file a step, and training from them without sampling or judging anything.

A row of a file is a sample: the fields of its trajectory, with the log-probs as the sampler gave them, beside prompt,
completion and the line of the rollout log. What belongs to the rollout as a whole is in the file's metadata.
"""

import base64
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.experiment.config import changed_fields
from rljax.experiment.journal import Made, fields_of, trajectory_of_fields
from rljax.parallel import is_main_process, on_main
from rljax.rollouts import Rollout, known_example
from rljax.tasks import Example, added_by
from rljax.text import Tokenizer
from rljax.training import RECORDED, AnyPath, as_path, plain, replace_bytes
from rljax.types import Trajectory

_ABOUT = b"rljax"
"""The metadata that is read before a replay begins: JSON."""
_REST = b"rljax.rest"
"""The metadata that is needed with the rows alone: JSON, deflated, as base64."""
_DIGEST = b"rljax.digest"
"""A digest of both. That of the rows is in the first: Parquet itself takes many a changed bit for another number."""

_TEXTS = ("step", "prompt", "completion", "record")
"""Columns that are no fields of a trajectory: for readers, and the line of the log."""

_OF_NO_MATTER = ("config.name", "config.log", "config.checkpoint", "config.rollout.devices")
"""What may differ between a run and its replay, which have the same numbers all the same."""

_OF_THE_LEARNER = (
    "config.steps",
    "config.optimizer",
    "config.update",
    "config.critic",
    "config.mesh",
    "config.evaluation",
    "config.reference_refresh",
    "config.reference_weight",
)
"""What may differ too, and then leads to other numbers from the same rollouts."""


def _pyarrow() -> Any:
    """pyarrow with its Parquet module. ValueError, naming the extra, without it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("recorded rollouts need pyarrow: pip install 'rljax-lm[parquet]'") from None
    return pyarrow


class Recorder:
    """Writes the rollouts of a run into `folder`, as they are made. The main process writes. `config` is the run's, as
    JSON holds it; `check` is called before a rollout is written, to raise where the folder is another run's."""

    def __init__(self, folder: AnyPath, config: Mapping[str, Any], tokenizer: Tokenizer, check: Callable[[], None]):
        self._folder = folder
        self._config = config
        self._tokenizer = tokenizer
        self._check = check

    def write(self, made: Made) -> None:
        """Writes a rollout; it is whole, or not there."""
        if not is_main_process():
            return
        self._check()
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_bytes(_file(self._folder, made.step), to_parquet(made, self._config, self._tokenizer))


class Recording:
    """The recorded rollouts of the run in `run`, for a run of `steps` steps with `config` (as JSON) and `tokenizer`.

    `examples` are the data rows by id. ValueError, with the remedy, where rollouts are missing or unreadable, or were
    made by a config that samples otherwise or with tokens that have another meaning. `others` holds, as (recorded, now)
    by name, the settings of the learner that differ: with them the numbers will be others than those of the run.
    All processes must come here.
    """

    def __init__(
        self,
        run: str | AnyPath,
        *,
        steps: int,
        config: Mapping[str, Any],
        tokenizer: Tokenizer,
        examples: Mapping[int, Example],
    ):
        self.folder = as_path(run) / RECORDED
        self.others: dict[str, tuple[Any, Any]] = {}
        self._tokenizer = tokenizer
        self._examples = examples

        abouts = on_main(lambda: self._abouts(steps))
        compared: list[Any] = []
        for step, about in enumerate(abouts):
            # A run has one config, or as many as it had starts.
            if about["config"] not in compared:
                compared.append(about["config"])
                self._compare(step, about["config"], config)

    def _abouts(self, steps: int) -> list[dict[str, Any]]:
        """What each file says of itself."""
        files = [_file(self.folder, step) for step in range(steps)]
        missing = [step for step, file in enumerate(files) if not file.exists()]
        if len(missing) == steps:
            raise ValueError(
                f"--replay: there are no recorded rollouts in {self.folder}; a run keeps them with "
                "--config.log.recordings=True"
            )
        if missing:
            first = missing[0]
            remedy = f"replay its first {first} with --config.steps={first}" if first else "restore it"
            raise ValueError(
                f"--replay: {self.folder} is incomplete: it has {steps - len(missing)} of {steps} rollouts and lacks "
                f"that of step {first + 1} ({files[first].name}); {remedy}, or go on with the run that makes them"
            )
        abouts = []
        for file in files:
            # Of a file its end alone is read: rollouts may be many, and in a bucket.
            with file.open("rb") as opened:
                abouts.append(_about(opened, file))
        return abouts

    def _compare(self, step: int, recorded: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Notes what differs. ValueError where it decides what is sampled."""
        changed = changed_fields(recorded, config)
        changed = {name: pair for name, pair in changed.items() if not name.startswith(_OF_NO_MATTER)}
        sampled = {name: pair for name, pair in changed.items() if not name.startswith(_OF_THE_LEARNER)}
        if sampled:
            lines = "; ".join(f"{name}: {was!r:.80} there, {now!r:.80} here" for name, (was, now) in sampled.items())
            raise ValueError(
                f"--replay: the rollout of step {step + 1} in {self.folder} was made with another config ({lines}); "
                f"set it as there: only {', '.join(_OF_THE_LEARNER)} may differ"
            )
        self.others |= changed

    def read(self, step: int) -> Made:
        """The rollout of a step, counted from 0. ValueError for tokens that mean something else here. All processes
        must come here."""
        file = _file(self.folder, step)
        return from_parquet(on_main(file.read_bytes), self._examples, self._tokenizer, str(file))


def to_parquet(made: Made, config: Mapping[str, Any], tokenizer: Tokenizer) -> bytes:
    """A rollout as the file that holds it."""
    pyarrow = _pyarrow()
    rollout = made.rollout
    columns, shapes = _columns_of(rollout.trajectories)
    records = rollout.records

    # What a person looks for stands in columns of its own, though the record has it too.
    texts = {
        "step": pyarrow.array([made.step + 1] * len(records), pyarrow.int64()),
        "prompt": pyarrow.array([_text(record.get("prompt")) for record in records], pyarrow.string()),
        "completion": pyarrow.array([_text(record.get("completion")) for record in records], pyarrow.string()),
        "record": pyarrow.array([json.dumps(record, default=plain) for record in records], pyarrow.string()),
    }
    table = pyarrow.table(texts | columns)

    about = {"step": made.step, "version": made.version, "config": config, "shapes": shapes}
    about["meaning"] = meaning(tokenizer, rollout.trajectories)
    about["rows"] = _digest_of_rows(table)

    # What a replay needs beside the rows.
    rest = {
        "lacking": made.lacking,
        "behind": made.behind,
        "untrained": list(rollout.untrained),
        "examples": [example.id for example in rollout.examples],
        "rewards": rollout.rewards.tolist(),
        "groups": list(rollout.rewards.shape),
        "stats": rollout.stats,
        "actor_stats": rollout.actor_stats,
    }
    deflated = base64.b64encode(zlib.compress(json.dumps(rest, default=plain).encode()))

    metadata = {_ABOUT: json.dumps(about, default=plain).encode(), _REST: deflated}
    table = table.replace_schema_metadata(metadata | {_DIGEST: _digest(metadata[_ABOUT], deflated)})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, compression="zstd")
    return file.getvalue()


def from_parquet(content: bytes, examples: Mapping[int, Example], tokenizer: Tokenizer, name: str) -> Made:
    """The inverse. ValueError, with the file's `name`, for content that is not whole, for an example that the data does
    not hold, and for tokens that mean something else to `tokenizer`."""
    pyarrow = _pyarrow()
    about = _about(io.BytesIO(content), name)

    # Parquet notices a cut file, but not every byte that has changed.
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
        is_whole = _digest_of_rows(table) == about["rows"]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _damaged(name, error) from None
    if not is_whole:
        raise _damaged(name, "its rows have changed")

    rest = json.loads(zlib.decompress(base64.b64decode(table.schema.metadata[_REST])))
    trajectories = _trajectories_of(table, about["shapes"])
    if meaning(tokenizer, trajectories) != about["meaning"]:
        raise ValueError(
            f"--replay: the tokens of {name} mean something else to the tokenizer of this run; use the model folder "
            "and the tokenizer that the recorded run had"
        )

    # Tasks that a curriculum made are in its state, which is that behind the rollout.
    known = {**examples, **added_by(json.loads(rest["behind"]).get("curriculum", {}))}
    unknown = [example_id for example_id in rest["examples"] if example_id not in known]
    if unknown:
        raise ValueError(
            f"--replay: {name} is of the data row {unknown[0]}, which the data does not hold; replay with the data of "
            "the recorded run"
        )

    rollout = Rollout(
        trajectories=trajectories,
        records=[json.loads(record) for record in table.column("record").to_pylist()],
        examples=[known_example(known, example_id) for example_id in rest["examples"]],
        rewards=np.array(rest["rewards"], np.float64).reshape(rest["groups"]),
        stats=rest["stats"],
        actor_stats=rest["actor_stats"],
        seconds={},  # nothing was sampled or judged here
        untrained=rest["untrained"],
    )
    return Made(about["step"], about["version"], rollout, rest["lacking"], rest["behind"], is_recorded=True)


def meaning(tokenizer: Tokenizer, trajectories: Sequence[Trajectory]) -> str:
    """A digest of the text of each token id that occurs in `trajectories`."""
    ids = np.unique(np.concatenate([trajectory.tokens for trajectory in trajectories])) if trajectories else ()
    texts = [(int(token), tokenizer.decode([int(token)])) for token in ids]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _about(file: io.IOBase, name: object) -> dict[str, Any]:
    """The metadata of a file, without its rows. ValueError, with its `name`, where it is none of ours or not whole."""
    pyarrow = _pyarrow()
    try:
        metadata = pyarrow.parquet.read_schema(file).metadata or {}
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _damaged(name, error) from None
    if _ABOUT not in metadata:
        raise ValueError(f"--replay: {name} is a Parquet file, but no rollout that rljax recorded")
    if metadata.get(_DIGEST) != _digest(metadata[_ABOUT], metadata.get(_REST, b"")):
        raise _damaged(name, "its metadata has changed, or is of another version")
    return json.loads(metadata[_ABOUT])


def _digest(*contents: bytes) -> bytes:
    return hashlib.sha256(b"\0".join(contents)).hexdigest().encode()


def _digest_of_rows(table: Any) -> str:
    """Of the values of a table by column, whatever file they stand in. Arrays count by their bytes."""
    whole = hashlib.sha256()
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        whole.update(f"{name} {column.is_valid().to_pylist()}".encode())
        if _pyarrow().types.is_large_list(column.type):
            # Not the whole type: Parquet has a name of its own for what a list holds.
            whole.update(f"{column.type.value_type} {column.value_lengths().to_pylist()}".encode())
            whole.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
        else:
            whole.update(f"{column.type} {column.to_pylist()}".encode())
    return whole.hexdigest()


def _damaged(name: object, why: object) -> ValueError:
    said = " ".join(f"{why!s:.120}".split())
    return ValueError(f"--replay: {name} is damaged ({said}); restore it, or replay fewer steps")


def _columns_of(trajectories: Sequence[Trajectory]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The fields of trajectories as Arrow columns, null where one has none; and dtype and inner shape of those that
    hold arrays."""
    pyarrow = _pyarrow()
    rows = [fields_of(trajectory) for trajectory in trajectories]
    columns: dict[str, Any] = {}
    shapes: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        # Files of which one knew no value of a field would not be read together.
        if all(value is None for value in values):
            continue
        arrays = [value for value in values if isinstance(value, np.ndarray) and value.ndim]
        if not arrays:
            # A number of one file is a float of the next, so that all of them can be read together.
            plain = [_plain_number(value) for value in values]
            is_float = any(isinstance(value, float) for value in plain) or name in ("reward", "fork_score")
            columns[name] = pyarrow.array(plain, pyarrow.float64() if is_float else None)
            continue

        shapes[name] = [arrays[0].dtype.str, list(arrays[0].shape[1:])]
        flat = pyarrow.array(np.concatenate([array.reshape(-1) for array in arrays]))
        sizes = [0 if value is None else value.size for value in values]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        # An offset that is null makes its row null.
        is_null = np.array([*(value is None for value in values), False])
        columns[name] = pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets, mask=is_null), flat)
    return columns, shapes


def _trajectories_of(table: Any, shapes: Mapping[str, Sequence[Any]]) -> list[Trajectory]:
    rows: list[dict[str, Any]] = [{} for _ in range(table.num_rows)]
    for name in table.column_names:
        if name in _TEXTS:
            continue
        column = table.column(name).combine_chunks()
        if name not in shapes:
            for row, value in zip(rows, column.to_pylist(), strict=True):
                if value is not None:
                    row[name] = value
            continue

        dtype, inner = shapes[name]
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False)
        sizes = [0 if size is None else size for size in column.value_lengths().to_pylist()]
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        for row, part, is_there in zip(rows, parts, column.is_valid().to_pylist(), strict=True):
            if is_there:
                row[name] = part.reshape(-1, *inner)
    return [trajectory_of_fields(row) for row in rows]


def _file(folder: AnyPath, step: int) -> AnyPath:
    return folder / f"rollout_{step:06d}.parquet"


def _text(value: Any) -> str:
    """Text as it is, but for half characters, which Parquet does not take; messages as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=plain)
    return text.encode("utf-8", "backslashreplace").decode()


def _plain_number(value: Any) -> Any:
    return value.item() if isinstance(value, (np.generic, np.ndarray)) else value
