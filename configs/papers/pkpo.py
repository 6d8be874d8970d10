"""PKPO, arXiv 2505.15201: an unbiased gradient of the expected best of k.

    rljax train --config=papers/pkpo --workdir=runs/pkpo

Look at held-out pass@8 against avg@8, beside those of pass_at_k.py.
"""

from spelling import spelling_config

from rljax.algorithms import PKPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(PKPO(group_size=8, k=2, baseline=1), size, minibatches=4)
