"""What stages ask for texts: the run's own policy or an endpoint behind one call, and what keeps its answers.

    Complete                `complete(prompts, count)`: `count` answers to every prompt
    EndpointCompletions     answers of a chat endpoint
    Remembered              around either: what was answered once is read from a file

An answer depends on what answers, the prompt and the count alone, so equal prompts have equal answers.
"""

import concurrent.futures
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rljax.tasks.examples import Prompt, digest
from rljax.tasks.judge import ChatEndpoint
from rljax.tasks.stages import described, read_rows, to_lines


class Completion(NamedTuple):
    """One answer."""

    text: str
    """As it was written, without the tokens that ended it."""
    is_whole: bool = True
    """Whether it ended by itself, rather than at a limit of length."""
    logprob: float | None = None
    """Mean log-prob of its tokens in nats, where it is known."""


@runtime_checkable
class Complete(Protocol):
    """What answers prompts."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that its answers depend on, JSON-ready: stages are compared by them."""
        ...

    @property
    def at_once(self) -> int:
        """Prompts of a call that are answered side by side."""
        ...

    def __call__(self, prompts: Sequence[Prompt], count: int) -> list[list[Completion]]:
        """`count` answers to each prompt, in order."""
        ...


@dataclass(frozen=True)
class EndpointCompletions:
    """Answers of a chat endpoint, `at_once` requests at a time. A prompt of text is a user's message.

    An endpoint that gives no answer ends the call (`JudgeError`), so that no row is lost to a bad hour; what was
    answered before stays with `Remembered`. ValueError for several answers at a temperature of 0, which would be equal.
    """

    endpoint: ChatEndpoint
    at_once: int = 8

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise ValueError(f"at_once={self.at_once} must be at least 1")

    @property
    def settings(self) -> Mapping[str, Any]:
        # Not the address: the same model may be served elsewhere when the pipeline goes on.
        one = self.endpoint
        return {"model": one.model, "temperature": one.temperature, "max_tokens": one.max_tokens}

    def __call__(self, prompts: Sequence[Prompt], count: int) -> list[list[Completion]]:
        if count > 1 and self.endpoint.temperature == 0:
            raise ValueError(f"{count} answers at a temperature of 0 are all one; raise ChatEndpoint.temperature")
        chats = [[{"role": "user", "content": p}] if isinstance(p, str) else [dict(m) for m in p] for p in prompts]
        asked = [chat for chat in chats for _ in range(count)]
        with concurrent.futures.ThreadPoolExecutor(self.at_once) as pool:
            replies = list(pool.map(self.endpoint.reply, asked))
        answers = [Completion(reply.text, reply.is_whole) for reply in replies]
        return [answers[i : i + count] for i in range(0, len(answers), count)]


class Remembered:
    """`complete`, whose answers are kept in a JSON Lines file and read from there when they are asked for again.

    A line is written when its prompt is answered, so that a kill costs what was under way. Answers under other settings
    are not taken for these.
    """

    def __init__(self, complete: Complete, file: str | os.PathLike):
        self._complete = complete
        self._file = Path(file)
        self._known: dict[str, list[Completion]] | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._complete.settings

    @property
    def at_once(self) -> int:
        return self._complete.at_once

    def __call__(self, prompts: Sequence[Prompt], count: int) -> list[list[Completion]]:
        if self._known is None:
            self._known = _read_answers(self._file)
        about = described(self.settings)
        keys = [f"{digest([about, prompt, count]):032x}" for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._known}

        waiting = list(missing.items())
        for start in range(0, len(waiting), self.at_once):
            part = waiting[start : start + self.at_once]
            answers = self._complete([prompt for _, prompt in part], count)
            lines = []
            for (key, prompt), given in zip(part, answers, strict=True):
                self._known[key] = [Completion(*answer) for answer in given]
                lines.append({"key": key, "prompt": prompt, "answers": [list(answer) for answer in given]})
            self._append(lines)
        return [self._known[key] for key in keys]

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        text = to_lines(lines, str(self._file))
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab") as file:
            file.write(text)


def _read_answers(file: Path) -> dict[str, list[Completion]]:
    """The answers of a file, by key, without the line that a kill has cut off, which is taken out of it."""
    if not file.exists():
        return {}
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(file, len(whole))
    return {line["key"]: [Completion(*answer) for answer in line["answers"]] for line in read_rows(whole)}
