"""How a model writes a tool call, and how it is read. A parser never raises: what it cannot read becomes a problem,
whose text the model gets to see.

| name | a call looks like |
|---|---|
| `hermes`, `qwen` | `<tool_call>{"name": "search", "arguments": {"query": "..."}}</tool_call>`, any number |
| `llama3` | the whole message is `{"name": "search", "parameters": {"query": "..."}}`, more after `;` |
| `tags` | `<search>...</search>`, `<python>...</python>`, `<calculator>...</calculator>`, `<answer>...</answer>` |
"""

import ast
import itertools
import json
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    start: int | None = field(default=None, compare=False)
    """Where in the message the first call begins, if the parser says so."""


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
    return text[slice(*_visible(text, _no_call))]


_Span = tuple[int, int]
_CallAround = Callable[[str, int], _Span | None]
"""The call of a text that a place stands in, as part of what the call says."""


def _no_call(text: str, place: int) -> None:
    return None


def _visible(text: str, call_around: _CallAround) -> _Span:
    """The part behind the thinking. A `<think>` or `</think>` that a call says, as in a JSON string, is neither."""
    place = text.rfind("</think>")
    while place >= 0 and (call := call_around(text, place)) is not None:
        place = text.rfind("</think>", 0, call[0])
    start = place + len("</think>") if place >= 0 else 0

    place = text.find("<think>", start)
    while place >= 0 and (call := call_around(text, place)) is not None:
        place = text.find("<think>", call[1])
    return start, place if place >= 0 else len(text)


_Marks = Callable[[str], Iterable[re.Match[str]]]
"""Finds `<name>` and `</name>` in a text, in order: group 1 is the slash, group 2 the name."""


def _marks(names: Iterable[str]) -> _Marks:
    return re.compile(f"<(/?)({'|'.join(map(re.escape, names))})>").finditer


class _Block(NamedTuple):
    """`<name>body</name>`: its marks, by their places in the list of all, and what it says."""

    opening: int
    closing: int
    value: ToolCall | ParseProblem


_Read = Callable[[str, Sequence[re.Match[str]], int, int], _Block]
"""Reads the block of (text, all marks, its opening mark, the first closing mark of its name)."""


def _blocks(marks: _Marks, text: str, read: _Read) -> Iterator[tuple[int, ToolCall | ParseProblem]]:
    """(where it begins, what it says) of the blocks of a text in order, and of marks without a partner. What stands
    inside a block is not searched for another."""
    found = list(marks(text))
    at = 0
    while at < len(found):
        mark = found[at]
        if mark[1]:
            yield mark.start(), ParseProblem(UNCLOSED, f"{mark[0]} was closed and never opened.")
            at += 1
            continue

        first = _next_closing(found, at, mark[2])
        if first is None:
            yield mark.start(), ParseProblem(UNCLOSED, f"{mark[0]} was opened and never closed.")
            return
        block = read(text, found, at, first)
        yield mark.start(), block.value
        at = block.closing + 1


def _next_closing(found: Sequence[re.Match[str]], at: int, name: str) -> int | None:
    """The closing mark of this name behind a mark."""
    return next((i for i in range(at + 1, len(found)) if found[i][1] and found[i][2] == name), None)


_HERMES_MARKS = _marks(["tool_call"])
_SPACE = re.compile(r"\s*")


def parse_hermes(text: str) -> Parsed:
    """`<tool_call>` with a JSON object of `name` and `arguments`, any number of times."""
    calls: list[ToolCall] = []
    begin: int | None = None
    problem: ParseProblem | None = None
    start, end = _visible(text, _json_call_around)
    for place, value in _blocks(_HERMES_MARKS, text[start:end], _read_json_call):
        # a stray closing mark counts only if no call follows it
        problem = value if isinstance(value, ParseProblem) else None
        if isinstance(value, ToolCall):
            begin = start + place if begin is None else begin
            calls.append(value)
        elif value.kind != UNCLOSED:
            break
    return Parsed(tuple(calls), problem, begin)


def _read_json_call(text: str, found: Sequence[re.Match[str]], at: int, first: int) -> _Block:
    start = found[at].end()
    body = text[start : found[first].start()].strip()
    call = _from_json(body, ("arguments", "parameters"))
    if isinstance(call, ToolCall) or call.kind != BAD_JSON:
        return _Block(at, first, call)

    # the first closing mark may stand in a string of the object, and then the object ends before a later one
    end = _end_of_json(text, start)
    if end is None or end <= found[first].start():
        return _Block(at, first, call)
    within = list(itertools.takewhile(lambda i: found[i].start() < end, range(first, len(found))))
    later = within[-1] + 1
    if later == len(found) or not found[later][1] or found[later].start() != end:
        return _Block(at, within[-1], ParseProblem(UNCLOSED, "<tool_call> was opened and never closed."))
    return _Block(at, later, _from_json(text[start:end].strip(), ("arguments", "parameters")))


def _end_of_json(text: str, start: int) -> int | None:
    """Where the JSON value that begins at `start` ends, with the space behind it; None if there is none."""
    try:
        _, end = _DECODER.raw_decode(text, _skip_space(text, start))
    except (ValueError, RecursionError):
        return None
    return _skip_space(text, end)


def _skip_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None  # it matches nothing, too
    return match.end()


_MOST_TRIES = 4  # marks of one kind that a string may hold before what follows it is misread


def _json_call_around(text: str, place: int) -> _Span | None:
    begin = place
    for _ in range(_MOST_TRIES):
        begin = text.rfind("<tool_call>", 0, begin)
        if begin < 0:
            return None
        end = _end_of_json(text, begin + len("<tool_call>"))
        if end is not None and end > place and text.startswith("</tool_call>", end):
            return begin, end
    return None


