"""Rewards that fail for some samples; test_run_loop.py names them by `module:function`."""

import math
import os

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


def of_the_main_process(completion: str, answer: str) -> float:
    """A judge that can be reached from the main process alone."""
    if os.environ.get("RLJAX_PROCESS_ID", "0") != "0":
        raise RuntimeError("judged twice")
    return echo_reward(completion, answer)
