"""Multi-turn function calling of BFCL v4: the package's questions, its stateful tools and its own checker.

The package `bfcl_eval` keeps the state of its tools in a module of its own, under names. Every episode has a name that
no other has, and its state is dropped with it.
"""

import functools
import itertools
import json
import keyword
import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rljax.envs.base import Prompt, Step
from rljax.envs.formats import ToolCall, ToolFormat, get_format
from rljax.envs.instructions import schema_instructions

CATEGORIES = ("base", "miss_func", "miss_param", "long_context")
STEPS_PER_TURN = 20  # the package's MAXIMUM_STEP_LIMIT
"""Calls after which the package gives up on a request of the user, and with it on the episode."""

_SYSTEM = (
    "You do what the user asks by calling functions. Once a request is done, or cannot be done, say so without a call; "
    "the next request follows."
)
_MORE = "I have updated some more functions you can choose from. What about now?"
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
_MOST_DIGITS = 1000
_MOST_BITS = 100_000
_ERROR = "Error during execution"
_NUMBERS = itertools.count()
_LOCK = threading.Lock()  # some tools keep a result or a precision for all instances


def rows(category: str = "base", *, size: int | None = None) -> list[dict[str, Any]]:
    """The questions of a category, or the first `size` of them, as rows.

    Columns: `prompt` (the first request of the user), `id`, `question` (the messages of every request),
    `initial_config`, `involved_classes`, `missed_function` (by request, the functions that are there only from then
    on) and `ground_truth`. Raises ValueError for an unknown category, ImportError without bfcl-eval.
    """
    name = category.removeprefix("multi_turn_")
    if name not in CATEGORIES:
        raise ValueError(f"BFCL category {category!r} is not one of {', '.join(CATEGORIES)}")

    file = f"BFCL_v4_multi_turn_{name}.json"
    answers = {entry["id"]: entry["ground_truth"] for entry in _lines(_data() / "possible_answer" / file)}
    entries = _lines(_data() / file)[:size]

    return [
        {
            "prompt": _text(entry["question"][0]),
            **{key: entry[key] for key in ("id", "question", "initial_config", "involved_classes")},
            "missed_function": entry.get("missed_function", {}),
            "ground_truth": answers[entry["id"]],
        }
        for entry in entries
    ]


class BfclEnvironment:
    """A user with several requests, one after the other, and functions that change the state of simulated services.
    Rows are those of `rows`.

    A message with calls runs them and shows what they return; one without moves on to the next request. After the last
    one the package's multi-turn checker compares states and results with those of the true calls: the reward is 1 or 0.
    More than `STEPS_PER_TURN` messages on one request end the episode with 0, as in the package. Unlike there, a call
    that cannot be read, or of a function that is not there, is an observation and not the end of the request. One that
    is held back works for those who guess it, as in the package.

    `system` stands before the first request; by default it says which functions there are and how `tool_format` calls
    them. With "" that is left to a chat template, which finds them in `schemas` after `reset`. Requests after the first
    one come as observations, behind `user_mark`. Steps count `tool_calls`, `tool_errors`, `malformed_calls` and
    `requests`. An episode needs some 40 turns of `EnvironmentLimits` at most.

    Raises ImportError without bfcl-eval, ValueError for the format `tags`, whose calls hold one argument.
    """

    def __init__(
        self, *, tool_format: str | ToolFormat = "hermes", system: str | None = None, user_mark: str = "[user]\n"
    ):
        self._checker, self._utils = _package()
        self.format = get_format(tool_format)
        if self.format.name == "tags":
            raise ValueError("tool format 'tags' holds one argument a call, which is not enough; take hermes or llama3")
        self._system = system
        self._user_mark = user_mark
        self.schemas: list[dict[str, Any]] = []

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """The functions, in a system message, and the first request."""
        self._row = row
        self._turn = 0
        self._decoded: list[list[list[str]]] = [[]]  # by request and message: the calls that were run

        # a name of its own, under which the package keeps the tools' state until this object goes
        self._name = f"rljax{next(_NUMBERS)}x"
        weakref.finalize(self, _forget, self._utils, self._name, row["id"], tuple(row["involved_classes"]))

        held_back = {name for names in row["missed_function"].values() for name in names}
        documented = [schema for name in row["involved_classes"] for schema in _schemas(name)]
        self._names = {schema["function"]["name"] for schema in documented}
        self._later = [schema for schema in documented if schema["function"]["name"] in held_back]
        self.schemas = [schema for schema in documented if schema["function"]["name"] not in held_back]

        request = {"role": "user", "content": self._request()}
        system = self._system
        if system is None:
            system = f"{_SYSTEM}\n{schema_instructions(self.schemas, self.format)}"
        return [{"role": "system", "content": system}, request] if system else [request]

    def step(self, action: str) -> Step:
        """Run the calls of a message up to one that cannot be read, or move on to the next request."""
        parsed = self.format.parse(action)
        counts = dict.fromkeys(("tool_calls", "tool_errors", "malformed_calls", "requests"), 0.0)
        if not parsed.calls and parsed.problem is None:
            return self._next(counts)

        texts: list[str] = []
        done: list[str] = []
        for call in parsed.calls:
            counts["tool_calls"] += 1
            problem = self._problem(call)
            if problem is None:
                done.append(_written(call))
                texts.append(self._run(done[-1]))
                counts["tool_errors"] += texts[-1].startswith(_ERROR)
            else:
                counts["tool_errors"] += 1
                texts.append(problem)
        if parsed.problem is not None:
            counts["malformed_calls"] += 1
            texts.append(parsed.problem.text)

        # a message without a call that could be run counts too: it took one of the steps
        self._decoded[-1].append(done)
        if len(self._decoded[-1]) > STEPS_PER_TURN:
            return Step("\n".join(texts), 0.0, True, counts)
        return Step("\n".join(texts), counts=counts)

    def _next(self, counts: dict[str, float]) -> Step:
        self._turn += 1
        counts["requests"] += 1
        if self._turn == len(self._row["question"]):
            return Step("", self._score(), True, counts)
        self._decoded.append([])
        return Step(self._user_mark + self._request(), counts=counts)

    def _request(self) -> str:
        """What the user says in this turn; functions that come with it go before."""
        names = self._row["missed_function"].get(str(self._turn), ())
        new = [schema for schema in self._later if schema["function"]["name"] in names]
        self.schemas = self.schemas + new
        text = _text(self._row["question"][self._turn])
        return "\n".join([*(_line(schema) for schema in new), text or _MORE])

    def _problem(self, call: ToolCall) -> str | None:
        """Why a call is not run. The package evaluates calls as Python text, so names must be names."""
        if call.name not in self._names:
            return f"There is no function {call.name[:50]!r}."
        strange = [key for key in call.arguments if not str(key).isidentifier() or keyword.iskeyword(str(key))]
        if strange:
            return f"{call.name} has no argument {str(strange[0])[:50]!r}."
        return _too_much(call)

    def _run(self, call: str) -> str:
        row = self._row
        with _LOCK:
            results, _ = self._utils.execute_multi_turn_func_call(
                func_call_list=[call],
                initial_config=row["initial_config"],
                involved_classes=row["involved_classes"],
                model_name=self._name,
                test_entry_id=row["id"],
                long_context="long_context" in row["id"],
            )
        return results[0]

    def _score(self) -> float:
        row = self._row
        decoded = [[calls for calls in turn if calls] for turn in self._decoded]
        entry = {key: row[key] for key in ("id", "initial_config", "involved_classes")}
        category = row["id"].rsplit("_", 1)[0]
        with _LOCK:
            verdict = self._checker.multi_turn_checker(decoded, row["ground_truth"], entry, category, self._name)
        return float(verdict["valid"])


