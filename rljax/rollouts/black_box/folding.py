"""An agent that plays an environment and folds its context: old results make room for new ones, so that an episode may
be longer than the context.

Keep-recent-k (GLM-5, 2602.15763): the last k results stay as they are, older ones are replaced by a short note. Beyond
a number of tokens all but the latest exchange is dropped (its hierarchical form). What the policy says is sampled and
recorded in the context that it was really shown: a fold begins a conversation of its own, in which only what is said
from then on is trained.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from rljax.rollouts.black_box.address import TOKEN
from rljax.tasks import load_callable

NOTE = "[result left out]"
"""What stands in place of a result."""

Messages = list[dict[str, Any]]
"""A chat, oldest first."""


def folded(messages: Sequence[Mapping[str, Any]], keep: int, *, note: str = NOTE) -> Messages:
    """`messages` with all but the last `keep` results replaced by `note`. A result is what is not the policy's behind
    its first message; what opens the chat is none."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    results = [i for i in range(first, len(messages)) if messages[i]["role"] != "assistant"]
    old = set(results[: max(len(results) - keep, 0)])
    return [{**message, "content": note} if i in old else dict(message) for i, message in enumerate(messages)]


def results_shown(messages: Sequence[Mapping[str, Any]], *, note: str = NOTE) -> int:
    """How many results are not left out."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return sum(m["role"] != "assistant" and m["content"] != note for m in messages[first:])


def latest_alone(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """What opens the chat, and the latest exchange."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return [dict(message) for message in [*messages[:first], *messages[max(first, len(messages) - 2) :]]]


class FoldingAgent:
    """Plays an environment through an endpoint, as `config.actor.agent`. Called from many threads.

    `make` names what makes an environment (`module:callable`), `args` are its keyword arguments. When more than `most`
    results are shown, all but the last `keep` are folded; `most=None` is `keep`, the published form, in which every
    turn is a conversation of its own, while a larger one folds more rarely. When the chat has more than
    `discard_beyond` tokens, all but what opens it and the latest exchange is dropped; None never does. An episode ends
    when the environment ends it, after `turns` turns, where a turn is cut off, or where the context is full; its reward
    is what it has earned.

    Raises ValueError, with the name of the setting, for what cannot work.
    """

    def __init__(
        self,
        make: str,
        args: Mapping[str, Any] | None = None,
        *,
        keep: int = 5,
        most: int | None = None,
        discard_beyond: int | None = None,
        turns: int = 64,
        timeout_s: float = 600.0,
    ):
        self._make = load_callable(make)
        self._args = dict(args or {})
        self.keep = keep
        self.most = keep if most is None else most
        self.discard_beyond = discard_beyond
        self.turns = turns
        self.timeout_s = timeout_s
        for name, value, least in (
            ("keep", keep, 1),
            ("most", self.most, keep),
            ("discard_beyond", 1 if discard_beyond is None else discard_beyond, 1),
            ("turns", turns, 1),
        ):
            if value < least:
                raise ValueError(f"config.actor.args.{name}={value} must be at least {least}")

    def __call__(self, base_url: str, row: dict[str, Any]) -> float:
        """Plays one episode; returns its reward."""
        environment = self._make(**self._args)
        try:
            return self._play(environment, base_url, row)
        finally:
            getattr(environment, "close", lambda: None)()

    def _play(self, environment: Any, base_url: str, row: dict[str, Any]) -> float:
        opening = environment.reset(row)
        messages: Messages = (
            [{"role": "user", "content": opening}] if isinstance(opening, str) else [dict(m) for m in opening]
        )
        # The schemas of tools, where the first message carries them, are a field of the request.
        tools = messages[0].pop("tools", None)

        earned = 0.0
        for _ in range(self.turns):
            answer = self._ask(base_url, messages, tools)
            if answer is None:
                return earned
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            if choice["finish_reason"] == "length":
                return earned

            step = environment.step(text)
            earned += step.reward
            if step.done:
                return earned
            messages = [
                *messages,
                {"role": "assistant", "content": text},
                {"role": "user", "content": step.observation},
            ]
            messages = self.shortened(messages, answer["usage"]["total_tokens"])
        return earned

    def shortened(self, messages: Messages, tokens: int) -> Messages:
        """The chat to go on with; `tokens` are those before its last message."""
        if self.discard_beyond is not None and tokens > self.discard_beyond:
            return latest_alone(messages)
        return folded(messages, self.keep) if results_shown(messages) > self.most else messages

    def _ask(self, base_url: str, messages: Messages, tools: Any) -> dict[str, Any] | None:
        """The endpoint's answer; None where the messages leave no room for one."""
        body: dict[str, Any] = {"model": "policy", "messages": messages}
        if tools:
            # The environment reads the calls in the text itself.
            body |= {"tools": tools, "tool_choice": "none"}
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(f"{base_url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            said = json.loads(error.read())["error"]
            if said.get("code") == "context_length_exceeded":
                return None
            raise RuntimeError(f"the endpoint refused a request: {said['message']}") from None
