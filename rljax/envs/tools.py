"""Tools: plain Python functions with type hints and a docstring, behind a `ToolBox` that never raises.

def add(a: int, b: int) -> int:
    \"\"\"Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    \"\"\"
    return a + b

box = ToolBox([add, answer])
box.schemas                                   what the chat template takes as `tools`
box.call(ToolCall("add", {"a": 1, "b": 2}))   ToolResult(text="3", ...)
"""

import functools
import inspect
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rljax.envs.formats import ToolCall, load
from rljax.envs.sandbox import Sandbox
from rljax.tasks.workers import end_if_forked

UNKNOWN_TOOL = "unknown_tool"
MISSING_ARGUMENT = "missing_argument"
EXTRA_ARGUMENT = "extra_argument"
WRONG_TYPE = "wrong_type"
TOOL_RAISED = "tool_raised"
TOOL_TIMEOUT = "tool_timeout"
CALL_FAILURES = (UNKNOWN_TOOL, MISSING_ARGUMENT, EXTRA_ARGUMENT, WRONG_TYPE, TOOL_RAISED, TOOL_TIMEOUT)

MOST_HUNG = 32
"""Calls of one tool that may hang in their threads, in one process."""

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
    "null": (type(None),),
}


@dataclass(frozen=True)
class ToolResult:
    """What came of a call."""

    text: str
    """The observation."""
    failure: str | None = None
    """One of `CALL_FAILURES`, or None."""
    is_final: bool = False
    """Whether the tool ends the episode."""
    value: Any = None
    """What it returned."""


def final(tool: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a tool whose call ends the episode."""
    tool.is_final = True  # type: ignore[attr-defined]
    return tool


@final
def answer(answer: str) -> str:
    """Give the final answer. Nothing can be done after it.

    Args:
        answer: The answer, and nothing else.
    """
    return answer


@final
def finish() -> str:
    """Say that the task is done. Nothing can be done after it."""
    return "finished"


def tool_schema(tool: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a tool, as chat templates expect it. A tool that is served elsewhere brings its own, as the
    attribute `schema`. Raises ValueError, saying what is missing, unless every parameter has a type hint and a line
    under `Args:` in the docstring."""
    brought: dict[str, Any] | None = getattr(tool, "schema", None)
    if brought is not None:
        return brought

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils import get_json_schema

    name = getattr(tool, "__name__", type(tool).__name__)
    parameters = inspect.signature(tool).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY) for p in parameters):
        raise ValueError(f"tool {name}{inspect.signature(tool)} must take named parameters only, no *args or **kwargs")
    try:
        return get_json_schema(tool)
    except Exception as error:  # several kinds of its own
        raise ValueError(
            f"tool {name} has no usable signature and docstring ({error}); give every parameter a type hint and, in "
            "the docstring under 'Args:', a line 'name: what it is'"
        ) from None