_SEPARATOR = re.compile(r"\s*;?\s*")


def parse_llama3(text: str) -> Parsed:
    """A message that is one JSON object of `name` and `parameters`, or several with `;` between.

    After `<|python_tag|>`, what is no JSON is a program for the tool `python`.
    """
    start, end = _llama3_message(text)
    message = text[start:end].strip()
    start = text.find(message, start)
    tag = "" if message.startswith("{") else "<|python_tag|>" if "<|python_tag|>" in message else ""
    body = message.partition(tag)[2] if tag else message
    body = body.removesuffix("<|eom_id|>").removesuffix("<|eot_id|>").strip()
    if not body.startswith("{"):
        return Parsed((ToolCall("python", {"code": body}),), None, start) if tag and body else Parsed()

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
    return Parsed(tuple(calls), None, start)


def _llama3_message(text: str) -> _Span:
    """What follows the thinking. A message has no mark at its end, so where a `<think>` or `</think>` may stand in one,
    the message is what can be read as one to its last character."""
    stop = len(text) if "think>" in text else -1
    for _ in range(_MOST_TRIES):
        if stop < 0:
            break
        stop = text.rfind("</think>", 0, stop)
        start = stop + len("</think>") if stop >= 0 else 0
        if _is_llama3_message(text, start):
            return start, len(text)
    return _visible(text, _no_call)


def _is_llama3_message(text: str, start: int) -> bool:
    place = _skip_space(text, start)
    is_tagged = text.startswith("<|python_tag|>", place)
    if is_tagged:
        place += len("<|python_tag|>")
    end = len(text.rstrip().removesuffix("<|eom_id|>").removesuffix("<|eot_id|>").rstrip())
    if is_tagged and not text.startswith("{", place):
        return _is_program(text[place:end])

    while text.startswith("{", place) and place < end:
        try:
            _, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            return False
        separator = _SEPARATOR.match(text, place)
        assert separator is not None
        place = separator.end()
    return place >= end


TAGS = {"search": "query", "python": "code", "calculator": "expression", "answer": "answer"}
"""Tags of the format `tags`: the name of the tool, and of the argument that the text between the tags is."""


def tag_parser(tags: Mapping[str, str] = TAGS) -> Parser:
    """A parser for `<name>text</name>`. What stands inside one tag is not searched for another. Raises ValueError for a
    name that is no identifier, or no tags."""
    if not tags or not all(name.isidentifier() for name in tags):
        raise ValueError(f"tags {list(tags)} must be names such as 'search', at least one")

    marks = _marks(tags)

    def read(text: str, found: Sequence[re.Match[str]], at: int, first: int) -> _Block:
        name = found[at][2]
        closing = _end_of_program(text, found, at, first) if name == "python" else first
        body = text[found[at].end() : found[closing].start()]
        # indentation counts in a program
        body = _without_fence(body) if name == "python" else body.strip()
        if not body:
            return _Block(at, closing, ParseProblem(BAD_CALL, f"<{name}> is empty."))
        return _Block(at, closing, ToolCall(name, {tags[name]: body}))

    def parse(text: str) -> Parsed:
        calls: list[ToolCall] = []
        begin: int | None = None
        start, end = _visible(text, _program_around if "python" in tags else _no_call)
        for place, value in _blocks(marks, text[start:end], read):
            if isinstance(value, ParseProblem):
                return Parsed(tuple(calls), value, begin)
            begin = start + place if begin is None else begin
            calls.append(value)
        return Parsed(tuple(calls), None, begin)

    return parse


# an unfinished string ends with its line, or with the text if it may have lines
_STRINGS_AND_COMMENTS = re.compile(
    r'''"""(?:\\.|[^\\])*?(?:"""|\Z)|\'{3}(?:\\.|[^\\])*?(?:\'{3}|\Z)'''
    r"""|"(?:\\.|[^"\\\n])*"?|\'(?:\\.|[^\'\\\n])*\'?|\#[^\n]*""",
    re.DOTALL,
)
_MOST_MARKS = 16  # marks behind its opening that are looked at for the end of a program: time is linear


def _end_of_program(text: str, found: Sequence[re.Match[str]], at: int, first: int) -> int:
    """The closing mark of a program: the first that stands in no string and no comment of it, unless another block
    begins before; else the first of all."""
    candidates = range(at + 1, min(first + _MOST_MARKS, len(found)))
    parts = _STRINGS_AND_COMMENTS.finditer(text, found[at].end(), found[candidates[-1]].end())
    inside = next(parts, None)
    for i in candidates:
        mark = found[i]
        while inside is not None and inside.end() <= mark.start():
            inside = next(parts, None)
        if inside is not None and inside.start() < mark.start():
            continue
        if mark[1] and mark[2] == "python":
            return i
        if i > first and not mark[1]:
            break
    return first


_PROGRAM_MARKS = re.compile("<(/?)(python)>")


def _program_around(text: str, place: int) -> _Span | None:
    begin = place
    for _ in range(_MOST_TRIES):
        begin = text.rfind("<python>", 0, begin)
        if begin < 0:
            return None
        found = list(itertools.islice(_PROGRAM_MARKS.finditer(text, begin), _MOST_MARKS))
        first = _next_closing(found, 0, "python")
        if first is None:
            continue
        end = found[_end_of_program(text, found, 0, first)].start()
        if end > place and _is_program(text[begin + len("<python>") : end]):
            return begin, end
    return None


def _is_program(code: str) -> bool:
    try:
        ast.parse(_without_fence(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


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


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number:.20} is beyond all floating-point numbers")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


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
