"""GRPO on one of two tasks of words, or on one behind the other: what teachers of two tasks come from.

    rljax train --config=two_spellings:backward --workdir=runs/backward
    rljax train --config=two_spellings:sorted --workdir=runs/sorted
    rljax train --config=two_spellings:sorted_after_backward --workdir=runs/sorted_after_backward

`backward` asks for a word's letters in the other order, `sorted` for them in the order of the alphabet. The third goes
on from the first run's checkpoint, and forgets what that could. configs/papers/mopd.py and cross_stage_distillation.py
are taught by these runs. `:smoke` is two steps of a far smaller model.
"""

import sys
from pathlib import Path

from rljax.algorithms import GRPO
from rljax.experiment import CheckpointConfig, Config, RunModel

# What configs of papers share stands a folder below, and a config's own folder alone is on the path.
sys.path.append(str(Path(__file__).resolve().parent / "papers"))

from spelling import two_tasks_config

STAGES = ("backward", "sorted", "sorted_after_backward", "smoke")


def get_config(stage: str = "backward") -> Config:
    if stage not in STAGES:
        raise ValueError(f"--config=...:{stage}: the stage must be one of {', '.join(STAGES)}")
    size = "smoke" if stage == "smoke" else "full"
    task = "backward" if stage in ("backward", "smoke") else "sorted"
    config = two_tasks_config(GRPO(group_size=8), size, tasks=(task,))
    config.checkpoint = CheckpointConfig(every=config.steps)
    if stage == "sorted_after_backward":
        config.model = RunModel("runs/backward")
        config.warmup.steps = 0
    return config
