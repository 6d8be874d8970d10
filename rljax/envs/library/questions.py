"""Questions about the end of a walk over a knowledge graph, in which nothing is called by its name.

A question is a conjunction of constraints on the pages of the walk: clues about attributes (a name becomes a
description, a year a range of years) and the relations between them. Evaluating it on the graph shows that it has one
answer.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rljax.envs.library.knowledge import REGION, RELATIONS, TRAITS, YEAR, YEARS, Graph, Page

YEARS_WIDE = 12
"""Years in a range, both ends included."""


@dataclass(frozen=True)
class Clue:
    """Of a page: that it is of a `kind`, that a trait has this value, or that its year lies in a range."""

    attribute: str
    value: str = ""
    first: int = 0
    last: int = 0

    def holds(self, page: Page) -> bool:
        """Whether the page fits."""
        if self.attribute == "kind":
            return page.kind == self.value
        if self.attribute == "year":
            return page.year is not None and self.first <= page.year <= self.last
        return (page.traits or {}).get(self.attribute) == self.value

    def phrase(self, kind: str) -> str:
        """What a question says of a page of this kind."""
        if self.attribute == "year":
            return f"{YEARS[kind][1]} between {self.first} and {self.last}"
        return next(text for name, _, text in TRAITS[kind] if name == self.attribute).format(self.value)


@dataclass(frozen=True)
class Question:
    """`clues[i]` constrain the i-th page of the walk, `relations[i]` leads from it to the next; the answer is the last
    page, `path[-1]`."""

    path: tuple[str, ...]
    relations: tuple[str, ...]
    clues: tuple[tuple[Clue, ...], ...]
    text: str


def answers(graph: Graph, relations: Sequence[str], clues: Sequence[Sequence[Clue]]) -> set[str]:
    """All pages that the constraints allow as the last of a walk."""
    return _follow(graph, _fitting(graph, graph, clues[0]), relations, clues[1:])


def _fitting(graph: Graph, among: Iterable[str], clues: Sequence[Clue]) -> set[str]:
    return {id_ for id_ in among if all(clue.holds(graph[id_]) for clue in clues)}


def _follow(graph: Graph, found: set[str], relations: Sequence[str], clues: Sequence[Sequence[Clue]]) -> set[str]:
    for relation, wanted in zip(relations, clues, strict=True):
        found = _fitting(graph, {target for source in found for target in graph[source].related(relation)}, wanted)
    return found


def ask(graph: Graph, path: Sequence[str], rng: random.Random) -> Question | None:
    """A question whose only answer is the end of the path; None if these pages make none.

    The first page is described until no other fits; a later one only as far as the relations leave a choice. There is
    none if the first page cannot be told from others, if the end is found without it, if the end is of a kind with few
    pages, or if the text gave a title away.
    """
    pages = [graph[id_] for id_ in path]
    if pages[-1].kind in (REGION, YEAR) or pages[0].kind not in TRAITS:
        return None
    relations = [_relation(one, other, rng) for one, other in pairwise(pages)]
    anything = _fitting(graph, graph, [Clue("kind", pages[0].kind)])
    first: list[Clue] = []
    for clue in _clues(pages[0], rng):  # a description and a range at least
        if len(first) < 2 or len(_fitting(graph, anything, first)) > 1:
            first.append(clue)
    later: list[list[Clue]] = [[] for _ in relations]
    spare = [(i, clue) for i, page in enumerate(pages[1:]) for clue in reversed(_clues(page, rng))]  # the vaguest first
    begin = _fitting(graph, anything, first)
    while len(_follow(graph, begin, relations, later)) > 1 and spare:
        i, clue = spare.pop(0)
        later[i].append(clue)
    is_unique = len(begin) == 1 and _follow(graph, begin, relations, later) == {path[-1]}
    if not is_unique or len(_follow(graph, anything, relations, later)) == 1:
        return None
    clues = [[Clue("kind", pages[0].kind), *first], *later]
    text = _text(pages, relations, clues)
    if any(page.title.lower() in text.lower() for page in pages):
        return None
    return Question(tuple(path), tuple(relations), tuple(map(tuple, clues)), text)


def _relation(one: Page, other: Page, rng: random.Random) -> str:
    return rng.choice([relation for relation, target in one.links if target == other.id])


def _clues(page: Page, rng: random.Random) -> list[Clue]:
    """What can be said of a page: what it is known for, a range around its year, what it shares with many."""
    if page.kind not in TRAITS or page.year is None or page.traits is None:
        return []
    first = page.year - rng.randrange(YEARS_WIDE)
    special, common = (Clue(name, page.traits[name]) for name, _, _ in TRAITS[page.kind])
    return [special, Clue("year", first=first, last=first + YEARS_WIDE - 1), common]


def _text(pages: Sequence[Page], relations: Sequence[str], clues: Sequence[Sequence[Clue]]) -> str:
    described = [
        " and ".join(clue.phrase(page.kind) for clue in own if clue.attribute != "kind")
        for page, own in zip(pages, clues)
    ]
    sentences = [f"(1) is the {pages[0].kind} that {described[0]}."]
    for i, (page, relation) in enumerate(zip(pages, relations), start=1):
        hop = RELATIONS[page.kind, relation][1].format(f"({i})")
        sentences.append(f"({i + 1}) is {hop}" + (f" that {described[i]}." if described[i] else "."))
    return " ".join([*sentences, f"What is the name of ({len(pages)})?"])
