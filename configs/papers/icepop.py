"""IcePop, arXiv 2602.15763: tokens on which sampler and trainer disagree are dropped.

    rljax train --config=papers/icepop --workdir=runs/icepop

Look at loss/weight_mean, 1 here, as sampler and trainer are one forward pass; rollout/logprob_gap_max says how
nearly.
"""

from spelling import spelling_config

from rljax.algorithms import IcePop
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(IcePop(group_size=8), size, minibatches=4)
