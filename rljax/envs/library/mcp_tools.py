"""Tools of servers that speak the Model Context Protocol (MCP): a server's tools as those of a tool box, and an
environment whose questions are answered with them."""

import asyncio
import contextlib
import importlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from rljax.envs.base import Prompt, Step
from rljax.envs.formats import ToolFormat, load
from rljax.envs.library.sharing import bearer, made_once, on_event_loop
from rljax.envs.tool_environment import ToolEnvironment
from rljax.envs.tools import ToolBox

_REFUSED = (-32602, -32601)
"""JSON-RPC codes of a server that stands and does not take a call: invalid params, method not found."""

_STOPPING_S = 5.0
"""Seconds that a server has to end before it is left."""


class McpServer:
    """A connection to a server, open from when it is made until `close`. Safe for many threads at once.

    `server` is the URL of one that runs (streamable HTTP), or the words of a command that starts one and speaks with it
    through its standard input and output. A command gets `env` beside the few harmless variables that the package
    passes on. A URL is asked with the bearer token in the environment variable `token_variable`, if it is named.
    `timeout_s` is for the start, and for each call.

    Raises ImportError without the package, ValueError for a server that does not start or answer, has no tools, or
    a `token_variable` that is not set.
    """

    def __init__(
        self,
        server: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        token_variable: str | None = None,
        timeout_s: float = 30.0,
    ):
        _package()
        self.name = server if isinstance(server, str) else " ".join(server)
        self.timeout_s = timeout_s
        self._problem: BaseException | None = None
        transport = _transport(server, dict(env or {}), token_variable)

        self._stop = asyncio.Event()
        try:
            self._served, listed = on_event_loop(self._open(transport), timeout_s)
        except Exception as error:
            raise ValueError(
                f"MCP server {self.name!r} does not answer ({_told(error)}); it must be the URL of a running server, "
                "or the words of a command that starts one and speaks through its standard output alone"
            ) from error

        self.tools: tuple[Callable[..., str], ...] = tuple(self._tool(tool) for tool in listed)
        """The server's tools, for a `ToolBox`. One whose server says that it failed raises an error with its text."""
        if not self.tools:
            self.close()
            raise ValueError(f"MCP server {self.name!r} has no tools")

    @property
    def problem(self) -> BaseException | None:
        """What broke the connection; None while it stands. The tools of a broken one all fail."""
        return self._problem

    def close(self) -> None:
        """End the connection, and the server if it was started here. A second call does nothing."""
        on_event_loop(self._close())

    async def _open(self, transport: Callable[[], Any]) -> tuple[asyncio.Task[None], list[dict[str, Any]]]:
        ready: asyncio.Future[list[dict[str, Any]]] = asyncio.get_running_loop().create_future()
        # the package wants a connection to be opened and closed by one task
        served = asyncio.create_task(self._serve(transport, ready))
        try:
            return served, await ready
        except BaseException:
            served.cancel()
            raise

    async def _serve(self, transport: Callable[[], Any], ready: asyncio.Future[list[dict[str, Any]]]) -> None:
        mcp = _package()
        try:
            async with transport() as (read, write, *_), mcp.ClientSession(read, write) as session:
                self._session = session
                await session.initialize()
                ready.set_result(await self._listed())
                await self._stop.wait()
        except BaseException as error:
            self._problem = self._problem or error
            if not ready.done():
                ready.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            if isinstance(error, asyncio.CancelledError):
                raise

    async def _listed(self) -> list[dict[str, Any]]:
        types = _package().types
        tools: list[dict[str, Any]] = []
        cursor = None
        while True:
            page = await self._session.list_tools(params=types.PaginatedRequestParams(cursor=cursor))
            # names of fields differ between versions of the package, those of the protocol do not
            listed = page.model_dump(by_alias=True, mode="json")
            tools += listed["tools"]
            cursor = listed.get("nextCursor")
            if not cursor:
                return tools

    async def _close(self) -> None:
        self._stop.set()
        self._problem = self._problem or RuntimeError("the connection was closed")
        done, _ = await asyncio.wait([self._served], timeout=_STOPPING_S)
        if not done:
            self._served.cancel()

    def _tool(self, listed: Mapping[str, Any]) -> Callable[..., str]:
        name = listed["name"]

        def tool(**arguments: Any) -> str:
            return self._call(name, arguments)

        tool.__name__ = name
        tool.__qualname__ = f"{self.name} {name}"
        tool.schema = schema_of(listed)  # type: ignore[attr-defined]
        return tool

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        if self._problem is not None:
            raise ConnectionError(f"the MCP server is gone ({_told(self._problem)})")
        try:
            # longer than the tool box waits, which has a word for a call that hangs
            answer = on_event_loop(self._session.call_tool(name, arguments), self.timeout_s + 1.0)
        except TimeoutError:
            raise
        except Exception as error:
            if getattr(getattr(error, "error", None), "code", None) in _REFUSED:
                raise McpToolError(_told(error)) from error
            self._problem = error  # a tool that fails is an answer: this is the connection
            raise
        result = answer.model_dump(by_alias=True, mode="json")
        text = text_of(result)
        if result.get("isError"):
            raise McpToolError(text)
        return text


class McpToolError(Exception):
    """A tool said that it failed."""


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

    A server that fails, not just one of its tools, costs the episode; the next one connects anew. Raises ImportError
    without the package, ValueError for a `reward` that is none and, in `reset`, as `McpServer` and for an unknown name
    in `only`.
    """

    def __init__(
        self,
        server: str | Sequence[str] | Mapping[str, Any],
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
        self._arguments = dict(server) if isinstance(server, Mapping) else {"server": server}
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
        """As `ToolEnvironment.step`. Raises RuntimeError where the server is gone."""
        assert self._server is not None, "step before reset"
        step = self._turns.step(action)
        if self._server.problem is not None:
            raise RuntimeError(f"MCP server {self._server.name!r} failed: {_told(self._server.problem)}")
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


def schema_of(listed: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool as chat templates expect it, from that of a server's list."""
    parameters = {"type": "object", "properties": {}, **(listed.get("inputSchema") or {})}
    function = {"name": listed["name"], "description": listed.get("description") or "", "parameters": parameters}
    return {"type": "function", "function": function}


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


_SHARED: dict[str, McpServer] = {}
_SHARED_LOCK = threading.Lock()


def _shared_server(arguments: Mapping[str, Any]) -> McpServer:
    """One for a process, for as long as it stands."""
    key = json.dumps(arguments, sort_keys=True)
    with _SHARED_LOCK:
        server = _SHARED.get(key)
        if server is None or server.problem is not None:
            server = _SHARED[key] = McpServer(**arguments)
        return server


def _transport(server: str | Sequence[str], env: dict[str, str], token_variable: str | None) -> Callable[[], Any]:
    """What opens the streams of a connection."""
    mcp = _package()
    if not isinstance(server, str):
        if token_variable is not None:
            raise ValueError(f"token_variable {token_variable!r} is for a URL; give a command its variables by env")
        command, *args = server
        # what it prints beside the protocol would stand between the lines of a run
        return lambda: mcp.stdio_client(mcp.StdioServerParameters(command=command, args=args, env=env or None))

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


def _told(error: BaseException) -> str:
    """One line, of the innermost error where several came together."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
