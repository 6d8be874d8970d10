"""GSPO, arXiv 2507.18071: one ratio, and one clip, for a whole row.

    rljax train --config=papers/gspo --workdir=runs/gspo

Look at loss/clip_fraction, the share of whole rows clipped. The interval is a hundred times the paper's,
since a model of this size moves further per update.
"""

from spelling import spelling_config

from rljax.algorithms import GSPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(GSPO(group_size=8, clip_low=0.03, clip_high=0.04), size, minibatches=4)
