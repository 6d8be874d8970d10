"""Questions over several pages of a local corpus, searched and opened one after the other (DeepDive, 2509.10446)."""

import random
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rljax.envs.base import Prompt, Step
from rljax.envs.formats import tag_format
from rljax.envs.library.corpus import Corpus, Document
from rljax.envs.library.knowledge import Graph, documents, knowledge_graph, walk
from rljax.envs.library.questions import Question, ask
from rljax.envs.library.sharing import made_once
from rljax.envs.tool_environment import ToolEnvironment
from rljax.envs.tools import EXTRA_ARGUMENT, MISSING_ARGUMENT, UNKNOWN_TOOL, WRONG_TYPE, ToolBox, answer, named
from rljax.tasks.examples import digest
from rljax.tasks.text_rewards import query_redundancy

MISSING_CALL = "missing_tool_call"
"""Count of a step: 1 if the turn had no call."""
MALFORMED_CALL = "malformed_tool_call"
"""Count of a step: 1 if its call could not be read."""
INVALID_CALL = "invalid_tool_call"
"""Count of a step: 1 if its call named an unknown tool, wrong arguments, or a result before any search."""
REDUNDANCY = "redundancy"
"""Count of a step: by how much it raised `query_redundancy` of the queries so far."""

TAGS = tag_format({"search": "query", "open": "page", "finish": "answer"})
"""What `tool_format="tags"` is here."""

SPLITS = ("all", "train", "test")

_TRIES = 500
_BAD_CALLS = (UNKNOWN_TOOL, MISSING_ARGUMENT, EXTRA_ARGUMENT, WRONG_TYPE)
_TASK = (
    "Answer the question. Search the pages, open those that look right, and follow what they say to the next; the "
    "answer is the title of a page. Every message must call a tool; end with finish."
)


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: two answers are the same if these are."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


class World:
    """Pages that can be searched, and opened by title."""

    def __init__(self, corpus: Corpus, graph: Graph | None = None):
        self.corpus = corpus
        self.graph = graph or {}
        # reversed: of pages with one title the first one counts
        self._pages = {normalised(d.title or d.id): d for d in reversed(corpus.documents)}

    def page(self, title: str) -> Document | None:
        """The first page of this title; punctuation and case do not count."""
        return self._pages.get(normalised(title))


@made_once
def made_up_world(num_pages: int, seed: int) -> World:
    """The knowledge graph of these arguments and its pages, one for all of the process."""
    graph = knowledge_graph(num_pages, seed)
    return World(Corpus(documents(graph)), graph)


@made_once
def world_of(path: str) -> World:
    """The documents of a file, one for all of the process."""
    return World(Corpus.load(path))


