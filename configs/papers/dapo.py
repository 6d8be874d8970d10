"""DAPO, arXiv 2503.14476: a wider upper clip, token mean, groups without signal replaced.

    rljax train --config=papers/dapo --workdir=runs/dapo

Look at rollout/prompts_drawn, which grows as the task is learned: what dynamic sampling costs.
"""

from spelling import spelling_config

from rljax.algorithms import DAPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(DAPO(group_size=8, overlong_buffer=0), size, minibatches=4)