class ToolBox:
    """Tools by name. Safe for many threads at once.

    A tool is a function, or its name `module:function`. `timeout_s` is for one call; one that takes longer is left
    behind in its thread and its answer dropped. Where MOST_HUNG calls of a tool hang in a process, it is called again
    once one of them has come back; until then calls fail at once. `max_chars` bounds an observation. `counts` counts
    calls by tool (`calls/NAME`) and failures by kind. Raises ValueError for a tool without schema, two of one
    name, or none.
    """

    def __init__(self, tools: Sequence[Callable[..., Any] | str], *, timeout_s: float = 10.0, max_chars: int = 8192):
        functions = [load(tool) if isinstance(tool, str) else tool for tool in tools]
        self.schemas: list[dict[str, Any]] = [tool_schema(function) for function in functions]
        self.names = tuple(schema["function"]["name"] for schema in self.schemas)
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"tools {list(self.names)} must be at least one, and have different names")
        if not 0 < timeout_s <= threading.TIMEOUT_MAX or max_chars < 1:
            raise ValueError(f"timeout_s {timeout_s} and max_chars {max_chars} of a tool box must be positive")

        self._tools = dict(zip(self.names, functions))
        self._parameters = {s["function"]["name"]: s["function"]["parameters"] for s in self.schemas}
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def call(self, call: ToolCall) -> ToolResult:
        """Check the arguments and call the tool; the result's text tells whatever goes wrong."""
        result = self._check(call) or self._run(call)
        with self._lock:
            self.counts[f"calls/{call.name}" if call.name in self._tools else "calls/unknown"] += 1
            if result.failure:
                self.counts[result.failure] += 1
        return result

    def _check(self, call: ToolCall) -> ToolResult | None:
        if call.name not in self._tools:
            text = f"There is no tool {call.name[:50]!r}; the tools are {', '.join(self.names)}."
            return ToolResult(text, UNKNOWN_TOOL)

        parameters = self._parameters[call.name]
        known = parameters.get("properties", {})
        missing = [name for name in parameters.get("required", ()) if name not in call.arguments]
        extra = [str(name)[:50] for name in call.arguments if name not in known]
        if parameters.get("additionalProperties"):  # of a tool that is served elsewhere
            extra = []
        usage = f"{call.name} takes {', '.join(known) or 'no arguments'}."
        if missing:
            return ToolResult(f"{call.name} needs the argument {', '.join(missing)}. {usage}", MISSING_ARGUMENT)
        if extra:
            return ToolResult(f"{call.name} has no argument {', '.join(extra)}. {usage}", EXTRA_ARGUMENT)

        # names first: of a call with wrong names the model learns what to write, not what is wrong with it
        for name, value in call.arguments.items():
            if problem := mismatch(value, known.get(name, {})):
                return ToolResult(f"The argument {name} of {call.name} {problem}.", WRONG_TYPE)
        return None

    def _run(self, call: ToolCall) -> ToolResult:
        tool = self._tools[call.name]
        box: list[ToolResult] = []

        def work() -> None:
            process = os.getpid()
            try:
                try:
                    value = tool(**call.arguments)
                finally:
                    end_if_forked(process)
                text = value if isinstance(value, str) else _as_text(value)
                box.append(ToolResult(self._cut(text), None, getattr(tool, "is_final", False), value))
            except (Exception, SystemExit) as error:
                text = self._cut(f"{call.name} failed: {type(error).__name__}: {error}")
                box.append(ToolResult(text, TOOL_RAISED))

        # a thread of its own, since nothing ends a call that hangs; it is left behind
        hung = _hung_calls(tool)
        if hung >= MOST_HUNG:
            return ToolResult(f"{call.name} is not available: {hung} earlier calls of it still hang.", TOOL_TIMEOUT)
        thread = threading.Thread(target=work, daemon=True, name=f"tool {call.name}")
        thread.start()
        thread.join(self._timeout_s)
        if box:
            return box[0]
        with _HUNG_LOCK:
            _HUNG.setdefault(_key_of(tool), []).append(thread)
        return ToolResult(f"{call.name} took longer than {self._timeout_s:g} s and was given up.", TOOL_TIMEOUT)

    def _cut(self, text: str) -> str:
        return cut(text, self._max_chars)


# boxes come and go with their environments, so calls that hang are kept by the tool
_HUNG: dict[str, list[threading.Thread]] = {}
_HUNG_LOCK = threading.Lock()


def _key_of(tool: Callable[..., Any]) -> str:
    kind = type(tool)
    return f"{getattr(tool, '__module__', kind.__module__)}:{getattr(tool, '__qualname__', kind.__qualname__)}"


def _hung_calls(tool: Callable[..., Any]) -> int:
    """How many calls of a tool were given up in this process and have not come back."""
    key = _key_of(tool)
    with _HUNG_LOCK:
        alive = [thread for thread in _HUNG.pop(key, []) if thread.is_alive()]
        if alive:
            _HUNG[key] = alive
    return len(alive)


