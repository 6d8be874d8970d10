"""PPO, arXiv 1707.06347, with GAE, 1506.02438: a critic is trained beside the policy.

    rljax train --config=papers/ppo --workdir=runs/ppo

Look at critic/explained_variance, which rises within the first 5 steps, in which the policy stands still.
"""

from spelling import spelling_config

from rljax.algorithms import PPO
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(PPO(group_size=8, lam=0.95), size, minibatches=4, critic_warmup=5)
