"""Where on the map is it? A city that is told by distances, found with the tools of a gazetteer (2601.05432)."""

import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rljax.envs.base import Prompt, Step
from rljax.envs.formats import ToolFormat
from rljax.envs.library.gazetteer import (
    Gazetteer,
    Place,
    bayes_value,
    distance_km,
    distance_reward,
    gazetteer_of,
    is_on_earth,
)
from rljax.envs.tool_environment import ToolEnvironment
from rljax.envs.tools import ToolBox, final
from rljax.tasks.callables import load_callable
from rljax.tasks.examples import digest

ACCURACY_KM = {
    "within_500_m": 0.5,
    "within_25_km": 25.0,
    "within_200_km": 200.0,
    "within_750_km": 750.0,
    "within_2500_km": 2500.0,
}
"""Counts of a step: 1 where the answer lies nearer than so many km. Their mean over episodes is Acc@km."""

SPLITS = ("all", "train", "test")

MOST_SHOWN = 10
"""Lines of one observation."""

_TASK = (
    "Find the city that fits all that is said of it. Look places up with the tools, and check what you find. The last "
    "message calls answer, or is JSON with the numbers latitude and longitude, and city and country."
)
_TRIES = 200


def read_answer(answer: Any) -> tuple[float, float] | None:
    """Latitude and longitude of an answer: of a mapping with these names (or `lat` and `lon`), or of the last JSON
    object in a text. None for another form, for what is no number, and out of range."""
    if isinstance(answer, str):
        objects = re.findall(r"\{[^{}]*\}", answer)
        try:
            answer = json.loads(objects[-1]) if objects else None
        except (ValueError, RecursionError):
            return None
    if not isinstance(answer, Mapping):
        return None

    numbers = [answer.get("latitude", answer.get("lat")), answer.get("longitude", answer.get("lon"))]
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        return None
    # Compared as they are: a whole number of JSON may be beyond what a float can hold.
    latitude, longitude = numbers
    return (float(latitude), float(longitude)) if is_on_earth(latitude, longitude) else None


class MapEnvironment(ToolEnvironment):
    """A city that is told by its distance from others. Rows are those of `rows`.

    Tools: `find(name)` tells coordinates; `distance(a, b)` km between two places; `neighbours(place, least_km,
    most_km)` which places lie so far away, by title; `answer(latitude, longitude, city, country)` ends the episode, as
    does JSON with these names in a message without a call. Observations have at most ten lines.

    The reward is `reward` (a function of km, or its name `module:function`) of the distance between the answer and the
    row's `latitude` and `longitude`; an answer without coordinates on earth has 0. Steps count `ACCURACY_KM`.
    `places` is a CSV file; empty are the places that come with rljax. `system` stands before the question; by default
    it says what to do and which tools there are. ValueError for a format that does not exist, and for places that are
    none.
    """

    def __init__(
        self,
        *,
        places: str = "",
        tool_format: str | ToolFormat = "hermes",
        reward: str | Callable[[float], float] = distance_reward,
        system: str | None = None,
    ):
        super().__init__(ToolBox(self._tools()), self._judge, tool_format=tool_format, system=system, task=_TASK)
        self.gazetteer = gazetteer_of(places)
        self._worth: Callable[[float], float] = load_callable(reward) if isinstance(reward, str) else reward
        self._error_km = math.inf

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """The question; nothing is answered yet."""
        self._error_km = math.inf
        return super().reset(row)

    def step(self, action: str) -> Step:
        """Call the tools; where the episode ends, count how near the answer came."""
        step = super().step(action)
        near = {name: float(step.done and self._error_km < km) for name, km in ACCURACY_KM.items()}
        return Step(step.observation, step.reward, step.done, {**step.counts, **near})

    def shown(self, place: Place) -> str:
        """The line of a place that `find` tells."""
        return f"{place.title}: {place.latitude:.4f}, {place.longitude:.4f}"

    def listed(self, places: Sequence[Place]) -> str:
        """What `neighbours` tells."""
        return "\n".join(place.title for place in places)

    def measured(self, km: float) -> str:
        """What `distance` tells."""
        return f"{km:.0f} km"

    def _judge(self, answer: Any, row: Mapping[str, Any]) -> float:
        point = read_answer(answer)
        if point is None:
            return 0.0
        self._error_km = distance_km(point, (row["latitude"], row["longitude"]))
        return self._worth(self._error_km)

    def _place(self, name: str) -> Place:
        found = self.gazetteer.find(name)
        if not found:
            raise ValueError(f"there is no place {name[:50]!r} on this map")
        return found[0]

    def _tools(self) -> list[Callable[..., Any]]:
        def find(name: str) -> str:
            """Latitude and longitude of the places of a name, those with more inhabitants first.

            Args:
                name: A name, or name and country, such as Paris, FR.
            """
            found = self.gazetteer.find(name)[:MOST_SHOWN]
            return "\n".join(map(self.shown, found)) or f"There is no place {name[:50]!r} on this map."

        def distance(a: str, b: str) -> str:
            """How many km lie between two places.

            Args:
                a: A name, or name and country.
                b: Another one.
            """
            return self.measured(distance_km(self._place(a).point, self._place(b).point))

        def neighbours(place: str, least_km: int | float, most_km: int | float) -> str:
            """Places whose distance from a place lies between two bounds, by name.

            Args:
                place: A name, or name and country.
                least_km: The lower bound in km.
                most_km: The upper bound in km.
            """
            found = self.gazetteer.between(self._place(place), least_km, most_km)
            more = f"\nand {len(found) - MOST_SHOWN} more; narrow the bounds" if len(found) > MOST_SHOWN else ""
            return self.listed(found[:MOST_SHOWN]) + more if found else "No place lies there."

        @final
        def answer(latitude: int | float, longitude: int | float, city: str = "", country: str = "") -> dict[str, Any]:
            """Say where it is. Nothing can be done after it.

            Args:
                latitude: In degrees.
                longitude: In degrees.
                city: Its name.
                country: Its country.
            """
            return {"latitude": latitude, "longitude": longitude, "city": city, "country": country}

        return [find, distance, neighbours, answer]


