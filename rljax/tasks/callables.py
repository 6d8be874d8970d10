"""Rewards as plain callables: how they are found by name, and what they ask for.

A reward takes any of `prompt`, `completion`, `token_ids` and of the data row's columns, by keyword, and returns a
number for one sample, or None where it does not apply:

    def reward(completion, answer): return float(completion.strip() == answer)
    def reward(prompt, completion, token_ids, **columns): ...

A batch reward takes lists and returns a list of numbers. It is known by a parameter named `prompts` or `completions`,
or by the decorator `batch_reward`; `token_ids` and columns are lists as well:

    def reward(completions, answer): return [float(c == a) for c, a in zip(completions, answer)]
"""

import copy
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rljax.tasks.examples import Prompt

SAMPLE_ARGUMENTS = ("prompt", "completion", "token_ids")
BATCH_ARGUMENTS = ("prompts", "completions", "token_ids")


@dataclass(frozen=True)
class RewardInput:
    """One sample: the prompt as in the data, the completion as text and as token ids, the columns of the data row."""

    prompt: Prompt
    completion: str
    token_ids: Sequence[int] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


def batch_reward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function as one that scores a whole batch, whatever its parameters are called."""
    function.is_batch_reward = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Wants:
    """What a reward asks for: the arguments of the sample, and the columns it cannot do without."""

    is_batch: bool
    arguments: tuple[str, ...]
    columns: tuple[str, ...]  # without a default
    optional_columns: tuple[str, ...]
    all_columns: bool

    def keywords(self, inputs: Sequence[RewardInput]) -> dict[str, Any]:
        """The keyword arguments of one call; a single input for a per-sample reward. A missing column is left out of a
        per-sample call and None in a batch. Prompts and columns are copies: what a reward does to them reaches neither
        the data nor the next call."""
        if not self.is_batch:
            (one,) = inputs
            prompt = _copy(one.prompt)
            return {**self._columns(one.columns), **self._given(prompt, one.completion, list(one.token_ids))}

        # rows may differ in their columns: each column is as long as the batch
        rows = [self._columns(i.columns) for i in inputs]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        prompts = [_copy(i.prompt) for i in inputs]
        completions = [i.completion for i in inputs]
        # the sample's own arguments last: a column of the same name does not hide them
        return {**columns, **self._given(prompts, completions, [list(i.token_ids) for i in inputs])}

    def _given(self, *values: Any) -> dict[str, Any]:
        names = BATCH_ARGUMENTS if self.is_batch else SAMPLE_ARGUMENTS
        return {name: value for name, value in zip(names, values) if name in self.arguments}

    def _columns(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        named = (*self.columns, *self.optional_columns)
        return {name: _copy(value) for name, value in columns.items() if self.all_columns or name in named}


def _copy(value: Any) -> Any:
    """A deep copy; the value itself where it cannot change, or cannot be copied, as an open file."""
    if isinstance(value, (str, int, float, bool, bytes, type(None))):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def inspect_reward(function: Callable[..., Any], name: str) -> Wants:
    """Read a reward's signature. Raises ValueError if it cannot be called as a reward."""
    if inspect.isclass(function):
        raise ValueError(f"reward {name} is the class {function.__name__}; give an instance of it, or a function")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise ValueError(f"reward {name} is an async function; a reward must return a number when it is called")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise ValueError(f"the signature of reward {name} cannot be read; wrap it in a Python function") from None

    parameters = signature.parameters.values()
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    is_batch = getattr(function, "is_batch_reward", False) or any(p.name in BATCH_ARGUMENTS[:2] for p in by_name)

    allowed = BATCH_ARGUMENTS if is_batch else SAMPLE_ARGUMENTS
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    arguments = allowed if takes_all else tuple(p.name for p in by_name if p.name in allowed)
    # `completions` beside `prompt`: neither kind of reward
    mixed = [p.name for p in by_name if is_batch and p.name in SAMPLE_ARGUMENTS[:2]]
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters) or not arguments or mixed:
        raise ValueError(
            f"reward {name}{signature} cannot be called as a reward; it must take some of {SAMPLE_ARGUMENTS}, or of "
            f"{BATCH_ARGUMENTS} for a whole batch, by keyword, and may take columns of the data by name or as **columns"
        )

    columns = [p.name for p in by_name if p.name not in allowed and p.default is p.empty]
    optional = [p.name for p in by_name if p.name not in allowed and p.default is not p.empty]
    # what a callable with **columns knows of itself, such as the column with the right answer
    columns += [c for c in getattr(function, "required_columns", ()) if c not in columns]
    return Wants(is_batch, arguments, tuple(columns), tuple(optional), takes_all)


def check_columns(wants: Wants, name: str, columns: Collection[str]) -> None:
    """Raise ValueError if a data row with these columns cannot be scored by the reward."""
    missing = [c for c in wants.columns if c not in columns]
    if missing:
        raise ValueError(
            f"reward {name} wants the columns {missing}, and the data has {sorted(columns)}; "
            "rename the parameter or the column, or give the parameter a default"
        )


def load_callable(path: str) -> Callable[..., Any]:
    """Import `module:function` (or `module:object.attribute`); modules of the working directory are found.

    Raises ValueError, saying which part failed, if the module or the attribute is missing, the module does not
    import, or the attribute cannot be called.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute or ":" in attribute:
        raise ValueError(f"{path!r} must have the form 'module:function', such as 'my_rewards:score'")

    # a script of another folder was started, or the file was written since the last look
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        value = importlib.import_module(module_name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        if missing:
            remedy = other_place(module_name) or (
                f"no module of that name is on the Python path or in {os.getcwd()}; write 'module:function' without "
                "'.py'"
            )
        else:
            remedy = "repair the module, or install what it needs"
        raise ValueError(
            f"{path!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); {remedy}"
        ) from error

    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            found = [n for n in dir(value) if not n.startswith("_") and inspect.isfunction(getattr(value, n))]
            raise ValueError(f"{path!r}: {module_name!r} has no {attribute!r}; functions there: {found}") from None
        except ImportError as error:  # a name that stands elsewhere; its package says where
            raise ValueError(f"{path!r}: {error}") from None
    if not callable(value):
        raise ValueError(f"{path!r} is {value!r}, which cannot be called; name a function")
    return value


def other_place(module_name: str) -> str:
    """Where a module is that is not where it was looked for, if its package knows; else the empty text."""
    package, _, name = module_name.rpartition(".")
    try:
        getattr(importlib.import_module(package), name)
    except ImportError as error:
        return "" if isinstance(error, ModuleNotFoundError) else str(error)
    except Exception:
        return ""
    return ""
