"""The commit of a hub's repository that a run's rows are of: found when the run begins, and kept in its folder."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rljax.experiment.config import Config
from rljax.experiment.report import say
from rljax.parallel import on_main
from rljax.tasks import DataSource, HubData, SkilledData, commit_of
from rljax.training import AnyPath, read_json

COMMIT_FILE = "data.json"
"""Which commit a run reads its rows of, in its folder."""


def source_of(config: Config, held_in: Sequence[AnyPath] = ()) -> tuple[DataSource, dict[str, str] | None]:
    """Where the rows of `config` are read, and what `COMMIT_FILE` is to say of it.

    A branch of the hub moves, so `config.data` is read at one commit: that of the first folder of `held_in` which says
    one of this data set and revision, else what the hub has now. Of other data, and of a revision that is a commit,
    there is nothing to find: (`config.data`, None). Process 0 asks, for all.
    """
    data = config.data
    own = data.data if isinstance(data, SkilledData) else data
    if not isinstance(own, HubData) or not own.moves:
        return data, None

    asked = {"path": own.path, "revision": own.revision}
    commit = on_main(lambda: _held(asked, held_in) or _found(asked))
    if not commit:
        return data, None
    fixed = dataclasses.replace(own, revision=commit)
    source = dataclasses.replace(data, data=fixed) if isinstance(data, SkilledData) else fixed
    return source, {**asked, "commit": commit}


def _held(asked: dict[str, str], folders: Sequence[AnyPath]) -> str:
    """The commit that a folder holds of what is asked for; empty where none does."""
    for file in (folder / COMMIT_FILE for folder in folders):
        held: Any = read_json(file) if file.exists() else None
        if not held:
            continue
        if not isinstance(held, dict) or not isinstance(held.get("commit"), str):
            raise ValueError(f"{file} names no commit; restore it, or remove it to read the newest rows")
        if {name: held.get(name) for name in asked} == asked:
            return held["commit"]
    return ""


def _found(asked: dict[str, str]) -> str:
    """The newest commit of a revision; empty where the hub does not say, of which the user is told."""
    try:
        return commit_of(asked["path"], asked["revision"])
    except ValueError as error:
        # What is in the cache of `datasets` can be read all the same; what cannot be is told by who reads it.
        say(f"{error}; where its rows have changed when this run goes on, it is refused")
        return ""
