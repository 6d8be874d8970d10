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
from rljax.sampling.logits import MASKED
from rljax.sampling.slots import Grammar
from rljax.sampling.turns import MOST_TURNS
from rljax.text import Tokenizer, check_messages, decode_behind

_PLACEHOLDER = "qz7"  # stands for the assistant's text where only the ids after it are wanted


@dataclass(eq=False)
class Reply:
    """What the policy answered to one request, which continues the reply `parent`.

    `keys` are those of the messages since `parent`, its own the last; `given` are the ids between `parent` and the
    first sampled token.
    """

    parent: "Reply | None"
    keys: list[str]
    message: dict[str, Any]
    given: list[int]
    tokens: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T]
    entropies: np.ndarray  # float32 [T]
    version: int
    is_cut: bool = False  # by a limit, or what came back had no room behind it
    top_tokens: np.ndarray | None = None  # int32 [T, N], as in `rljax.sampling.Sample`
    top_logprobs: np.ndarray | None = None  # float32 [T, N]

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

    @property
    def own(self) -> tuple[tuple[int, int], ...]:
        """Spans of these ids that the policy has sampled."""
        spans = []
        stop = 0
        for reply in self.path:
            start = stop + len(reply.given)
            stop = start + len(reply.tokens)
            spans.append((start, stop))
        return tuple(spans)


@dataclass(eq=False)
class Session:
    """One run of an agent. (`prompt_id`, `sample_id`) name its random numbers, `grammar` is what each of its turns
    follows."""

    id: str
    prompt_id: int
    sample_id: int
    grammar: Grammar | None = None
    replies: list[Reply] = field(default_factory=list)  # in order of completion
    counts: Counter[str] = field(default_factory=Counter)
    is_closed: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _turns_taken: dict[bytes, set[int]] = field(default_factory=dict, repr=False)

    def find(self, keys: Sequence[str]) -> tuple[Reply | None, int]:
        """The reply furthest on, of equal ones the latest, whose conversation `keys` begin with; and how many they are.
        (None, 1) if there is none: the first key is that of the tools."""
        best: tuple[Reply | None, int] = (None, 1)

        # A search of the tree of replies. Of equal replies the latest is popped first, and a tie does not replace it.
        unexplored: list[tuple[Reply | None, int]] = [(None, 0)]
        while unexplored:
            parent, start = unexplored.pop()
            if parent is not None and start > best[1]:
                best = (parent, start)
            for reply in self.replies:
                stop = start + len(reply.keys)
                if reply.parent is parent and list(keys[start:stop]) == reply.keys:
                    unexplored.append((reply, stop))
        return best

    def assign_turn(self, ids: Sequence[int], depth: int) -> int:
        """The turn that names the random numbers of the answer to `ids`: its place in the conversation, or, where the
        same ids are sent again, one that is not taken. It does not depend on the order of other requests."""
        taken = self._turns_taken.setdefault(np.asarray(ids, np.int32).tobytes(), set())

        # Downwards, and from 0 round to the top: the next ones up are the turns of the replies that follow.
        turn = next((depth - i) % MOST_TURNS for i in itertools.count() if (depth - i) % MOST_TURNS not in taken)
        taken.add(turn)

        # The sampler knows no more turns than these, so they are used again when all are taken.
        if len(taken) == MOST_TURNS:
            taken.clear()
        return turn

    def conversations(self) -> list[list[Reply]]:
        """The paths to all last replies, those with the most sampled tokens first."""
        parents = {id(reply.parent) for reply in self.replies}
        paths = [reply.path for reply in self.replies if id(reply) not in parents]

        # Ties are broken by the ids: replies stand in order of completion, which differs between runs.
        return sorted(paths, key=lambda path: (-sum(len(r.tokens) for r in path), path[-1].ids))


