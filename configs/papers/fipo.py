"""FIPO, arXiv 2603.19835: a token counts more where the policy has since moved on the rest of the answer.

    rljax train --config=papers/fipo --workdir=runs/fipo

Look at loss/future_kl, and loss/influence_low and loss/influence_high, the shares of tokens at the ends of the range.
"""

from spelling import spelling_config

from rljax.algorithms import FIPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(FIPO(group_size=8, overlong_buffer=0), size, minibatches=4)
