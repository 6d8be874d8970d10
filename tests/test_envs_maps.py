"""The map: distances and rewards of the paper's tables, tools, questions whose splits are clean, answers."""

import json
import math

import pytest

from rljax.envs.library import Gazetteer, MapEnvironment, Place, bucket_reward, distance_km, distance_reward
from rljax.envs.library.gazetteer import bayes_value, gazetteer_of, log_reward, read_places
from rljax.envs.library.maps import ACCURACY_KM, MOST_SHOWN, candidates, read_answer, rows

TARGET = (31.2304, 121.4737)
PARIS = (48.8566, 2.3522)


@pytest.mark.parametrize(
    ("guess", "km", "reward"),
    [
        (TARGET, 0.0, 1.0),
        ((31.2340, 121.4737), 0.4003, 1.0),
        ((31.2400, 121.4737), 1.0675, 0.8),
        ((31.2304, 121.5500), 7.2547, 0.6),
        ((31.4000, 121.4737), 18.8587, 0.4),
        ((31.3000, 120.6000), 83.4019, 0.2),
        ((30.2741, 120.1551), 164.8744, 0.2),
        ((39.9042, 116.4074), 1067.3116, 0.0),
    ],
)
def test_distances_and_rewards_are_those_of_the_worked_example(guess, km, reward):
    assert distance_km(TARGET, guess) == pytest.approx(km, abs=5e-5)
    assert distance_km(guess, TARGET) == distance_km(TARGET, guess)
    assert distance_reward(distance_km(TARGET, guess)) == reward


@pytest.mark.parametrize(
    ("point", "km", "bucket", "log"),
    [
        ((48.8606, 2.3376), 1.1570, 0.8, 0.883904),
        ((48.7262, 2.3652), 14.5311, 0.4, 0.585761),
        ((48.8014, 2.1301), 17.3779, 0.4, 0.560342),
        ((50.8503, 4.3517), 263.9758, 0.1, 0.157333),
        ((45.7640, 4.8357), 391.4995, 0.1, 0.097996),
        ((52.5200, 13.4050), 877.4645, 0.0, 0.0),
    ],
)
def test_both_rewards_around_paris(point, km, bucket, log):
    assert distance_km(PARIS, point) == pytest.approx(km, abs=5e-5)
    assert distance_reward(km) == bucket
    assert log_reward(km) == pytest.approx(log, abs=1e-6)


def test_an_edge_belongs_to_the_lower_score_and_the_date_line_is_no_border():
    on_edges = {0.4999: 1, 0.5: 0.8, 2.0: 0.6, 10.0: 0.4, 25.0: 0.2, 200.0: 0.1, 750.0: 0}
    assert {km: distance_reward(km) for km in on_edges} == on_edges
    assert distance_km((0.0, 179.9), (0.0, -179.9)) == pytest.approx(22.2390, abs=5e-5)
    assert distance_km((90.0, 0.0), (-90.0, 77.0)) == pytest.approx(math.pi * 6371.0088)
    with pytest.raises(ValueError, match="2 edges part 3 buckets, and there are 2 scores"):
        bucket_reward(1.0, (1.0, 2.0), (1.0, 0.0))


def test_the_places_that_come_with_it_are_where_they_are():
    world = gazetteer_of()
    assert len(world.places) == 690
    for name, point in {"Paris": PARIS, "Tokyo": (35.69, 139.69), "Nairobi": (-1.29, 36.82)}.items():
        assert distance_km(world.find(name)[0].point, point) < 10
    assert {place.country for place in world.find("hyderabad")} == {"IN", "PK"}
    assert world.find("SAO  PAULO")[0].title == "São Paulo, BR"
    assert world.find("Atlantis") == []


def test_all_distances_of_a_place_are_those_one_by_one():
    world = gazetteer_of()
    place = world.find("Paris, FR")[0]
    one_by_one = [distance_km(place.point, other.point) for other in world.places]
    assert world.distances(place) == pytest.approx(one_by_one, abs=1e-6)
    ring = world.between(place, 250.0, 350.0)
    assert [p.title for p in ring] == sorted(p.title for p in ring) and "London, GB" in [p.title for p in ring]
    assert all(250 <= distance_km(place.point, p.point) < 350 for p in ring)


def test_bad_files_of_places_are_refused_by_line(tmp_path):
    file = tmp_path / "places.csv"
    file.write_text("# mine\nname,country,latitude,longitude,population\nHere,XX,1,2,3\nThere,XX,91,2,3\n")
    with pytest.raises(ValueError, match=r"line 4: \(91.0, 2.0\) lies outside"):
        read_places(file)
    file.write_text("name,country,latitude,longitude,population\nHere,XX,north,2,3\n")
    with pytest.raises(ValueError, match=r"line 2: .*north.* is no place"):
        read_places(file)
    file.write_text("name,lat\nHere,1\n")
    with pytest.raises(ValueError, match="has the columns name, lat; it must have name, country"):
        read_places(file)
    with pytest.raises(ValueError, match="2 places have 1 titles"):
        Gazetteer([Place("Here", "XX", 0.0, 0.0), Place("here", "XX", 1.0, 1.0)])


