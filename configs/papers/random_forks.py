"""Forks at random tokens, GRPO's credit (arXiv 2402.03300): the control of every method that forks.

    rljax train --config=papers/random_forks --workdir=runs/random_forks

Look at rollout/reused_tokens, what forks inherit, and pack/token_ratio, what training saves by sharing it.
"""

from spelling import spelling_config

from rljax.algorithms import RandomForks
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(RandomForks(chains=4, points=1), size, minibatches=4)
