"""Recipes: one file per method, a dataclass of hyperparameters with `build() -> Algorithm`."""

from rljax.algorithms.base import Algorithm
from rljax.algorithms.cispo import CISPO
from rljax.algorithms.dapo import DAPO
from rljax.algorithms.dr_grpo import DrGRPO
from rljax.algorithms.fipo import FIPO
from rljax.algorithms.gmpo import GMPO
from rljax.algorithms.grpo import GRPO
from rljax.algorithms.gspo import GSPO
from rljax.algorithms.high_entropy import HighEntropy
from rljax.algorithms.near_boundary_rescue import NearBoundaryRescue, NearBoundaryRescueGSPO
from rljax.algorithms.owpo import OWPO
from rljax.algorithms.reinforce import Reinforce
from rljax.algorithms.reinforce_pp import ReinforcePlusPlus, ReinforcePlusPlusBaseline
from rljax.algorithms.rloo import RLOO
from rljax.algorithms.rlvr_direction import DirectionReweighting
from rljax.algorithms.sapo import SAPO
from rljax.algorithms.sparse_but_critical import DivergenceWeighting

RECIPES = (
    CISPO,
    DAPO,
    DirectionReweighting,
    DivergenceWeighting,
    DrGRPO,
    FIPO,
    GMPO,
    GRPO,
    GSPO,
    HighEntropy,
    NearBoundaryRescue,
    NearBoundaryRescueGSPO,
    OWPO,
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
    "FIPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "OWPO",
    "RECIPES",
    "RLOO",
    "SAPO",
    "Algorithm",
    "DirectionReweighting",
    "DivergenceWeighting",
    "DrGRPO",
    "HighEntropy",
    "NearBoundaryRescue",
    "NearBoundaryRescueGSPO",
    "Reinforce",
    "ReinforcePlusPlus",
    "ReinforcePlusPlusBaseline",
]
