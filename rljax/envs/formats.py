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
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rljax.tasks.callables import other_place

UNCLOSED = "unclosed"
"""Kind of a problem: one of a pair of marks is missing."""
BAD_JSON = "bad_json"
"""The call is no JSON."""
BAD_CALL = "bad_call"
"""It is no call: the name or the arguments are missing, or of another form."""
PARSER_FAILED = "parser_failed"
"""A parser of one's own raised, or returned something else."""


@dataclass(frozen=True)
class ToolCall:
    """A tool by name, and its arguments by name."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ParseProblem:
    """A call that could not be read."""

    kind: str
    """For counting; the built-in parsers have `unclosed`, `bad_json`, `bad_call` and `parser_failed`."""
    text: str
    """The observation that tells the model."""


@dataclass(frozen=True)
class Parsed:
    """The calls of one message in order, up to the first problem. A message without either is plain text."""

    calls: tuple[ToolCall, ...] = ()
    problem: ParseProblem | None = None


Parser = Callable[[str], Parsed]


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written and results are shown."""

    name: str
    parse: Parser
    """Reads a message."""
    stop_strings: tuple[str, ...] = ()
    """End a turn early."""
    role: str = "tool"
    """Chat role of an observation."""
    wrap: tuple[str, str] = ("<tool_response>\n", "\n</tool_response>")
    """What stands before and behind an observation where there is no chat template."""


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; nothing of a message that is still thinking. Calls count only there."""
    _, end, visible = text.rpartition("</think>")
    if "<think>" in visible:
        return visible.partition("<think>")[0]
    return visible if end else text


class _Block(NamedTuple):
    """`<name>body</name>`, or what is left of one of which a mark is missing."""

    name: str
    body: str = ""
    problem: ParseProblem | None = None


_Marks = Callable[[str], Iterable[re.Match[str]]]
"""Finds `<name>` and `</name>` in a text, in order: group 1 is the slash, group 2 the name."""


def _marks(names: Iterable[str]) -> _Marks:
    return re.compile(f"<(/?)({'|'.join(map(re.escape, names))})>").finditer


def _blocks(marks: _Marks, text: str) -> Iterator[_Block]:
    """The blocks of a text in order, in one pass over it. What stands inside one is not searched for another."""
    name = ""
    start = 0
    for mark in marks(text):
        is_closing = bool(mark[1])
        if not name and is_closing:
            problem = ParseProblem(UNCLOSED, f"{mark[0]} was closed and never opened.")
            yield _Block(mark[2], problem=problem)
        elif not name:
            name = mark[2]
            start = mark.end()
        # any other mark stands inside of a block, and is text
        elif is_closing and mark[2] == name:
            yield _Block(name, text[start : mark.start()])
            name = ""
    if name:
        yield _Block(name, problem=ParseProblem(UNCLOSED, f"<{name}> was opened and never closed."))


_HERMES_MARKS = _marks(["tool_call"])


def parse_hermes(text: str) -> Parsed:
    """`<tool_call>` with a JSON object of `name` and `arguments`, any number of times."""
    calls: list[ToolCall] = []
    problem: ParseProblem | None = None
    for block in _blocks(_HERMES_MARKS, after_thinking(text)):
        # a stray closing mark counts only if no call follows it
        problem = block.problem
        if problem is not None:
            continue
        call = _from_json(block.body.strip(), ("arguments", "parameters"))
        if isinstance(call, ParseProblem):
            return Parsed(tuple(calls), call)
        calls.append(call)
    return Parsed(tuple(calls), problem)


_SEPARATOR = re.compile(r"\s*;?\s*")


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
    place = 0
    while place < len(body):
        try:
            value, end = _DECODER.raw_decode(body, place)
        except (ValueError, RecursionError):
            return Parsed(tuple(calls), _no_json(body[place:]))
        if not tag and not calls and isinstance(value, dict) and not {"name", "parameters"} & set(value):
            return Parsed()  # an answer that happens to be JSON
        call = _as_call(value, ("parameters", "arguments"))
        if isinstance(call, ParseProblem):
            return Parsed(tuple(calls), call)
        calls.append(call)
        separator = _SEPARATOR.match(body, end)
        assert separator is not None  # it matches nothing, too
        place = separator.end()
    return Parsed(tuple(calls))


TAGS = {"search": "query", "python": "code", "calculator": "expression", "answer": "answer"}
"""Tags of the format `tags`: the name of the tool, and of the argument that the text between the tags is."""


def tag_parser(tags: Mapping[str, str] = TAGS) -> Parser:
    """A parser for `<name>text</name>`. What stands inside one tag is not searched for another. Raises ValueError for a
    name that is no identifier, or no tags."""
    if not tags or not all(name.isidentifier() for name in tags):
        raise ValueError(f"tags {list(tags)} must be names such as 'search', at least one")

    marks = _marks(tags)

    def parse(text: str) -> Parsed:
        calls: list[ToolCall] = []
        for block in _blocks(marks, after_thinking(text)):
            if block.problem is not None:
                return Parsed(tuple(calls), block.problem)
            # indentation counts in a program
            body = _without_fence(block.body) if block.name == "python" else block.body.strip()
            if not body:
                return Parsed(tuple(calls), ParseProblem(BAD_CALL, f"<{block.name}> is empty."))
            calls.append(ToolCall(block.name, {tags[block.name]: body}))
        return Parsed(tuple(calls))

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
        remedy = "write 'module:function' of a module that imports"
        if isinstance(error, ModuleNotFoundError):
            remedy = other_place(path.partition(":")[0]) or remedy
        raise ValueError(f"cannot load {path!r} ({type(error).__name__}: {error}); {remedy}") from error


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


def _no_json(body: str) -> ParseProblem:
    """Why a text does not begin with JSON, with places counted from its beginning."""
    try:
        _DECODER.raw_decode(body)
    except (ValueError, RecursionError) as error:
        return _bad_json(body, error)
    raise AssertionError(f"{body!r:.100} begins with JSON")


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
