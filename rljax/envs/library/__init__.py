"""The environments that come with it: reasoning with tools, search over several pages, a map, and those of others."""

from rljax.envs.library.bfcl import BfclEnvironment
from rljax.envs.library.calculator import calculate, calculator
from rljax.envs.library.corpus import Corpus, Document, Hit, search_tool
from rljax.envs.library.gazetteer import Gazetteer, Place, bucket_reward, distance_km, distance_reward
from rljax.envs.library.maps import MapEnvironment
from rljax.envs.library.mixture import MixedEnvironment, mixed_rows
from rljax.envs.library.multihop import MultiHop
from rljax.envs.library.prediction import Predicting
from rljax.envs.library.reasoning import ReasoningEnvironment
from rljax.envs.library.textworld import TextWorldEnvironment
from rljax.envs.library.verifiers_adapter import VerifiersEnvironment

__all__ = [
    "BfclEnvironment",
    "Corpus",
    "Document",
    "Gazetteer",
    "Hit",
    "MapEnvironment",
    "MixedEnvironment",
    "MultiHop",
    "Place",
    "Predicting",
    "ReasoningEnvironment",
    "TextWorldEnvironment",
    "VerifiersEnvironment",
    "bucket_reward",
    "calculate",
    "calculator",
    "distance_km",
    "distance_reward",
    "mixed_rows",
    "search_tool",
]
