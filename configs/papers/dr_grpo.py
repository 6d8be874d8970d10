"""Dr.GRPO, arXiv 2503.20783: GRPO without the division by length and by the group's std.

    rljax train --config=papers/dr_grpo --workdir=runs/dr_grpo

Look at rollout/length_mean, which the division would let grow for wrong answers.
"""

from spelling import spelling_config

from rljax.algorithms import DrGRPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(DrGRPO(group_size=8, horizon=8), size, minibatches=4)
