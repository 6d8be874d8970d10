"""AEPO, arXiv 2510.14545: ARPO with fewer forks in a row, and credit scaled by entropy.

    rljax train --config=papers/aepo --workdir=runs/aepo

Look at loss/clip_fraction beside arpo.py: clipped tokens keep a gradient here. Each letter is a step.
"""

from spelling import LETTERS, spelling_config

from rljax.algorithms import AEPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(AEPO(chains=4, window=1, step_delimiters=LETTERS), size, minibatches=4)
