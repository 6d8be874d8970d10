"""Environments behind a server of OpenEnv: its tasks as rows, its steps as turns, its rewards as they come."""

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from rljax.envs.base import Prompt, Step
from rljax.envs.formats import Parsed, ToolFormat, after_thinking, get_format, load
from rljax.envs.instructions import schema_instructions
from rljax.envs.library.mcp_tools import schema_of, text_of, told_in_a_line, without_half_characters
from rljax.envs.library.sharing import bearer, made_once, on_event_loop
from rljax.envs.tool_environment import NUDGE
from rljax.tasks.examples import whole_text

_NOT_SHOWN = ("done", "reward", "metadata")
"""Fields of every observation that are not for the policy to read."""

_INVALID = "VALIDATION_ERROR"
_NO_ROOM = "CAPACITY_REACHED"
"""Codes at the end of what the server says."""

_CLOSING_S = 10.0
"""Seconds that a session has to end before it is left."""

_CALL = {"tool_name", "arguments"}
"""Fields of an action that is a call of a tool."""


def rows(
    url: str, *, split: str | None = None, size: int | None = None, seed: int = 0, token_variable: str | None = None
) -> list[dict[str, Any]]:
    """Rows for `OpenEnvEnvironment`: the tasks of a split of the server, or `size` seeds from `seed` on.

    Columns: `prompt` ("", since the server opens an episode), `reset`, the arguments of the server's reset (`split` and
    `index`, or `seed`), and of a task `task`, as the server describes it. `size` takes the first tasks; None takes all.
    Raises ValueError if the server has no tasks, or no such split, and for neither `split` nor `size`.
    """
    if split is None:
        if size is None:
            raise ValueError(f"rows of {url} need a split of the server's tasks, or a size: that many seeds")
        return [{"prompt": "", "reset": {"seed": number}} for number in range(seed, seed + size)]

    [name] = _asked(url, "GET", "/list_environments", token_variable)
    splits = [found["name"] for found in _asked(url, "GET", f"/{name}/splits", token_variable)]
    if split not in splits:
        raise ValueError(f"OpenEnv server {url} has no split {split!r} of tasks; it has {splits}")
    bounds = {"split": split, "start": 0, "stop": size}
    tasks = _asked(url, "POST", f"/{name}/task_range", token_variable, bounds)["tasks"]
    return [{"prompt": "", "reset": {"split": split, "index": index}, "task": task} for index, task in enumerate(tasks)]


