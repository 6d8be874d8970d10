"""Several environments in one run: every row names its own."""

from collections.abc import Mapping
from typing import Any

from rljax.envs.base import Environment, Prompt, Step
from rljax.envs.formats import load
from rljax.tasks.mixture import interleave


class MixedEnvironment:
    """An episode of the environment that the row's column `environment` names.

    `environments` maps names to `{"make": "module:callable", "args": {...}}`; for every episode `make(**args)` makes
    one. Raises ValueError for an entry of another form and, in `reset`, for a row that names none of them.
    """

    def __init__(self, environments: Mapping[str, Mapping[str, Any]]):
        if not environments:
            raise ValueError("a mixed environment needs at least one environment; none was given")
        for name, entry in environments.items():
            _check(name, entry, "make")
        self._environments = environments
        self.environment: Environment | None = None

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """Make the row's environment and open an episode of it."""
        name = str(row.get("environment"))
        if name not in self._environments:
            raise ValueError(f"the row's environment {name!r} is not one of {', '.join(self._environments)}")
        entry = self._environments[name]
        self.environment = load(entry["make"])(**entry.get("args", {}))
        return self.environment.reset(row)

    def step(self, action: str) -> Step:
        """A step of the row's environment."""
        if self.environment is None:
            raise ValueError("step before reset: a mixed environment does not know its environment yet")
        return self.environment.step(action)

    def close(self) -> None:
        """Closes the row's environment, if there is anything to close."""
        getattr(self.environment, "close", lambda: None)()


def mixed_rows(parts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of several sources, taking turns.

    `parts` maps names of tasks to `{"rows": "module:function", "args": {...}, "environment": name}`; `function(**args)`
    gives the rows of one. Each row gets the columns `task` (by which task ids are told apart) and `environment` (by
    default the name of the task). Raises ValueError for an entry of another form and for rows without a `prompt`.
    """
    return interleave([_rows_of(task, entry) for task, entry in parts.items()])


def _rows_of(task: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    _check(task, entry, "rows", "environment")
    found = load(entry["rows"])(**entry.get("args", {}))
    if not found or not all(isinstance(row, Mapping) and "prompt" in row for row in found):
        raise ValueError(f"{entry['rows']} gave {found!r:.200}; it must be a non-empty list of rows with a 'prompt'")
    return [{**row, "task": task, "environment": entry.get("environment", task)} for row in found]


def _check(name: str, entry: Mapping[str, Any], path: str, *more: str) -> None:
    unknown = set(entry) - {path, "args", *more}
    value = entry.get(path)
    if unknown or not isinstance(value, str) or ":" not in value or not isinstance(entry.get("args", {}), Mapping):
        raise ValueError(
            f"the entry {name!r} is {dict(entry)!r:.200}; it must be {{{path!r}: 'module:function', 'args': {{...}}}}"
            + "".join(f", {key!r} if wanted" for key in more)
        )
