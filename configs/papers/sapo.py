"""SAPO, arXiv 2511.20347: a sigmoid gate in place of the clip interval.

    rljax train --config=papers/sapo --workdir=runs/sapo

Look at loss/clip_fraction, which is 0: nothing is clipped, tokens fade.
"""

from spelling import spelling_config

from rljax.algorithms import SAPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(SAPO(group_size=8), size, minibatches=4)
