"""REINFORCE++, arXiv 2501.03262: PPO's clip with returns whitened over the batch, no critic.

    rljax train --config=papers/reinforce_pp --workdir=runs/reinforce_pp

Look at rollout/reward_mean; with one sample per prompt a group size of 1 would serve as well.
"""

from spelling import spelling_config

from rljax.algorithms import ReinforcePlusPlus
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(ReinforcePlusPlus(group_size=8), size, minibatches=4)
