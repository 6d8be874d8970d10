"""AgentRL, arXiv 2510.04206: advantages normalised once more over all tokens of a task.

    python launch/train.py --config=configs/papers/agentrl.py --workdir=runs/agentrl

Look at rollout/reward_mean; with several tasks in the column `task` each gets the same scale.
"""

from spelling import spelling_config

from rljax.algorithms import AgentRL
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(AgentRL(group_size=8, kl_coef=0.0), size, minibatches=4)
