"""Role-Agent, arXiv 2606.10917: credit for turns, raised where the policy foresaw what came next.

    python launch/train.py --config=configs/papers/role_agent.py --workdir=runs/role_agent

Look at rollout/reward_mean. Answers of one turn predict nothing, so that it is GRPO with a wider upper clip.
"""

from spelling import spelling_config

from rljax.algorithms import RoleAgent
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(RoleAgent(group_size=8, kl_coef=0.0), size, minibatches=4)