@pytest.mark.parametrize(
    ("answer", "point"),
    [
        ('It is Paris. {"lat": 48.8566, "lon": 2.3522, "city": "Paris", "country": "FR"}', PARIS),
        ({"latitude": 48.8566, "longitude": 2.3522}, PARIS),
        ('{"lat": 1, "lon": 2} no, {"lat": 3, "lon": 4}', (3.0, 4.0)),
        ('{"lat": 91, "lon": 2}', None),
        ('{"lat": NaN, "lon": 2}', None),
        ('{"lat": "48", "lon": 2}', None),
        ('{"lat": true, "lon": 2}', None),
        pytest.param(f'{{"lat": 1{"0" * 400}, "lon": 2}}', None, id="beyond floats"),
        pytest.param(f'{{"lat": 1, "lon": {"[" * 100_000}}}', None, id="nested too deeply"),
        ({"latitude": 1, "longitude": -(10**400)}, None),
        ("Paris", None),
        ("{lat}", None),
    ],
)
def test_an_answer_is_read_as_coordinates_on_earth_or_not_at_all(answer, point):
    assert read_answer(answer) == point


def call(tool, **arguments):
    return f"<tool_call>{json.dumps({'name': tool, 'arguments': arguments})}</tool_call>"


def play(row, *actions, **options):
    environment = MapEnvironment(**options)
    environment.reset(row)
    return [environment.step(action) for action in actions]


def test_a_question_is_answered_with_the_tools_and_counts_how_near_the_answer_is():
    row = {"prompt": "?", "latitude": 50.8505, "longitude": 4.3488}
    steps = play(
        row,
        call("neighbours", place="Paris", least_km=200, most_km=300),
        call("find", name="Brussels"),
        call("distance", a="Brussels", b="Paris, FR"),
        call("answer", latitude=50.8, longitude=4.4, city="Brussels", country="BE"),
    )
    assert steps[0].observation == "Brussels, BE\nLuxembourg, LU"
    assert steps[1].observation == "Brussels, BE: 50.8505, 4.3488"
    assert steps[2].observation == "264 km"
    assert steps[3].done and steps[3].reward == 0.6
    near = {name: sum(step.counts[name] for step in steps) for name in ACCURACY_KM}
    assert near == {
        "within_500_m": 0,
        "within_25_km": 1,
        "within_200_km": 1,
        "within_750_km": 1,
        "within_2500_km": 1,
    }


def test_what_goes_wrong_is_told_and_costs_nothing_but_the_reward():
    row = {"prompt": "?", "latitude": 0.0, "longitude": 0.0}
    steps = play(row, call("distance", a="Atlantis", b="Paris"), "I do not know.")
    assert "there is no place 'Atlantis' on this map" in steps[0].observation
    assert steps[1].done and steps[1].reward == 0.0 and not any(steps[1].counts[name] for name in ACCURACY_KM)

    (step,) = play(row, call("answer", latitude=10**400, longitude=0))
    assert step.done and step.reward == 0.0

    many = play(row, call("neighbours", place="Paris", least_km=0, most_km=10**400))[0].observation.splitlines()
    assert len(many) == MOST_SHOWN + 1 and many[-1].endswith("more; narrow the bounds")


def test_the_reward_is_a_function_by_name():
    row = {"prompt": "?", "latitude": 48.7262, "longitude": 2.3652}
    answer = call("answer", latitude=PARIS[0], longitude=PARIS[1])
    (step,) = play(row, answer, reward="rljax.envs.library.gazetteer:log_reward")
    assert step.reward == pytest.approx(0.585761, abs=1e-6)


def test_questions_fit_their_city_and_splits_share_no_country():
    train = rows(30, split="train", seed=1)
    test = rows(10, split="test", seed=1)
    assert train == rows(30, split="train", seed=1) and len({row["prompt"] for row in train}) == 30
    assert not {row["country"] for row in train} & {row["country"] for row in test}
    for row in train + test:
        fitting = candidates(gazetteer_of(), row["clues"], 50.0)
        assert row["city"] in {place.name for place in fitting} and len(fitting) == row["num_candidates"]
        assert 1 / len(fitting) <= row["best_reward"] <= 1
        assert row["city"] not in row["prompt"]
    assert any(row["num_candidates"] > 1 for row in train)


def test_the_value_of_a_guess_is_that_of_the_best_one():
    near = Place("a", "XX", 0.0, 0.0)
    beside = Place("b", "XX", 0.0, 0.1)
    far = Place("c", "XX", 50.0, 0.0)
    # Of a and b, either earns 1 for itself and 0.4 for the other, which lies 11 km away.
    assert bayes_value([near, beside, far], distance_reward) == pytest.approx((1 + 0.4 + 0) / 3)
    with pytest.raises(ValueError, match="at least one candidate"):
        bayes_value([], distance_reward)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"size": 0}, "size 0"),
        ({"size": 1, "to_km": 0.0}, "to_km 0.0"),
        ({"size": 1, "split": "dev"}, "split 'dev' is not one of all, train, test"),
        ({"size": 10, "to_km": 2000.0, "num_clues": 600}, "only 0 of 10 questions"),
    ],
)
def test_questions_that_cannot_be_had_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        rows(**options)