class OpenEnvEnvironment:
    """An environment of a running OpenEnv server, one session for an episode. Rows are those of `rows`, or others
    whose column `reset` holds the arguments of the server's reset.

    The opening is the row's `prompt` (text or messages), and behind it the observation of the reset. The observation is
    shown as its one text field or as JSON, without what is empty; `observe` names a field of it instead, or is a
    function of the observation (or `module:function`) that gives text.

    Where actions have one text field, a turn is what follows the thinking. Where they are calls of tools, the server's
    tools are called in `tool_format`; of a call that cannot be read, a tool that is not there and a turn without a call
    the server never hears. For other actions, `act` is the field that the turn goes into, or a function (or
    `module:function`) of the turn that gives the action; its ValueError is an observation. Steps count `tool_calls` and
    `malformed_calls`: an action that the server calls invalid (VALIDATION_ERROR) is one of these.

    The reward is the sum over the steps; that of a reset does not count. `system` stands before the opening; by default
    it says which tools there are. A server on another machine may want the bearer token that the environment variable
    `token_variable` holds. A session must do the same again for the same `reset` and actions, since forks repeat them.

    Raises ImportError without the package, ValueError for an address where no server answers, and for actions that need
    `act`; RuntimeError for a server that fails, is gone or has no room, in `reset` and `step`; the
    session takes no further step then.
    """

    def __init__(
        self,
        url: str,
        *,
        act: str | Callable[[str], Mapping[str, Any]] | None = None,
        observe: str | Callable[[Mapping[str, Any]], str] | None = None,
        tool_format: str | ToolFormat = "hermes",
        system: str | None = None,
        token_variable: str | None = None,
        timeout_s: float = 60.0,
    ):
        _package()
        self._url = url
        self._token_variable = token_variable
        self._timeout_s = timeout_s
        self.format = get_format(tool_format)
        self._system = system
        self._observe = _function_or_name(observe)
        fields = _fields_of_actions(url, token_variable)
        self._fields = ", ".join(f"{name} ({field.get('type', 'any')})" for name, field in fields.items())
        self._act = _way_to_act(url, fields, _function_or_name(act))
        self.schemas: list[dict[str, Any]] = []
        self._client: Any = None

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """Open a session, and read the first observation."""
        self.close()
        client = _session_class()(
            self._url, message_timeout_s=self._timeout_s, headers=bearer(self._token_variable, self._url)
        )
        self._client = client
        try:
            opened = on_event_loop(self._open(client, without_half_characters(dict(row.get("reset") or {}))))
        except Exception as error:
            if not str(error).endswith(f"(code: {_NO_ROOM})"):
                raise RuntimeError(
                    f"OpenEnv server {self._url} does not open an episode ({told_in_a_line(error)})"
                ) from error
            raise RuntimeError(
                f"OpenEnv server {self._url} has no room for another session ({error}); raise its max_concurrent_envs "
                "to at least the episodes that are open at a time"
            ) from error
        if opened.done:
            raise RuntimeError(f"OpenEnv server {self._url} ended the episode of {row.get('reset')} with its reset")
        return self._opening(row, self._shown(opened.observation))

    def step(self, action: str) -> Step:
        """Hand the turn to the server and read its answer."""
        if self._client is None:
            raise RuntimeError("the episode has no session: step comes behind reset, and before close or a failure")
        if self._act is None:
            return self._called(self.format.parse(action))
        try:
            taken = dict(self._act(after_thinking(action).strip()))
        except ValueError as error:
            return Step(f"The action cannot be read: {error}", counts={"malformed_calls": 1.0})
        return self._taken(taken)

    def close(self) -> None:
        """End the session."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):  # the session ends with its connection
                on_event_loop(_awaited(client.close), _CLOSING_S)

    async def _open(self, client: Any, arguments: dict[str, Any]) -> Any:
        opened = await client.reset(**arguments)
        if self._act is None:
            listed = (await client.step({"type": "list_tools"})).observation["tools"]
            self.schemas = [schema_of({**tool, "inputSchema": tool.get("input_schema")}) for tool in listed]
        return opened

    def _opening(self, row: Mapping[str, Any], observation: str) -> Prompt:
        prompt = row.get("prompt") or ""
        system = self._system
        if system is None:
            system = schema_instructions(self.schemas, self.format) if self.schemas else ""
        if isinstance(prompt, str) and not system:
            return "\n\n".join(filter(None, (prompt, observation)))

        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages = [message for message in messages if message["content"]]
        if messages and messages[-1]["role"] == "user" and observation:
            messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{observation}"}
        elif observation or not messages:
            messages.append({"role": "user", "content": observation})
        return [{"role": "system", "content": system}, *messages] if system else messages

    def _called(self, parsed: Parsed) -> Step:
        """Calls in order, up to the one that ends the episode."""
        texts: list[str] = []
        reward = 0.0
        counts = {"tool_calls": 0.0, "malformed_calls": 0.0}
        known = [schema["function"]["name"] for schema in self.schemas]

        for call in parsed.calls:
            if call.name not in known:
                texts.append(f"There is no tool {whole_text(call.name[:50])!r}; the tools are {', '.join(known)}.")
                counts["malformed_calls"] += 1.0
                continue

            taken = self._taken({"type": "call_tool", "tool_name": call.name, "arguments": dict(call.arguments)})
            texts.append(taken.observation)
            reward += taken.reward
            counts["tool_calls"] += 1.0
            counts["malformed_calls"] += taken.counts.get("malformed_calls", 0.0)
            if taken.done:
                return Step("\n\n".join(texts), reward, True, counts)

        if parsed.problem is not None:
            counts["malformed_calls"] += 1.0
            texts.append(parsed.problem.text)
        return Step("\n\n".join(texts) or NUDGE, reward, counts=counts)

    def _taken(self, action: dict[str, Any]) -> Step:
        try:
            result = on_event_loop(_awaited(self._client.step, without_half_characters(action)))
        except Exception as error:
            # of what a server calls invalid, its session stands
            if str(error).endswith(f"(code: {_INVALID})"):
                return Step(f"The action is refused; it takes {self._fields}.", counts={"malformed_calls": 1.0})
            self.close()
            raise RuntimeError(f"OpenEnv server {self._url} failed: {told_in_a_line(error)}") from error
        return Step(self._shown(result.observation), float(result.reward or 0.0), bool(result.done))

    def _shown(self, observation: Mapping[str, Any]) -> str:
        if callable(self._observe):
            return str(self._observe(observation))

        if self._observe is not None:
            if self._observe not in observation:
                raise RuntimeError(
                    f"observe={self._observe!r} is no field of the observation of OpenEnv server {self._url}; it has "
                    f"{sorted(observation)}"
                )
            value = observation[self._observe]
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

        if set(observation) >= {"tool_name", "result", "error"}:
            return _result_of_call(observation)

        # A text alone is shown as it is; more than that needs its names.
        left = {
            key: value
            for key, value in observation.items()
            if key not in _NOT_SHOWN and value not in (None, "", [], {})
        }
        if len(left) == 1 and isinstance(text := next(iter(left.values())), str):
            return text
        return json.dumps(left, ensure_ascii=False) if left else ""


def _result_of_call(observation: Mapping[str, Any]) -> str:
    if error := observation["error"]:
        return f"{observation['tool_name']} failed: {error.get('message', error)}"
    result = observation["result"]
    if isinstance(result, Mapping) and ("content" in result or "structured_content" in result):
        return text_of({"structuredContent": result.get("structured_content"), **result})
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def _way_to_act(
    url: str, fields: Mapping[str, Mapping[str, Any]], act: Any
) -> Callable[[str], Mapping[str, Any]] | None:
    """How a turn becomes an action; None where actions are calls of tools."""
    if callable(act):
        return act
    if act is not None:
        if fields and act not in fields:
            raise ValueError(
                f"act={act!r} is no field of the actions of OpenEnv server {url}; they have {sorted(fields)}"
            )
        return lambda turn: {act: turn}

    if set(fields) >= _CALL:
        return None
    needed = [name for name, field in fields.items() if "default" not in field]
    if len(needed) == 1 and fields[needed[0]].get("type") == "string":
        [name] = needed
        return lambda turn: {name: turn}
    raise ValueError(
        f"actions of OpenEnv server {url} need the fields {needed or sorted(fields)}, not one text; give act, a "
        "function of the turn that makes an action"
    )


@made_once
def _fields_of_actions(url: str, token_variable: str | None) -> dict[str, Mapping[str, Any]]:
    """The JSON schema of each field, by its name."""
    schema = _asked(url, "GET", "/schema", token_variable)["action"]
    return {name: field for name, field in schema.get("properties", {}).items() if name != "metadata"}


def _asked(url: str, method: str, path: str, token_variable: str | None, data: Any = None) -> Any:
    _package()
    import httpx

    try:
        answer = httpx.request(
            method, url.rstrip("/") + path, json=data, headers=bearer(token_variable, url), timeout=30.0
        )
        answer.raise_for_status()
        return answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ValueError(f"OpenEnv server {url} does not answer {method} {path} ({error!r:.300})") from error


@made_once
def _session_class() -> type[Any]:
    """A client of one session: that of the package connects anew, to an episode that was never reset."""

    class Session(_package().GenericEnvClient):  # type: ignore[misc]
        first: Any = None

        async def _connect_async(self) -> Any:
            # called before every message
            found = await super()._connect_async()
            self.first = self.first or self._ws
            if self._ws is not self.first:
                raise ConnectionError("the connection was lost, and the session with it")
            return found

    return Session


async def _awaited(call: Callable[..., Any], *args: Any) -> Any:
    # the client makes up its mind where it is called: on the event loop it gives what can be awaited
    return await call(*args)


def _function_or_name(given: Any) -> Any:
    return load(given) if isinstance(given, str) and ":" in given else given


def _package() -> Any:
    try:
        from openenv import core
    except ImportError as error:
        raise ImportError(
            f"environments of OpenEnv need the extra openenv ({error}): pip install 'rljax-lm[openenv]'"
        ) from error
    return core
