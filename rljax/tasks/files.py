"""Data sets from JSONL and Parquet files: a prompt, and whatever columns the rewards want."""

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rljax.tasks.examples import Example, Prompt, split_answer, whole_text


def load_jsonl(
    path: str | os.PathLike, *, prompt_column: str = "prompt", id_column: str | None = None
) -> list[Example]:
    """Read one example from each line of a JSON Lines file; blank lines are skipped.

    The prompt is text or a non-empty list of `{role, content}` messages; all other keys become columns. Where messages
    end with the assistant's turn, that is taken out and becomes the column `completion` (`split_answer`). Ids are
    hashes of the row unless `id_column` names a column of integers in [0, 2**31). Raises ValueError, naming file, line
    and value, for a row that is no JSON object or has no usable prompt, and for a file that is missing or empty.
    """

    def rows() -> Iterator[tuple[str, Any]]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}, line {number}"
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield place, _row(line, place)

    _check_file(path)
    return examples_of_rows(rows(), path, prompt_column=prompt_column, id_column=id_column)


def _row(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text ({error}); save the file as UTF-8 JSON Lines") from None
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        # what was being written when a disk was full or a copy broke off
        remedy = "each line must be one JSON object" if line.endswith(b"\n") else "the file is cut off here"
        text = _short(line[:400].decode("utf-8", "replace").strip())
        raise ValueError(f"{place}: not valid JSON ({reason}): {text}; {remedy}") from None


def load_parquet(
    path: str | os.PathLike, *, prompt_column: str = "prompt", id_column: str | None = None
) -> list[Example]:
    """Read one example from each row of a Parquet file; the rest is as in `load_jsonl`.

    A place is named as a row, counted from 1. Fields of a message that are null are left out. Raises ImportError,
    naming the extra, without pyarrow.
    """
    _check_file(path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("reading Parquet needs pyarrow: pip install 'rljax-lm[parquet]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from None
    rows = ((f"{path}, row {i + 1}", row) for i, row in enumerate(table.to_pylist()))
    return examples_of_rows(rows, path, prompt_column=prompt_column, id_column=id_column)


def _check_file(path: str | os.PathLike) -> None:
    if not Path(path).is_file():
        raise ValueError(f"no data file at {str(path)!r}; give the path of an existing file")


def examples_of_rows(
    rows: Iterable[tuple[str, Any]], path: str | os.PathLike, *, prompt_column: str, id_column: str | None = None
) -> list[Example]:
    """An example of each row of `path`, which comes with its name for a person. Raises ValueError as `load_jsonl`."""
    examples = []
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place}: {_short(row)} is not an object; each row must map column names to values")
        columns = dict(row)
        # each error names the place, since a file may have millions of rows
        if prompt_column not in columns:
            raise ValueError(
                f"{place}: no column {prompt_column!r} among {sorted(columns)}; "
                "add it, or name the column that holds the prompt with prompt_column"
            )

        prompt: Prompt = _prompt(columns.pop(prompt_column), place, prompt_column)
        example_id = -1 if id_column is None else _id(columns, place, id_column)
        try:
            prompt, columns = split_answer(prompt, columns)
        except ValueError as error:
            raise ValueError(f"{place}: {error}; add the user's turn, or drop the row") from None
        examples.append(Example(prompt=prompt, columns=columns, id=example_id, place=place))

    if not examples:
        raise ValueError(f"{path} holds no rows; a data set needs at least one")
    return examples


def _id(columns: dict[str, Any], place: str, id_column: str) -> int:
    value = columns.get(id_column)
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(
            f"{place}: the id {_short(value)} in column {id_column!r} must be an integer in [0, 2**31); "
            "leave id_column out to use a hash of the row"
        )
    return value


def _prompt(value: Any, place: str, column: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str) and value.strip():
        _check_text(value, place, column)
        return value
    if isinstance(value, list) and value:
        # Parquet gives every struct of a list all fields, null where a message has none
        messages = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in value]
        for i, m in enumerate(messages):
            if not (isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
                raise ValueError(
                    f"{place}: message {i} of {column!r} is {_short(value[i])}; "
                    "a message is an object with a text role and a text content"
                )
            _check_text(m["content"], place, column)
        return messages
    raise ValueError(f"{place}: {column!r} is {_short(value)}; it must be non-empty text, or a list of chat messages")


def _check_text(text: str, place: str, column: str) -> None:
    if whole_text(text) != text:
        at = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
        raise ValueError(
            f"{place}: {column!r} holds half of a character ({text[at]!a}, at character {at}), which no tokenizer "
            "takes; write the whole character, or take it out"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
