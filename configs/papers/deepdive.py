"""DeepDive, arXiv 2509.10446: GRPO for search agents, less a penalty for searches that repeat themselves.

    python launch/train.py --config=configs/papers/deepdive.py --workdir=runs/deepdive

Look at rollout/reward_mean. Nothing is searched for on this task, so that it is GRPO with a wider upper clip.
"""

from spelling import spelling_config

from rljax.algorithms import DeepDive
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(DeepDive(group_size=8), size, minibatches=4)
