"""Environments of the package `verifiers`: its data sets as rows, its turns as steps, its rubric as the reward.

For versions 0.2, whose environments have `env_response`, stop conditions and a rubric. Later ones drive a model behind
an HTTP endpoint themselves and cannot be stepped.
"""

import json
import math
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

from rljax.envs.base import Prompt, Step
from rljax.envs.formats import Parsed, ToolFormat, get_format, load
from rljax.envs.instructions import schema_instructions
from rljax.envs.library.sharing import made_once, on_event_loop


def rows(
    env_id: str,
    *,
    args: Mapping[str, Any] | None = None,
    split: str = "train",
    size: int | None = None,
    seed: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of the data set of an environment, or `size` of them, shuffled if there is a `seed`.

    `env_id` and `args` are those of `VerifiersEnvironment`; `split` is `train` or `eval`. Columns are those of the data
    set, `prompt` (chat messages) among them. Raises as `VerifiersEnvironment` does.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"verifiers split {split!r} is not one of train, eval")
    environment = _environment(env_id, json.dumps(args or {}, sort_keys=True))
    get = environment.get_dataset if split == "train" else environment.get_eval_dataset
    found = get(n=-1 if size is None else size, seed=seed).to_list()
    return [{**row, "prompt": _without_none(row["prompt"])} for row in found]


class VerifiersEnvironment:
    """An environment of `verifiers`, one turn at a time. Rows are those of `rows`.

    `env_id` is the name of an installed environment, as for `verifiers.load_environment`, or `module:function` of a
    function that makes one; `args` go to it. It is made once for a process and serves all episodes, on one event loop:
    as `verifiers` has it, what belongs to an episode is in its state.

    The observation is the text of the messages that the environment answers with. An episode ends at its stop
    conditions; then the rubric gives the reward, and its metrics are counts, as `metric/NAME`. An error of the
    environment is raised. Where it has tools, they are called in `tool_format`; a call that cannot be read is an
    observation (the count `malformed_calls`) of which the environment never hears. `system` stands before the prompt;
    by default it says which tools there are, and "" leaves that to a chat template, with `schemas`.

    Raises ImportError without verifiers, ValueError for an environment that cannot be loaded, is not made of turns,
    rewards a group of episodes together, or has pictures; for one that rewrites what was said, when it does.
    """

    def __init__(
        self,
        env_id: str,
        *,
        args: Mapping[str, Any] | None = None,
        tool_format: str | ToolFormat = "hermes",
        system: str | None = None,
    ):
        self._environment = _environment(env_id, json.dumps(args or {}, sort_keys=True))
        self.format = get_format(tool_format)
        self._env_id = env_id
        self._system = system
        self.schemas: list[dict[str, Any]] = []

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """The environment's first messages, behind its tools."""
        self._state, self._messages = on_event_loop(self._open(dict(row)), of="verifiers")
        self.schemas = [_schema(tool) for tool in self._state["tool_defs"]]
        opening = [_message(message) for message in self._messages]
        system = self._system
        if system is None:
            system = schema_instructions(self.schemas, self.format) if self.schemas else ""
        if not system:
            return opening
        if opening and opening[0]["role"] == "system":
            own = opening.pop(0)["content"]
            system = f"{own}\n\n{system}"
        return [{"role": "system", "content": system}, *opening]

    def step(self, action: str) -> Step:
        """Hand the turn to the environment and read its answer."""
        parsed = self.format.parse(action) if self.schemas else Parsed()
        counts = {"tool_calls": float(len(parsed.calls)), "malformed_calls": float(parsed.problem is not None)}
        if parsed.problem is not None:
            return Step(parsed.problem.text, counts={**counts, "tool_calls": 0.0})
        new, done = on_event_loop(self._answer(action, parsed), of="verifiers")
        text = "\n\n".join(_text(message) for message in new)
        if not done:
            return Step(text, counts=counts)
        metrics = {f"metric/{name}": float(value) for name, value in (self._state["metrics"] or {}).items()}
        counts |= {name: value for name, value in metrics.items() if math.isfinite(value)}
        return Step(text, float(self._state["reward"]), True, counts)

    async def _open(self, row: dict[str, Any]) -> tuple[Any, list[Any]]:
        environment = self._environment
        state = await environment.init_state(row, _no_client(), "policy", None)
        state["timing"].generation.start = time.time()
        state = await environment.setup_state(state) or state
        self._raise(state)
        return state, list(await self._prompt(state))

    async def _answer(self, action: str, parsed: Parsed) -> tuple[list[Any], bool]:
        """One round of the environment's own loop: its new messages, and whether it is over."""
        environment = self._environment
        state = self._state
        await environment.add_model_response(state, self._messages, _response(action, parsed))
        before = [*self._messages, *state["trajectory"][-1]["completion"]]

        new: list[Any] = []
        if not await environment.is_completed(state):
            after = list(await self._prompt(state))
            # the last answer of an environment stands in no prompt
            final = state.get("final_env_response")
            if final is None and after[: len(before)] != before:
                raise ValueError(
                    f"verifiers environment {self._env_id!r} rewrites what was said before; only those whose "
                    "conversations grow at the end can be used"
                )
            new = _normal(final) if final is not None else after[len(before) :]
            self._messages = after
            if not await environment.is_completed(state):
                return new, False

        self._raise(state)
        await environment.cleanup(state)
        await environment.rubric.score_rollout(state)
        await environment.rubric.cleanup(state)
        return new, True

    async def _prompt(self, state: Any) -> list[Any]:
        return _normal(await self._environment.get_prompt_messages(state))

    def _raise(self, state: Any) -> None:
        if state.get("error") is not None:
            raise RuntimeError(f"verifiers environment {self._env_id!r} failed: {state['error']!r}")


