"""Chronicles: events of several lives told in prose, with statements about the years before.

What these prove is for `rljax.tasks.chronicle_facts` to say. Lives move on while a chronicle is told: who is where, can
do what, has met whom. All of it agrees with one `World`.
"""

import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rljax.tasks.chronicle_facts import (
    BORN,
    DAYS,
    EVE,
    FAR,
    IDLE,
    KNEW,
    MET,
    OLDER,
    PUPIL,
    SAW,
    THERE,
    TOGETHER,
    USED,
    Event,
    Fact,
    Variable,
    pair_of,
)

TOWNS = ("Ardal", "Brask", "Corvo", "Dunmere", "Elsin", "Farrow", "Gild", "Hask")
SKILLS = {
    "sail": "sailed a boat home",
    "swim": "swam across the pond",
    "read": "read a letter aloud",
    "ride": "rode a grey horse",
    "weave": "wove a blanket",
    "fiddle": "fiddled at a wedding",
    "bake": "baked bread for a feast",
    "carve": "carved a spoon",
}
"""What can be learned, and how it looks where it is used."""
_SCENERY = (
    ("The wind", "A thin rain", "The light of the evening", "Smoke from the chimneys", "A cold mist", "The sun"),
    ("came over", "lay on", "went across", "hung above"),
    ("the roofs", "the fields", "the river", "the market", "the hills", "the harbour"),
    ("and nobody spoke", "until the bells rang", "as so often that year", "for a while", "and dogs barked"),
)
_IDLE_TALK = (
    "In {town}, {name} bought a lamp.",
    "In {town}, {name} counted coins all evening.",
    "In {town}, {name} lost a glove and found it again.",
    "In {town}, {name} slept badly.",
    "In {town}, {name} planted a pear tree.",
    "In {town}, {name} mended a roof.",
)
_LONGEST_WAY = 9
_MOST_EVENTS = 300


@dataclass(frozen=True)
class World:
    """What was true before the first day. All that a chronicle says agrees with it."""

    cast: tuple[str, ...]
    born: Mapping[str, int]
    knew: frozenset[tuple[str, str]]
    saw: frozenset[tuple[str, str]]
    met: frozenset[tuple[str, str]]
    eve: Mapping[str, str]
    at: Mapping[str, int]
    """Where towns lie along the one road, in days."""
    pair: tuple[str, str]
    """Two that were always together."""
    pupil: tuple[str, str]
    """One, and who knew all that this one knew."""
    idle: frozenset[str]
    """Who learns nothing in the chronicle."""

    def holds(self, fact: Fact) -> bool:
        """Whether a fact of earlier life is so, `fact.holds` aside."""
        key = (fact.subject, fact.value)
        one = {BORN: self.born, EVE: self.eve}
        many = {KNEW: self.knew, SAW: self.saw, MET: self.met}
        return one[fact.relation][fact.subject] == fact.value if fact.relation in one else key in many[fact.relation]

    def way(self, one: str, other: str) -> int:
        """Days between two towns."""
        return abs(self.at[one] - self.at[other])


@dataclass(frozen=True)
class Statement:
    """What an event is to say; its day is filled in where it is placed."""

    text: str
    """With `{town}` where it happens in one, and `{age}` for that of the subject."""
    says: tuple[Fact, ...]
    is_early: bool = False
    """Whether it belongs to the first days."""


def make_world(rng: random.Random, cast: Sequence[str]) -> World:
    """A world at random, of at least four characters."""
    names = tuple(cast)
    born = {name: -rng.randint(16, 50) for name in names}
    eve = {name: rng.choice(TOWNS) for name in names}
    # Towns lie apart, so that some cannot be reached in the first days.
    places = rng.sample(range(len(TOWNS)), len(TOWNS))
    at = {town: round(place * _LONGEST_WAY / (len(TOWNS) - 1)) for town, place in zip(TOWNS, places, strict=True)}

    saw = {(name, town) for name in names for town in TOWNS if rng.random() < 0.5 or eve[name] == town}
    met = {pair_of(*two) for two in itertools.combinations(names, 2) if rng.random() < 0.5}
    knew = {(name, skill) for name in names for skill in SKILLS if rng.random() < 0.5}

    one, other = rng.sample(names, 2)
    together = {town for name, town in saw if name in (one, other)}
    saw |= {(name, town) for name in (one, other) for town in together}
    for third in set(names) - {one, other}:
        met.discard(pair_of(other, third))
        met |= {pair_of(other, third)} if pair_of(one, third) in met else set()
    met.add(pair_of(one, other))

    pupil, teacher = rng.sample(names, 2)
    knew -= {(pupil, skill) for skill in SKILLS if (teacher, skill) not in knew}
    idle = frozenset(rng.sample(names, 2))
    return World(
        cast=names,
        born=born,
        knew=frozenset(knew),
        saw=frozenset(saw),
        met=frozenset(met),
        eve=eve,
        at=at,
        pair=(one, other),
        pupil=(pupil, teacher),
        idle=idle,
    )