def cut(text: str, max_chars: int) -> str:
    """`text`, its middle left out if it is longer; the note that says so comes on top of `max_chars`."""
    if len(text) <= max_chars:
        return text
    tail = max_chars // 4
    head = max_chars - tail
    return f"{text[:head]}\n[{len(text) - max_chars} characters left out]\n{text[len(text) - tail :]}"


def _as_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def mismatch(value: Any, schema: Mapping[str, Any]) -> str | None:
    """Why a value does not fit the part of JSON schema that type hints turn into; None if it does."""
    if value is None and (schema.get("nullable") or not ({"type", "anyOf"} & set(schema))):
        return None
    if "anyOf" in schema:
        problems = [mismatch(value, option) for option in schema["anyOf"]]
        return None if None in problems else " or ".join(filter(None, problems))

    kinds = schema.get("type")
    kinds = list(_TYPES) if kinds is None else [kinds] if isinstance(kinds, str) else list(kinds)
    fits = [kind for kind in kinds if isinstance(value, _TYPES.get(kind, (object,)))]
    if isinstance(value, bool):  # an int to Python, not to JSON
        fits = [kind for kind in fits if kind in ("boolean", *(k for k in kinds if k not in _TYPES))]
    if not fits:
        return f"must be of type {' or '.join(kinds)}, not {_type_name(value)} ({_short(value)})"
    if "enum" in schema and value not in schema["enum"]:
        return f"must be one of {', '.join(map(str, schema['enum']))}, not {_short(value)}"

    # what it holds, each with its own schema
    parts: list[tuple[Any, Any]] = []
    if isinstance(value, (list, tuple)):
        inner = schema.get("prefixItems")
        if inner is not None and len(inner) != len(value):
            return f"must have {len(inner)} items, not {len(value)}"
        parts = list(zip(value, inner)) if inner is not None else [(v, schema.get("items")) for v in value]
    elif isinstance(value, dict):
        parts = [(v, schema.get("additionalProperties")) for v in value.values()]
    for part, wanted in parts:
        if isinstance(wanted, Mapping) and (problem := mismatch(part, wanted)):
            return f"holds a value that {problem}"
    return None


def _type_name(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = _as_text(value)
    return text if len(text) <= 50 else text[:50] + "..."


_STOPPED = {
    "timeout": "it ran longer than {wall_s:g} s",
    "cpu": "it used more than {cpu_s:g} s of CPU time",
    "memory": "it used more than {memory_mb} MB of memory",
    "processes": "it started more than {processes} processes",
    "output": "it printed more than {output_bytes} bytes",
    "signal": "it crashed with signal {signal}",
    "lost": "the sandbox was lost",
}


def python_tool(sandbox: Sandbox, *, timeout_s: float | None = None) -> Callable[..., str]:
    """The tool `python`: runs a program in the sandbox, each call in a fresh one.

    Give the tool box a longer timeout than the sandbox, so that the sandbox is the one that ends a program.
    """

    def python(code: str) -> str:
        """Run a Python program and return what it prints, and the value of a last line that is an expression. There is
        no network and no file of the user, and nothing is kept between calls.

        Args:
            code: The whole program.
        """
        result = sandbox.run(code, timeout_s=timeout_s, echo=True)
        # an exception or exit code needs no note: the output shows it
        reason = _STOPPED.get(result.outcome, "").format(
            **{**vars(sandbox.limits), **({} if timeout_s is None else {"wall_s": timeout_s})},
            signal=(result.exit_code or 128) - 128,
        )
        note = f"[stopped: {reason}]" if reason else ""
        text = result.output.rstrip("\n")
        return "\n".join(filter(None, (text, note))) or "[no output]"

    return python


def named(tool: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same tool under another name."""

    @functools.wraps(tool)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        return tool(*args, **kwargs)

    renamed.__name__ = name
    return renamed
