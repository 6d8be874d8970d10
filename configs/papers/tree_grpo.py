"""Tree-GRPO, arXiv 2509.21240: forks at ends of steps, credit within a tree and between trees.

    rljax train --config=papers/tree_grpo --workdir=runs/tree_grpo

Look at rollout/leaves against rollout/new_tokens beside grpo.py. Each letter is a step. Three leaves a tree, as credit
within a tree compares them.
"""

from spelling import LETTERS, spelling_config

from rljax.algorithms import TreeGRPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(TreeGRPO(chains=3, points=2, step_delimiters=LETTERS, kl_coef=0.0), size, minibatches=4)
