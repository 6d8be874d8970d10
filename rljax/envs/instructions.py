"""Says in plain text which tools there are and how to call them, for prompts that no chat template adds them to."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rljax.envs.formats import ToolFormat
from rljax.envs.tools import ToolBox

_HERMES = '<tool_call>{"name": NAME, "arguments": {ARGUMENT: VALUE, ...}}</tool_call>'
_JSON_CALLS = {
    "hermes": _HERMES,
    "qwen": _HERMES,
    "llama3": '{"name": NAME, "parameters": {ARGUMENT: VALUE, ...}}',
}


def tool_instructions(tools: ToolBox, tool_format: ToolFormat) -> str:
    """The tools of a box, and how a call is written in the format: a line for each tool with `tags`, else a line on the
    format, if it is a built-in one, and the JSON schemas."""
    if tool_format.name == "tags":
        return "\n".join(["You can call these tools:", *(_tagged(schema) for schema in tools.schemas)])
    return schema_instructions(tools.schemas, tool_format)


def schema_instructions(schemas: Sequence[Mapping[str, Any]], tool_format: ToolFormat) -> str:
    """The same of JSON schemas alone, for the formats whose calls are JSON."""
    call = _JSON_CALLS.get(tool_format.name)
    lines = [f"You can call these tools. A call is written {call}" if call else "You can call these tools."]
    return "\n".join(lines + [json.dumps(schema["function"], ensure_ascii=False) for schema in schemas])


def _tagged(schema: dict[str, Any]) -> str:
    function = schema["function"]
    name = function["name"]
    parameter = _first_parameter(schema)
    about = " ".join(function["description"].split())
    what = function["parameters"]["properties"][parameter].get("description", "")
    return f"<{name}>{parameter}</{name}>: {about}" + (f" {parameter}: {what}" if what else "")


def _first_parameter(schema: dict[str, Any]) -> str:
    return next(iter(schema["function"]["parameters"]["properties"]))
