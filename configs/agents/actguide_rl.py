"""ActGuide-RL, arXiv 2605.12004: where all rollouts fail, as little of a recorded plan as it takes.

    rljax train --config=agents/actguide_rl --workdir=runs/agent_actguide_rl

Look at play/hard_share, play/guidance_level_mean and play/probe_tokens.
"""

from search import search_actor, search_config

from rljax.algorithms import ActGuideRL
from rljax.experiment import Config, Guided


def get_config(size: str = "full") -> Config:
    group = 4 if size == "smoke" else 8
    return search_config(ActGuideRL(group_size=group), size, actor=Guided(search_actor(), column="actions"))
