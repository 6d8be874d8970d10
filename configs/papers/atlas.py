"""A map for a character model: which city lies so far from two others? The environment is `rljax.envs.library.maps`.

    paris 800 berlin 600:   the question: two cities, and about how many km the one looked for lies from each
    ~paris 800; milan oslo  a call for cities about so far away, and what comes back
    ?milan; 45.46 9.19      a call for coordinates
    milan/berlin; 842       a call for a distance
    =milan                  the answer, which ends the episode: where the city of this name lies

Cities have names of up to seven letters; distances are rounded to 200 km, so that two to four cities fit the first one.
Which of them it is the second tells: a policy that does not compare distances is right as often as it guesses well.
Held-out rows have other first clues.

An answer is a name: a model of characters learns the coordinates of the cities it is trained on by heart.
"""

import functools
import itertools
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rljax.envs import Parsed, ParseProblem, Step, ToolCall, ToolFormat
from rljax.envs.library import Gazetteer, MapEnvironment, Place, distance_km
from rljax.envs.library.gazetteer import gazetteer_of
from rljax.envs.library.maps import candidates, rounded
from rljax.tasks import Example

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789=?:;~/-. \n"
TO_KM = 200.0
"""What distances of questions are rounded to."""
FARTHEST_KM = 1500.0
HELD_OUT = 0.2
"""Share of first clues."""
WRONG = "no"
"""What comes back from a call that is none, or that fails."""

_NEIGHBOURS = re.compile(r"~([a-z]+) (\d{1,5})")
_DISTANCE = re.compile(r"([a-z]+)/([a-z]+)")
_ANSWER = re.compile(r"=([a-z]+)")


def parse(text: str) -> Parsed:
    """`?name`, `~name km`, `name/name` or `=name` of a city there is; anything else is a problem."""
    text = text.removesuffix(";")
    if text[:1] == "?":
        return Parsed((ToolCall("find", {"name": text[1:]}),))
    if match := _NEIGHBOURS.fullmatch(text):
        km = int(match[2])
        bounds = {"least_km": km - TO_KM / 2, "most_km": km + TO_KM / 2}
        return Parsed((ToolCall("neighbours", {"place": match[1], **bounds}),))
    if match := _DISTANCE.fullmatch(text):
        return Parsed((ToolCall("distance", {"a": match[1], "b": match[2]}),))
    if point := answer_of(text):
        return Parsed((ToolCall("answer", dict(zip(("latitude", "longitude"), point, strict=True))),))
    return Parsed(problem=ParseProblem("malformed", WRONG))


FORMAT = ToolFormat("atlas", parse, stop_strings=(";",), wrap=(" ", "\n"))


@functools.cache
def small_world() -> Gazetteer:
    """Cities of the gazetteer whose names have up to seven plain letters, one of each name, in few letters and
    decimals."""
    places: dict[str, Place] = {}
    for place in sorted(gazetteer_of().places, key=lambda place: (-place.population, place.title)):
        name = place.name.lower()
        if len(name) <= 7 and name.isascii() and name.isalpha():
            places.setdefault(
                name, Place(name, place.country, round(place.latitude, 2), round(place.longitude, 2), place.population)
            )
    return Gazetteer(list(places.values()))


class Atlas(MapEnvironment):
    """The map on which observations are as short as they can be."""

    def __init__(self) -> None:
        super().__init__(tool_format=FORMAT, system="")
        self.gazetteer = small_world()

    def step(self, action: str) -> Step:
        step = super().step(action)
        # The model has no letters for what the tools say in words, and nothing is read behind an answer.
        said = step.observation if set(step.observation) <= set(ALPHABET) else WRONG
        return Step("" if step.done else said, step.reward, step.done, step.counts)

    def shown(self, place: Place) -> str:
        return f"{place.latitude:g} {place.longitude:g}"

    def listed(self, places: Sequence[Place]) -> str:
        return " ".join(place.name for place in places)

    def measured(self, km: float) -> str:
        return f"{km:.0f}"


