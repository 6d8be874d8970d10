"""Tools of servers that speak the Model Context Protocol (MCP): a server's tools as those of a tool box, and an
environment whose questions are answered with them."""

import collections
import contextlib
import importlib
import inspect
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from rljax.envs.base import Prompt, Step
from rljax.envs.formats import ToolFormat, load
from rljax.envs.library.sharing import HeldOpen, bearer, made_once, on_event_loop
from rljax.envs.sandbox import kernel
from rljax.envs.tool_environment import ToolEnvironment
from rljax.envs.tools import ToolBox
from rljax.tasks.examples import whole_text

_GONE = -32000
_LATE = (-32001, 408)
"""Codes with which the package says that a connection is closed, and that an answer did not come in time."""

_PING_S = 5.0
"""Seconds in which a server that stands says so."""

_STOPPING_S = 5.0
"""Seconds that a server has to end before it is left."""


class McpServer:
    """A connection to a server, open from when it is made until `close`. Safe for many threads at once.

    `server` is the URL of one that runs (streamable HTTP), or the words of a command that starts one and speaks with it
    through its standard input and output. A command gets `env` beside the few harmless variables that the package
    passes on. A URL is asked with the bearer token in the environment variable `token_variable`, if it is named.
    `timeout_s` is for the start, and for each call. On Linux a command's server ends with this process, however that
    ends.

    A call that fails while the server stands raises McpToolError; one that meets no server any more breaks the
    connection. Raises ImportError without the package, ValueError for a server that does not start or answer, has no
    tools, or a `token_variable` that is not set.
    """

    def __init__(
        self,
        server: str | Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        token_variable: str | None = None,
        timeout_s: float = 30.0,
    ):
        _package()
        self.name = server if isinstance(server, str) else " ".join(os.fspath(word) for word in server)
        self.timeout_s = timeout_s
        self._problem: BaseException | None = None
        transport = _transport(server, env, token_variable)

        self._held = HeldOpen()
        try:
            self._session, listed = on_event_loop(self._held.enter(_session(transport)), timeout_s)
        except Exception as error:
            raise ValueError(
                f"MCP server {self.name!r} does not answer ({told_in_a_line(error)}); it must be the URL of a running "
                "server, or the words of a command that starts one and speaks through its standard output alone"
            ) from error

        self.tools: tuple[Callable[..., str], ...] = tuple(self._tool(tool) for tool in listed)
        """The server's tools, for a `ToolBox`. One whose server says that it failed raises an error with its text."""
        if not self.tools:
            self.close()
            raise ValueError(f"MCP server {self.name!r} has no tools")

    @property
    def problem(self) -> BaseException | None:
        """What broke the connection, as far as a call or `is_standing` has found it; the tools of a broken one all
        fail."""
        return self._problem or self._held.failure

    def is_standing(self) -> bool:
        """Whether the server answers. One that does not within seconds breaks the connection."""
        if self.problem is None:
            try:
                on_event_loop(self._session.send_ping(), _PING_S)
            except Exception as error:
                # one that refuses a ping has answered
                if getattr(getattr(error, "error", None), "code", _GONE) in (_GONE, *_LATE):
                    self._problem = self._problem or error
        return self.problem is None

    def close(self) -> None:
        """End the connection, and the server if it was started here. A second call does nothing."""
        self._problem = self._problem or RuntimeError("the connection was closed")
        on_event_loop(self._held.leave(_STOPPING_S))

    def _tool(self, listed: Mapping[str, Any]) -> Callable[..., str]:
        name = listed["name"]

        def tool(**arguments: Any) -> str:
            return self._call(name, arguments)

        tool.__name__ = name
        tool.__qualname__ = f"{self.name} {name}"
        tool.schema = schema_of(listed)  # type: ignore[attr-defined]
        return tool

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        if self.problem is not None:
            raise ConnectionError(f"the MCP server is gone ({told_in_a_line(self.problem)})")
        try:
            # longer than the tool box waits, which has a word for a call that hangs
            answer = on_event_loop(
                self._session.call_tool(name, without_half_characters(arguments)), self.timeout_s + 1.0
            )
        except Exception as error:
            # the call alone, or the server
            if self.is_standing():
                raise McpToolError(told_in_a_line(error)) from error
            raise ConnectionError(f"the MCP server is gone ({told_in_a_line(error)})") from error
        result = answer.model_dump(by_alias=True, mode="json")
        text = text_of(result)
        if result.get("isError"):
            raise McpToolError(text)
        return text


