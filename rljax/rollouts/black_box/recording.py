"""What an agent and the policy said to each other, as token ids: replies in a tree, conversations its paths.

A request that goes on from a reply, its messages being those of the requests before with what was answered, gets the
ids that were recorded and what the chat template puts behind them. Nothing sampled is ever encoded again.
"""

import itertools
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rljax.sampling import Sample
from rljax.sampling.turns import MOST_TURNS
from rljax.text import Tokenizer, check_messages

_SAID = "qz7"  # what the assistant says where only what comes behind it is wanted


@dataclass(eq=False)
class Reply:
    """What the policy said to one request, behind the reply `parent`. `keys` are those of the messages since then, the
    last one of its own; `given` are the ids since then, up to where it speaks."""

    parent: "Reply | None"
    keys: list[str]
    message: dict[str, Any]
    given: list[int]
    tokens: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T]
    entropies: np.ndarray  # float32 [T]
    version: int
    is_cut: bool = False  # by a limit, or what came back had no room behind it

    @property
    def path(self) -> list["Reply"]:
        """All replies of its conversation up to this one."""
        path = [self]
        while (parent := path[-1].parent) is not None:
            path.append(parent)
        return path[::-1]

    @property
    def ids(self) -> list[int]:
        """Ids of its conversation, itself at the end."""
        return [i for reply in self.path for i in [*reply.given, *reply.tokens.tolist()]]


@dataclass(eq=False)
class Session:
    """One run of an agent. (`prompt_id`, `sample_id`) name its random numbers."""

    id: str
    prompt_id: int
    sample_id: int
    replies: list[Reply] = field(default_factory=list)  # in order of completion
    counts: Counter[str] = field(default_factory=Counter)
    is_closed: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _numbers: dict[bytes, set[int]] = field(default_factory=dict, repr=False)

    def find(self, keys: Sequence[str]) -> tuple[Reply | None, int]:
        """The reply furthest on, of equal ones the latest, whose conversation `keys` begin with; and how many they are.
        (None, 1) if there is none: the first key is that of the tools."""
        best: tuple[Reply | None, int] = (None, 1)
        open_ends: list[tuple[Reply | None, int]] = [(None, 0)]
        while open_ends:
            parent, start = open_ends.pop()
            if parent is not None and start > best[1]:
                best = parent, start
            for reply in self.replies:
                stop = start + len(reply.keys)
                if reply.parent is parent and list(keys[start:stop]) == reply.keys:
                    open_ends.append((reply, stop))
        return best

    def number(self, ids: Sequence[int], depth: int) -> int:
        """The turn that names the random numbers of what is said behind `ids`: its place in the conversation, or, where
        the same is asked for again, one that is not taken. It does not depend on the order of other requests."""
        taken = self._numbers.setdefault(np.asarray(ids, np.int32).tobytes(), set())
        number = next((depth - i) % MOST_TURNS for i in itertools.count() if (depth - i) % MOST_TURNS not in taken)
        taken.add(number)
        if len(taken) == MOST_TURNS:
            taken.clear()
        return number

    def conversations(self) -> list[list[Reply]]:
        """The paths to all last replies, those with the most sampled tokens first."""
        parents = {id(reply.parent) for reply in self.replies}
        paths = [reply.path for reply in self.replies if id(reply) not in parents]
        return sorted(paths, key=lambda path: (-sum(len(r.tokens) for r in path), path[-1].ids))


