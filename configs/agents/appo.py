"""APPO, arXiv 2606.12384: forks within the thinking of an agent, credit for what a token led to.

    rljax train --config=agents/appo --workdir=runs/agent_appo

For a model that thinks between `<think>` and `</think>`; one that does not is not forked, which
rollout/unused_forks shows.
"""

from search import search_config

from rljax.algorithms import APPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    chains = 2 if size == "smoke" else 8
    return search_config(APPO(chains=chains, fork_within=("<think>", "</think>")), size, minibatches=2)
