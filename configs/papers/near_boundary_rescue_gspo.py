"""Near-boundary stochastic rescue over GSPO, arXiv 2605.22703: whole rows come back.

    rljax train --config=papers/near_boundary_rescue_gspo --workdir=runs/near_boundary_rescue_gspo

Look at loss/rescued against loss/clip_active. Interval and noise are those of gspo.py, a hundred times the paper's.
"""

from spelling import spelling_config

from rljax.algorithms import NearBoundaryRescueGSPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(
        NearBoundaryRescueGSPO(group_size=8, clip_low=0.03, clip_high=0.04, delta=0.04), size, minibatches=4
    )
