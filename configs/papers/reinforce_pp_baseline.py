"""REINFORCE++-baseline, arXiv 2501.03262: the group's mean taken off, then whitened over the batch.

    rljax train --config=papers/reinforce_pp_baseline --workdir=runs/reinforce_pp_baseline

Look at rollout/reward_mean against reinforce_pp.py: what the group's mean does.
"""

from spelling import spelling_config

from rljax.algorithms import ReinforcePlusPlusBaseline
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(ReinforcePlusPlusBaseline(group_size=8), size, minibatches=4)
