"""What an environment is. Two methods; everything else is optional.

class Guess:
    def reset(self, row):
        self.number = row["number"]
        return "Guess a number from 1 to 9."

    def step(self, action):
        right = action.strip() == str(self.number)
        return Step("right" if right else "wrong", reward=float(right), done=right)
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

from rljax.tasks.examples import whole_text

Prompt = str | Sequence[Mapping[str, Any]]
"""What opens an episode: text, or a list of chat messages."""

DONE = "done"
"""The environment ended the episode."""
TURNS = "turns"
"""The limit on turns ended it; so do the next two."""
TOOL_CALLS = "tool_calls"
SECONDS = "seconds"
RAISED = "raised"
"""The environment failed: it raised an exception."""
TIMEOUT = "timeout"
"""It took too long over one reset or step."""
MALFORMED = "malformed"
"""It returned what no environment may."""
CRASHED = "crashed"
"""It took its worker process down."""
REPLAY = "replay"
"""It did not repeat itself when its actions were replayed."""

FAILED = (RAISED, TIMEOUT, MALFORMED, CRASHED, REPLAY)
"""Reasons that are the environment's fault: the episode has no reward."""
END_REASONS = (DONE, TURNS, TOOL_CALLS, SECONDS, *FAILED)
"""Why an episode ended."""


@dataclass(frozen=True)
class Step:
    """What an action led to."""

    observation: str
    """The text that the policy reads next."""
    reward: float = 0.0
    """The reward of an episode is the sum over its steps."""
    done: bool = False
    """Whether the episode is over."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """Whatever else there is to count, added up over the episode; `tool_calls` is the one that has a limit."""


@runtime_checkable
class Environment(Protocol):
    """One episode at a time. `row` is a row of data as a mapping, `action` the text of one turn of the policy.

    One that holds more than memory (a process, a file, a connection) may have a method `close()`, which is called once
    the episode is needed no more, also after a reset or step that failed or came too late.
    """

    def reset(self, row: Mapping[str, Any]) -> Prompt: ...

    def step(self, action: str) -> Step: ...


class OneAnswer:
    """What a curriculum asks the policy by itself (`rljax.tasks.ASKED`), in the place of a run's environment: the
    row's prompt is read, and the first turn ends the episode."""

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        prompt: Prompt = row["prompt"]
        return prompt

    def step(self, action: str) -> Step:
        return Step("", done=True)


@runtime_checkable
class Snapshots(Protocol):
    """An environment that can also be copied. It is asked for a snapshot after every step, and `copy.deepcopy` of it is
    kept, so it may be live state but no handle to one. An environment without these methods is forked by replaying its
    actions."""

    def snapshot(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


@dataclass
class EnvironmentLimits:
    """What one episode may take. Raises ValueError, here and in `check`, unless every limit is positive."""

    turns: int = 16
    """Turns of the policy. Raise it for tasks that need more steps."""
    tool_calls: int = 64
    """Tool calls over all turns, as the environment counts them in `Step.counts`."""
    observation_chars: int = 16_384
    """Characters of one observation; a longer one loses its middle. It bounds what the tokenizer has to read."""
    observation_tokens: int = 512
    """Tokens of one observation; a longer one loses its middle. Lower it if observations fill the context."""
    step_s: float = 30.0
    """Seconds of one reset or step. Raise it for slow tools; what takes longer ends the episode as `timeout`."""
    episode_s: float = 600.0
    """Seconds that all calls of an episode take together."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises ValueError for a limit that is not positive."""
        for name, value in asdict(self).items():
            if not 0 < value < 2**31:
                raise ValueError(f"environment limit {name} is {value}; it must be positive (and below 2**31)")


class ReplayMismatch(Exception):
    """An environment did not do the same again."""


class MalformedStep(Exception):
    """An environment returned what no environment may, from `step` or `reset`."""


def checked_prompt(value: Any) -> Prompt:
    """What `reset` returned, its text without half characters, which no tokenizer takes; or MalformedStep."""
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(m, Mapping) and "role" in m for m in value):
        return [{**m, "content": whole_text(m["content"])} if isinstance(m.get("content"), str) else m for m in value]
    raise MalformedStep(f"reset returned {value!r:.200}; it must be text or a non-empty list of chat messages")


def checked_step(value: Any) -> Step:
    """What `step` returned, reward and flag as plain Python, text as in `checked_prompt`; or MalformedStep."""
    if not isinstance(value, Step):
        raise MalformedStep(f"step returned {value!r:.200} of type {type(value).__name__}; it must be a Step")
    try:
        reward = float(value.reward)
        done = value.done
        counts = {str(name): float(number) for name, number in value.counts.items()}
    except Exception as error:
        raise MalformedStep(f"step returned {value!r:.200} ({error})") from None

    if getattr(done, "shape", None) == ():  # a scalar of numpy or jax
        done = done.item()  # type: ignore[attr-defined]
    if not isinstance(value.observation, str) or not isinstance(done, bool) or isinstance(value.reward, str):
        raise MalformedStep(f"step returned {value!r:.200}; it must hold text, a number and True or False")
    if not all(math.isfinite(number) for number in (reward, *counts.values())):
        raise MalformedStep(f"step returned the reward {reward} and the counts {counts}; they must be finite")
    return Step(whole_text(value.observation), reward, done, counts)


_REMEDY = "make the environment depend on its row and actions alone, or give it snapshot() and restore()"


def replay_same(
    environment: Environment, row: Mapping[str, Any], opening: Prompt, actions: Sequence[str], steps: Sequence[Step]
) -> None:
    """Bring a fresh environment to where the actions of a recorded episode lead.

    Raises ReplayMismatch, naming the turn, if anything comes out differently, and MalformedStep as a first run would.
    """
    again = checked_prompt(environment.reset(copy.deepcopy(dict(row))))
    if again != opening:
        raise ReplayMismatch(f"reset began with {again!r:.100} instead of {opening!r:.100}; {_REMEDY}")

    for turn, (action, step) in enumerate(zip(actions, steps, strict=True)):
        new = checked_step(environment.step(action))
        if new != step:
            raise ReplayMismatch(f"turn {turn} led to {new!r:.200} instead of {step!r:.200}; {_REMEDY}")
