"""What `losses.py` and its peers pass each other: a folder with `inputs.npz`, `calls.json` and one answer per peer.

Needs NumPy alone, so that it runs in every environment. A call is `{"name", "kind", "settings"}`; an answer
holds arrays named `name|what`, and in its JSON the peer's versions and the calls that could not be made, with reasons.
"""

import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Data = Mapping[str, np.ndarray]


def write_data(folder: Path, data: Data) -> None:
    np.savez(folder / "inputs.npz", **data)


def answer(peer: str, packages: Sequence[str], kinds: Mapping[str, Callable[[Data, Mapping[str, Any]], Data]]) -> None:
    """A peer's main: makes the calls of the folder in `sys.argv[1]` that are for it, and writes what came out."""
    folder = Path(sys.argv[1])
    with np.load(folder / "inputs.npz") as file:
        data = dict(file)
    arrays, failed = {}, {}
    for call in json.loads((folder / "calls.json").read_text())[peer]:
        try:
            for what, x in kinds[call["kind"]](data, call["settings"]).items():
                arrays[f"{call['name']}|{what}"] = x
        except Exception as error:
            traceback.print_exc()
            failed[call["name"]] = f"{type(error).__name__}: {error}"
    np.savez(folder / f"{peer}.npz", **arrays)
    about = {"versions": {p: importlib.metadata.version(p) for p in packages}, "failed": failed}
    (folder / f"{peer}.json").write_text(json.dumps(about))


def read_answer(folder: Path, peer: str) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """What `answer` wrote: arrays by call and name, and the peer's versions and failures."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(folder / f"{peer}.npz") as file:
        for key in file.files:
            name, what = key.split("|")
            found.setdefault(name, {})[what] = file[key]
    return found, json.loads((folder / f"{peer}.json").read_text())
