"""VCPO, arXiv 2602.17616: the step shrinks with the effective sample size of a minibatch.

    python launch/train.py --config=configs/papers/vcpo.py --workdir=runs/vcpo

Look at loss/effective_sample_size and loss/step_scale, 1 on fresh rollouts, as here.
"""

from spelling import spelling_config

from rljax.algorithms import VCPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(VCPO(group_size=8), size, minibatches=4)
