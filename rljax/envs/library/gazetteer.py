"""Places with coordinates, what lies between them, and what a guess of coordinates is worth.

The distance reward is that of Thinking with Map (2601.05432). The places that come with it are from GeoNames
(geonames.org), under CC BY 4.0: cities of a million inhabitants, and capitals.
"""

import bisect
import csv
import functools
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from rljax.envs.library.sharing import made_once

EARTH_KM = 6371.0088
"""Mean radius of the earth."""

EDGES_KM = (0.5, 2.0, 10.0, 25.0, 200.0, 750.0)
"""Bounds of the distance reward, each the first distance that earns less (2601.05432)."""
SCORES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0)
"""What it pays below each of them, and beyond the last."""

COLUMNS = ("name", "country", "latitude", "longitude", "population")


@dataclass(frozen=True)
class Place:
    """A city."""

    name: str
    country: str
    """Two letters of ISO 3166."""
    latitude: float
    """In degrees, from -90 to 90."""
    longitude: float
    """In degrees, from -180 to 180."""
    population: int = 0
    """Inhabitants; 0 where it is unknown."""

    @property
    def point(self) -> tuple[float, float]:
        """Latitude and longitude."""
        return self.latitude, self.longitude

    @property
    def title(self) -> str:
        """Name and country, which no two places share."""
        return f"{self.name}, {self.country}"


def distance_km(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Great-circle distance of two (latitude, longitude) in degrees: haversine on a sphere, up to 0.5% from the
    ellipsoid's."""
    (lat_a, lon_a), (lat_b, lon_b) = (map(math.radians, point) for point in (a, b))
    across = math.sin((lat_b - lat_a) / 2) ** 2
    along = math.cos(lat_a) * math.cos(lat_b) * math.sin((lon_b - lon_a) / 2) ** 2
    # Rounding may lead past 1 for points on opposite sides.
    return 2 * EARTH_KM * math.asin(math.sqrt(min(across + along, 1.0)))


def bucket_reward(value: float, edges: Sequence[float], scores: Sequence[float]) -> float:
    """The score of the bucket that `value` falls into: `scores[i]` from `edges[i - 1]` on and below `edges[i]`, so that
    a value on an edge gets the score behind it. ValueError unless there is one score more than edges."""
    if len(scores) != len(edges) + 1:
        raise ValueError(f"{len(edges)} edges part {len(edges) + 1} buckets, and there are {len(scores)} scores")
    return scores[bisect.bisect_right(edges, value)]


def distance_reward(km: float) -> float:
    """1 below 500 m, then 0.8, 0.6, 0.4, 0.2 and 0.1 below 2, 10, 25, 200 and 750 km, and 0 (2601.05432)."""
    return bucket_reward(km, EDGES_KM, SCORES)


def log_reward(km: float) -> float:
    """`1 - ln(1 + km) / ln 751`, at least 0: as far as the buckets reach, and without their ties."""
    return max(0.0, 1.0 - math.log1p(km) / math.log1p(EDGES_KM[-1]))


def folded(name: str) -> str:
    """Lower case without accents, single spaces: two names are the same if these are."""
    bare = unicodedata.normalize("NFKD", name)
    return " ".join("".join(c for c in bare if not unicodedata.combining(c)).casefold().split())


class Gazetteer:
    """Places by name, and by their distance from each other. ValueError for none, or for two of one title."""

    def __init__(self, places: Sequence[Place]):
        self.places = tuple(places)
        self._index = {folded(place.title): i for i, place in enumerate(self.places)}
        if not self.places or len(self._index) < len(self.places):
            raise ValueError(
                f"{len(self.places)} places have {len(self._index)} titles; give at least one place, and no two of one "
                "name in one country"
            )

        self._units = [_unit(place.point) for place in self.places]

        # By population, so that a bare name means the best-known place.
        named: dict[str, list[Place]] = {}
        for place in sorted(self.places, key=lambda place: (-place.population, place.title)):
            named.setdefault(folded(place.name), []).append(place)
        self._named = named
        self._distances = functools.cache(self._distances_from)

    def find(self, name: str) -> list[Place]:
        """All places of a name, or the one of a title; those with more inhabitants first."""
        index = self._index.get(folded(name))
        return [self.places[index]] if index is not None else list(self._named.get(folded(name), ()))

    def distances(self, place: Place) -> list[float]:
        """km from one of its places to each of `places`, in their order. KeyError for a place that is none of them."""
        return self._distances(self._index[folded(place.title)])

    def between(self, place: Place, least_km: int | float, most_km: int | float) -> list[Place]:
        """Other places whose distance from one of its places lies in [least_km, most_km), in the order of titles:
        neither the order nor anything else tells which of them is looked for."""
        found = zip(self.places, self.distances(place), strict=True)
        return sorted((p for p, km in found if least_km <= km < most_km and p != place), key=lambda p: p.title)

    def _distances_from(self, index: int) -> list[float]:
        # Of chords, which are fast to come by and say the same: a map has a distance for each two of its places.
        start = self._units[index]
        return [2 * EARTH_KM * math.asin(min(math.dist(start, unit) / 2, 1.0)) for unit in self._units]


def _unit(point: tuple[float, float]) -> tuple[float, float, float]:
    """The point on the unit sphere."""
    latitude, longitude = map(math.radians, point)
    return (
        math.cos(latitude) * math.cos(longitude),
        math.cos(latitude) * math.sin(longitude),
        math.sin(latitude),
    )


def read_places(path: str | Path) -> list[Place]:
    """The places of a CSV file with the columns `COLUMNS`; lines that begin with # are comments.

    ValueError, naming file and line, for other columns and for coordinates that are out of range or no numbers.
    """
    found = []
    with open(path, encoding="utf-8", newline="") as file:
        numbered = [(n, line) for n, line in enumerate(file, start=1) if line.strip() and not line.startswith("#")]
    rows = csv.reader(line for _, line in numbered)
    header = tuple(next(rows, ()))
    if header != COLUMNS:
        raise ValueError(f"{path} has the columns {', '.join(header) or 'none'}; it must have {', '.join(COLUMNS)}")

    for (number, _), row in zip(numbered[1:], rows, strict=True):
        try:
            name, country, latitude, longitude, population = row
            place = Place(name, country, float(latitude), float(longitude), int(population))
        except ValueError:
            raise ValueError(f"{path}, line {number}: {row} is no place; it needs {', '.join(COLUMNS)}") from None
        if not is_on_earth(*place.point):
            raise ValueError(f"{path}, line {number}: {place.point} lies outside [-90, 90] and [-180, 180] degrees")
        found.append(place)
    return found


def is_on_earth(latitude: int | float, longitude: int | float) -> bool:
    """Whether both are within their range of degrees; NaN is not."""
    return -90.0 <= latitude <= 90.0 and -180.0 <= longitude <= 180.0


@made_once
def gazetteer_of(path: str = "") -> Gazetteer:
    """The gazetteer of a file, or of the places that come with it, one for all of the process."""
    return Gazetteer(read_places(path or str(files("rljax.envs.library") / "cities.csv")))


def bayes_value(places: Sequence[Place], reward: Callable[[float], float]) -> float:
    """The most that a guess of one of these places earns on average, when each is as likely to be the right one. A
    policy that earns more on questions with these candidates has seen what it should not. ValueError for none."""
    if not places:
        raise ValueError("no place fits; the value of a guess needs at least one candidate")
    return max(sum(reward(distance_km(x.point, p.point)) for p in places) / len(places) for x in places)
