"""Recipes: one file per method, a dataclass of hyperparameters with `build() -> Algorithm`."""

from rljax.algorithms.actguide_rl import ActGuideRL
from rljax.algorithms.agentrl import AgentRL
from rljax.algorithms.appo import APPO
from rljax.algorithms.arpo import AEPO, ARPO
from rljax.algorithms.base import Algorithm, GroupRecipe, Recipe
from rljax.algorithms.cispo import CISPO
from rljax.algorithms.cross_stage_distillation import CrossStageDistillation
from rljax.algorithms.dapo import DAPO
from rljax.algorithms.decoupled_ppo import DecoupledPPO
from rljax.algorithms.deepdive import DeepDive
from rljax.algorithms.dis import DIS
from rljax.algorithms.dr_grpo import DrGRPO
from rljax.algorithms.dynamic_sampling import DynamicSampling
from rljax.algorithms.fipo import FIPO
from rljax.algorithms.forest import ForestRecipe, RandomForks
from rljax.algorithms.gkd import GKD
from rljax.algorithms.gmpo import GMPO
from rljax.algorithms.grpo import GRPO
from rljax.algorithms.gspo import GSPO
from rljax.algorithms.high_entropy import HighEntropy
from rljax.algorithms.icepop import IcePop
from rljax.algorithms.m2po import M2PO
from rljax.algorithms.mopd import MOPD
from rljax.algorithms.near_boundary_rescue import NearBoundaryRescue, NearBoundaryRescueGSPO
from rljax.algorithms.on_policy_distillation import OnPolicyDistillation
from rljax.algorithms.owpo import OWPO
from rljax.algorithms.pass_at_k import PKPO, PassAtK
from rljax.algorithms.ppo import PPO
from rljax.algorithms.preferences import DPO, IPO, KTO, BradleyTerry, PreferenceMethod, SimPO
from rljax.algorithms.reinforce import Reinforce
from rljax.algorithms.reinforce_pp import ReinforcePlusPlus, ReinforcePlusPlusBaseline
from rljax.algorithms.resum import ReSum
from rljax.algorithms.rloo import RLOO
from rljax.algorithms.rlvr_direction import DirectionReweighting
from rljax.algorithms.role_agent import RoleAgent
from rljax.algorithms.sapo import SAPO
from rljax.algorithms.sparse_but_critical import DivergenceWeighting
from rljax.algorithms.tree_grpo import TreeGRPO
from rljax.algorithms.treerl import TreeRL
from rljax.algorithms.vcpo import VCPO

RECIPES = (
    ActGuideRL,
    AgentRL,
    CISPO,
    CrossStageDistillation,
    DAPO,
    DecoupledPPO,
    DeepDive,
    DirectionReweighting,
    DIS,
    DivergenceWeighting,
    DrGRPO,
    FIPO,
    GMPO,
    GRPO,
    GSPO,
    HighEntropy,
    IcePop,
    M2PO,
    MOPD,
    NearBoundaryRescue,
    NearBoundaryRescueGSPO,
    OWPO,
    OnPolicyDistillation,
    PassAtK,
    PKPO,
    PPO,
    Reinforce,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    RLOO,
    RoleAgent,
    SAPO,
    VCPO,
)
"""Recipes over independent samples; the conformance suite runs over these."""

FOREST_RECIPES = (AEPO, APPO, ARPO, RandomForks, ReSum, TreeGRPO, TreeRL)
"""Recipes whose samples branch."""

PREFERENCE_RECIPES = (DPO, IPO, SimPO, KTO, BradleyTerry)
"""Those that learn from preferences, without sampling: `config.preferences.method`."""
DISTRIBUTION_RECIPES = (GKD,)
"""Recipes whose loss compares whole distributions, which log-probs of sampled tokens do not tell."""

__all__ = [
    "AEPO",
    "APPO",
    "ARPO",
    "CISPO",
    "DAPO",
    "DIS",
    "DISTRIBUTION_RECIPES",
    "DPO",
    "FIPO",
    "FOREST_RECIPES",
    "GKD",
    "GMPO",
    "GRPO",
    "GSPO",
    "IPO",
    "KTO",
    "M2PO",
    "MOPD",
    "OWPO",
    "PKPO",
    "PPO",
    "PREFERENCE_RECIPES",
    "RECIPES",
    "RLOO",
    "SAPO",
    "VCPO",
    "ActGuideRL",
    "AgentRL",
    "Algorithm",
    "BradleyTerry",
    "CrossStageDistillation",
    "DecoupledPPO",
    "DeepDive",
    "DirectionReweighting",
    "DivergenceWeighting",
    "DrGRPO",
    "DynamicSampling",
    "ForestRecipe",
    "GroupRecipe",
    "HighEntropy",
    "IcePop",
    "NearBoundaryRescue",
    "NearBoundaryRescueGSPO",
    "OnPolicyDistillation",
    "PassAtK",
    "PreferenceMethod",
    "RandomForks",
    "ReSum",
    "Recipe",
    "Reinforce",
    "ReinforcePlusPlus",
    "ReinforcePlusPlusBaseline",
    "RoleAgent",
    "SimPO",
    "TreeGRPO",
    "TreeRL",
]
