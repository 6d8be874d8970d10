"""Language models as judges, behind any endpoint that speaks the OpenAI chat protocol.

A judge that cannot be reached, or whose reply cannot be read, raises `JudgeError`: the sample then counts as failed,
and takes no part in statistics or gradient. That is not the same as a reward of 0, which would punish the policy for
the judge. Before a judge becomes a reward, measure it (`rljax.tasks.judge_bias`).

A reward's time limit (`RewardSpec.timeout_s`) ends its process, so it must leave room for all attempts:
`ChatEndpoint.longest_s`, times two for a judge that asks twice.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from rljax.settings import is_web_address
from rljax.tasks.answers import Extractor, whole_completion
from rljax.tasks.examples import Prompt

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})

T = TypeVar("T")


class JudgeError(RuntimeError):
    """The judge gave no usable reply."""


class Reply(NamedTuple):
    """What an endpoint answers to a chat."""

    text: str
    """Never empty."""
    is_whole: bool
    """False where the endpoint says that a limit of length cut it off."""


@dataclass(frozen=True, kw_only=True)
class ChatEndpoint:
    """`POST {base_url}/chat/completions`, such as `http://localhost:8000/v1`.

    An attempt fails after `timeout_s` seconds without data, for a lost connection, for a status of `RETRIED_STATUS`,
    and for a body that is no chat completion; up to `retries` more follow. Other statuses fail at once.
    """

    base_url: str
    """Begins with http:// or https://."""
    model: str
    """The name that the endpoint knows."""
    api_key_variable: str = ""
    """The environment variable that holds the key; empty is no key."""
    temperature: float = 0.0
    """0 for the same verdict each time, as far as the endpoint keeps to it."""
    max_tokens: int = 512
    """Of a reply. Raise it for judges that think."""
    timeout_s: float = 30.0
    """Seconds of an attempt without data."""
    retries: int = 3
    """Attempts that may follow the first."""
    backoff_s: float = 1.0
    """Seconds of the first pause between attempts; each further one is twice as long."""
    max_pause_s: float = 20.0
    """Seconds of a pause at most."""

    def __post_init__(self) -> None:
        if not re.match(r"https?://", self.base_url):
            raise ValueError(f"base_url {self.base_url!r} must begin with http:// or https://")
        if not is_web_address(self.base_url):
            raise ValueError(f"base_url {self.base_url!r} names no host and port, such as http://host:8000/v1")
        if self.retries < 0 or not self.timeout_s > 0 or self.backoff_s < 0 or self.max_pause_s < 0:
            raise ValueError(
                f"retries {self.retries}, backoff_s {self.backoff_s} and max_pause_s {self.max_pause_s} must not be "
                f"negative, and timeout_s {self.timeout_s} must be positive"
            )

    @property
    def longest_s(self) -> float:
        """Seconds that a call takes if every attempt times out."""
        return self.timeout_s * (self.retries + 1) + sum(self._pause(i) for i in range(self.retries))

    def ask(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of `reply`."""
        return self.reply(messages).text

    def reply(self, messages: Sequence[dict[str, str]]) -> Reply:
        """The reply to a chat. JudgeError when every attempt failed."""
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        request = urllib.request.Request(
            f"{self.base_url.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **self._authorisation()},
            method="POST",
        )

        problem = ""
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(request)
            except urllib.error.HTTPError as error:  # before OSError, which it is one of
                problem = f"status {error.code}: {error.read(200).decode(errors='replace')}"
                if error.code not in RETRIED_STATUS:
                    raise JudgeError(f"{request.full_url} refused the request, {problem}") from None
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"

            if attempt < self.retries:
                time.sleep(self._pause(attempt))
        raise JudgeError(f"{request.full_url} gave no reply in {self.retries + 1} attempts; the last: {problem}")

    def _attempt(self, request: urllib.request.Request) -> Reply:
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            choice = json.loads(response.read())["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str) or not text.strip():
            raise ValueError("the reply is empty")
        return Reply(text, choice.get("finish_reason") != "length")

    def _authorisation(self) -> dict[str, str]:
        if not self.api_key_variable:
            return {}
        key = os.environ.get(self.api_key_variable)
        if not key:
            raise JudgeError(f"the environment variable {self.api_key_variable!r} with the judge's key is not set")
        return {"Authorization": f"Bearer {key}"}

    def _pause(self, attempt: int) -> float:
        return min(self.backoff_s * 2**attempt, self.max_pause_s)


ANSWER_PROMPT = """Decide whether an answer to a question is right. It is right if it means the same as the reference.

Question: {question}

Reference: {reference}

Answer: {answer}

Reply with one word, YES or NO."""

PAIR_PROMPT = """Compare two answers to a question.

Question: {question}

Answer A: {first}

Answer B: {second}

Which one is better? Reply with one letter: A, B, or C if they are equally good."""

FACT_PROMPT = """For each numbered statement, decide whether the text says so. Do not judge whether the text is right.

Text: {text}

Statements:
{facts}

Reply with a JSON list of {count} numbers, 1 for a statement that the text makes and 0 for one that it does not."""


@dataclass(frozen=True, kw_only=True)
class AnswerJudge:
    """1 if the judge finds that the answer means the same as the one in `column`, else 0; 0 without an answer, for
    which nobody is asked (DeepDive, 2509.10446)."""

    endpoint: ChatEndpoint
    column: str = "answer"
    extract: Extractor = whole_completion
    template: str = ANSWER_PROMPT

    @property
    def required_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, prompt: Prompt, completion: str, **columns: Any) -> float:
        answer = self.extract(completion)
        if not answer:
            return 0.0
        reference = str(columns[self.column])
        text = self.template.format(question=question_of(prompt), reference=reference, answer=answer)
        return float(_ask(self.endpoint, text, read_yes_no))


@dataclass(frozen=True, kw_only=True)
class PairJudge:
    """1 if the completion beats the answer in `column`, -1 if it loses, 0 for a tie; asked twice, with positions
    swapped, and 0 as well where the two verdicts disagree (2406.07791)."""

    endpoint: ChatEndpoint
    column: str = "baseline"
    extract: Extractor = whole_completion
    template: str = PAIR_PROMPT

    @property
    def required_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def __call__(self, prompt: Prompt, completion: str, **columns: Any) -> float:
        answer = self.extract(completion)
        if not answer:
            return -1.0
        return swapped_reward(self.verdicts(prompt, answer, str(columns[self.column])))

    def verdicts(self, prompt: Prompt, answer: str, other: str) -> str:
        """Two letters: the verdict with `answer` shown first, and that with `other` first."""
        question = question_of(prompt)
        shown = [(answer, other), (other, answer)]
        texts = [self.template.format(question=question, first=a, second=b) for a, b in shown]
        return "".join(_ask(self.endpoint, text, read_choice) for text in texts)


@dataclass(frozen=True, kw_only=True)
class FactJudge:
    """For each fact 1 if the judge finds it stated in the completion, else 0: the `stated` of `GroundedAnswer`
    (Perception-R1, 2506.07218). Presence is judged, not truth."""

    endpoint: ChatEndpoint
    template: str = FACT_PROMPT

    def __call__(self, completion: str, facts: Sequence[str]) -> list[float]:
        listed = "\n".join(f"{i}. {fact}" for i, fact in enumerate(facts, 1))
        text = self.template.format(text=completion, facts=listed, count=len(facts))
        return _ask(self.endpoint, text, lambda reply: read_flags(reply, len(facts)))


def swapped_reward(verdicts: str) -> float:
    """`AB` (the first answer won in both orders) is 1, `BA` -1, all else 0."""
    return {"AB": 1.0, "BA": -1.0}.get(verdicts, 0.0)


def read_yes_no(reply: str) -> bool:
    """Whether the last YES or NO of a reply is YES. ValueError without one."""
    found = re.findall(r"\b(yes|no)\b", reply.lower())
    if not found:
        raise ValueError("neither YES nor NO")
    return found[-1] == "yes"


def read_choice(reply: str) -> str:
    """The last A, B or C that stands alone in a reply. ValueError without one."""
    found = re.findall(r"(?<![\w'])([ABC])(?![\w'])", reply)
    if not found:
        raise ValueError("none of A, B and C")
    return found[-1]


def read_flags(reply: str, count: int) -> list[float]:
    """The last list of `count` zeros and ones in a reply. ValueError without one."""
    for text in reversed(re.findall(r"\[[^\[\]]*\]", reply)):
        try:
            flags = json.loads(text)
        except ValueError:
            continue
        if len(flags) == count and all(flag in (0, 1) for flag in flags):
            return [float(flag) for flag in flags]
    raise ValueError(f"no list of {count} zeros and ones")


def question_of(prompt: Prompt) -> str:
    """The prompt as text: of a chat, its last user message."""
    if isinstance(prompt, str):
        return prompt
    asked = [str(message.get("content", "")) for message in prompt if message.get("role") == "user"]
    return asked[-1] if asked else ""


def _ask(endpoint: ChatEndpoint, text: str, read: Callable[[str], T]) -> T:
    reply = endpoint.ask([{"role": "user", "content": text}])
    try:
        return read(reply)
    except ValueError as error:
        raise JudgeError(f"the judge's reply {reply[-80:]!r} cannot be read: {error}") from None
