"""Environments and tools that a policy acts in. Nothing here imports jax.

An environment has `reset(row)` and `step(action)`; an `EnvironmentPool` runs hundreds of episodes of it at once. Tools
are plain functions in a `ToolBox`; model-written programs run in a `Sandbox`. Environments to use stand in
`rljax.envs.library`.
"""

from typing import TYPE_CHECKING, NoReturn

from rljax.envs.base import (
    DONE,
    END_REASONS,
    FAILED,
    MALFORMED,
    Environment,
    EnvironmentLimits,
    MalformedStep,
    Prompt,
    ReplayMismatch,
    Snapshots,
    Step,
    replay_same,
)
from rljax.envs.chat import check_chat_template, probe_conversation
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
from rljax.envs.pool import HOSTS, PROCESSES, RAY, THREADS, EnvironmentPool, Episode, check_hosts
from rljax.envs.ray_host import RayConfig, require_ray
from rljax.envs.sandbox import LEVELS, Limits, Sandbox, SandboxResult
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

__all__ = [
    "CALL_FAILURES",
    "DONE",
    "END_REASONS",
    "FAILED",
    "FORMATS",
    "HOSTS",
    "LEVELS",
    "MALFORMED",
    "PROCESSES",
    "RAY",
    "THREADS",
    "Environment",
    "EnvironmentLimits",
    "EnvironmentPool",
    "Episode",
    "Limits",
    "MalformedStep",
    "ParseProblem",
    "Parsed",
    "Prompt",
    "RayConfig",
    "ReplayMismatch",
    "Sandbox",
    "SandboxResult",
    "Snapshots",
    "Step",
    "ToolBox",
    "ToolCall",
    "ToolEnvironment",
    "ToolFormat",
    "ToolResult",
    "after_thinking",
    "answer",
    "check_chat_template",
    "check_hosts",
    "final",
    "finish",
    "get_format",
    "named",
    "probe_conversation",
    "python_tool",
    "replay_same",
    "require_ray",
    "tag_format",
    "tool_instructions",
    "tool_schema",
]

_IN_LIBRARY = frozenset(
    {
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
    }
    | {"bfcl", "corpus", "gazetteer", "geometry", "geosketch", "histories", "knowledge", "maps", "mcp_tools"}
    | {"memory", "memory_store", "mixture", "multihop", "openenv_adapter", "prediction", "questions", "reasoning"}
    | {"retrieval", "sketches", "textworld", "verifiers_adapter", "verifiers_agent"}
)
"""Environments and their modules, which are looked for here."""

if not TYPE_CHECKING:  # a type checker would take every name for one of this module

    def __getattr__(name: str) -> NoReturn:
        # not an AttributeError: `from rljax.envs import ...` would replace its text
        if name in _IN_LIBRARY:
            raise ImportError(f"{name} stands in rljax.envs.library; write 'rljax.envs.library.{name}'")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
