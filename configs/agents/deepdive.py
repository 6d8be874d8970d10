"""DeepDive, arXiv 2509.10446: strict rewards, and a penalty for queries that repeat each other.

    rljax train --config=agents/deepdive --workdir=runs/agent_deepdive

Look at rollout/component/redundancy.
"""

from search import search_config

from rljax.algorithms import DeepDive
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return search_config(DeepDive(group_size=4 if size == "smoke" else 8), size)
