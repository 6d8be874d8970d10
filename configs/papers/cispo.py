"""CISPO, arXiv 2506.13585: the ratio is a capped constant, so that no token loses its gradient.

    rljax train --config=papers/cispo --workdir=runs/cispo

Look at loss/ratio_max against the cap of 5; loss/clip_fraction says how often it holds.
"""

from spelling import spelling_config

from rljax.algorithms import CISPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(CISPO(group_size=8), size, minibatches=4)
