"""Can an episode from a character's earlier life be true, given the chronicle of what came after?

The task is that of PRELUDE (2508.09848), whose books are mostly in copyright. Here chronicles are generated
(`rljax.tasks.chronicles`), labels come from a check of all events, and the smallest sets of events that decide are
known, so that cited reasons are judged without a person.
"""

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rljax.tasks.chronicle_facts import (
    BORN,
    EARLIER,
    EVE,
    KNEW,
    MET,
    ONE_VALUE,
    SAW,
    Event,
    Fact,
    Supports,
    Variable,
    conflicts,
    derive,
    pair_of,
    variables,
)
from rljax.tasks.chronicles import SKILLS, TOWNS, Statement, World, counted, make_world, proved_by_two, said, tell
from rljax.tasks.stories import FULL, check_rows, draw_cast, listed, merged, shown

SUITE = "prelude"
CONSISTENT = "consistent"
CONTRADICT = "contradict"
LABELS = (CONSISTENT, CONTRADICT)
KINDS = {
    "core": CONSISTENT,
    "irrelevant": CONSISTENT,
    "local": CONTRADICT,
    "global": CONTRADICT,
}
"""Core: the chronicle implies it. Irrelevant: the chronicle says nothing of what it is about. Local: one event rules it
out. Global: only two or more events together do."""
MOST_CITED = 5
"""Events that a reason may cite. Whoever cites them all has found nothing."""
SHORTEST = 1000
"""Characters of a chronicle."""

ASK = (
    "Only the chronicle counts. What it does not tell may have happened, but nothing happens between the episode and "
    "the first day. What characters say is true unless it is exposed. Can the episode be true? Answer consistent or "
    f"contradict, then the numbers of the events that show it, at most {MOST_CITED}, such as: contradict [2, 7]"
)

_LABEL = re.compile(
    r"\b(?P<not>not\s+)?(?:(?P<in>in)?consistent\b|contradict(?:s|ed|ion|ory|ing)?\b|(?P<un>no)\s+contradiction\b)",
    re.IGNORECASE,
)
_CITED = re.compile(r"\[([\d\s,;]*)\]")
_TRIES = 400
_OFFSETS = tuple(offset for offset in range(-9, 10) if abs(offset) > 1)


@dataclass(frozen=True)
class Episode:
    """A candidate for a character's earlier life."""

    kind: str
    claim: Fact
    text: str
    evidence: Supports
    """The smallest sets of events that decide; for an irrelevant one the empty set alone."""

    @property
    def label(self) -> str:
        return KINDS[self.kind]


def kind_of(events: Sequence[Event], claim: Fact) -> tuple[str, Supports]:
    """The kind of a claim about earlier life by the events, with its evidence; "" for one that is of none: the events
    touch it and decide nothing."""
    against = conflicts(events, claim)
    if against:
        return ("local" if min(map(len, against)) == 1 else "global"), against
    known = derive(events)
    if claim in known:
        return "core", known[claim]
    if any(variables(fact) & variables(claim) for fact in known):
        return "", frozenset()
    return "irrelevant", frozenset({frozenset()})