def rounded(km: float, to_km: float) -> int:
    """A distance as clues tell it: a whole multiple of `to_km`, as an integer."""
    return round(round(km / to_km) * to_km)


def candidates(gazetteer: Gazetteer, clues: Sequence[Mapping[str, Any]], to_km: float) -> list[Place]:
    """The places that fit all clues, mappings of the `place` (a title) that the distance is from and its `km`. A place
    that a clue names is none of them. ValueError for a place that is not there."""
    fits = [True] * len(gazetteer.places)
    for clue in clues:
        found = gazetteer.find(clue["place"])
        if not found:
            raise ValueError(f"the clue {dict(clue)} names a place that is not on this map")
        far = gazetteer.distances(found[0])
        fits = [fit and km > 0.0 and rounded(km, to_km) == clue["km"] for fit, km in zip(fits, far, strict=True)]
    return [place for place, fit in zip(gazetteer.places, fits, strict=True) if fit]


def rows(
    size: int,
    *,
    seed: int = 0,
    places: str = "",
    split: str = "all",
    test_fraction: float = 0.2,
    num_clues: int = 2,
    to_km: float = 50.0,
    farthest_km: float = 2000.0,
) -> list[dict[str, Any]]:
    """`size` different questions for `MapEnvironment`.

    Each tells the distance of a city from `num_clues` others that lie up to `farthest_km` away, rounded to `to_km`; the
    coarser, the more cities fit. The splits "train" and "test" share no country of a city that is asked for: a country
    belongs to "test" by its hash, with probability `test_fraction`.

    Columns: `prompt`, `latitude`, `longitude`, `city`, `country`, `clues` (as `candidates` takes them), and of the
    cities that fit, as many as the question leaves open, `num_candidates` and `best_reward`: the `bayes_value` of the
    distance reward. ValueError for an argument out of range, and if there are not as many questions.
    """
    if size < 1 or num_clues < 1 or not 0 < to_km <= farthest_km or not 0 <= test_fraction <= 1:
        raise ValueError(
            f"size {size} and num_clues {num_clues} must be at least 1, to_km {to_km} above 0 and at most farthest_km "
            f"{farthest_km}, and test_fraction {test_fraction} in [0, 1]"
        )
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")

    gazetteer = gazetteer_of(places)
    targets = [place for place in gazetteer.places if is_of_split(place, split, test_fraction)]
    rng = random.Random(f"map questions {split} {seed}")
    found: dict[str, dict[str, Any]] = {}
    tries = 0  # since the last one found
    while targets and len(found) < size and tries < _TRIES + 2 * size:
        tries += 1
        target = rng.choice(targets)
        far = zip(gazetteer.places, gazetteer.distances(target), strict=True)
        near = [(place, km) for place, km in far if to_km <= km < farthest_km]
        if len(near) < num_clues:
            continue

        clues = [{"place": place.title, "km": rounded(km, to_km)} for place, km in rng.sample(near, num_clues)]
        row = _row(target, clues, candidates(gazetteer, clues, to_km))
        if row["prompt"] not in found:
            found[row["prompt"]] = row
            tries = 0

    if len(found) < size:
        raise ValueError(f"only {len(found)} of {size} questions were found (split {split!r}); ask for fewer")
    return list(found.values())


def _row(target: Place, clues: Sequence[Mapping[str, Any]], fitting: Sequence[Place]) -> dict[str, Any]:
    told = " and ".join(f"about {clue['km']} km from {clue['place']}" for clue in clues)
    return {
        "prompt": f"A city lies {told}. Where is it?",
        "latitude": target.latitude,
        "longitude": target.longitude,
        "city": target.name,
        "country": target.country,
        "clues": list(clues),
        "num_candidates": len(fitting),
        "best_reward": bayes_value(fitting, distance_reward),
    }


def is_of_split(place: Place, split: str, test_fraction: float) -> bool:
    """Whether a place may be asked for in a split, one of `SPLITS`: its country decides."""
    is_test = digest(["map country", place.country]) < test_fraction * 2.0**128
    return split == "all" or is_test == (split == "test")