class MultiHop(ToolEnvironment):
    """A question whose answer is found by searching a corpus hop by hop. Rows are those of `rows`.

    Tools: `search(query)` shows `top_k` pages, the first `snippet_chars` of each; `open(page)` a whole page, by the
    number of a result of the latest search or by its title; `finish(answer)` ends the episode. The pages are those that
    the row's `world` describes, or the `documents` of a file. A page that holds one of the row's texts `forbidden` is
    neither found nor opened.

    The reward is 1 if the answer is the row's, normalised by `normalised`, else 0. With `early_exit`, the first invalid
    turn ends the episode with 0: one without a call, one whose call cannot be read, and one with an unknown tool, wrong
    arguments or the number of a result before any search. Steps count them as `missing_tool_call`,
    `malformed_tool_call` and `invalid_tool_call`. The count `redundancy` adds up to `query_redundancy` of the queries
    so far, in [0, 1]; `redundancy_weight` times it is subtracted from the reward, however the episode ends.

    `system` stands before the question; by default it says what to do, which tools there are and how `tool_format`
    calls them. Raises ImportError, naming the extra, without bm25s, and ValueError for a format that does not exist.
    """

    def __init__(
        self,
        *,
        documents: str | None = None,
        tool_format: str = "hermes",
        top_k: int = 3,
        snippet_chars: int = 120,
        early_exit: bool = True,
        redundancy_weight: float = 0.0,
        system: str | None = None,
    ):
        if top_k < 1 or snippet_chars < 1 or not 0.0 <= redundancy_weight < float("inf"):
            raise ValueError(
                f"top_k {top_k} and snippet_chars {snippet_chars} must be at least 1, and redundancy_weight "
                f"{redundancy_weight} a finite number, 0 or more"
            )
        super().__init__(
            ToolBox([*self._tools(), named(answer, "finish")]),
            _is_right,
            tool_format=TAGS if tool_format == "tags" else tool_format,
            system=system,
            task=_TASK,
            plain_text_ends=False,
        )
        self._documents = documents
        self._top_k = top_k
        self._snippet_chars = snippet_chars
        self._early_exit = early_exit
        self._redundancy_weight = redundancy_weight

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """The question, on the pages of its world, which are made when first asked for."""
        self._world = _world(row) if self._documents is None else world_of(self._documents)

        forbidden = row.get("forbidden") or ()
        texts = [forbidden] if isinstance(forbidden, str) else forbidden
        self._forbidden = [_folded(text) for text in texts if text.strip()]

        self._queries: list[str] = []
        self._results: list[Document] | None = None
        self._redundancy = 0.0
        self._is_invalid = False
        return super().reset(row)

    def step(self, action: str) -> Step:
        """Call the tools; check the turn."""
        failed_before = self._num_bad_calls()
        self._is_invalid = False
        step = super().step(action)
        reward = step.reward
        is_done = step.done
        counts = dict(step.counts)

        violation = None
        if counts["malformed_calls"]:
            violation = MALFORMED_CALL
        elif not counts["tool_calls"]:
            violation = MISSING_CALL
        elif self._is_invalid or self._num_bad_calls() > failed_before:
            violation = INVALID_CALL
        if violation is not None:
            counts[violation] = 1.0
            if self._early_exit:
                reward = 0.0
                is_done = True

        # the change alone, so that the sum over the steps is the redundancy of all queries
        before = self._redundancy
        self._redundancy = query_redundancy(self._queries)
        counts[REDUNDANCY] = self._redundancy - before
        return Step(step.observation, reward - self._redundancy_weight * counts[REDUNDANCY], is_done, counts)

    def _num_bad_calls(self) -> int:
        return sum(self.tools.counts[kind] for kind in _BAD_CALLS)

    def _tools(self) -> list[Any]:
        def search(query: str) -> str:
            """Search the pages by keywords. Shows the beginning of the best ones.

            Args:
                query: What to look for, in a few words.
            """
            return self._search(query)

        def open(page: str | int) -> str:
            """Show a whole page.

            Args:
                page: The number of a result of the latest search, or the title of the page.
            """
            return self._open(str(page))

        return [search, open]

    def _search(self, query: str) -> str:
        self._queries.append(query)
        count = self._top_k
        hits: list[Document] = []
        while True:  # forbidden pages make room for others
            found = self._world.corpus.search(query, count)
            hits = [hit.document for hit in found if self._is_allowed(hit.document)][: self._top_k]
            if len(hits) == self._top_k or len(found) < count:
                break
            count *= 2

        self._results = hits
        shown = [f"[{i}] {d.title or d.id}\n{_beginning(d.text, self._snippet_chars)}" for i, d in enumerate(hits, 1)]
        return "\n\n".join(shown) or "No page matches; try other words."

    def _open(self, page: str) -> str:
        name = page.strip().strip("[]")
        number = int(name) if name.isdecimal() and len(name) < 10 else 0
        if self._results and 1 <= number <= len(self._results):
            return _shown(self._results[number - 1])

        document = self._world.page(name)
        if document is not None and self._is_allowed(document):
            return _shown(document)

        if number and self._results is None:
            self._is_invalid = True
            return "There are no results to open yet: search first, or give the title of a page."
        if number:
            return f"There is no result {number}; the latest search has {len(self._results or ())}."
        return f"There is no page with the title {name[:80]!r}."

    def _is_allowed(self, document: Document) -> bool:
        text = _folded(f"{document.title}\n{document.text}") if self._forbidden else ""
        return not any(forbidden in text for forbidden in self._forbidden)


@dataclass(frozen=True)
class Walks:
    """Over which pages a question leads."""

    min_hops: int = 2
    """Links of the shortest walk; 5 in the paper."""
    max_hops: int = 4
    """Links of the longest; 9 in the paper. Raise both for harder questions."""
    min_degree: int = 4
    """Links of a page that may be walked over, at least."""
    max_degree: int = 8
    """And at most: pages that link to everything make questions with many answers."""
    num_candidates: int = 5
    """Pages that are drawn at every hop, and one taken of them."""


