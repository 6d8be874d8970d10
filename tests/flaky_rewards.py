"""Rewards that fail for some samples; test_run_loop.py names them by `module:function`."""

import math
import os
from pathlib import Path

from rljax.tasks.echo import echo_reward


def raises_on_h(completion: str, answer: str) -> float:
    if "h" in completion:
        raise RuntimeError("no h, please")
    return echo_reward(completion, answer)


def nan_on_h(completion: str, answer: str) -> float:
    return math.nan if "h" in completion else echo_reward(completion, answer)


def nearly_always_equal(completion: str, answer: str) -> float:
    """A reward that few groups disagree about."""
    return float(completion.startswith(answer))


def always_raises(completion):
    raise RuntimeError("no judge here")


def noted(completion: str, answer: str) -> float:
    """A judge that notes what it is asked, by process."""
    notes = Path(os.environ["NOTES"]) / os.environ.get("RLJAX_PROCESS_ID", "alone")
    with notes.open("a") as file:
        file.write(f"{completion} {answer}\n")
    return echo_reward(completion, answer)
