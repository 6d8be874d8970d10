"""Role-Agent, arXiv 2606.10917: credit for turns, raised where the policy foresaw what came next.

    rljax train --config=papers/role_agent --workdir=runs/role_agent

Look at rollout/reward_mean: turns from one state are compared. Nothing is predicted here, since prices cannot be
foreseen; configs/agents/role_agent.py has predictions.
"""

from turns import turns_config

from rljax.algorithms import RoleAgent
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return turns_config(RoleAgent(group_size=8, kl_coef=0.0), size)