def rows(
    size: int,
    *,
    seed: int = 0,
    num_pages: int = 240,
    world_seed: int = 0,
    walks: Walks | Mapping[str, int] = Walks(),
    split: str = "all",
    test_fraction: float = 0.2,
    filter_top_k: int = 3,
) -> list[dict[str, Any]]:
    """`size` questions over the world of `num_pages` pages and `world_seed`.

    A question is about one of the `walks` over pages; a mapping gives them by the names of their fields. The splits
    "train" and "test" share neither questions nor answers, whatever the seed: an answer belongs to "test" by its hash,
    with probability `test_fraction`. With "all", no two questions share an answer, so that any later split is as clean.
    Questions whose answer stands on one of the `filter_top_k` best pages for the question itself are dropped (0 keeps
    them); the paper drops what a model with search answers.

    Columns: `prompt` and `question` (the text), `answer` (a title), `forbidden` (texts that no shown page may hold),
    `world`, `hops`, `path` (titles) and `actions` (calls that lead to the answer, as guidance may show them). Raises
    ValueError for an argument out of range, and if there are not as many.
    """
    walks = walks if isinstance(walks, Walks) else _walks(walks)
    _check_rows(size, walks, split, test_fraction)
    world = made_up_world(num_pages, world_seed)
    links = {id_: page.neighbours for id_, page in world.graph.items()}
    starts = sorted(id_ for id_, targets in links.items() if walks.min_degree <= len(targets) <= walks.max_degree)
    rng = random.Random(f"multi-hop questions {num_pages} {world_seed} {seed}")

    found: dict[str, Question] = {}
    tries = 0  # since the last one found
    while starts and len(found) < size and tries < _TRIES + 2 * size:
        tries += 1
        path = walk(
            links,
            rng.choice(starts),
            rng.randint(walks.min_hops, walks.max_hops),
            min_degree=walks.min_degree,
            max_degree=walks.max_degree,
            num_candidates=walks.num_candidates,
            choose=lambda _, candidates: candidates[0],
            rng=rng,
        )
        if path is None or not _is_wanted(world.graph[path[-1]].title, split, test_fraction):
            continue

        # with "all" one question an answer, so that none is asked that would be dropped
        is_new = split != "all" or path[-1] not in found
        question = ask(world.graph, path, rng) if is_new else None
        if question is None:
            continue

        key = path[-1] if split == "all" else question.text
        if key not in found and _is_hard(question, world, filter_top_k):
            found[key] = question
            tries = 0

    if len(found) < size:
        raise ValueError(
            f"only {len(found)} of {size} questions were found (split {split!r}, {num_pages} pages); ask for fewer, or "
            "raise num_pages or max_hops"
        )
    where = {"num_pages": num_pages, "seed": world_seed}
    return [_row(question, world.graph, where) for question in found.values()]


def _world(row: Mapping[str, Any]) -> World:
    where = row.get("world")
    if not isinstance(where, Mapping) or set(where) != {"num_pages", "seed"}:
        raise ValueError(
            f"the row's world is {where!r:.100}; it must hold num_pages and seed, or the environment takes documents="
        )
    return made_up_world(where["num_pages"], where["seed"])


def _row(question: Question, graph: Graph, where: Mapping[str, int]) -> dict[str, Any]:
    return {
        "prompt": question.text,
        "question": question.text,
        "answer": graph[question.path[-1]].title,
        "forbidden": [question.text],
        "world": dict(where),
        "hops": len(question.relations),
        "path": [graph[id_].title for id_ in question.path],
        "actions": [{"name": "open", "arguments": {"page": graph[id_].title}} for id_ in question.path[:-1]],
    }


def _is_wanted(answer: str, split: str, test_fraction: float) -> bool:
    is_test = digest(["multi-hop answer", answer]) < test_fraction * 2.0**128
    return split == "all" or is_test == (split == "test")


def _is_hard(question: Question, world: World, top_k: int) -> bool:
    title = world.graph[question.path[-1]].title
    hits = world.corpus.search(question.text, top_k)
    return not any(title in hit.document.title or title in hit.document.text for hit in hits)


def _walks(values: Mapping[str, int]) -> Walks:
    try:
        return Walks(**values)
    except TypeError as error:
        raise ValueError(f"walks {dict(values)} do not fit: {error}") from None


def _check_rows(size: int, walks: Walks, split: str, test_fraction: float) -> None:
    if size < 1 or not 1 <= walks.min_hops <= walks.max_hops or walks.num_candidates < 1:
        raise ValueError(
            f"size {size} and num_candidates {walks.num_candidates} must be at least 1, and 1 <= min_hops "
            f"{walks.min_hops} <= max_hops {walks.max_hops}"
        )
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if not 0.0 <= test_fraction < 1.0:
        raise ValueError(f"test_fraction {test_fraction} must be in [0, 1)")


def _is_right(found: Any, row: Mapping[str, Any]) -> float:
    right = row["answer"]
    alternatives: Sequence[Any] = right if isinstance(right, (list, tuple)) else [right]
    return float(normalised(str(found)) in {normalised(str(text)) for text in alternatives})


def _beginning(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else f"{text[:max_chars]}..."


def _shown(document: Document) -> str:
    return f"{document.title}\n{document.text}" if document.title else document.text


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