class McpToolError(Exception):
    """A tool failed, or was called in a way that it does not take; its server stands."""


class McpEnvironment:
    """A question of the row's column `prompt`, answered with the tools of an MCP server.

    `server` is what `McpServer` takes, or a mapping of its arguments. `reward` is a function of the answer and the row,
    or its name `module:function`; it is given at the end. The answer is a message without a call, or what a final tool
    gives: `own_tools` are functions, or their names, beside those of the server, such as `rljax.envs:answer`. `only`
    names the tools of the server that the policy may call. `system` stands before the question; by default it is
    `task` and which tools there are. Steps count as those of `ToolEnvironment`.

    With `shared`, all episodes of a process use one connection, so its tools must give every episode the same, whatever
    others did. Else every episode has a connection of its own and, with a command, a server of its own, which may keep
    what the episode did; a fork starts another and repeats the calls.

    A server that is gone, not just a tool that fails, costs the episodes that call it; the next reset connects anew.
    Raises ImportError without the package, ValueError for arguments that `McpServer` does not take, a program or token
    that is not there, and a `reward` that is no function; in `reset` as `McpServer` and `ToolBox`, and for an unknown
    name in `only`.
    """

    def __init__(
        self,
        server: str | Sequence[str | os.PathLike[str]] | Mapping[str, Any],
        reward: str | Callable[[Any, Mapping[str, Any]], float],
        *,
        shared: bool = True,
        only: Sequence[str] | None = None,
        own_tools: Sequence[str | Callable[..., Any]] = (),
        tool_format: str | ToolFormat = "hermes",
        system: str | None = None,
        task: str = "",
    ):
        _package()
        self._arguments: dict[str, Any] = dict(server) if isinstance(server, Mapping) else {"server": server}
        known = set(inspect.signature(McpServer).parameters)
        if "server" not in self._arguments or not set(self._arguments) <= known:
            raise ValueError(f"server has {sorted(self._arguments)}; it must have server, and may have {sorted(known)}")
        if isinstance(only, str):
            raise ValueError(f"only={only!r} must be a list of names")
        _transport(**{name: value for name, value in self._arguments.items() if name != "timeout_s"})
        self._reward = load(reward) if isinstance(reward, str) else reward
        if not callable(self._reward):
            raise ValueError(f"reward {reward!r} is not a function of the answer and the row")
        self._shared = shared
        self._only = only
        self._own_tools = tuple(own_tools)
        self._presentation: dict[str, Any] = {"tool_format": tool_format, "system": system, "task": task}
        self._server: McpServer | None = None

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """Connect, if there is no connection, and show the question behind the tools."""
        if not self._shared:
            self.close()
        self._server = _shared_server(self._arguments) if self._shared else McpServer(**self._arguments)
        box = ToolBox(
            [*self._chosen(self._server.tools), *self._own_tools],
            timeout_s=self._server.timeout_s,
        )
        self._turns = ToolEnvironment(box, self._reward, **self._presentation)
        return self._turns.reset(row)

    def step(self, action: str) -> Step:
        """As `ToolEnvironment.step`. Raises RuntimeError where a call finds the server gone, and behind `close`."""
        if self._server is None:
            raise RuntimeError("the episode has no MCP server: step comes behind reset, and before close")
        step = self._turns.step(action)
        if step.counts["tool_errors"] and self._server.problem is not None:
            raise RuntimeError(f"MCP server {self._server.name!r} failed: {told_in_a_line(self._server.problem)}")
        return step

    def close(self) -> None:
        """End the episode's own connection."""
        if self._server is not None and not self._shared:
            self._server.close()
            self._server = None

    def _chosen(self, tools: Sequence[Callable[..., str]]) -> list[Callable[..., str]]:
        if self._only is None:
            return list(tools)
        by_name = {tool.__name__: tool for tool in tools}
        if missing := [name for name in self._only if name not in by_name]:
            raise ValueError(f"only names {missing}, which are no tools of the server; it has {sorted(by_name)}")
        return [by_name[name] for name in self._only]