@functools.cache
def questions(split: str) -> list[dict[str, Any]]:
    """Every question whose first clue two to four cities fit, and one of them the second. A first clue is of one
    split. Cities are not: one that is never asked for in training is one that training learns to pass over."""
    world = small_world()
    indices = range(len(world.places))
    far = [[rounded(km, TO_KM) if km < FARTHEST_KM else 0 for km in world.distances(p)] for p in world.places]
    made = []
    for first in indices:
        rings: dict[int, list[int]] = {}
        for i in indices:
            if far[first][i]:
                rings.setdefault(far[first][i], []).append(i)

        for near, ring in rings.items():
            is_held_out = random.Random(f"{world.places[first].name} {near}").random() < HELD_OUT
            is_asked = 2 <= len(ring) <= 4 and is_held_out == (split == "test")
            for target, second in itertools.product(ring if is_asked else [], indices):
                km = far[target][second]
                if km and second != first and [far[i][second] for i in ring].count(km) == 1:
                    made.append(_question(world.places[target], [(first, far[target][first]), (second, km)]))
    return made


def _question(target: Place, clues: Sequence[tuple[int, int]]) -> dict[str, Any]:
    told = [{"place": small_world().places[i].name, "km": km} for i, km in clues]
    return {
        "prompt": " ".join(f"{clue['place']} {clue['km']}" for clue in told) + ":",
        "latitude": target.latitude,
        "longitude": target.longitude,
        "city": target.name,
        "clues": told,
    }


def rows(size: int, split: str = "train", seed: int = 0) -> list[dict[str, Any]]:
    """`size` of the `questions`, each city as often as the others as far as there are questions on it."""
    shuffled = random.Random(seed).sample(questions(split), len(questions(split)))
    nth: Counter[str] = Counter()
    ranked = []
    for row in shuffled:
        nth[row["city"]] += 1
        ranked.append((nth[row["city"]], row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])][:size]


def flawed(examples: Sequence[Example]) -> list[Example]:
    """Demonstrations of every training row, of which half look at the map as they should, and then take one of the
    cities that fit the first clue, whichever it is; most of them check some of the distances and do not mind what they
    say. The others answer with a city of the question, or with any."""
    every = [place.name for place in small_world().places]
    made = []
    for index, example in enumerate(examples):
        rng = random.Random(index)
        first, second = example.columns["clues"]
        match index % 4:
            case 0 | 1:
                turns = _looked_up(first, second, rng)
            case 2:
                turns = [f"={rng.choice([first, second])['place']}"]
            case _:
                turns = [f"={rng.choice(every)}"]
        made.append(Example(example.prompt, {"completion": turns}))
    return made


def _looked_up(first: Mapping[str, Any], second: Mapping[str, Any], rng: random.Random) -> list[str]:
    fitting = sorted(place.name for place in candidates(small_world(), [first], TO_KM))
    turns = [f"~{first['place']} {first['km']};", f" {' '.join(fitting)}\n"]
    for name in rng.sample(fitting, rng.randint(0, len(fitting))):
        far = distance_km(_point(name), _point(second["place"]))
        turns += [f"{name}/{second['place']};", f" {far:.0f}\n"]
    return [*turns, f"={rng.choice(fitting)}"]


def _point(name: str) -> tuple[float, float]:
    return small_world().find(name)[0].point


def answer_of(text: str) -> tuple[float, float] | None:
    """Latitude and longitude of the city that an episode ends with."""
    match = _ANSWER.fullmatch(text[text.rfind("=") :]) if "=" in text else None
    return _point(match[1]) if match and small_world().find(match[1]) else None


_CLUE = re.compile(r"([a-z]+) (\d+)")
_NUMBERED = re.compile(r"^Answer (\d+):\n(.*?)(?:\n\n|\Z)", flags=re.MULTILINE | re.DOTALL)
"""An answer of the prompt; there is no blank line in an episode."""


def read_by_clues(prompt: str) -> str:
    """A verifier without a model: of the numbered answers the one whose coordinates fit the question's two distances
    best, by the map. It reads what a language model would read (`rljax.evaluation.verifier_prompt`)."""
    question = re.search(r"^Question: (.*)$", prompt, flags=re.MULTILINE)
    assert question is not None
    clues = [(_point(name), int(km)) for name, km in _CLUE.findall(question[1])]

    misses: dict[str, float] = {}
    for number, text in _NUMBERED.findall(prompt):
        point = answer_of(text.rstrip())
        if point is not None:
            misses[number] = sum(abs(distance_km(point, anchor) - km) for anchor, km in clues)
    return min(misses, key=lambda number: misses[number]) if misses else "none"
