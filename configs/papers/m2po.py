"""M2PO, arXiv 2510.01161: the stalest tokens are dropped until the second moment of the rest is small.

    rljax train --config=papers/m2po --workdir=runs/m2po

Look at loss/m2_kept_fraction, 1 on fresh rollouts, as here.
"""

from spelling import spelling_config

from rljax.algorithms import M2PO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(M2PO(group_size=8), size, minibatches=4)
