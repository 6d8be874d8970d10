"""Tasks of reasoning-gym, solved with the help of Python programs that run in the sandbox."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rljax.envs.formats import tag_format
from rljax.envs.library.sharing import made_once
from rljax.envs.sandbox import Limits, Sandbox
from rljax.envs.tool_environment import ToolEnvironment
from rljax.envs.tools import ToolBox, answer, python_tool
from rljax.tasks.reasoning_gym import ReasoningGymVerifier, reasoning_gym_task

TAGS = tag_format({"python": "code", "answer": "answer"})
"""What `tool_format="tags"` is here."""

_WAIT_S = 20.0  # for a free sandbox


class ReasoningEnvironment(ToolEnvironment):
    """A question of reasoning-gym, with the tools `python` and `answer`. Rows are those of `rows`.

    The answer is scored as `ReasoningGymVerifier` does; one that its verifier cannot read scores 0. All episodes of a
    process share a sandbox of `workers` programs at a time, each of at most `wall_s` seconds and `memory_mb` MB, at
    the isolation `level` (None: the strongest here). `system` stands before the question; by default it says which
    tools there are and how `tool_format` calls them, and "" leaves that to a chat template. With `plain_text_ends` a
    message without a call is the answer.

    Raises ValueError if no sandbox works here, ImportError without reasoning-gym when an answer is scored.
    """

    def __init__(
        self,
        *,
        tool_format: str = "tags",
        full_score_only: bool = True,
        system: str | None = None,
        plain_text_ends: bool = True,
        workers: int = 4,
        wall_s: float = 5.0,
        memory_mb: int = 512,
        level: str | None = None,
    ):
        self._full_score_only = full_score_only
        super().__init__(
            _tools(workers, wall_s, memory_mb, level),
            self._score,
            tool_format=TAGS if tool_format == "tags" else tool_format,
            system=system,
            plain_text_ends=plain_text_ends,
        )

    def _score(self, found: Any, row: Mapping[str, Any]) -> float:
        verifier = ReasoningGymVerifier(row["dataset"], row["config"], full_score_only=self._full_score_only)
        return verifier(str(found), row["question"], row["answer"], row["metadata"])


@made_once
def _tools(workers: int, wall_s: float, memory_mb: int, level: str | None) -> ToolBox:
    limits = Limits(**{**asdict(Limits()), "wall_s": wall_s, "cpu_s": wall_s, "memory_mb": memory_mb})
    sandbox = Sandbox(limits, workers=workers, level=level)
    sandbox.open()  # for as long as the process lives: which environment is the last one, nobody knows
    return ToolBox([python_tool(sandbox), answer], timeout_s=wall_s + _WAIT_S)


def rows(dataset: str, size: int, *, seed: int = 0, config: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The distinct ones of `size` items of the reasoning-gym data set `dataset`, as rows.

    Columns: `prompt` (the question), `question`, `answer`, `metadata`, `dataset` and `config`. All are JSON-like; those
    of arc_agi and rearc hold tuples, which their verifiers rely on, so they cannot be stored as JSON. Raises what
    `reasoning_gym_task` does.
    """
    task = reasoning_gym_task(dataset, size=size, seed=seed, config=config)
    same = {"dataset": dataset, "config": dict(config or {})}
    return [{"prompt": example.prompt, **example.columns, **same} for example in task.train]
