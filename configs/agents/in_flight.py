"""Episodes that span updates: GRPO on groups that were begun by earlier policies, each token with its own version.

    rljax train --config=agents/in_flight --workdir=runs/agent_in_flight

The ratio is taken to the log-probs recorded when a token was sampled (Decoupled PPO, arXiv 2505.24298).
"""

from search import search_actor, search_config

from rljax.algorithms import DecoupledPPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    actor = search_actor()
    actor.groups_in_flight = 2 if size == "smoke" else 16
    return search_config(DecoupledPPO(group_size=4 if size == "smoke" else 8), size, actor=actor)
