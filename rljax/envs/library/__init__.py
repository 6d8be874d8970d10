"""The environments that come with it: reasoning with tools, search over several pages, a memory, a map, drawing in
geometry, and those of others."""

from rljax.envs.library.bfcl import BfclEnvironment
from rljax.envs.library.calculator import calculate, calculator
from rljax.envs.library.corpus import Corpus, Document, Hit, search_tool
from rljax.envs.library.gazetteer import Gazetteer, Place, bucket_reward, distance_km, distance_reward
from rljax.envs.library.geosketch import Sketched, SketchEnvironment, sketch_reward
from rljax.envs.library.maps import MapEnvironment
from rljax.envs.library.mcp_tools import McpEnvironment, McpServer
from rljax.envs.library.memory import MemoryEnvironment, Outcome, Reading, evidence_reward
from rljax.envs.library.memory_store import Conversation, Memory, at_granularity, multi_granular
from rljax.envs.library.mixture import MixedEnvironment, mixed_rows
from rljax.envs.library.multihop import MultiHop
from rljax.envs.library.openenv_adapter import OpenEnvEnvironment
from rljax.envs.library.prediction import Predicting
from rljax.envs.library.reasoning import ReasoningEnvironment
from rljax.envs.library.textworld import TextWorldEnvironment
from rljax.envs.library.verifiers_adapter import VerifiersEnvironment
from rljax.envs.library.verifiers_agent import VerifiersAgent

__all__ = [
    "BfclEnvironment",
    "Conversation",
    "Corpus",
    "Document",
    "Gazetteer",
    "Hit",
    "MapEnvironment",
    "McpEnvironment",
    "McpServer",
    "Memory",
    "MemoryEnvironment",
    "MixedEnvironment",
    "MultiHop",
    "OpenEnvEnvironment",
    "Outcome",
    "Place",
    "Predicting",
    "Reading",
    "ReasoningEnvironment",
    "SketchEnvironment",
    "Sketched",
    "TextWorldEnvironment",
    "VerifiersAgent",
    "VerifiersEnvironment",
    "at_granularity",
    "bucket_reward",
    "calculate",
    "calculator",
    "distance_km",
    "distance_reward",
    "evidence_reward",
    "mixed_rows",
    "multi_granular",
    "search_tool",
    "sketch_reward",
]
