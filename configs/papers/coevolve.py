"""CoEvolve, arXiv 2604.15840: new tasks are made where rollouts show the policy to be weak.

    rljax train --config=papers/coevolve --workdir=runs/coevolve

Look at rollout/curriculum/accepted, which grows, and at rollout/curriculum/medium_share, which stays up while held-out
scores rise.
"""

from evolving import evolving_config

from rljax.algorithms import GRPO
from rljax.experiment import CoEvolvedTasks, Config


def get_config(size: str = "full") -> Config:
    config = evolving_config(GRPO(group_size=8, kl_coef=0.0, clip_high=0.28), size)
    config.curriculum = CoEvolvedTasks(maker="evolving:WordMaker", every=1 if size == "smoke" else 5, attempts=4)
    return config
