"""OWPO-style, arXiv 2605.22156: a reference that follows the policy sets the size of a step, not its direction.

    rljax train --config=papers/owpo --workdir=runs/owpo

Look at loss/inferior and loss/superior, tokens behind and ahead of the reference; both jump to 0 at a refresh.
"""

from spelling import spelling_config

from rljax.algorithms import OWPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(OWPO(group_size=8, overlong_buffer=0, refresh_every=20), size, minibatches=4)
