"""AgentRL, arXiv 2510.04206: two tasks on one scale, and a quarter of the turns by older weights.

    rljax train --config=papers/agentrl --workdir=runs/agentrl

Look at rollout/reward_mean, and at loss/ratio_max: tokens of the older weights have ratios of their own.
"""

from turns import turns_config

from rljax.algorithms import AgentRL
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    recipe = AgentRL(group_size=8, kl_coef=0.0)
    return turns_config(recipe, size, stale_share=0.25, stale_every=5)
