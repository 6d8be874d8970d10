"""A made-up knowledge graph whose pages can be searched, and random walks over it (DeepDive, 2509.10446)."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rljax.envs.library.corpus import Document

PERSON = "person"
PLACE = "place"
WORK = "work"
ORGANISATION = "organisation"
REGION = "region"
YEAR = "year"

MIN_PAGES = 40

_ONSETS = "b br d dr f g gr h j k kl l m n p pr qu r s st sv t tr v z"
_VOWELS = "a e i o u ae ei"
_CODAS = "l n r s k th"
_METALS = "amber brass bronze clay copper crystal glass golden iron ivory jade leaden marble oaken paper pewter silver"
_THINGS = "bells bridges buttons candles clocks coins doors fans flutes gates keys kites lamps masks rings spoons"
_OCCUPATIONS = "architect astronomer botanist cartographer chemist engraver glassblower lawyer painter printer sailor"
_INDUSTRIES = "brewing fishing linen milling mining pottery salt shipbuilding tanning weaving"
_GENRES = "ballad comedy diary fable hymn novel opera poem satire tragedy"
_FIELDS = "acoustics anatomy ceramics geology horology hydraulics metallurgy optics seismology textiles"

TRAITS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    PERSON: (("known for", "known for", "is known for {}"), ("occupation", "occupation", "worked as {}")),
    PLACE: (("known for", "known for", "is known for {}"), ("industry", "industry", "lives on {}")),
    WORK: (("subject", "tells of", "tells of {}"), ("genre", "genre", "is {}")),
    ORGANISATION: (("emblem", "emblem", "has an emblem of {}"), ("field", "field", "works in {}")),
}
"""Of each kind of page: attribute, how the page calls it, and how a question does."""

YEARS: Mapping[str, tuple[str, str]] = {
    PERSON: ("born in", "was born"),
    PLACE: ("founded in", "was founded"),
    WORK: ("published in", "was published"),
    ORGANISATION: ("founded in", "was founded"),
}
"""What the year of a page is that of: as the page says it, and as a question does."""

RELATIONS: Mapping[tuple[str, str], tuple[str, str]] = {
    (PERSON, "birthplace"): ("birthplace", "the place where {} was born"),
    (PERSON, "school"): ("studied at", "the organisation where {} studied"),
    (PERSON, "teacher"): ("pupil of", "the teacher of {}"),
    (PERSON, "employer"): ("worked for", "the organisation that {} worked for"),
    (PERSON, "works"): ("works", "a work created by {}"),
    (PLACE, "region"): ("region", "the region of {}"),
    (PLACE, "founder"): ("founder", "the founder of {}"),
    (PLACE, "twin"): ("twin town", "the twin town of {}"),
    (PLACE, "archive"): ("archive", "the organisation that keeps the archive of {}"),
    (PLACE, "natives"): ("natives", "a person born in {}"),
    (WORK, "creator"): ("creator", "the creator of {}"),
    (WORK, "dedicatee"): ("dedicated to", "the person to whom {} is dedicated"),
    (WORK, "setting"): ("setting", "the place where {} is set"),
    (WORK, "publisher"): ("publisher", "the organisation that published {}"),
    (ORGANISATION, "seat"): ("seat", "the place where {} has its seat"),
    (ORGANISATION, "founder"): ("founder", "the founder of {}"),
    (ORGANISATION, "director"): ("first director", "the first director of {}"),
    (ORGANISATION, "partner"): ("partner", "the partner of {}"),
    (ORGANISATION, "publications"): ("publications", "a work published by {}"),
    (REGION, "towns"): ("towns", "a place in {}"),
    (YEAR, "events"): ("in that year", "something that began in {}"),
}
"""Of each kind of page and link: how the page calls it, and how a question does."""


@dataclass(frozen=True)
class Page:
    """A node of the graph."""

    id: str
    kind: str
    title: str
    year: int | None = None
    """In which it began."""
    traits: Mapping[str, str] | None = None
    """Its other attributes, by name (`TRAITS`)."""
    links: tuple[tuple[str, str], ...] = ()
    """Pairs of a relation and the id of another page."""

    @property
    def neighbours(self) -> list[str]:
        """Pages that it links to, each once, in order."""
        return list(dict.fromkeys(target for _, target in self.links))

    def related(self, relation: str) -> list[str]:
        """Pages that it links to by this relation."""
        return [target for name, target in self.links if name == relation]


Graph = Mapping[str, Page]


def walk(
    graph: Mapping[str, Sequence[str]],
    start: str,
    length: int,
    *,
    min_degree: int,
    max_degree: int,
    num_candidates: int,
    choose: Callable[[Sequence[str], Sequence[str]], str],
    rng: random.Random,
) -> list[str] | None:
    """A path of `length` links over nodes not visited before, or None at a dead end (2509.10446).

    Of the neighbours with `min_degree` to `max_degree` neighbours of their own, `num_candidates` are drawn, and
    `choose(path, candidates)` takes one.
    """
    path = [start]
    while len(path) <= length:
        fits = [u for u in graph[path[-1]] if u not in path and min_degree <= len(graph[u]) <= max_degree]
        if not fits:
            return None
        path.append(choose(path, rng.sample(fits, min(num_candidates, len(fits)))))
    return path


def knowledge_graph(num_pages: int, seed: int = 0) -> dict[str, Page]:
    """People, places, works, organisations and regions with made-up names, `num_pages` in all, and a page for each
    year in which something began. The same arguments give the same graph.

    A person, place, work or organisation links to 4 to 8 others; a region links to all its places, and a year is linked
    to by none. Titles differ in more than case. Raises ValueError for fewer than `MIN_PAGES` pages.
    """
    if num_pages < MIN_PAGES:
        raise ValueError(f"a knowledge graph of {num_pages} pages is too small to walk on; give at least {MIN_PAGES}")

    # one generator from here on: the order in which parts are drawn is part of what a seed means
    rng = random.Random(f"knowledge graph {num_pages} {seed}")
    shares = {PLACE: 0.25, ORGANISATION: 0.2, WORK: 0.2, REGION: 0.02}
    counts = {kind: max(2, int(num_pages * share)) for kind, share in shares.items()}
    counts[PERSON] = num_pages - sum(counts.values())

    ids = {kind: [f"{kind}-{i}" for i in range(count)] for kind, count in counts.items()}
    titles = _titles(rng)
    names = {page: titles(kind) for kind, pages in ids.items() for page in pages}
    links = _links(ids, rng)
    pages = {
        page: Page(page, kind, names[page], _year(kind, rng), _traits(kind, rng), tuple(links[page]))
        for kind, members in ids.items()
        for page in members
    }

    for year in sorted({page.year for page in pages.values() if page.year is not None}):
        events = tuple(("events", page.id) for page in pages.values() if page.year == year)
        pages[f"year-{year}"] = Page(f"year-{year}", YEAR, str(year), links=events)
    return pages


def documents(graph: Graph) -> list[Document]:
    """The pages as documents: a sentence for each attribute and each relation."""
    return [Document(page.id, page.title, _text(page, graph)) for page in graph.values()]


def _text(page: Page, graph: Graph) -> str:
    facts = [f"{page.title} is {'an' if page.kind == ORGANISATION else 'a'} {page.kind}"]
    traits = page.traits or {}
    facts += [f"{label}: {traits[name]}" for name, label, _ in TRAITS.get(page.kind, ())]
    facts += [f"{YEARS[page.kind][0]}: {page.year}"] if page.year is not None else []
    for relation in dict.fromkeys(relation for relation, _ in page.links):
        targets = "; ".join(graph[target].title for target in page.related(relation))
        facts.append(f"{RELATIONS[page.kind, relation][0]}: {targets}")
    return ". ".join(fact[0].upper() + fact[1:] for fact in facts) + "."


def _links(ids: Mapping[str, list[str]], rng: random.Random) -> dict[str, list[tuple[str, str]]]:
    """Four links of every page to others, one each; then what leads back, such as the works of a person."""
    links: dict[str, list[tuple[str, str]]] = {page: [] for members in ids.values() for page in members}

    def link(kind: str, **relations: str) -> None:
        for page in ids[kind]:
            taken = {page}
            for relation, other in relations.items():
                target = rng.choice([candidate for candidate in ids[other] if candidate not in taken])
                taken.add(target)
                links[page].append((relation, target))

    def link_back(kind: str, relation: str, other: str, back: str, most: int) -> None:
        for page in ids[kind]:
            (target,) = [target for name, target in links[page] if name == relation]
            present = {linked for _, linked in links[target]}
            if sum(name == back for name, _ in links[target]) < most and page not in present:
                links[target].append((back, page))

    # forward links first: what leads back follows from them
    link(PERSON, birthplace=PLACE, school=ORGANISATION, teacher=PERSON, employer=ORGANISATION)
    link(PLACE, region=REGION, founder=PERSON, twin=PLACE, archive=ORGANISATION)
    link(WORK, creator=PERSON, dedicatee=PERSON, setting=PLACE, publisher=ORGANISATION)
    link(ORGANISATION, seat=PLACE, founder=PERSON, director=PERSON, partner=ORGANISATION)
    link_back(WORK, "creator", PERSON, "works", 4)
    link_back(WORK, "publisher", ORGANISATION, "publications", 4)
    link_back(PERSON, "birthplace", PLACE, "natives", 4)
    link_back(PLACE, "region", REGION, "towns", len(ids[PLACE]))
    return links


def _year(kind: str, rng: random.Random) -> int | None:
    spans = {PERSON: (1700, 1949), PLACE: (1200, 1699), WORK: (1750, 1989), ORGANISATION: (1700, 1989)}
    return rng.randint(*spans[kind]) if kind in spans else None


def _traits(kind: str, rng: random.Random) -> dict[str, str]:
    classes = {PERSON: _OCCUPATIONS, PLACE: _INDUSTRIES, WORK: _GENRES, ORGANISATION: _FIELDS}
    if kind not in classes:
        return {}
    special, common = (name for name, _, _ in TRAITS[kind])
    value = rng.choice(classes[kind].split())
    article = {PERSON: "an " if value[0] in "aeiou" else "a ", WORK: "an " if value[0] in "aeiou" else "a "}
    thing = f"{rng.choice(_METALS.split())} {rng.choice(_THINGS.split())}"
    return {special: thing, common: article.get(kind, "") + value}


def _titles(rng: random.Random) -> Callable[[str], str]:
    """Gives a new made-up title at every call. No word of a title comes in another one, but for endings and forms."""
    words = _words(rng)
    forms: Mapping[str, Sequence[str]] = {
        PERSON: ("{a} {b}",),
        PLACE: ("{a}ford", "{a}holm", "{a}mere", "{a}stad", "{a}wick"),
        WORK: ("Letters to {a}", "Return to {a}", "Song of {a}", "Winter in {a}"),
        ORGANISATION: ("{a} Academy", "{a} Guild", "{a} Institute", "{a} Press", "{a} Society"),
        REGION: ("{a}mark", "{a}land"),
    }

    def title(kind: str) -> str:
        form = rng.choice(forms[kind])
        return form.format(a=next(words), b=next(words) if "{b}" in form else "")

    return title


def _words(rng: random.Random) -> Iterator[str]:
    """Made-up words, none twice."""
    onsets = _ONSETS.split()
    vowels = _VOWELS.split()
    codas = ["", "", *_CODAS.split()]
    used: set[str] = set()
    while True:
        word = "".join(rng.choice(onsets) + rng.choice(vowels) for _ in range(2))
        word += rng.choice(onsets)[0] + rng.choice(vowels)[0] + rng.choice(codas)
        if word not in used:
            used.add(word)
            yield word.capitalize()
