"""How a model writes a tool call, and how it is read. A parser never raises: what it cannot read becomes a problem,
whose text the model gets to see.

| name | a call looks like |
|---|---|
| `hermes`, `qwen` | `<tool_call>{"name": "search", "arguments": {"query": "..."}}</tool_call>`, any number |
| `llama3` | the whole message is `{"name": "search", "parameters": {"query": "..."}}`, more after `;` |
| `tags` | `<search>...</search>`, `<python>...</python>`, `<calculator>...</calculator>`, `<answer>...</answer>` |
"""

import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

UNCLOSED, BAD_JSON, BAD_CALL, PARSER_FAILED = "unclosed", "bad_json", "bad_call", "parser_failed"


@dataclass(frozen=True)
class ToolCall:
    """A tool by name, and its arguments by name."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ParseProblem:
    """A call that could not be read. `kind` is for counting, `text` is the observation that tells the model."""

    kind: str
    text: str


@dataclass(frozen=True)
class Parsed:
    """The calls of one message in order, up to the first problem. A message without either is plain text."""

    calls: tuple[ToolCall, ...] = ()
    problem: ParseProblem | None = None


Parser = Callable[[str], Parsed]


@dataclass(frozen=True)
class ToolFormat:
    """`parse` reads a message; `stop_strings` end a turn early; `role` is the chat role of an observation; `wrap` holds
    what stands around it where there is no chat template."""

    name: str
    parse: Parser
    stop_strings: tuple[str, ...] = ()
    role: str = "tool"
    wrap: tuple[str, str] = ("<tool_response>\n", "\n</tool_response>")

    def observation(self, text: str) -> str:
        """The observation as plain text."""
        return f"{self.wrap[0]}{text}{self.wrap[1]}"


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; nothing of a message that is still thinking. Calls count only there."""
    _, end, visible = text.rpartition("</think>")
    if "<think>" in visible:
        return visible.partition("<think>")[0]
    return visible if end else text


def parse_hermes(text: str) -> Parsed:
    """`<tool_call>` with a JSON object of `name` and `arguments`, any number of times."""
    calls: list[ToolCall] = []
    rest = after_thinking(text)
    while (start := rest.find("<tool_call>")) >= 0:
        body, end, rest = rest[start + len("<tool_call>") :].partition("</tool_call>")
        if not end:
            return Parsed(tuple(calls), ParseProblem(UNCLOSED, "<tool_call> was opened and never closed."))
        call = _from_json(body.strip(), ("arguments", "parameters"))
        if isinstance(call, ParseProblem):
            return Parsed(tuple(calls), call)
        calls.append(call)
    if "</tool_call>" in rest:
        return Parsed(tuple(calls), ParseProblem(UNCLOSED, "</tool_call> was closed and never opened."))
    return Parsed(tuple(calls))


def parse_llama3(text: str) -> Parsed:
    """A message that is one JSON object of `name` and `parameters`, or several with `;` between.

    After `<|python_tag|>`, what is no JSON is a program for the tool `python`.
    """
    message = after_thinking(text).strip()
    _, tag, tagged = message.rpartition("<|python_tag|>")
    body = (tagged if tag else message).removesuffix("<|eom_id|>").removesuffix("<|eot_id|>").strip()
    if not body.startswith("{"):
        return Parsed((ToolCall("python", {"code": body}),)) if tag and body else Parsed()
    calls: list[ToolCall] = []
    while body:
        try:
            value, end = _DECODER.raw_decode(body)
        except (ValueError, RecursionError) as error:
            return Parsed(tuple(calls), _bad_json(body, error))
        if not tag and not calls and isinstance(value, dict) and not {"name", "parameters"} & set(value):
            return Parsed()  # an answer that happens to be JSON
        call = _as_call(value, ("parameters", "arguments"))
        if isinstance(call, ParseProblem):
            return Parsed(tuple(calls), call)
        calls.append(call)
        body = body[end:].lstrip().removeprefix(";").lstrip()
    return Parsed(tuple(calls))


TAGS = {"search": "query", "python": "code", "calculator": "expression", "answer": "answer"}
"""Tags of the format `tags`: the name of the tool, and of the argument that the text between the tags is."""


def tag_parser(tags: Mapping[str, str] = TAGS) -> Parser:
    """A parser for `<name>text</name>`. What stands inside one tag is not searched for another. Raises ValueError for a
    name that is no identifier, or no tags."""
    if not tags or not all(name.isidentifier() for name in tags):
        raise ValueError(f"tags {list(tags)} must be names such as 'search', at least one")

    def parse(text: str) -> Parsed:
        calls: list[ToolCall] = []
        rest = after_thinking(text)
        while True:
            found = [(rest.find(mark), name) for name in tags for mark in (f"<{name}>", f"</{name}>")]
            found = [place for place in found if place[0] >= 0]
            if not found:
                return Parsed(tuple(calls))
            start, name = min(found)
            if rest.startswith("</", start):
                return Parsed(tuple(calls), ParseProblem(UNCLOSED, f"</{name}> was closed and never opened."))
            body, end, rest = rest[start + len(name) + 2 :].partition(f"</{name}>")
            if not end:
                return Parsed(tuple(calls), ParseProblem(UNCLOSED, f"<{name}> was opened and never closed."))
            body = _without_fence(body) if name == "python" else body.strip()
            if not body:
                return Parsed(tuple(calls), ParseProblem(BAD_CALL, f"<{name}> is empty."))
            calls.append(ToolCall(name, {tags[name]: body}))

    return parse


