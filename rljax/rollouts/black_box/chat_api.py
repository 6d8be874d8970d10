"""What OpenAI's chat completions look like on the wire: requests read and checked, answers written. Host, no jax."""

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rljax.rollouts.http_server import ApiError

ROLES = ("system", "developer", "user", "assistant", "tool")

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # settings that change what is sampled, and the values that do not
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "functions": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}
_SAMPLED = ("temperature", "top_p", "top_k", "min_p")


class ChatRequest(NamedTuple):
    """A checked request. `messages` are as chat templates take them; `keys` tell histories apart: one of the tools,
    then one of each message."""

    messages: list[dict[str, Any]]
    keys: list[str]
    tools: list[dict[str, Any]]
    reads_calls: bool
    limit: int | None  # new tokens
    stop: tuple[str, ...]
    model: str
    stream: bool
    include_usage: bool
    logprobs: bool
    top_logprobs: int


def read_request(
    body: Any, *, sampling: Mapping[str, float], stop_strings: Sequence[str] | None, most_top: int = 0
) -> ChatRequest:
    """Checks a request's JSON value. `sampling` is how the run samples, under OpenAI's names; a request may repeat it,
    or leave it out. `stop_strings` are all that may end an answer; None is any. `most_top` is how many most probable
    tokens can be told. Raises ApiError for anything that is malformed, or that would be sampled in another way."""
    if not isinstance(body, dict):
        raise ApiError(f"the body is {_short(body)}; it must be a JSON object with the list 'messages'")

    # Nothing that would change what is sampled is ignored in silence: the agent would believe that it was obeyed.
    for name, allowed in _NEUTRAL.items():
        if (value := body.get(name)) is not None and value not in allowed:
            raise ApiError(
                f"{name}={_short(value)} is not served; leave it out, or send {' or '.join(map(_short, allowed))}",
                code="unsupported_value",
                param=name,
            )

    for name in _SAMPLED:
        value = body.get(name)
        if value is not None and not _is_near(value, sampling[name]):
            raise ApiError(
                f"{name}={_short(value)}, but this run samples with {name}={sampling[name]:g}, and the log-probs that "
                "are recorded are of that; leave it out",
                code="unsupported_value",
                param=name,
            )

    raw = body.get("messages")
    if not isinstance(raw, list) or not raw:
        raise ApiError(f"messages is {_short(raw)}; it must be a non-empty list of messages", param="messages")
    messages = [read_message(f"messages[{i}]", message) for i, message in enumerate(raw)]
    tools = _tools(body.get("tools"))
    options = body.get("stream_options")
    return ChatRequest(
        messages=messages,
        # Tools stand in the prompt, so a request with others begins a conversation of its own.
        keys=[json.dumps(tools, sort_keys=True), *map(key_of, messages)],
        tools=tools,
        reads_calls=bool(tools) and body.get("tool_choice") != "none",
        limit=_limit(body),
        stop=_stop(body.get("stop"), stop_strings),
        model=body["model"] if isinstance(body.get("model"), str) else "",
        stream=bool(body.get("stream")),
        include_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        logprobs=bool(body.get("logprobs")),
        top_logprobs=_top(body.get("top_logprobs"), most_top),
    )


def key_of(message: Mapping[str, Any]) -> str:
    """Equal for messages that say the same: ids of calls, and white space around what the assistant says, do not
    count."""
    content = message.get("content") or ""
    calls = message.get("tool_calls") or []
    # Clients strip what they were answered, and make up ids of calls, before they send it back.
    if message["role"] == "assistant":
        content = content.strip()
    functions = [[call["function"]["name"], call["function"]["arguments"]] for call in calls]
    return json.dumps([message["role"], content, message.get("name"), functions], sort_keys=True)


