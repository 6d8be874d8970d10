"""An environment made of tools: the policy thinks, calls tools, reads results, and answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rljax.envs.base import Prompt, Step
from rljax.envs.formats import ToolFormat, after_thinking, get_format
from rljax.envs.instructions import tool_instructions
from rljax.envs.tools import ToolBox

NUDGE = "Call a tool, or give the final answer."


class ToolEnvironment:
    """A question of the row's column `prompt`, answered with the help of tools.

    An episode ends when a final tool is called (`answer`, `finish`), or, with `plain_text_ends`, at a message without a
    call, which then is the answer. The reward is `reward(answer, row)`, given at the end; an episode that runs into a
    limit gets none. Steps count `tool_calls`, `tool_errors` and `malformed_calls`.

    `system` stands before the question; None says `task`, if there is one, and which tools there are.
    """

    def __init__(
        self,
        tools: ToolBox,
        reward: Callable[[Any, Mapping[str, Any]], float],
        *,
        tool_format: str | ToolFormat = "hermes",
        system: str | None = "",
        task: str = "",
        plain_text_ends: bool = True,
    ):
        self.tools = tools
        self.format = get_format(tool_format)
        self._reward = reward
        self._system = _instructions(task, tools, self.format) if system is None else system
        self._plain_text_ends = plain_text_ends
        self._row: Mapping[str, Any] = {}

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """The prompt, behind the system message if there is one (in front of text, it is a paragraph). A first message
        carries the schemas of the tools, for the chat template to show."""
        self._row = row
        prompt: str | Sequence[Mapping[str, Any]] = row["prompt"]
        if isinstance(prompt, str):
            return f"{self._system}\n\n{prompt}" if self._system else prompt
        messages = [{"role": "system", "content": self._system}, *prompt] if self._system else list(prompt)
        return [{**messages[0], "tools": self.tools.schemas}, *messages[1:]]

    def step(self, action: str) -> Step:
        """Call what the message calls, in order, up to a final tool or a call that cannot be read."""
        parsed = self.format.parse(action)
        texts: list[str] = []
        counts = dict.fromkeys(("tool_calls", "tool_errors", "malformed_calls"), 0.0)
        for call in parsed.calls:
            result = self.tools.call(call)
            counts["tool_calls"] += 1
            counts["tool_errors"] += result.failure is not None
            texts.append(result.text)
            if result.is_final:
                return Step("\n\n".join(texts), float(self._reward(result.value, self._row)), True, counts)

        # calls before one that cannot be read were run, and their results are shown with what is wrong
        if parsed.problem is not None:
            counts["malformed_calls"] += 1
            texts.append(parsed.problem.text)
        if texts:
            return Step("\n\n".join(texts), counts=counts)

        if not self._plain_text_ends:
            return Step(NUDGE, counts=counts)
        return Step("", float(self._reward(after_thinking(action).strip(), self._row)), True, counts)


def _instructions(task: str, tools: ToolBox, tool_format: ToolFormat) -> str:
    which = tool_instructions(tools, tool_format)
    return f"{task}\n\n{which}" if task else which
