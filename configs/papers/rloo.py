"""RLOO, arXiv 2402.14740: the policy gradient with the mean of the other samples as baseline.

    rljax train --config=papers/rloo --workdir=runs/rloo

Look at rollout/reward_mean; loss/ratio_mean is 1, with one update per rollout.
"""

from spelling import spelling_config

from rljax.algorithms import RLOO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(RLOO(group_size=8), size)
