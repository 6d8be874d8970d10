"""Made-up conversations over some weeks, in which people tell facts, and questions about them.

Facts are drawn, some are overwritten later and some never told, so which conversations an answer needs is known, and no
model knows an answer by heart. How a fact is told and how it is asked for is a `Wording`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rljax.envs.library.memory import UNKNOWN
from rljax.envs.library.memory_store import Conversation

SINGLE = "single fact"
TWO_HOP = "two-hop"
UPDATE = "temporal update"
AGGREGATE = "aggregate"
UNANSWERABLE = "unanswerable"
KINDS = (SINGLE, TWO_HOP, UPDATE, AGGREGATE, UNANSWERABLE)
"""Kinds of questions: told once; about a friend, whom another fact names; told twice, of which the later holds; how
many there are of what is told one by one; never told."""

FRIEND = "friend"
PET = "pet"
_TOWNS = "Arlen Borvik Castra Delmo Elvas Fornby Grenz Harrow Istra Jorvik Kelda Lomas"
_JOBS = "baker miller potter tailor sailor carver weaver tanner glazier cooper"
_DISHES = "soup stew bread curry pasta rice beans salad pie trout"
_PETS = "cat dog hen goat pony duck mouse rabbit"
VALUES: Mapping[str, tuple[str, ...]] = {
    "town": tuple(_TOWNS.split()),
    "job": tuple(_JOBS.split()),
    "dish": tuple(_DISHES.split()),
}
"""What may be told of a person once, or again with another value."""
PETS = tuple(_PETS.split())

SPLITS = ("all", "train", "test")

_TRIES = 200


@dataclass(frozen=True)
class Fact:
    """Something that a person tells."""

    person: str
    attribute: str
    """One of `VALUES`, `FRIEND` or `PET`."""
    value: str


@dataclass(frozen=True)
class Asked:
    """What a question is about."""

    kind: str
    """One of `KINDS`."""
    person: str
    attribute: str
    """What is asked of the person; of their friend, if the kind is `TWO_HOP`."""


@dataclass(frozen=True)
class Wording:
    """How things are said."""

    tell: Callable[[Fact], str]
    """A turn of a conversation."""
    ask: Callable[[Asked], str]
    """The question."""
    headline: Callable[[int, Sequence[str]], str]
    """Of a conversation: its day, and who talks in it."""
    name: Callable[[random.Random], str]
    """A person's name, drawn."""


_TOLD = {
    "town": "I moved to {}.",
    "job": "I work as a {} now.",
    "dish": "What I like to eat most is {}.",
    FRIEND: "My best friend is {}.",
    PET: "I got a {}.",
}
_ASKED = {
    "town": ("Where does {} live?", "Where does the best friend of {} live?"),
    "job": ("What does {} do for a living?", "What does the best friend of {} do for a living?"),
    "dish": ("What is the favourite food of {}?", "What is the favourite food of the best friend of {}?"),
    PET: ("How many pets has {} got?", ""),
}


