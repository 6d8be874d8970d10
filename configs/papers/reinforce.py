"""REINFORCE (Williams, 1992) with the batch's mean as baseline: the simplest that learns.

    rljax train --config=papers/reinforce --workdir=runs/reinforce

Look at rollout/reward_mean; without groups the baseline ignores how hard a prompt is.
"""

from spelling import spelling_config

from rljax.algorithms import Reinforce
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(Reinforce(group_size=8), size)