def _verifiers() -> Any:
    try:
        import verifiers
        from verifiers.envs.multiturn_env import MultiTurnEnv  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"environments of verifiers need the extra verifiers, with a version 0.2 ({error}): "
            "pip install 'rljax-lm[verifiers]'"
        ) from error
    return verifiers


@made_once
def _environment(env_id: str, args: str) -> Any:
    vf = _verifiers()
    from verifiers.envs import environment as module

    # an environment takes over the signals of the process, which it may only in the main thread, and which are ours
    ours = module.signal
    quiet = types.SimpleNamespace(**vars(module.signal))
    quiet.signal = lambda *_: None
    module.signal = quiet
    try:
        made = load(env_id)(**json.loads(args)) if ":" in env_id else vf.load_environment(env_id, **json.loads(args))
    except RuntimeError as error:  # what verifiers makes of any error
        raise ValueError(
            f"verifiers environment {env_id!r} with the arguments {args} cannot be loaded ({error})"
        ) from error
    finally:
        module.signal = ours

    # what cannot be played turn by turn, each alone
    if not isinstance(made, vf.MultiTurnEnv):
        raise ValueError(
            f"verifiers environment {env_id!r} is a {type(made).__name__}; it must be a MultiTurnEnv (of a group, "
            "take its environments one by one)"
        )
    if made.requires_group_rollouts:
        raise ValueError(
            f"verifiers environment {env_id!r} rewards a group of episodes together; its rubric must score each alone"
        )
    return made


@made_once
def _no_client() -> Any:
    """A client for the state of an episode; nobody but the policy speaks."""
    from verifiers.clients import Client

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("this environment asks for a model of its own, which it does not get here")

    methods = dict.fromkeys(Client.__abstractmethods__, refuse)
    return type("NoClient", (Client,), methods)(None)


def _response(action: str, parsed: Parsed) -> Any:
    from verifiers.types import Response, ResponseMessage, ToolCall

    calls = [
        ToolCall(id=f"call_{i}", name=call.name, arguments=json.dumps(dict(call.arguments)))
        for i, call in enumerate(parsed.calls)
    ]
    reason: Any = "tool_calls" if calls else "stop"
    message = ResponseMessage(content=action, tool_calls=calls or None, finish_reason=reason, is_truncated=False)
    return Response(id="rljax", created=int(time.time()), model="policy", message=message)


def _normal(messages: Any) -> list[Any]:
    from verifiers.utils.message_utils import maybe_normalize_messages

    return list(maybe_normalize_messages(messages, field_name="messages"))


def _schema(tool: Any) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _message(message: Any) -> dict[str, str]:
    return {"role": str(message.role), "content": _text(message)}


def _text(message: Any) -> str:
    content = message.content or ""
    if isinstance(content, str):
        return content
    parts = [part if isinstance(part, Mapping) else part.model_dump() for part in content]
    if any(part.get("type") != "text" for part in parts):
        raise ValueError(f"a message holds {[part.get('type') for part in parts]}; only text can be used")
    return "".join(part["text"] for part in parts)


def _without_none(messages: Any) -> Any:
    """A table of messages has every key in every row."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        return messages
    return [{key: value for key, value in message.items() if value is not None} for message in messages]
