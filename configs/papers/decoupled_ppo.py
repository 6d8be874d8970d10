"""Decoupled PPO, arXiv 2110.00641: the trust region is around the policy at the start of the updates.

    rljax train --config=papers/decoupled_ppo --workdir=runs/decoupled_ppo

Look at loss/weight_mean, 1 on fresh rollouts, as here.
"""

from spelling import spelling_config

from rljax.algorithms import DecoupledPPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(DecoupledPPO(group_size=8), size, minibatches=4)
