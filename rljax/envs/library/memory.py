"""Questions about what was said in earlier conversations, found with the tools of a memory and answered.

What the tools do is of MemGAS (2505.19549: many granularities), DrVideo (2406.12846: looking for what is missing),
Align-GRAG (2505.16237: a pruned graph) and GenKI (2505.19660: an answer that several candidates agree on).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from rljax.envs.base import Prompt, Step
from rljax.envs.formats import ToolFormat
from rljax.envs.library.memory_store import Conversation, Memory, Ranking, at_granularity, multi_granular
from rljax.envs.library.multihop import normalised
from rljax.envs.library.retrieval import evidence_recall, most_consistent, pruned
from rljax.envs.tool_environment import ToolEnvironment
from rljax.envs.tools import ToolBox, final
from rljax.tasks.callables import load_callable

UNKNOWN = "unknown"
"""The right answer to what was never said."""
COUNTS = (
    "evidence_recall",
    "read_share",
    "is_right",
    "sufficient",
    "opens_after_enough",
    "stale_answer",
    "false_answer",
)
"""Counts of a step, whose sums over an episode are: the share of the evidence that was opened; what was read, by the
budget, at most 1; whether the answer was right; whether all evidence was open when it was given; conversations opened
after all evidence was; whether the answer was one that holds no more; and whether an answer was given to what was never
said."""

_TASK = (
    "Answer the question from what was said in earlier conversations. Search shows headlines alone; open a "
    "conversation to read it. What was said later holds. If it was never said, the answer is unknown."
)


@dataclass(frozen=True)
class Reading:
    """How much the tools show, and what reading costs."""

    num_hits: int = 3
    """Headlines that a search shows, at most."""
    num_missing: int = 2
    """Headlines that a look for what is missing shows, at most."""
    missing_rounds: int = 3
    """How often an episode may look for what is missing."""
    num_seeds: int = 2
    """Conversations around which the graph is shown."""
    budget: int = 200
    """What may be read before reading costs the most, in the unit of `count_tokens`."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value below 1."""
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"reading.{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class Outcome:
    """What a reward is made of."""

    is_right: bool
    """Whether the answer is right."""
    recall: float
    """Share of the evidence that was opened, in [0, 1]."""
    cost: float
    """Share of the budget that was read, in [0, 1]."""


def evidence_reward(outcome: Outcome, *, cost_weight: float = 0.2, recall_weight: float = 0.1) -> float:
    """`1 - cost_weight * c` for a right answer, and `recall_weight * recall * (1 - c)` for a wrong one, c the cost.

    While `cost_weight + recall_weight < 1`, any right answer earns more than any wrong one, and who opens everything
    and is wrong has nothing.
    """
    if outcome.is_right:
        return 1.0 - cost_weight * outcome.cost
    return recall_weight * outcome.recall * (1.0 - outcome.cost)


def answer_reward(outcome: Outcome) -> float:
    """1 for a right answer, whatever was read."""
    return float(outcome.is_right)


def count_words(text: str) -> int:
    """Words, which spaces part."""
    return len(text.split())


def is_short(text: str) -> bool:
    """Whether it has one to eight words: the form of an answer."""
    return 1 <= count_words(text) <= 8