def said(fact: Fact, rng: random.Random) -> list[Statement]:
    """Events that state a fact of earlier life: one, or a lie and its exposure, of which the second states it."""
    name, value = fact.subject, fact.value
    if fact.relation == BORN:
        return [Statement(f"That year {name} was {{age}} years old.", (fact,))]
    if fact.relation == EVE:
        return [Statement(f"{name} had spent the night before the first day in {value}, as a letter showed.", (fact,))]

    so, not_so = {
        KNEW: (f"learned to {value} before the first day", f"known how to {value} before the first day"),
        SAW: (f"been to {value} before the first day", f"been to {value} before the first day"),
        MET: (f"met {value} before the first day", f"met {value} before the first day"),
    }[fact.relation]
    told = f"{name} told a neighbour of having {so}." if fact.holds else f"{name} had never {not_so}, as all knew."
    if rng.random() >= 0.25:
        return [Statement(told, (fact,))]

    lie = f"{name} swore never to have {not_so}." if fact.holds else f"{name} boasted of having {so}."
    exposed = f"had {so}" if fact.holds else f"had never {not_so}"
    return [Statement(lie, ()), Statement(f"It came out that {name} had lied and {exposed}.", (fact,))]


def proved_by_two(fact: Fact, world: World, rng: random.Random) -> list[Statement]:
    """Events that prove a fact only together; none where the world has no such events for it. `EVE` is proved where
    it does not hold."""
    name, value = fact.subject, fact.value
    if fact.relation == KNEW and fact.holds:
        if name not in world.idle:
            return []
        learned = f"Since the first day {name} had learned nothing new."
        return [uses(name, value), Statement(learned, (Fact(IDLE, name, 0),))]

    # A pupil knew nothing but what the teacher did.
    if fact.relation == KNEW:
        pupil, teacher = world.pupil
        other = Fact(KNEW, teacher, value, holds=False)
        if name != pupil or world.holds(other):
            return []
        taught = f"Whatever {pupil} knew when it all began, {pupil} had from {teacher}, who knew it too."
        return [Statement(taught, (Fact(PUPIL, pupil, teacher),)), *said(other, rng)]

    if fact.relation in (SAW, MET):
        return _by_company(fact, world, rng)

    # An age, and how far another one's is from it.
    if fact.relation == BORN:
        other_name = rng.choice([other for other in world.cast if other != name])
        years = world.born[other_name] - world.born[name]
        if not years:
            return []
        first, second = (name, other_name) if years > 0 else (other_name, name)
        link = Fact(OLDER, first, (second, abs(years)))
        text = f"{first} was older than {second} by {counted(abs(years), 'year')}."
        return [Statement(text, (link,)), *said(Fact(BORN, other_name, world.born[other_name]), rng)]

    # Nobody can have been where the way is longer than the days since.
    town = world.eve[name]
    far = world.way(town, value)
    if far <= 3 or fact.holds:
        return []

    days = counted(far, "day")
    text = f"A carter swore that no way between {value} and {town} takes less than {days}, and he was right."
    seen = Statement(f"In {town}, {name} was seen at the well.", (Fact(THERE, name, (town, 0)),), is_early=True)
    return [seen, Statement(text, (Fact(FAR, value, (town, far)),))]


def counted(number: int, unit: str) -> str:
    """A number with its unit, in the plural where it is not 1."""
    return f"{number} {unit}" + ("" if number == 1 else "s")


def uses(name: str, skill: str) -> Statement:
    """Somebody does what is to be learned."""
    return Statement(f"In {{town}}, {name} {SKILLS[skill]}.", (Fact(USED, name, (skill, 0)),))


