"""Near-boundary stochastic rescue over DAPO, arXiv 2605.22703: tokens just out of the clip interval may come back.

    rljax train --config=papers/near_boundary_rescue --workdir=runs/near_boundary_rescue

Look at loss/rescued against loss/clip_active, the share of clipped tokens that it saves.
"""

from spelling import spelling_config

from rljax.algorithms import NearBoundaryRescue
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(NearBoundaryRescue(group_size=8, overlong_buffer=0), size, minibatches=4)