def _name(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnrstvz") + rng.choice("aeiou") for _ in range(3)).title()


PROSE = Wording(
    tell=lambda fact: f"{fact.person}: {_TOLD[fact.attribute].format(fact.value)}",
    ask=lambda asked: _ASKED[asked.attribute][asked.kind == TWO_HOP].format(asked.person),
    headline=lambda day, people: f"Day {day}: a talk with {' and '.join(people)}",
    name=_name,
)
"""Sentences. Of a friend's fact the turn shares no word with the question."""


def rows(
    size: int,
    *,
    seed: int = 0,
    split: str = "all",
    num_people: int = 5,
    num_conversations: int = 8,
    kinds: Sequence[str] = KINDS,
    wording: Wording = PROSE,
) -> list[dict[str, Any]]:
    """`size` questions for `MemoryEnvironment`, the kinds in turn, each about a history of its own.

    Columns: `prompt`, `answer`, `evidence` (ids), `stale` (None but for a temporal update), `kind`, `task` (the kind
    again, by which evaluations report), `conversations`, and `asked`: the fields of `Asked`. The splits "train" and
    "test" draw apart. ValueError for an argument out of range.
    """
    if size < 1 or num_people < 2 or num_conversations < 2:
        raise ValueError(
            f"size {size} must be at least 1, and num_people {num_people} and num_conversations {num_conversations} at "
            "least 2"
        )
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds {list(kinds)} must be some of {', '.join(KINDS)}")

    made = []
    for i in range(size):
        rng = random.Random(f"memory {split} {seed} {i} {num_people} {num_conversations}")
        made.append(_row(kinds[i % len(kinds)], num_people, num_conversations, wording, rng))
    return made


def _row(kind: str, num_people: int, num_conversations: int, wording: Wording, rng: random.Random) -> dict[str, Any]:
    for _ in range(_TRIES):
        people = _names(num_people, wording, rng)
        told = _told(people, num_conversations, rng)
        ids = rng.sample([f"{letter}{digit}" for letter in "abcdefghkm" for digit in range(10)], num_conversations)
        question = _question(kind, people, told, rng)
        if question is not None and all(told):
            break
    else:
        raise ValueError(
            f"no history of {num_people} people fills {num_conversations} conversations and has a question of the kind "
            f"{kind!r}; raise num_people"
        )

    asked, answer, needed, stale = question
    return {
        "prompt": wording.ask(asked),
        "answer": answer,
        "evidence": [ids[i] for i in needed],
        "stale": stale,
        "kind": kind,
        "task": kind,
        "conversations": [asdict(c) for c in _conversations(told, ids, wording)],
        "asked": asdict(asked),
    }


def _names(count: int, wording: Wording, rng: random.Random) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names[wording.name(rng)] = None
    return list(names)


def _told(people: Sequence[str], num_conversations: int, rng: random.Random) -> list[list[Fact]]:
    """Facts by conversation, in the order in which they are told: of each attribute none, one or two values."""
    facts = []
    for person in people:
        facts.append(Fact(person, FRIEND, rng.choice([other for other in people if other != person])))
        facts += [Fact(person, PET, pet) for pet in rng.sample(PETS, rng.randint(0, 2))]
        for attribute, values in VALUES.items():
            times = rng.choice((0, 1, 1, 2))
            facts += [Fact(person, attribute, value) for value in rng.sample(values, times)]

    rng.shuffle(facts)
    return [facts[i::num_conversations] for i in range(num_conversations)]


def _question(
    kind: str, people: Sequence[str], told: Sequence[Sequence[Fact]], rng: random.Random
) -> tuple[Asked, str, list[int], str | None] | None:
    """(what is asked, answer, conversations that it needs, an answer that holds no more), or None if this history has
    no question of the kind."""
    person = rng.choice(list(people))
    attribute = PET if kind == AGGREGATE else rng.choice(list(VALUES))
    asked = Asked(kind, person, attribute)
    found = _of(told, person, attribute)

    if kind == TWO_HOP:
        ((first, friend),) = _of(told, person, FRIEND)
        found = _of(told, friend, attribute)
        # Two conversations, or there would be one hop.
        if len(found) != 1 or found[0][0] == first:
            return None
        return asked, found[0][1], sorted((first, found[0][0])), None

    if kind == UNANSWERABLE:
        return None if found else (asked, UNKNOWN, [], None)
    if kind == AGGREGATE:
        places = sorted({place for place, _ in found})
        return (asked, str(len(found)), places, None) if len(found) >= 2 else None

    wanted = 2 if kind == UPDATE else 1
    if len(found) != wanted or len({place for place, _ in found}) < wanted:
        return None
    return asked, found[-1][1], [found[-1][0]], found[0][1] if kind == UPDATE else None


def _of(told: Sequence[Sequence[Fact]], person: str, attribute: str) -> list[tuple[int, str]]:
    """(conversation, value) of all facts of an attribute of a person, in the order in which they were told."""
    return [
        (place, fact.value)
        for place, facts in enumerate(told)
        for fact in facts
        if (fact.person, fact.attribute) == (person, attribute)
    ]


def _conversations(told: Sequence[Sequence[Fact]], ids: Sequence[str], wording: Wording) -> list[Conversation]:
    """Two are linked where one names a friend who talks in the other, or where both tell the same of one person."""
    people = [list(dict.fromkeys(fact.person for fact in facts)) for facts in told]
    about = [{(fact.person, fact.attribute) for fact in facts} for facts in told]
    friends = [{fact.value for fact in facts if fact.attribute == FRIEND} for facts in told]
    made = []
    for i, facts in enumerate(told):
        headline = wording.headline(i + 1, people[i])
        others = [j for j in range(len(told)) if j != i]
        linked = [ids[j] for j in others if friends[i] & set(people[j]) or about[i] & about[j]]
        values = [fact.value for fact in facts]
        made.append(
            Conversation(
                id=ids[i],
                headline=headline,
                turns=tuple([headline, *map(wording.tell, facts)]),
                summary=", ".join(f"{fact.person} {fact.attribute}" for fact in facts),
                keywords=" ".join([*people[i], *values]),
                links=tuple(linked),
            )
        )
    return made
