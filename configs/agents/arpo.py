"""ARPO, arXiv 2507.19849: forks after tool results, where the policy is less sure than it was at the start.

rljax train --config=agents/arpo --workdir=runs/agent_arpo
"""

from search import search_config

from rljax.algorithms import ARPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return search_config(ARPO(chains=2 if size == "smoke" else 8), size)
