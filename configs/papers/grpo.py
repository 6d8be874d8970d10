"""GRPO, arXiv 2402.03300: the samples of a prompt are each other's baseline.

    rljax train --config=papers/grpo --workdir=runs/grpo

Look at rollout/reward_mean, which rises, and loss/clip_fraction, which stays small.
"""

from spelling import spelling_config

from rljax.algorithms import GRPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(GRPO(group_size=8, kl_coef=0.0), size, minibatches=4)
