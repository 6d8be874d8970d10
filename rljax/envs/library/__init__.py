"""The environments that come with it: reasoning with tools, search over several pages, TextWorld, BFCL, verifiers."""

from rljax.envs.library.bfcl import BfclEnvironment
from rljax.envs.library.calculator import calculate, calculator
from rljax.envs.library.corpus import Corpus, Document, Hit, search_tool
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
    "Hit",
    "MixedEnvironment",
    "MultiHop",
    "Predicting",
    "ReasoningEnvironment",
    "TextWorldEnvironment",
    "VerifiersEnvironment",
    "calculate",
    "calculator",
    "mixed_rows",
    "search_tool",
]
