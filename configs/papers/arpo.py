"""ARPO, arXiv 2507.19849: forks at steps that begin with more entropy than the answer did.

    rljax train --config=papers/arpo --workdir=runs/arpo

Look at rollout/unused_forks, which is 0: what no step earns is sampled on its own. Each letter is a step.
"""

from spelling import LETTERS, spelling_config

from rljax.algorithms import ARPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(ARPO(chains=4, window=1, step_delimiters=LETTERS), size, minibatches=4)
