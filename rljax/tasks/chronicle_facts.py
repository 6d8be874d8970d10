"""What events say of the years before, and what follows from it.

A `Fact` about earlier life is stated by one event, or follows from several under a few rules (`derive`), each with the
smallest sets of events that prove it. So whether an episode from before can be true is computed, and why (`conflicts`).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

BORN = "born"
"""In the year `value`; year 1 is the first of a chronicle."""
KNEW = "knew"
"""The skill `value`, when the chronicle begins."""
SAW = "saw"
"""The town `value`, before it begins."""
MET = "met"
"""The character `value`, before it begins; the subject is the first of the two by name."""
EVE = "eve"
"""Slept in the town `value` on the night before the first day."""
EARLIER = (BORN, KNEW, SAW, MET, EVE)
"""Relations of earlier life. A life has one value of `ONE_VALUE`."""
ONE_VALUE = (BORN, EVE)

USED = "used"
"""`(skill, day)`: the subject can do it by then."""
IDLE = "idle"
"""`day`: up to it the subject has learned nothing since the chronicle began."""
THERE = "there"
"""`(town, day)`: where the subject is."""
FAR = "far"
"""`(town, days)`: no way between the town `subject` and that one takes fewer days."""
OLDER = "older"
"""`(character, years)`: the subject is older by so many."""
TOGETHER = "together"
"""The subject and the character `value` had seen the same towns and met the same people."""
PUPIL = "pupil"
"""What the subject knew when the chronicle began, the character `value` knew too."""

DAYS = 360
"""Of a year."""

Variable = tuple[object, ...]
"""Something of earlier life that a chronicle may speak of: a relation, and whose."""
Supports = frozenset[frozenset[int]]
"""Smallest sets of event numbers that prove something; none holds another."""


class Fact(NamedTuple):
    """Something that is so, or is not."""

    relation: str
    subject: str
    value: Any
    holds: bool = True


@dataclass(frozen=True)
class Event:
    """One entry of a chronicle."""

    number: int
    """From 1."""
    day: int
    """From 1, counted through the years."""
    text: str
    says: tuple[Fact, ...] = ()

    def told(self) -> str:
        """The entry with its number and date."""
        return f"[{self.number}] Year {1 + (self.day - 1) // DAYS}, day {1 + (self.day - 1) % DAYS}. {self.text}"


def pair_of(one: str, other: str) -> tuple[str, str]:
    """Two characters by name, as `MET` has them."""
    return (one, other) if one < other else (other, one)


def opposes(one: Fact, other: Fact) -> bool:
    """Whether two facts of earlier life cannot both be."""
    if (one.relation, one.subject) != (other.relation, other.subject):
        return False
    if one.value == other.value:
        return one.holds != other.holds
    return one.relation in ONE_VALUE and one.holds and other.holds


def derive(events: Sequence[Event]) -> dict[Fact, Supports]:
    """All that events say and that follows from it, each with its smallest proofs, to a fixed point."""
    known: dict[Fact, Supports] = {}
    for event in events:
        for fact in event.says:
            known[fact] = _smallest([*known.get(fact, ()), frozenset({event.number})])

    is_changed = True
    while is_changed:
        is_changed = False
        for fact, premises in list(_conclusions(known)):
            unions = [frozenset().union(*sets) for sets in itertools.product(*(known[p] for p in premises))]
            found = _smallest([*known.get(fact, ()), *unions])
            if found != known.get(fact):
                known[fact] = found
                is_changed = True
    return known


def conflicts(events: Sequence[Event], claim: Fact) -> Supports:
    """The smallest sets of events that a claim about earlier life cannot be true with; none where it can be true. The
    events agree with each other, and no event has the number 0."""
    known = derive([Event(0, 0, "", (claim,)), *events])
    groups: dict[tuple[str, str], list[Fact]] = {}
    for fact in known:
        if fact.relation in EARLIER:
            groups.setdefault((fact.relation, fact.subject), []).append(fact)

    found = []
    for facts in groups.values():
        for one, other in itertools.combinations(facts, 2):
            if opposes(one, other):
                found += [a | b for a in known[one] for b in known[other]]
    return _smallest([support - {0} for support in found])


def variables(fact: Fact) -> frozenset[Variable]:
    """What of earlier life a fact is about."""
    relation, subject, value, _ = fact
    if relation == USED:
        return frozenset({(KNEW, subject, value[0])})
    if relation == OLDER:
        return frozenset({(BORN, subject), (BORN, value[0])})
    if relation == EVE:
        return frozenset({(EVE, subject), (SAW, subject, value)})
    if relation == BORN:
        return frozenset({(BORN, subject)})
    return frozenset({(relation, subject, value)} if relation in EARLIER else ())


def _conclusions(known: Mapping[Fact, Supports]) -> Iterator[tuple[Fact, tuple[Fact, ...]]]:
    """What follows from known facts in one step, with its premises."""
    by: dict[str, list[Fact]] = {}
    for fact in known:
        by.setdefault(fact.relation, []).append(fact)

    def of(*relations: str) -> Iterable[tuple[Fact, ...]]:
        return itertools.product(*(by.get(relation, ()) for relation in relations))

    for used, idle in of(USED, IDLE):
        skill, day = used.value
        if used.subject == idle.subject and day <= idle.value:
            yield Fact(KNEW, used.subject, skill), (used, idle)

    for there, far in of(THERE, FAR):
        # From the eve to day d there are d days.
        (town, day), (end, days) = there.value, far.value
        for here, start in ((end, far.subject), (far.subject, end)):
            if town == here and day < days:
                yield Fact(EVE, there.subject, start, holds=False), (there, far)

    for older, born in of(OLDER, BORN):
        other, years = older.value
        if born.holds and born.subject == older.subject:
            yield Fact(BORN, other, born.value + years), (older, born)
        if born.holds and born.subject == other:
            yield Fact(BORN, older.subject, born.value - years), (older, born)

    for pupil, knew in of(PUPIL, KNEW):
        if knew.holds and knew.subject == pupil.subject:
            yield knew._replace(subject=pupil.value), (pupil, knew)
        if not knew.holds and knew.subject == pupil.value:
            yield knew._replace(subject=pupil.subject), (pupil, knew)

    for (together,) in of(TOGETHER):
        one, other = together.subject, together.value
        yield Fact(MET, *pair_of(one, other)), (together,)
        for fact in (*by.get(SAW, ()), *by.get(MET, ())):
            for a, b in ((one, other), (other, one)):
                yield from ((moved, (together, fact)) for moved in _moved(fact, a, b))

    for (eve,) in of(EVE):
        if eve.holds:
            yield Fact(SAW, eve.subject, eve.value), (eve,)
    for (saw,) in of(SAW):
        if not saw.holds:
            yield Fact(EVE, saw.subject, saw.value, holds=False), (saw,)


def _moved(fact: Fact, one: str, other: str) -> list[Fact]:
    """A fact of `one` as a fact of `other`, who was always with them."""
    if fact.relation == SAW:
        return [fact._replace(subject=other)] if fact.subject == one else []
    people = {fact.subject, fact.value}
    if one not in people or other in people:
        return []
    (third,) = people - {one}
    return [Fact(MET, *pair_of(other, third), fact.holds)]


def _smallest(supports: Iterable[frozenset[int]]) -> Supports:
    """Those that hold no other."""
    kept: list[frozenset[int]] = []
    for support in sorted(set(supports), key=len):
        if not any(other <= support for other in kept):
            kept.append(support)
    return frozenset(kept)
