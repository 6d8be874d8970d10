"""Recipes: one file per method, a dataclass of hyperparameters with `build() -> Algorithm`."""

from rljax.algorithms.base import Algorithm
from rljax.algorithms.cispo import CISPO
from rljax.algorithms.dapo import DAPO
from rljax.algorithms.dr_grpo import DrGRPO
from rljax.algorithms.gmpo import GMPO
from rljax.algorithms.grpo import GRPO
from rljax.algorithms.gspo import GSPO
from rljax.algorithms.reinforce import Reinforce
from rljax.algorithms.reinforce_pp import ReinforcePlusPlus, ReinforcePlusPlusBaseline
from rljax.algorithms.rloo import RLOO
from rljax.algorithms.sapo import SAPO

RECIPES = (
    CISPO,
    DAPO,
    DrGRPO,
    GMPO,
    GRPO,
    GSPO,
    RLOO,
    Reinforce,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    SAPO,
)
"""Every recipe; the conformance suite runs over these."""

__all__ = [
    "CISPO",
    "DAPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "RECIPES",
    "RLOO",
    "SAPO",
    "Algorithm",
    "DrGRPO",
    "Reinforce",
    "ReinforcePlusPlus",
    "ReinforcePlusPlusBaseline",
]
