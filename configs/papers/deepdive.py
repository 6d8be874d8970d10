"""DeepDive, arXiv 2509.10446: GRPO for search agents, less a penalty for searches that repeat themselves.

    rljax train --config=papers/deepdive --workdir=runs/deepdive

Look at rollout/component/redundancy: a third of the demonstrations of two goods ask for one price twice.
"""

from turns import turns_config

from rljax.algorithms import DeepDive
from rljax.experiment import Config


def get_config(size: str = "full") -> Config:
    return turns_config(DeepDive(group_size=8), size)
