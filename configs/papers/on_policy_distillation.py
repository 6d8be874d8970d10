"""On-policy distillation, arXiv 2601.02780 (eq. 8): a trained speller scores every letter that the student samples.

    rljax train --config=papers/grpo --workdir=runs/teacher --config.checkpoint.every=60
    rljax train --config=papers/on_policy_distillation --workdir=runs/on_policy_distillation

The teacher is what the first run has trained. A fourth of GRPO's samples are drawn. Look at teacher/kl, the reverse KL
per token on the student's samples, which falls towards 0, and loss/teacher_clipped. The smoke size has a teacher that
knows nothing.
"""

from spelling import spelling_config, teacher

from rljax.algorithms import OnPolicyDistillation
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    config = spelling_config(OnPolicyDistillation(group_size=2), size)
    config.teachers = (teacher(config, size, "runs/teacher"),)
    return config