def make_chronicle(
    rng: random.Random, cast: Sequence[str], length: int
) -> tuple[tuple[Event, ...], dict[str, Episode]]:
    """A chronicle of about `length` characters, and an episode of each kind.

    What an episode is about and whether it says that something is or is not are drawn before its kind comes into play:
    read alone, an episode tells nothing.
    """
    about = {kind: (rng.choice(EARLIER), rng.random() < 0.5) for kind in KINDS}
    for _ in range(_TRIES):
        world = make_world(rng, cast)
        planned = {kind: _planned(kind, *about[kind], world, rng) for kind in ("core", "local", "global")}
        if any(plan is None for plan in planned.values()):
            continue

        claims = {kind: plan[0] for kind, plan in planned.items() if plan is not None}
        claims["irrelevant"] = rng.choice(_claims(*about["irrelevant"], world, rng))
        quiet = variables(claims["irrelevant"])
        statements = [plan[1] for plan in planned.values() if plan is not None]
        others = [_decoy(world, rng, quiet) for _ in range(length // 1500)]
        events = tell(world, merged([*statements, *others], rng), length, rng, quiet=quiet)

        # The check says what a claim is, whatever was planned.
        found = {kind: kind_of(events, claims[kind]) for kind in KINDS}
        if all(found[kind][0] == kind for kind in KINDS):
            return events, {k: Episode(k, claims[k], _told(claims[k], rng), found[k][1]) for k in KINDS}
    raise ValueError(f"no chronicle of {length} characters has episodes about {about}")


def rows(
    size: int, *, seed: int = 0, split: str = "all", length: int = 4000, windows: Sequence[int] = (FULL,)
) -> list[dict[str, Any]]:
    """`size` chronicles of about `length` characters, each with an episode of each kind, asked in each window: `4 *
    len(windows)` rows a chronicle.

    A window is the number of characters, the last ones in whole events, that are shown; 0 shows none and `FULL` all.
    Columns: `prompt`, `answer` (the label), `completion` (label and evidence, for a warm-up), `suite`, `item` (number
    of the chronicle), `kind`, `window`, `evidence` (lists of event numbers), and `visible`: whether the window shows
    one of these whole. The splits "train" and "test" share no chronicle. ValueError for an argument out of range.
    """
    check_rows(size, length, windows, shortest=SHORTEST)
    made = []
    for index in range(size):
        rng = random.Random(f"{SUITE} {split} {seed} {index}")
        cast = draw_cast(rng, min(8, 4 + length // 8000), split)
        events, episodes = make_chronicle(rng, cast, length)
        for episode in episodes.values():
            made += [_row(index, cast, events, episode, window) for window in windows]
    return made


def read_label(text: str) -> str | None:
    """The first label that a text gives, None without one. "Not consistent" and "inconsistent" are a contradiction,
    "does not contradict" is none."""
    found = _LABEL.search(text)
    if found is None:
        return None
    is_consistent = found[0].lower().endswith("consistent") and not found["in"]
    if found["not"] or found["un"] or re.search(r"\bno\s+$", text[: found.start()], re.IGNORECASE):
        is_consistent = not is_consistent
    return CONSISTENT if is_consistent else CONTRADICT


def read_cited(text: str) -> set[int]:
    """The event numbers that a text cites in brackets."""
    return {int(number) for part in _CITED.findall(text) for number in re.findall(r"\d{1,6}", part)}


def score(row: Mapping[str, Any], text: str) -> dict[str, float]:
    """Of an answer to a row: `right` (its label), `reasoned` (right, and at most `MOST_CITED` cited events hold one of
    the smallest sets that decide), `readable` (it has a label); each 0 or 1."""
    label = read_label(text)
    cited = read_cited(text)
    is_right = label == row["answer"]
    is_proved = len(cited) <= MOST_CITED and any(cited >= set(support) for support in row["evidence"])
    return {
        "right": float(is_right),
        "reasoned": float(is_right and is_proved),
        "readable": float(label is not None),
    }


def right(completion: str, answer: str, **columns: Any) -> float:
    """1 for the right label, else 0."""
    del columns
    return float(read_label(completion) == answer)


def reasoned(completion: str, answer: str, evidence: Sequence[Sequence[int]], **columns: Any) -> float:
    """1 for the right label with events that prove it, else 0."""
    del columns
    return score({"answer": answer, "evidence": evidence}, completion)["reasoned"]


@dataclass(frozen=True)
class Summary:
    """What labels come to."""

    items: int
    accuracy: float
    f1: Mapping[str, float]
    """Of each label."""
    macro_f1: float
    unreadable: float
    """Share of answers without a label, which count as wrong."""


def summary(answers: Sequence[str], found: Sequence[str | None]) -> Summary:
    """Of the right labels and those that were found, None where an answer has none. A label that is neither given nor
    right anywhere has F1 0. ValueError for other lengths, no item, or an answer that is no label."""
    if len(answers) != len(found) or not answers or not set(answers) <= set(LABELS):
        raise ValueError(
            f"{len(answers)} answers and {len(found)} labels must be as many, at least one, and answers of {LABELS}"
        )
    pairs = list(zip(answers, found, strict=True))
    f1 = {}
    for label in LABELS:
        both = sum(answer == given == label for answer, given in pairs)
        either = sum(answer == label for answer, _ in pairs) + sum(given == label for _, given in pairs)
        f1[label] = 2 * both / either if either else 0.0
    return Summary(
        items=len(pairs),
        accuracy=sum(answer == given for answer, given in pairs) / len(pairs),
        f1=f1,
        macro_f1=sum(f1.values()) / len(f1),
        unreadable=sum(given is None for given in found) / len(pairs),
    )


def _row(index: int, cast: Sequence[str], events: Sequence[Event], episode: Episode, window: int) -> dict[str, Any]:
    texts = [event.told() for event in events]
    count = shown(texts, window)
    seen = {event.number for event in events[len(events) - count :]}
    evidence = sorted(sorted(support) for support in episode.evidence)
    chronicle = "\n".join(texts[len(texts) - count :]) or "(left out)"
    return {
        "prompt": f"Chronicle of {listed(cast)}.\n{chronicle}\n\nCharacter: {episode.claim.subject}\n"
        f"Episode before the first day: {episode.text}\n{ASK}\n",
        "answer": episode.label,
        "completion": f"{episode.label} {min(evidence, key=lambda numbers: (len(numbers), numbers))}",
        "suite": SUITE,
        "item": index,
        "kind": episode.kind,
        "window": window,
        "evidence": evidence,
        "visible": any(seen >= set(support) for support in evidence),
    }


def _claims(relation: str, is_so: bool, world: World, rng: random.Random) -> list[Fact]:
    """Episodes that can be told with a relation, true ones and others. Of a year and of a night it is said where they
    were, never where not."""
    if relation == BORN:
        years = [(name, born + rng.choice((0, rng.choice(_OFFSETS)))) for name, born in world.born.items()]
        return [Fact(BORN, name, year) for name, year in years]
    values: dict[str, Collection[str]] = {KNEW: SKILLS, SAW: TOWNS, EVE: TOWNS, MET: world.cast}
    return [
        Fact(relation, name, value, is_so or relation in ONE_VALUE)
        for name in world.cast
        for value in values[relation]
        if relation != MET or ((name, value) == pair_of(name, value) and name != value)
    ]


def _planned(
    kind: str, relation: str, is_so: bool, world: World, rng: random.Random
) -> tuple[Fact, list[Statement]] | None:
    """A claim of a kind, and events that are to make it so; None where this world has none."""
    if relation == BORN:
        name = rng.choice(world.cast)
        truth = Fact(BORN, name, world.born[name])
        claim = truth if kind == "core" else truth._replace(value=world.born[name] + rng.choice(_OFFSETS))
    else:
        claims = _claims(relation, is_so, world, rng)
        fitting = [claim for claim in claims if (world.holds(claim) == claim.holds) == (kind == "core")]
        if kind == "global":
            fitting = [claim for claim in fitting if proved_by_two(_against(claim), world, random.Random(0))]
        if not fitting:
            return None
        claim = rng.choice(fitting)
        truth = claim if kind == "core" else _against(claim)

    is_joint = kind == "global" or (kind == "core" and rng.random() < 0.5)
    events = proved_by_two(truth, world, rng) if is_joint else []
    if kind == "global":
        return (claim, events) if events else None
    if relation == EVE:
        truth = Fact(EVE, claim.subject, world.eve[claim.subject])
    return claim, events or said(truth, rng)


def _against(claim: Fact) -> Fact:
    return claim._replace(holds=not claim.holds)


def _decoy(world: World, rng: random.Random, quiet: Collection[Variable]) -> list[Statement]:
    """Events that say something true of earlier life, and nothing of what is quiet."""
    name = rng.choice(world.cast)
    truths = [Fact(BORN, name, world.born[name]), Fact(EVE, name, world.eve[name])]
    for relation in (KNEW, SAW, MET):
        claim = rng.choice(_claims(relation, True, world, rng))
        truths.append(claim._replace(holds=world.holds(claim)))
    truths = [truth for truth in truths if not variables(truth) & {*quiet}]
    return said(rng.choice(truths), rng)


def _told(claim: Fact, rng: random.Random) -> str:
    """The episode that makes a claim."""
    name, value = claim.subject, claim.value
    if claim.relation == BORN:
        age = rng.randint(1, 6)
        return f"{counted(1 - value - age, 'year')} before year 1, {name} was {counted(age, 'year')} old."
    if claim.relation == EVE:
        return f"{name} slept in {value} on the night before the first day."
    so, not_so = {
        KNEW: (f"As a child, {name} learned to {value}.", f"{name} grew up and never learned to {value}."),
        SAW: (f"As a child, {name} walked the streets of {value}.", f"{name} grew up and never came to {value}."),
        MET: (f"As children, {name} and {value} were friends.", f"{name} and {value} grew up and never met."),
    }[claim.relation]
    return so if claim.holds else not_so
