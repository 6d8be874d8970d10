"""Tree-GRPO, arXiv 2509.21240: forks at agent steps, credit within trees and between them.

    rljax train --config=agents/tree_grpo --workdir=runs/agent_tree_grpo

A step is a turn with what its tool answered. Look at rollout/reused_tokens: what the forks did not sample again.
"""

from search import search_config

from rljax.algorithms import TreeGRPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return search_config(TreeGRPO(chains=2, points=2, rounds=1), size)
