"""TreeRL with EPTree, arXiv 2506.11902: forks at the most surprising tokens, credit from the leaves below.

    rljax train --config=papers/treerl --workdir=runs/treerl

Look at rollout/original_minus_branch, what choosing by surprise does to the path that is kept.
"""

from spelling import spelling_config

from rljax.algorithms import TreeRL
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(
        TreeRL(chains=3, points=1, branches=2, tail=0.0, last_words=(), kl_coef=0.0), size, minibatches=4
    )
