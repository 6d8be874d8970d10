"""Multi-teacher distillation, arXiv 2601.02780: one teacher spells backwards, one sorts letters, the student does both.

    rljax train --config=two_spellings:backward --workdir=runs/backward
    rljax train --config=two_spellings:sorted --workdir=runs/sorted
    rljax train --config=papers/mopd --workdir=runs/mopd

Each teacher is GRPO's on its own task; a row's teacher is that of its column `task`. Look at teacher/kl_0 and
teacher/kl_1, and at loss/teacher_reversal, tokens that a teacher pushes against the verifier. The smoke size has
teachers that know nothing.
"""

from spelling import teacher, two_tasks_config

from rljax.algorithms import MOPD
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    config = two_tasks_config(MOPD(group_size=4), size)
    config.teachers = tuple(teacher(config, size, f"runs/{task}", tasks=(task,)) for task in ("backward", "sorted"))
    return config