class MemoryEnvironment(ToolEnvironment):
    """A question about earlier conversations. Rows are those of `rljax.envs.library.histories.rows`, or have the
    columns `prompt`, `conversations` (mappings of the fields of `Conversation`, earlier ones first), `answer`
    (`UNKNOWN` where it was never said), `evidence` (ids that have to be read, or a mapping of them to weights) and, if
    there is one, `stale` (an answer that holds no more).

    Tools: `search(query, granularity)` shows headlines by `ranking`, or by one granularity; `missing(what)` those
    of what is not open yet; `graph(query)` the best ones and what they are linked with; `neighbours(id)`; `open(id)` a
    whole conversation; `note(text)` does nothing but stand there; `answer(candidates)` ends the episode. Of candidates
    with | between them `constrain` takes one; where it takes none, the call fails and says so. A message without a call
    is an answer, too.

    The reward is `reward` of the `Outcome`: right if normalised (`multihop.normalised`) it is the row's. What the tools
    show counts as read, by `count_tokens`. Steps count `COUNTS`. Functions may be names `module:function`, and
    `reading` a mapping of its fields. `system` stands before the question; by default it says what to do and which
    tools there are. ValueError for a format that does not exist.
    """

    def __init__(
        self,
        *,
        tool_format: str | ToolFormat = "hermes",
        ranking: str | Ranking | None = None,
        reward: str | Callable[[Outcome], float] = evidence_reward,
        constrain: str | Callable[[Sequence[str]], str | None] | None = None,
        reading: Reading | Mapping[str, int] = Reading(),
        count_tokens: str | Callable[[str], int] = count_words,
        system: str | None = None,
    ):
        super().__init__(ToolBox(self._tools()), self._judge, tool_format=tool_format, system=system, task=_TASK)
        self._rank: Ranking = _loaded(ranking) or multi_granular()
        self._worth: Callable[[Outcome], float] = _loaded(reward)
        self._constrain: Callable[[Sequence[str]], str | None] = _loaded(constrain) or consistent
        self._count: Callable[[str], int] = _loaded(count_tokens)
        self._reading = reading if isinstance(reading, Reading) else _reading(reading)

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """The question; nothing is open yet."""
        self._memory = _memory_of(tuple(_conversation(given) for given in row["conversations"]))
        evidence = row["evidence"]
        self._evidence: dict[str, int | float] = (
            dict(evidence) if isinstance(evidence, Mapping) else dict.fromkeys(evidence, 1.0)
        )
        unknown = sorted(id_ for id_ in self._evidence if self._memory.get(id_) is None)
        if unknown:
            raise ValueError(f"the row's evidence {unknown} is none of its conversations")

        self._opened: dict[str, None] = {}
        self._opened_late = 0
        self._read = 0
        self._rounds = 0
        self._said: dict[str, float] = {}
        self._told = dict.fromkeys(COUNTS, 0.0)
        return super().reset(row)

    def step(self, action: str) -> Step:
        """Call the tools; count what is open and what was read, each by how much it grew."""
        step = super().step(action)
        totals = {
            **self._told,
            **self._said,
            "evidence_recall": self._recall(),
            "read_share": self._cost(),
            "opens_after_enough": float(self._opened_late),
        }
        grown = {name: totals[name] - self._told[name] for name in COUNTS}
        self._told = totals
        return Step(step.observation, step.reward, step.done, {**step.counts, **grown})

    def listed(self, conversations: Sequence[Conversation]) -> str:
        """What a search shows."""
        return "\n".join(f"[{conversation.id}] {conversation.headline}" for conversation in conversations)

    def shown(self, conversation: Conversation) -> str:
        """What `open` shows."""
        return conversation.text

    def _recall(self) -> float:
        return evidence_recall(self._opened, self._evidence)

    def _cost(self) -> float:
        return min(1.0, self._read / self._reading.budget)

    def _is_enough(self) -> bool:
        return bool(self._evidence) and set(self._evidence) <= set(self._opened)

    def _reads_this(self, text: str) -> str:
        self._read += self._count(text)
        return text

    def _judge(self, answer: Any, row: Mapping[str, Any]) -> float:
        chosen = self._constrain(str(answer).split("|"))
        given = normalised(chosen or "")
        is_right = given == normalised(row["answer"])
        is_unknown = normalised(row["answer"]) == UNKNOWN
        stale = row.get("stale")
        self._said = {
            "is_right": float(is_right),
            "sufficient": float(self._is_enough()),
            "stale_answer": float(stale is not None and given == normalised(stale)),
            "false_answer": float(is_unknown and not is_right),
        }
        return self._worth(Outcome(is_right, self._recall(), self._cost()))

    def _best(self, scores: np.ndarray, count: int) -> list[Conversation]:
        order = np.argsort(-scores, kind="stable")[:count]
        return [self._memory.conversations[i] for i in order if scores[i] > 0]

    def _list(self, found: Sequence[Conversation], otherwise: str) -> str:
        return self._reads_this(self.listed(found) if found else otherwise)

    def _get(self, id_: str) -> Conversation:
        found = self._memory.get(id_.strip().strip("[]"))
        if found is None:
            raise ValueError(f"there is no conversation {id_[:50]!r}")
        return found

    def _tools(self) -> list[Callable[..., Any]]:
        def search(query: str, granularity: str = "") -> str:
            """Headlines of the conversations that fit a query best.

            Args:
                query: What to look for, in a few words.
                granularity: By what: conversation, turn, summary or keyword. Leave it out for all of them.
            """
            rank = at_granularity(granularity) if granularity else self._rank
            return self._list(self._best(rank(self._memory, query), self._reading.num_hits), "Nothing fits.")

        def missing(what: str) -> str:
            """Headlines of conversations that are not open yet and fit what is still missing.

            Args:
                what: What has to be known for an answer, and is not known yet.
            """
            if self._rounds >= self._reading.missing_rounds:
                raise ValueError("what was missing was looked for often enough; answer now")
            self._rounds += 1
            scores = np.array(self._rank(self._memory, what))
            scores[[c.id in self._opened for c in self._memory.conversations]] = 0.0
            return self._list(self._best(scores, self._reading.num_missing), "Nothing else fits.")

        def graph(query: str) -> str:
            """The conversations that fit a query best, and those that they are linked with.

            Args:
                query: What to look for, in a few words.
            """
            scores = self._rank(self._memory, query)
            _, kept = pruned(scores, self._memory.links, self._reading.num_seeds)
            return self._list([self._memory.conversations[i] for i in kept], "Nothing fits.")

        def neighbours(id: str) -> str:
            """Headlines of the conversations that one is linked with.

            Args:
                id: Of the conversation.
            """
            index = self._memory.conversations.index(self._get(id))
            found = np.flatnonzero(self._memory.links[index])
            return self._list([self._memory.conversations[i] for i in found], "It is linked with none.")

        def open(id: str) -> str:
            """Show a whole conversation.

            Args:
                id: Of the conversation, as a search shows it.
            """
            conversation = self._get(id)
            # Who reads one again has to pay for it, and has nothing new.
            self._opened_late += self._is_enough()
            self._opened[conversation.id] = None
            return self._reads_this(self.shown(conversation))

        def note(text: str) -> str:
            """Write down what was found.

            Args:
                text: The note.
            """
            return "Noted."

        @final
        def answer(candidates: str) -> str:
            """Give the final answer. Nothing can be done after it.

            Args:
                candidates: The answer, a few words, or unknown; or several of one meaning, with | between them.
            """
            if self._constrain(candidates.split("|")) is None:
                raise ValueError("no candidate has the form of an answer: a few words, or unknown")
            return candidates

        return [search, missing, graph, neighbours, open, note, answer]


def consistent(candidates: Sequence[str]) -> str | None:
    """The one that the others agree with most (`most_consistent`), of those that are short; None where none is."""
    return most_consistent([candidate.strip() for candidate in candidates], is_short)


@lru_cache(maxsize=256)
def _memory_of(conversations: tuple[Conversation, ...]) -> Memory:
    """One for all episodes of a group. Threads that ask at the same time may make it twice, which is no harm."""
    return Memory(conversations)


def _conversation(given: Mapping[str, Any]) -> Conversation:
    try:
        return Conversation(**{**given, "turns": tuple(given["turns"]), "links": tuple(given.get("links", ()))})
    except (KeyError, TypeError) as error:
        names = ", ".join(field.name for field in fields(Conversation))
        raise ValueError(f"a conversation of the row does not fit ({error}); it has the fields {names}") from None


def _reading(values: Mapping[str, int]) -> Reading:
    try:
        return Reading(**values)
    except TypeError as error:
        raise ValueError(f"reading {dict(values)} does not fit: {error}") from None


def _loaded(function: Any) -> Any:
    return load_callable(function) if isinstance(function, str) else function