def tag_format(tags: Mapping[str, str] = TAGS) -> ToolFormat:
    """The format of `tag_parser`; a turn ends with a closing tag."""
    stops = tuple(f"</{name}>" for name in tags)
    return ToolFormat("tags", tag_parser(tags), stops, role="user", wrap=("\n<result>\n", "\n</result>\n"))


FORMATS: Mapping[str, ToolFormat] = {
    "hermes": ToolFormat("hermes", parse_hermes),
    "qwen": ToolFormat("qwen", parse_hermes),
    "llama3": ToolFormat("llama3", parse_llama3, role="ipython", wrap=("", "")),
    "tags": tag_format(),
}


def get_format(choice: "str | Parser | ToolFormat") -> ToolFormat:
    """A format by name, by `module:function` or as a callable `text -> Parsed`, or a `ToolFormat` as it is.

    A callable is guarded: what it raises, and an answer that is not `Parsed`, become a problem. Raises ValueError for
    an unknown name and for a function that cannot be imported.
    """
    if isinstance(choice, ToolFormat):
        return choice
    if isinstance(choice, str) and ":" not in choice:
        if choice not in FORMATS:
            raise ValueError(f"tool format {choice!r} is not one of {', '.join(FORMATS)}, nor 'module:function'")
        return FORMATS[choice]
    parser = load(choice) if isinstance(choice, str) else choice
    if isinstance(parser, ToolFormat):
        return parser
    if not callable(parser):
        raise ValueError(
            f"tool format {choice!r} is {parser!r}, which cannot be called; give a function text -> Parsed"
        )
    return ToolFormat(getattr(parser, "__name__", type(parser).__name__), _guarded(parser))


def load(path: str) -> Any:
    """Import `module:name`. Raises ValueError, saying what failed."""
    try:
        return pkgutil.resolve_name(path)
    except Exception as error:
        raise ValueError(
            f"cannot load {path!r} ({type(error).__name__}: {error}); write 'module:function' of a module that imports"
        ) from error


def _guarded(parser: Parser) -> Parser:
    def parse(text: str) -> Parsed:
        try:
            parsed = parser(text)
        except Exception as error:
            return Parsed(problem=ParseProblem(PARSER_FAILED, f"The call could not be read: {error!r:.200}"))
        if not isinstance(parsed, Parsed):
            return Parsed(problem=ParseProblem(PARSER_FAILED, f"The call could not be read: {parsed!r:.100}"))
        return parsed

    return parse


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _from_json(body: str, keys: tuple[str, ...]) -> ToolCall | ParseProblem:
    try:
        return _as_call(_DECODER.decode(body), keys)
    except (ValueError, RecursionError) as error:
        return _bad_json(body, error)


def _bad_json(body: str, error: Exception) -> ParseProblem:
    reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
    return ParseProblem(BAD_JSON, f"The tool call is not valid JSON ({reason[:200]}): {_short(body)}")


def _as_call(value: Any, keys: tuple[str, ...]) -> ToolCall | ParseProblem:
    wanted = f'an object such as {{"name": "...", "{keys[0]}": {{...}}}}'
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return ParseProblem(BAD_CALL, f"A tool call must be {wanted}, not {_short(json.dumps(value))}.")
    arguments: Any = next((value[key] for key in keys if key in value), {})
    if isinstance(arguments, str):  # some models write the arguments as a JSON text
        try:
            arguments = _DECODER.decode(arguments)
        except (ValueError, RecursionError) as error:
            return _bad_json(arguments, error)
    if not isinstance(arguments, dict):
        return ParseProblem(BAD_CALL, f"The {keys[0]} of {value['name'][:50]} must be an object; a call is {wanted}.")
    return ToolCall(value["name"], arguments)


def _without_fence(code: str) -> str:
    """A program without the Markdown fence that models like to put around it; indentation is kept."""
    stripped = code.strip()
    if stripped.startswith("```") and stripped.endswith("```") and len(stripped) >= 6:
        first, _, body = stripped[3:-3].partition("\n")
        return (body if first.strip().lower() in ("", "python", "py", "python3") else f"{first}\n{body}").strip("\n")
    return code.strip("\n") if stripped else ""


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:120] + "..."