@functools.cache
def _package() -> tuple[Any, Any]:
    try:
        from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker, multi_turn_utils
    except ImportError as error:
        raise ImportError(
            f"BFCL needs the package bfcl-eval and the extra bfcl ({error}): pip install 'rljax-lm[bfcl]' && "
            "pip install --no-deps bfcl-eval==2026.3.23 (its dependencies are for models behind an API, and clash)"
        ) from error
    return multi_turn_checker, multi_turn_utils


def _data() -> Path:
    return Path(_package()[1].__file__).parents[2] / "data"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


@functools.cache
def _schemas(class_name: str) -> list[dict[str, Any]]:
    """The functions of one service, as chat templates expect them."""
    from bfcl_eval.constants.executable_backend_config import MULTI_TURN_FUNC_DOC_FILE_MAPPING

    documented = _lines(_data() / "multi_turn_func_doc" / MULTI_TURN_FUNC_DOC_FILE_MAPPING[class_name])
    fields = ("name", "description", "parameters")
    return [{"type": "function", "function": {key: _json_types(entry[key]) for key in fields}} for entry in documented]


def _json_types(value: Any) -> Any:
    """The package's names of types turned into those of JSON schema."""
    if isinstance(value, list):
        return [_json_types(part) for part in value]
    if not isinstance(value, dict):
        return value
    is_type = {key: key == "type" and isinstance(part, str) for key, part in value.items()}
    return {key: _TYPES.get(part, part) if is_type[key] else _json_types(part) for key, part in value.items()}


def _line(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema["function"], ensure_ascii=False)


def _text(messages: Sequence[Mapping[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages)


def _written(call: ToolCall) -> str:
    return f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})"


def _too_much(call: ToolCall) -> str | None:
    """The package's arithmetic has no limits: a large power or precision would never come back."""
    numbers = {key: value for key, value in call.arguments.items() if isinstance(value, (int, float))}
    digits = numbers.get("precision", 0)
    base = numbers.get("base", 0)
    exponent = numbers.get("exponent", 0)
    bits = math.log2(abs(base)) * exponent if base and call.name == "power" else 0
    if digits > _MOST_DIGITS or bits > _MOST_BITS:
        return f"{_ERROR}: the numbers of {call.name} are too large."
    return None


def _forget(utils: Any, name: str, entry: str, classes: Sequence[str]) -> None:
    """Take the tools of an episode out of the package's module."""
    for run in ("", "_eval", "_ground_truth_eval"):
        for class_name in classes:
            instance = f"{name}{run}_{entry}_{class_name}_instance"
            vars(utils).pop("".join("_" if c in "-./:" else c for c in instance), None)
