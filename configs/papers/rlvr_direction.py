"""Reweighting of rare tokens, arXiv 2603.22117: unlikely tokens of either sign weigh more.

    rljax train --config=papers/rlvr_direction --workdir=runs/rlvr_direction

Look at loss/weight_mean, by how much the average step grows; it falls as the policy becomes sure.
"""

from spelling import spelling_config

from rljax.algorithms import DirectionReweighting
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(DirectionReweighting(group_size=8, overlong_buffer=0), size, minibatches=4)