def tell(
    world: World,
    statements: Sequence[Statement],
    length: int,
    rng: random.Random,
    *,
    quiet: Collection[Variable] = (),
) -> tuple[Event, ...]:
    """A chronicle of about `length` characters that makes the statements, in their order, among other events: journeys,
    lessons, work and first meetings, after which places and skills are others. The other events say nothing of what is
    `quiet`."""
    early = [statement for statement in statements if statement.is_early]
    later = [statement for statement in statements if not statement.is_early]
    count = max(len(statements) + 4, min(_MOST_EVENTS, length // 75))
    slots = set(rng.sample(range(len(early), count), len(later)))

    queue = iter([*early, *later])
    life = _Life(world, rng, quiet)
    events: list[Event] = []
    for index in range(count):
        is_first = index < max(3, len(early))
        life.day += rng.randint(0, 1) if is_first else rng.randint(2, 20)
        statement = next(queue) if index < len(early) or index in slots else life.happens()
        events.append(life.event(index + 1, statement))
    return _padded(events, length, rng)


class _Life:
    """The state that moves on while a chronicle is told."""

    def __init__(self, world: World, rng: random.Random, quiet: Collection[Variable]):
        self.world = world
        self.rng = rng
        self.quiet = quiet
        self.day = 1
        self.place = dict(world.eve)
        self.since = dict.fromkeys(world.cast, 0)
        self.knows = set(world.knew)
        self.met = set(world.met)

    def event(self, number: int, statement: Statement) -> Event:
        """The statement today. Who is somewhere is there."""
        says = []
        for fact in statement.says:
            if fact.relation in (USED, THERE):
                fact = fact._replace(value=(fact.value[0], self.day))
            elif fact.relation == IDLE:
                fact = fact._replace(value=self.day)
            says.append(fact)

        text = statement.text
        if "{town}" in text:
            name = says[0].subject
            text = text.format(town=self.place[name])
            says.append(Fact(THERE, name, (self.place[name], self.day)))
        if "{age}" in text:
            text = text.format(age=1 + (self.day - 1) // DAYS - int(says[0].value))
        for fact in says:
            if fact.relation == THERE:
                self.since[fact.subject] = self.day
        return Event(number, self.day, text, tuple(says))

    def happens(self) -> Statement:
        """Something at random that can happen today."""
        name = self.rng.choice(self.world.cast)
        kinds = [self._moves, self._works, self._learns, self._meets, self._idles]
        self.rng.shuffle(kinds)
        return next(found for kind in kinds if (found := kind(name)) is not None)

    def _moves(self, name: str) -> Statement | None:
        here = self.place[name]
        reached = [t for t in TOWNS if t != here and self.world.way(here, t) <= self.day - self.since[name]]
        if not reached:
            return None
        town = self.rng.choice(reached)
        self.place[name] = town
        return Statement(f"{name} came to {town}.", (Fact(THERE, name, (town, 0)),))

    def _works(self, name: str) -> Statement | None:
        known = [skill for skill in SKILLS if (name, skill) in self.knows and (KNEW, name, skill) not in self.quiet]
        return uses(name, self.rng.choice(known)) if known else None

    def _learns(self, name: str) -> Statement | None:
        teachers = [
            (other, skill)
            for other, skill in sorted(self.knows)
            if other != name and self.place[other] == self.place[name] and (name, skill) not in self.knows
            if not {(KNEW, name, skill), (KNEW, other, skill)} & {*self.quiet}
        ]
        if not teachers or name in self.world.idle:
            return None
        other, skill = self.rng.choice(teachers)
        self.knows.add((name, skill))
        text = f"In {{town}}, {other} taught {name}, who had never learned it, to {skill}."
        return Statement(text, (Fact(USED, other, (skill, 0)), Fact(KNEW, name, skill, holds=False)))

    def _meets(self, name: str) -> Statement | None:
        strangers = [
            other
            for other in self.world.cast
            if other != name and self.place[other] == self.place[name] and pair_of(name, other) not in self.met
            if (MET, *pair_of(name, other)) not in self.quiet
        ]
        if not strangers:
            return None
        one, other = pair_of(name, self.rng.choice(strangers))
        self.met.add((one, other))
        text = f"In {{town}}, {one} and {other} met for the first time in their lives."
        return Statement(text, (Fact(MET, one, other, holds=False), Fact(THERE, other, (self.place[one], 0))))

    def _idles(self, name: str) -> Statement:
        text = self.rng.choice(_IDLE_TALK).format(town=self.place[name], name=name)
        return Statement(text, (Fact(THERE, name, (self.place[name], 0)),))


def _by_company(fact: Fact, world: World, rng: random.Random) -> list[Statement]:
    """A fact of one of two that were always together, by what is said of the other."""
    people = [fact.subject] if fact.relation == SAW else [fact.subject, fact.value]
    inside = [name for name in people if name in world.pair]
    if len(inside) != 1:
        return []
    (name,) = inside
    other = world.pair[world.pair[0] == name]
    if fact.relation == SAW:
        link = Fact(SAW, other, fact.value, fact.holds)
    else:
        (third,) = (person for person in people if person != name)
        link = Fact(MET, *pair_of(other, third), fact.holds)
    text = (
        f"Before the first day {name} and {other} went everywhere together; what towns one had seen and what people "
        "one had met, so had the other."
    )
    return [Statement(text, (Fact(TOGETHER, name, other),)), *said(link, rng)]


def _padded(events: Sequence[Event], length: int, rng: random.Random) -> tuple[Event, ...]:
    """The events with sentences that say nothing, as long as they fit into the length."""
    texts = [event.text for event in events]
    left = length - sum(len(event.told()) + 1 for event in events)
    while True:
        sentence = " " + " ".join(rng.choice(part) for part in _SCENERY) + "."
        left -= len(sentence)
        if left < 0:
            break
        texts[rng.randrange(len(texts))] += sentence
    return tuple(Event(e.number, e.day, text, e.says) for e, text in zip(events, texts, strict=True))
