"""What two runs must have in common to count as the same run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rljax.models import abstract_params, config_from_hf
from rljax.training import fingerprint, read_jsonl, restore_params

_OF_THE_PROCESS = ("time/", "compile/", "play/busy_share")
"""Metrics that tell of the process rather than of the run: how long it took, and what it compiled again."""


def run_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics of a run folder, without times and compiles."""
    lines = read_jsonl(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(_OF_THE_PROCESS)} for line in lines]


def params_fingerprint(folder: str | Path, step: int | None = None) -> dict[str, int]:
    """Checksums of the restored weights of a run folder's checkpoint; `step` None is the newest."""
    folder = Path(folder)
    decoder = config_from_hf(json.loads((folder / "model" / "config.json").read_text()))
    trained = abstract_params(dataclasses.replace(decoder, param_dtype="float32"))
    return fingerprint(restore_params(folder / "checkpoints", trained, step)[0])


def rollout_records(folder: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The rollout log of a run folder, by file name."""
    return {file.name: read_jsonl(file) for file in sorted((Path(folder) / "rollouts").glob("*.jsonl"))}
