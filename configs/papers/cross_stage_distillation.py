"""Cross-stage distillation, arXiv 2602.15763: the checkpoint that ended a stage brings back what a later one forgets.

    rljax train --config=two_spellings:backward --workdir=runs/backward
    rljax train --config=two_spellings:sorted_after_backward --workdir=runs/sorted_after_backward
    rljax train --config=papers/cross_stage_distillation --workdir=runs/cross_stage_distillation

The student goes on from the second stage, which has forgotten the first; each stage teaches its own rows. Look at
teacher/kl_0 and teacher/kl_1. The smoke size has a fresh student, and teachers that know nothing.
"""

from spelling import teacher, two_tasks_config

from rljax.algorithms import CrossStageDistillation
from rljax.experiment import Config, RunModel

STAGES = {"backward": "runs/backward", "sorted": "runs/sorted_after_backward"}


def get_config(size: str = "full") -> Config:
    config = two_tasks_config(CrossStageDistillation(group_size=2), size)
    config.teachers = tuple(teacher(config, size, path, tasks=(task,)) for task, path in STAGES.items())
    if size == "full":
        config.model = RunModel(STAGES["sorted"])
        config.warmup.steps = 0
    return config
