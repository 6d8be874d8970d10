"""VCPO, arXiv 2602.17616: the step shrinks with the effective sample size of a minibatch.

    rljax train --config=papers/vcpo --workdir=runs/vcpo

Look at loss/effective_sample_size and loss/step_scale: a step's worth of groups is under way while the policy is
updated, so that its tokens are of several versions.
"""

from turns import turns_config

from rljax.algorithms import VCPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    in_flight = 4 if size == "smoke" else 24
    return turns_config(VCPO(group_size=8), size, groups_in_flight=in_flight)
