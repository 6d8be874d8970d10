"""Double-sided importance sampling, arXiv 2602.15763: no old log-probs, tokens out of the interval dropped.

    rljax train --config=papers/double_sided --workdir=runs/double_sided

Look at loss/clip_fraction, the share of tokens dropped.
"""

from spelling import spelling_config

from rljax.algorithms import DIS
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(DIS(group_size=8), size, minibatches=4)