class Renderer:
    """Token ids of chats; safe for several threads. Raises ValueError for a tokenizer without a chat template."""

    def __init__(self, tokenizer: Tokenizer):
        if not tokenizer.has_chat_template:
            raise ValueError(
                "agents send chat messages, but the tokenizer has no chat template; add chat_template to its "
                "tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # fast tokenizers keep padding and truncation in a state of their own

    def decode(self, ids: Sequence[int]) -> str:
        with self._lock:
            return self.tokenizer.decode(ids)

    def opening(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[int]:
        """Ids of a whole conversation, up to where the policy speaks. Raises ValueError if the template refuses it."""
        check_messages(messages)
        tokenizer: Any = self.tokenizer
        if tools:
            if not hasattr(tokenizer, "with_template_kwargs"):
                raise ValueError(f"{type(tokenizer).__name__} cannot show tools to its chat template; send none")
            tokenizer = tokenizer.with_template_kwargs(tools=list(tools))
        ids = self._render(tokenizer, messages, True)
        if not ids:
            raise ValueError("the chat template makes nothing of these messages")
        return ids

    def behind(self, reply: Reply, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Ids of `messages` behind a reply, from the end of what was sampled up to where the policy speaks again.
        Raises ValueError if the template does not append them."""
        said = {"role": "assistant", "content": _SAID}
        calls = reply.message.get("tool_calls")
        before = [{"role": "user", "content": "x"}, said | ({"tool_calls": calls} if calls else {})]
        base = self._render(self.tokenizer, before, False)
        ids = self._render(self.tokenizer, [*before, *messages], True)
        # The turn ends with the stop token that closes it alone, though it may look different before (some templates
        # leave out thinking once there is a message behind it).
        stop_ids = self.tokenizer.stop_ids
        stops, base_stops = ([i for i, token in enumerate(x) if token in stop_ids] for x in (ids, base))
        count = len(base_stops)
        if not count:
            end, is_kept = len(base), ids[: len(base)] == base
        else:
            end = stops[count - 1] + 1 if count <= len(stops) else 0
            is_kept = end > 0 and (bool(calls) or _SAID in self.decode(ids[:end]))
        if not is_kept:
            raise ValueError(f"the chat template does not append {[m['role'] for m in messages]} to the turn before")
        is_closed = len(reply.tokens) > 0 and int(reply.tokens[-1]) in stop_ids
        return ids[end - 1 if count and not is_closed else end :]

    def _render(self, tokenizer: Any, messages: Sequence[dict[str, Any]], prompting: bool) -> list[int]:
        try:
            with self._lock:
                return tokenizer.apply_chat_template(list(messages), add_generation_prompt=prompting)
        except ValueError:
            raise
        except Exception as error:  # a template may stumble over anything
            raise ValueError(f"the chat template failed: {type(error).__name__}: {error}") from error


def common_prompt(paths: Sequence[Sequence[Reply]]) -> list[int]:
    """The ids that all conversations begin with, before anything was sampled; [] of none."""
    openings = [path[0].given for path in paths]
    same = min(openings, key=len, default=[])
    for opening in openings:
        length = next((i for i, pair in enumerate(zip(same, opening)) if pair[0] != pair[1]), len(same))
        same = same[:length]
    return list(same)


def sample_of(path: Sequence[Reply], prompt_length: int, taken: set[int]) -> Sample:
    """A conversation as a sample behind its first `prompt_length` ids. What was sampled counts unless its reply is
    `taken`, by another conversation that shares it; ids that were given, or taken, are forced. Adds to `taken`."""
    tokens: list[int] = []
    logprobs: list[np.ndarray] = []
    entropies: list[np.ndarray] = []
    forced, turns, versions = [], [], []
    for turn, reply in enumerate(path):
        given = reply.given if turn else reply.given[prompt_length:]
        start, length = len(tokens), len(reply.tokens)
        is_taken = id(reply) in taken
        taken.add(id(reply))
        tokens += [*given, *reply.tokens.tolist()]
        stop = len(tokens) if is_taken else start + len(given)
        if stop > start:
            forced.append((start, stop))
        nothing = np.zeros(length, np.float32)
        for values, said in ((logprobs, reply.logprobs), (entropies, reply.entropies)):
            values += [np.zeros(len(given), np.float32), nothing if is_taken else said]
        turns += [max(turn - 1, 0)] * len(given) + [turn] * length
        versions += [reply.version] * (len(given) + length)
    return Sample(
        tokens=np.array(tokens, np.int32),
        logprobs=np.concatenate(logprobs, dtype=np.float32) if logprobs else np.zeros(0, np.float32),
        entropies=np.concatenate(entropies, dtype=np.float32) if entropies else np.zeros(0, np.float32),
        finish_reason="length" if path and path[-1].is_cut else "stop",
        forced=tuple(forced),
        turns=np.array(turns, np.int32),
        versions=np.array(versions, np.int32),
    )