@contextlib.asynccontextmanager
async def _session(transport: Callable[[], Any]) -> AsyncIterator[tuple[Any, list[dict[str, Any]]]]:
    """A session with a server, and its tools as it lists them."""
    async with transport() as (read, write, *_), _package().ClientSession(read, write) as session:
        await session.initialize()
        yield session, await _listed(session)


async def _listed(session: Any) -> list[dict[str, Any]]:
    types = _package().types
    tools: list[dict[str, Any]] = []
    cursor = None
    while True:
        page = await session.list_tools(params=types.PaginatedRequestParams(cursor=cursor))
        # names of fields differ between versions of the package, those of the protocol do not
        listed = page.model_dump(by_alias=True, mode="json")
        tools += listed["tools"]
        cursor = listed.get("nextCursor")
        if not cursor:
            return tools


def schema_of(listed: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool as chat templates expect it, from that of a server's list."""
    parameters = {"type": "object", "properties": {}, **_tidy(listed.get("inputSchema"))}
    function = {"name": listed["name"], "description": listed.get("description") or "", "parameters": parameters}
    return {"type": "function", "function": function}


_KINDS: dict[str, Any] = {
    "type": (str, list),
    "required": list,
    "enum": list,
    "anyOf": list,
    "prefixItems": list,
    "properties": Mapping,
}
"""What parts of a schema are, which a tool box relies on."""


def _tidy(schema: Any) -> dict[str, Any]:
    """A schema without what is none: any value fits in its place, and the server decides."""
    if not isinstance(schema, Mapping):
        return {}
    tidy = {name: part for name, part in schema.items() if isinstance(part, _KINDS.get(name, object))}

    # schemas within it
    for name in ("anyOf", "prefixItems"):
        if name in tidy:
            tidy[name] = [_tidy(one) for one in tidy[name]]
    if "properties" in tidy:
        tidy["properties"] = {name: _tidy(one) for name, one in tidy["properties"].items()}
    for name in ("items", "additionalProperties"):  # which may be True and False, too
        if isinstance(tidy.get(name), Mapping):
            tidy[name] = _tidy(tidy[name])
    return tidy


def text_of(result: Mapping[str, Any]) -> str:
    """What a call gave, as text: its texts, or else its structured content as JSON. Of a picture, a sound or a resource
    that is no text, the policy learns that it is there."""
    parts = [_part(part) for part in result.get("content") or []]
    if not parts and result.get("structuredContent") is not None:
        return json.dumps(result["structuredContent"], ensure_ascii=False)
    return "\n".join(parts)


def _part(part: Mapping[str, Any]) -> str:
    if part.get("type") == "text":
        return str(part["text"])
    resource = part.get("resource") or {}
    if "text" in resource:
        return str(resource["text"])
    kind = part.get("mimeType") or resource.get("mimeType") or part.get("uri") or part.get("type")
    return f"[{kind}, which cannot be shown]"


class _Place:
    """Of a server that all episodes of a process share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.server: McpServer | None = None
        self.failure: tuple[float, str] | None = None
        """When the last attempt to connect ended, and how."""


_PLACES: collections.defaultdict[str, _Place] = collections.defaultdict(_Place)
_PLACES_LOCK = threading.Lock()


def _shared_server(arguments: Mapping[str, Any]) -> McpServer:
    """One for a process, for as long as it stands. Who waits while another connects shares its failure."""
    with _PLACES_LOCK:
        place = _PLACES[json.dumps(arguments, sort_keys=True, default=os.fspath)]

    asked = time.monotonic()
    before = place.server
    if before is not None and before.is_standing():
        return before

    with place.lock:
        # Another has connected meanwhile, or has tried to since this one asked.
        if place.server is not before and place.server is not None:
            return place.server
        if place.failure is not None and place.failure[0] > asked:
            raise ValueError(place.failure[1])

        try:
            place.server = McpServer(**arguments)
        except ValueError as error:
            place.failure = (time.monotonic(), str(error))
            raise
    if before is not None:
        before.close()
    return place.server


def without_half_characters(value: Any) -> Any:
    """JSON-like values without half characters, which no server can be sent."""
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, Mapping):
        return {without_half_characters(key): without_half_characters(one) for key, one in value.items()}
    return [without_half_characters(one) for one in value] if isinstance(value, (list, tuple)) else value


_WITH_PARENT = (
    "import os, sys; _, folder, parent, *words = sys.argv; sys.path.append(folder); "
    "from kernel import die_with_parent; die_with_parent(); "
    "sys.exit('its parent has ended') if os.getppid() != int(parent) else os.execvp(words[0], words)"
)


def with_parent(words: Sequence[str]) -> list[str]:
    """The words of a command that runs `words` and that the kernel kills when this process ends, on Linux; elsewhere
    `words`."""
    if sys.platform != "linux":
        return list(words)
    return [sys.executable, "-ISc", _WITH_PARENT, os.path.dirname(kernel.__file__), str(os.getpid()), *words]


def _transport(
    server: str | Sequence[str | os.PathLike[str]],
    env: Mapping[str, str] | None = None,
    token_variable: str | None = None,
) -> Callable[[], Any]:
    """What opens the streams of a connection. ValueError for a server that cannot be."""
    mcp = _package()
    if not isinstance(server, str):
        words = [os.fspath(word) for word in server]
        if token_variable is not None:
            raise ValueError(f"token_variable {token_variable!r} is for a URL; give a command its variables by env")
        if not words or shutil.which(words[0]) is None:
            raise ValueError(f"MCP server {words} must be the words of a command, whose first is a program here")
        command, *args = with_parent(words)
        settings = mcp.StdioServerParameters(command=command, args=args, env=dict(env) if env else None)
        return lambda: mcp.stdio_client(settings)

    if not server.startswith(("http://", "https://")):
        raise ValueError(f"MCP server {server!r} must be a URL, or the words of a command as a list")
    if env:
        raise ValueError(f"env {sorted(env)} is for a command; MCP server {server!r} runs already")
    headers = bearer(token_variable, f"MCP server {server}")

    @contextlib.asynccontextmanager
    async def streams() -> AsyncIterator[Any]:
        http = _http_library()
        async with (
            http.AsyncClient(headers=headers, timeout=None) as client,
            mcp.client.streamable_http.streamable_http_client(server, http_client=client) as opened,
        ):
            yield opened

    return streams


@made_once
def _http_library() -> Any:
    """The one that this version of the package speaks through."""
    from mcp.client import streamable_http

    return importlib.import_module("httpx2" if hasattr(streamable_http, "httpx2") else "httpx")


def _package() -> Any:
    try:
        import mcp
        import mcp.client.streamable_http
    except ImportError as error:
        raise ImportError(f"tools of MCP servers need the extra mcp ({error}): pip install 'rljax-lm[mcp]'") from error
    return mcp


def told_in_a_line(error: BaseException) -> str:
    """One line, of the innermost error where several came together."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
