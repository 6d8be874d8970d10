"""Rows of data sets on the Hugging Face hub, or in a folder of files, as `datasets` reads them."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rljax.tasks.examples import Example
from rljax.tasks.files import examples_of_rows


def load_hub(
    path: str,
    *,
    split: str = "train",
    subset: str = "",
    revision: str = "",
    max_rows: int = 0,
    prompt_column: str = "prompt",
    columns: Mapping[str, str] | None = None,
) -> list[Example]:
    """Examples of one split of a data set, in its order.

    `path` is an id on the hub, or a local folder of Parquet or JSON Lines files; `subset` is what the hub also calls a
    configuration. With `max_rows` above 0 the first rows alone are read, as they come over the network; else all files
    are downloaded into the cache of `datasets` first. `columns` names columns anew, `{"answer": "reward.truth"}`, where
    a dot leads into a column that holds an object. What a prompt may be is as in `load_parquet`; a row is named by
    its split and number, counted from 1.

    Raises ValueError for what cannot be read, for a column that is not there, and for a row without a usable prompt;
    ImportError that names the extra without `datasets`.
    """
    rows = _rows(path, split=split, subset=subset, revision=revision, max_rows=max_rows)
    named = ((place, _renamed(row, columns or {}, place)) for place, row in rows)
    return examples_of_rows(named, f"{path}, split {split},", prompt_column=prompt_column)


def is_local(path: str) -> bool:
    """Whether `path` is a folder here rather than an id on the hub, where a folder of that name comes first."""
    return Path(path).is_dir()


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit, whole, which never holds anything else."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def commit_of(path: str, revision: str = "") -> str:
    """The commit that `revision` (empty: the main branch) of a data set on the hub is now. ValueError where the hub
    does not say."""
    import huggingface_hub

    try:
        found = huggingface_hub.HfApi(library_name="rljax").dataset_info(path, revision=revision or None, timeout=60.0)
    except Exception as error:  # whatever it raises: its own errors, those of HTTP, and of a name that it does not take
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the hub does not say which commit {revision or 'the main branch'} of the data set {path!r} is "
            f"({reason:.300})"
        ) from error
    return str(found.sha or "")


def _rows(path: str, *, split: str, subset: str, revision: str, max_rows: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row and its name for a person."""
    try:
        import datasets
    except ImportError:
        raise ImportError("reading data of the hub needs datasets: pip install 'rljax-lm[hub]'") from None

    # Also a row may be what cannot be read: with `max_rows` files are opened on the way.
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(
            path, subset or None, split=split, revision=revision or None, streaming=max_rows > 0
        )
        if max_rows > 0:
            rows = itertools.islice(rows, max_rows)
        for number, row in enumerate(rows, start=1):
            yield f"{path}, split {split}, row {number}", row
    except Exception as error:  # whatever it raises: its own errors, and those of HTTP, storage and Parquet
        # Some of these say the whole in many lines, and the reason in the last error but one.
        reason = " ".join(str(error.__cause__ or error).split())
        where = "in the folder" if is_local(path) else "on the hub"
        raise ValueError(
            f"the data set {path!r} {where} (subset {subset or 'none'}, split {split}) cannot be read: {reason:.300}; "
            "give an id of the hub (user/name) or a folder of Parquet files, and a subset and split that it has"
        ) from error


def _renamed(row: dict[str, Any], columns: Mapping[str, str], place: str) -> dict[str, Any]:
    """The row with its columns, and those of `columns` under their new names, which take the place of equal ones."""
    return {**row, **{new: _value(row, old, place) for new, old in columns.items()}}


def _value(row: dict[str, Any], name: str, place: str) -> Any:
    if name in row:
        return row[name]

    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            has = sorted(value) if isinstance(value, Mapping) else f"{value!r:.40}, which is no object"
            raise ValueError(f"{place}: no column {name!r}, since {part!r} is not among {has}; name one that is there")
        value = value[part]
    return value
