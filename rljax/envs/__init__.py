"""Environments and tools that a policy acts in. Nothing here imports jax.

An environment has `reset(row)` and `step(action)`; an `EnvironmentPool` runs hundreds of episodes of it at once. Tools
are plain functions in a `ToolBox`; model-written programs run in a `Sandbox`.
"""

from rljax.envs.base import (
    DONE,
    END_REASONS,
    FAILED,
    NONSENSE,
    Environment,
    EnvironmentLimits,
    Nonsense,
    Prompt,
    ReplayMismatch,
    Snapshots,
    Step,
    fork,
    replay,
    replay_same,
)
from rljax.envs.bfcl import BfclEnvironment
from rljax.envs.calculator import calculate, calculator
from rljax.envs.chat import check_chat_template, probe_conversation
from rljax.envs.corpus import Corpus, Document, Hit, search_tool
from rljax.envs.formats import (
    FORMATS,
    Parsed,
    ParseProblem,
    ToolCall,
    ToolFormat,
    after_thinking,
    get_format,
    tag_format,
)
from rljax.envs.instructions import tool_instructions
from rljax.envs.mixture import MixedEnvironment, mixed_rows
from rljax.envs.multihop import MultiHop
from rljax.envs.pool import EnvironmentPool, Episode
from rljax.envs.prediction import Predicting
from rljax.envs.reasoning import ReasoningEnvironment
from rljax.envs.sandbox import LEVELS, Limits, Sandbox, SandboxResult
from rljax.envs.textworld import TextWorldEnvironment
from rljax.envs.tool_environment import ToolEnvironment
from rljax.envs.tools import (
    CALL_FAILURES,
    ToolBox,
    ToolResult,
    answer,
    final,
    finish,
    named,
    python_tool,
    tool_schema,
)
from rljax.envs.verifiers_adapter import VerifiersEnvironment

__all__ = [
    "CALL_FAILURES",
    "DONE",
    "END_REASONS",
    "FAILED",
    "FORMATS",
    "LEVELS",
    "NONSENSE",
    "BfclEnvironment",
    "Corpus",
    "Document",
    "Environment",
    "EnvironmentLimits",
    "EnvironmentPool",
    "Episode",
    "Hit",
    "Limits",
    "MixedEnvironment",
    "MultiHop",
    "Nonsense",
    "ParseProblem",
    "Parsed",
    "Predicting",
    "Prompt",
    "ReasoningEnvironment",
    "ReplayMismatch",
    "Sandbox",
    "SandboxResult",
    "Snapshots",
    "Step",
    "TextWorldEnvironment",
    "ToolBox",
    "ToolCall",
    "ToolEnvironment",
    "ToolFormat",
    "ToolResult",
    "VerifiersEnvironment",
    "after_thinking",
    "answer",
    "calculate",
    "calculator",
    "check_chat_template",
    "final",
    "finish",
    "fork",
    "get_format",
    "mixed_rows",
    "named",
    "probe_conversation",
    "python_tool",
    "replay",
    "replay_same",
    "search_tool",
    "tag_format",
    "tool_instructions",
    "tool_schema",
]