def read_message(where: str, raw: Any) -> dict[str, Any]:
    """A message as chat templates take it: content is text, arguments of calls are objects."""
    if not isinstance(raw, dict) or raw.get("role") not in ROLES:
        role = raw.get("role") if isinstance(raw, dict) else raw
        raise ApiError(f"{where} has the role {_short(role)}; it must be one of {', '.join(ROLES)}", param=where)

    # `developer` is OpenAI's newer word for `system`, which few chat templates know.
    role = raw["role"]
    calls = raw.get("tool_calls") or []
    message = {"role": "system" if role == "developer" else role, "content": _text(where, raw.get("content"))}
    if raw.get("content") is None and not (role == "assistant" and calls):
        raise ApiError(f"{where} has no content; it must be text", param=where)

    for name in ("name", "tool_call_id"):
        if isinstance(raw.get(name), str):
            message[name] = raw[name]

    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise ApiError(f"{where}.tool_calls must be a list, in a message of the assistant", param=where)
        message["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    return message


def _text(where: str, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise ApiError(f"{where}.content is {_short(content)}; it must be text, or a list of text parts", param=where)


def _call(where: str, raw: Any) -> dict[str, Any]:
    function = raw.get("function") if isinstance(raw, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(f"{where} must be an object with a function that has a name and arguments", param=where)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return call | ({"id": raw["id"]} if isinstance(raw.get("id"), str) else {})


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _tools(raw: Any) -> list[dict[str, Any]]:
    if raw is None:
        return []
    if not isinstance(raw, list) or not all(
        isinstance(t, dict) and isinstance(t.get("function"), dict) and isinstance(t["function"].get("name"), str)
        for t in raw
    ):
        raise ApiError('tools must be a list of {"type": "function", "function": {"name": ...}}', param="tools")
    return raw


def _limit(body: Mapping[str, Any]) -> int | None:
    limits = []
    for name in ("max_tokens", "max_completion_tokens"):
        if (value := body.get(name)) is not None:
            if type(value) is not int or value < 1:
                raise ApiError(f"{name}={_short(value)} must be a whole number of at least 1", param=name)
            limits.append(value)
    return min(limits, default=None)


def _top(raw: Any, most: int) -> int:
    count = 0 if raw is None else raw
    if type(count) is not int or not 0 <= count <= most:
        raise ApiError(
            f"top_logprobs={_short(raw)} is not served: it must be a whole number from 0 to {most}, which is the run's "
            "config.sampling.top_logprobs",
            code="unsupported_value",
            param="top_logprobs",
        )
    return count


def _stop(raw: Any, served: Sequence[str] | None) -> tuple[str, ...]:
    strings = [raw] if isinstance(raw, str) else raw or []
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise ApiError(f"stop is {_short(raw)}; it must be text or a list of texts", param="stop")
    if served is None:
        return tuple(strings)
    if unknown := [s for s in strings if s not in served]:
        raise ApiError(
            f"the decoder does not stop at {unknown}, only at {list(served)} and at the model's own end of turn; leave "
            "stop out, or set it for the run",
            code="unsupported_value",
            param="stop",
        )
    return tuple(strings)


def write_answer(
    request: ChatRequest,
    message: Mapping[str, Any],
    finish_reason: str,
    *,
    counts: tuple[int, int],
    logprobs: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """A chat completion; `counts` are the tokens before it and in it."""
    # OpenAI's schema wants null, not an empty list, where no log-probs were asked for.
    choice = {
        "index": 0,
        "message": dict(message),
        "finish_reason": finish_reason,
        "logprobs": {"content": list(logprobs), "refusal": None} if request.logprobs else None,
    }

    prompt_tokens, completion_tokens = counts
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def stream_answer(answer: Mapping[str, Any], *, include_usage: bool) -> Iterator[bytes]:
    """The same as server-sent events: who speaks, what is said, why it ended."""
    choice = answer["choices"][0]
    message = choice["message"]
    head = {name: answer[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    content = {"content": message["content"]}
    if calls := message.get("tool_calls"):
        content["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]

    parts = [
        ({"role": "assistant", "content": ""}, None, None),
        (content, choice["logprobs"], None),
        ({}, None, choice["finish_reason"]),
    ]
    for delta, logprobs, end in parts:
        line = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": end}
        yield _event(json.dumps(head | {"choices": [line]}))
    if include_usage:
        yield _event(json.dumps(head | {"choices": [], "usage": answer["usage"]}))
    yield _event("[DONE]")


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def _is_near(value: Any, wanted: float) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    # NaN, which JSON may hold, is near nothing; an integer may be too large to be subtracted from
    return wanted - 1e-6 <= value <= wanted + 1e-6


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
