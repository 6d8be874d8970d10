"""Conversations that are remembered, at four granularities, and rankings of them for a query (MemGAS, 2505.19549)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from rljax.envs.library.corpus import Corpus, Document
from rljax.envs.library.retrieval import accepted, entropy, pagerank, relative_certainty, router_weights

MOST_CANDIDATES = 30
"""Nodes that a new one may be associated with."""
FIRST_LINKED = 5
"""Conversations before which none is associated with others."""


@dataclass(frozen=True)
class Conversation:
    """What is remembered as one, and opened as one."""

    id: str
    headline: str
    """A line that tells little: what a policy sees before it opens the conversation."""
    turns: tuple[str, ...]
    """What was said."""
    summary: str
    """What it was about."""
    keywords: str
    """Words apart by spaces."""
    links: tuple[str, ...] = ()
    """Ids of conversations that it is linked with."""

    @property
    def text(self) -> str:
        """All of it, a line a turn."""
        return "\n".join(self.turns)


GRANULARITIES: Mapping[str, Callable[[Conversation], Sequence[str]]] = {
    "conversation": lambda conversation: [conversation.text],
    "turn": lambda conversation: conversation.turns,
    "summary": lambda conversation: [conversation.summary],
    "keyword": lambda conversation: [conversation.keywords],
}
"""Texts of a conversation by which it can be found. Each makes one node of a conversation."""


class Memory:
    """Conversations, earlier ones first, with an index for each granularity. Safe for many threads at once.

    ValueError for none, for two of one id, and for links that lead nowhere.
    """

    def __init__(self, conversations: Sequence[Conversation]):
        self.conversations = tuple(conversations)
        self._index = {conversation.id: i for i, conversation in enumerate(self.conversations)}
        unknown = {link for c in self.conversations for link in c.links} - set(self._index)
        if not self.conversations or len(self._index) < len(self.conversations) or unknown:
            raise ValueError(
                f"{len(self.conversations)} conversations with {len(self._index)} ids, and links to {sorted(unknown)} "
                "that are none of them; a memory needs at least one, ids that differ, and links among them"
            )
        self._corpora = [self._corpus(texts) for texts in GRANULARITIES.values()]

    def get(self, id_: str) -> Conversation | None:
        """The conversation of an id."""
        index = self._index.get(id_)
        return None if index is None else self.conversations[index]

    def similarities(self, query: str) -> Float[np.ndarray, "G N"]:
        """Of each granularity the BM25 score of each conversation, the mean of its texts, by the highest one: at most
        1, and 0 throughout where no text shares a word with the query."""
        rows = []
        for corpus, owners in self._corpora:
            totals = np.bincount(owners, weights=corpus.scores(query), minlength=len(self.conversations))
            means = totals / np.maximum(np.bincount(owners, minlength=len(self.conversations)), 1)
            rows.append(means / means.max() if means.max() > 0.0 else means)
        return np.stack(rows)

    @functools.cached_property
    def links(self) -> Bool[np.ndarray, "N N"]:
        """Which conversations are linked; both ways."""
        found = np.zeros((len(self.conversations),) * 2, bool)
        for i, conversation in enumerate(self.conversations):
            for link in conversation.links:
                found[i, self._index[link]] = found[self._index[link], i] = True
        return found

    @functools.cached_property
    def associations(self) -> Float[np.ndarray, "M M"]:
        """Which nodes are associated, 1 both ways, M = G * N, node (g, i) at g * N + i (MemGAS).

        A node of a conversation behind the first `FIRST_LINKED` is linked with what `accepted` takes of its
        `MOST_CANDIDATES` most similar nodes of earlier conversations, of any granularity.
        """
        count = len(self.conversations)
        size = len(GRANULARITIES) * count
        found = np.zeros((size, size))
        for i in range(FIRST_LINKED, count):
            for g, texts in enumerate(GRANULARITIES.values()):
                near = self.similarities("\n".join(texts(self.conversations[i])))[:, :i]
                nodes = (np.arange(len(near))[:, None] * count + np.arange(i)).ravel()
                best = np.argsort(-near.ravel(), kind="stable")[:MOST_CANDIDATES]
                taken = nodes[best[accepted(near.ravel()[best])]]
                found[g * count + i, taken] = found[taken, g * count + i] = 1.0
        return found

    def _corpus(self, texts: Callable[[Conversation], Sequence[str]]) -> tuple[Corpus, np.ndarray]:
        """An index of all texts of a granularity, and which conversation each is of."""
        owned = [(i, text) for i, conversation in enumerate(self.conversations) for text in texts(conversation)]
        return Corpus([Document(str(i), "", text) for i, text in owned]), np.array([i for i, _ in owned])


Ranking = Callable[[Memory, str], Float[np.ndarray, " N"]]
"""How well each conversation of a memory fits a query: 0 is not at all."""


def at_granularity(name: str) -> Ranking:
    """By one of `GRANULARITIES` alone. ValueError for another name."""
    if name not in GRANULARITIES:
        raise ValueError(f"granularity {name!r} is not one of {', '.join(GRANULARITIES)}")
    row = list(GRANULARITIES).index(name)
    return lambda memory, query: memory.similarities(query)[row]


def multi_granular(
    *,
    temperature: float = 0.2,
    certainty: Callable[[float, int], float] = relative_certainty,
    num_seeds: int = 15,
    damping: float = 0.1,
) -> Ranking:
    """By all granularities, the surer ones more, and by what is associated with what they find (MemGAS).

    The `num_seeds` best nodes, by the weight of their granularity times their similarity, are where a walk over the
    associations starts; a conversation's score is how often the walk is at one of its nodes. `certainty` is of an
    entropy and the number of scores that it is of.
    """

    def rank(memory: Memory, query: str) -> Float[np.ndarray, " N"]:
        similar = memory.similarities(query)
        num_granularities, count = similar.shape
        if not similar.any():
            return np.zeros(count)

        nats = [entropy(row, temperature=temperature) for row in similar]
        weights = router_weights([certainty(h, count) for h in nats])
        nodes = (weights[:, None] * similar).ravel()

        # Without the fix a weight may be below 0, and a walk starts nowhere with a probability below 0.
        best = np.argsort(-nodes, kind="stable")[:num_seeds]
        restart = np.zeros(len(nodes))
        restart[best] = np.maximum(nodes[best], 0.0)
        if not restart.any():
            return np.zeros(count)
        found = pagerank(memory.associations, restart, damping=damping)
        return found.reshape(num_granularities, count).sum(axis=0)

    return rank