class Renderer:
    """Token ids of chats; safe for several threads. Raises ValueError for a tokenizer without a chat template."""

    def __init__(self, tokenizer: Tokenizer):
        if not tokenizer.has_chat_template:
            raise ValueError(
                "agents send chat messages, but the tokenizer has no chat template; name a file with one in "
                "config.model.chat_template"
            )
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # fast tokenizers keep padding and truncation in a state of their own

    def decode(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
        """Text of `ids` behind the tokens `before`."""
        with self._lock:
            return decode_behind(self.tokenizer, ids, before)

    def opening_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[int]:
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

    def continuation_ids(self, reply: Reply, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Ids of `messages` after a reply, from the end of what was sampled up to where the policy speaks again.
        Raises ValueError if the template does not append them."""
        # The template is asked about a short conversation with the same calls in it, once without and once with the
        # messages; what the second has more are the ids to append. The real reply is never rendered, since encoding
        # its text could give other ids than those that were sampled.
        calls = reply.message.get("tool_calls")
        answer: dict[str, Any] = {"role": "assistant", "content": _PLACEHOLDER}
        if calls:
            answer["tool_calls"] = calls
        conversation = [{"role": "user", "content": "x"}, answer]
        base = self._render(self.tokenizer, conversation, False)
        ids = self._render(self.tokenizer, [*conversation, *messages], True)

        # The turn ends with the stop token that closes it alone, though it may look different before (some templates
        # leave out thinking once there is a message behind it).
        stop_ids = self.tokenizer.stop_ids
        stops = [i for i, token in enumerate(ids) if token in stop_ids]
        count = sum(token in stop_ids for token in base)
        if not count:
            # Nothing marks the end of the turn, so only an exact prefix shows where it is.
            end = len(base)
            is_kept = ids[:end] == base
        else:
            end = stops[count - 1] + 1 if count <= len(stops) else 0
            # Templates may leave out the text of a turn that calls tools.
            is_kept = end > 0 and (bool(calls) or _PLACEHOLDER in self.decode(ids[:end]))
        if not is_kept:
            raise ValueError(f"the chat template does not append {[m['role'] for m in messages]} to the turn before")

        # A reply that was cut off, or ended by a stop string, lacks the stop token: then it is given.
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


def sample_of(
    path: Sequence[Reply], prompt_length: int, taken: set[int], *, grammar: str = "", is_penalised: bool = False
) -> Sample:
    """A conversation as a sample behind its first `prompt_length` ids, whose turns follow `grammar`, with penalties or
    without. What was sampled counts unless its reply is `taken`, by another conversation that shares it; ids that were
    given, or taken, are forced. Adds to `taken`."""
    tokens: list[int] = []
    logprobs: list[np.ndarray] = []
    entropies: list[np.ndarray] = []
    forced: list[tuple[int, int]] = []
    shared: list[tuple[int, int]] = []
    spoken: list[tuple[int, int]] = []
    turns: list[int] = []
    versions: list[int] = []
    top_tokens: list[np.ndarray] = []
    top_logprobs: list[np.ndarray] = []

    for turn, reply in enumerate(path):
        given = reply.given if turn else reply.given[prompt_length:]
        start = len(tokens)
        length = len(reply.tokens)
        is_taken = id(reply) in taken
        taken.add(id(reply))

        tokens += [*given, *reply.tokens.tolist()]
        forced_stop = len(tokens) if is_taken else start + len(given)
        if forced_stop > start:
            forced.append((start, forced_stop))
        if length:
            spoken.append((start + len(given), len(tokens)))
            shared += spoken[-1:] if is_taken else []

        # Forced tokens have log-prob and entropy 0 in the record.
        given_zeros = np.zeros(len(given), np.float32)
        reply_zeros = np.zeros(length, np.float32)
        logprobs += [given_zeros, reply_zeros if is_taken else reply.logprobs]
        entropies += [given_zeros, reply_zeros if is_taken else reply.entropies]

        # Of what was given nothing could be sampled.
        if reply.top_tokens is not None and reply.top_logprobs is not None:
            room = (len(given), reply.top_tokens.shape[1])
            top_tokens += [np.zeros(room, np.int32), reply.top_tokens]
            top_logprobs += [np.full(room, MASKED, np.float32), reply.top_logprobs]

        # An observation belongs to the turn before it, as in an episode of an environment.
        turns += [max(turn - 1, 0)] * len(given) + [turn] * length
        versions += [reply.version] * (len(given) + length)

    # A run that asked nothing has an empty path, and np.concatenate refuses an empty list.
    nothing = np.zeros(0, np.float32)
    return Sample(
        tokens=np.array(tokens, np.int32),
        logprobs=np.concatenate([nothing, *logprobs], dtype=np.float32),
        entropies=np.concatenate([nothing, *entropies], dtype=np.float32),
        finish_reason="length" if path and path[-1].is_cut else "stop",
        forced=tuple(forced),
        shared=tuple(shared),
        spoken=tuple(spoken),
        grammar=grammar,
        is_penalised=is_penalised,
        turns=np.array(turns, np.int32),
        versions=np.array(versions, np.int32),
        top_tokens=np.concatenate(top_tokens) if top_tokens else None,
        top_logprobs=np.concatenate(top_logprobs) if top_logprobs else None,
    )
