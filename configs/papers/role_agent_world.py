"""Role-Agent's other half, arXiv 2606.10917: the policy reads its failures, and what failed alike comes more often.

    rljax train --config=papers/role_agent_world --workdir=runs/role_agent_world

Look at rollout/curriculum/unread_reflections beside rollout/curriculum/reflections: how many of its own words on why it
failed could not be read; and at rollout/curriculum/retrieved and rollout/curriculum/modes. The recipe is GRPO, so that
nothing but the draw of tasks is the paper's; configs/agents/role_agent.py has the credit too. The model is that of
search.py: take one that can call tools and hold to a form with `--config.model.path=...`.

The smoke size is two steps of a tiny model of characters, whose reflections cannot be read.
"""

import sys
from pathlib import Path

from rljax.algorithms import GRPO
from rljax.experiment import Config, ReflectedTasks

# The search stands in a folder beside, and a config's own folder alone is on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent / "agents"))

from search import search_config


def get_config(size: str = "full") -> Config:
    smoke = size == "smoke"
    config = search_config(GRPO(group_size=2 if smoke else 8, kl_coef=0.0), size)
    config.name = "role_agent_world"
    config.curriculum = ReflectedTasks(vocabulary="search", chars=200 if smoke else 3000, rollouts=1 if smoke else 2)
    return config
