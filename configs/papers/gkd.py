"""GKD on the student's samples, arXiv 2306.13649: the divergence of whole distributions from a trained speller's.

    rljax train --config=papers/grpo --workdir=runs/teacher --config.checkpoint.every=60
    rljax train --config=papers/gkd --workdir=runs/gkd

The teacher is what the first run has trained. A fourth of GRPO's samples are drawn. Look at loss/teacher_divergence and
teacher/kl, which fall towards 0. The smoke size has a teacher that knows nothing.
"""

from spelling import spelling_config, teacher

from rljax.algorithms import GKD
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    config = spelling_config(GKD(group_size=2), size)
    config.teachers = (teacher(config, size, "runs/teacher"),)
    return config
