"""ActGuide-RL, arXiv 2605.12004: learning without guidance from rollouts that had some.

    rljax train --config=papers/actguide_rl --workdir=runs/actguide_rl

Look at rollout/reward_mean. On this task there is no plan to show, so that it is GRPO with a token mean.
"""

from spelling import spelling_config

from rljax.algorithms import ActGuideRL
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return spelling_config(ActGuideRL(group_size=8, kl_coef=0.0), size, minibatches=4)
