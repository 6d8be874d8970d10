"""APPO, arXiv 2606.12384: branches are evidence for the samples they left, credit for what a token led to.

    rljax train --config=papers/appo --workdir=runs/appo

Look at loss/weight_mean, which moves with the policy after a rollout's first minibatch. The half life fits the
short answers.
"""

from spelling import spelling_config

from rljax.algorithms import APPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(APPO(chains=4, half_life=4.0), size, minibatches=4)
