"""Pass@k Training, arXiv 2508.10751: credit for being in a set of k of which the best counts.

    rljax train --config=papers/pass_at_k --workdir=runs/pass_at_k

Look at held-out pass@8 against avg@8, beside those of grpo.py.
"""

from spelling import spelling_config

from rljax.algorithms import PassAtK
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(PassAtK(group_size=8, k=2), size, minibatches=4)
