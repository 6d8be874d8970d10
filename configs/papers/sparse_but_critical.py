"""Divergence-weighted advantages, arXiv 2603.22446: tokens on which the policy has moved weigh more.

    rljax train --config=papers/sparse_but_critical --workdir=runs/sparse_but_critical

Look at loss/weight_mean, 1 on a rollout's first minibatch; it leaves 1 with loss/approx_kl.
"""

from spelling import spelling_config

from rljax.algorithms import DivergenceWeighting
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(DivergenceWeighting(group_size=8, overlong_buffer=0), size, minibatches=4)
