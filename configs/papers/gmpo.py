"""GMPO, arXiv 2507.20673: the geometric mean of clipped token ratios.

    rljax train --config=papers/gmpo --workdir=runs/gmpo

Look at loss/ratio_max, nearer to 1 than that of grpo.py.
"""

from spelling import spelling_config

from rljax.algorithms import GMPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(GMPO(group_size=8), size, minibatches=4)
