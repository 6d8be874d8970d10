"""Tasks by how often they are solved: the worked examples of the filter and of GLM-4.5's second stage."""

import json
import math

import numpy as np
import pytest

from rljax.tasks import Curriculum, Evolving, Example, MediumTasks, SeenGroup, TwoStageTasks
from rljax.tasks.difficulty import chance_of_second_stage, refreshed, second_stage, signal_weights

DATA = [Example(f"p{i}") for i in range(6)]


def seen(example, rewards):
    return SeenGroup(example, [""] * len(rewards), [*map(float, rewards)])


class Solves:
    """A player that solves the tasks of `places[prompt]` at these attempts alone."""

    def __init__(self, places):
        self.places = places
        self.played = 0

    def can_play(self, example):
        return True

    def play(self, examples, samples):
        self.played += len(examples) * samples
        return [seen(e, [i in self.places.get(e.prompt, ()) for i in range(samples)]) for e in examples]


def test_weights_and_estimates_meet_the_worked_examples():
    weights = signal_weights(np.array([0, 0.25, 0.5, 1]), floor=0.02)
    np.testing.assert_allclose(weights, [0.02, 0.2075, 0.27, 0.02])
    np.testing.assert_allclose(weights / weights.sum(), [0.038647, 0.400966, 0.521739, 0.038647], atol=5e-7)
    assert refreshed(0.5, 0.75, rate=0.3) == 0.575


def test_the_second_stage_meets_the_worked_examples():
    chance = chance_of_second_stage(np.array([0.001, 0.005, 0.01, 0.05]), few=8, many=512)
    np.testing.assert_allclose(chance, [0.3977, 0.8869, 0.9174, 0.6634], atol=5e-5)
    solved = np.zeros((4, 16), bool)
    solved[0, 3] = solved[1, 12] = solved[3, :] = True  # in the few; only later; never; always
    np.testing.assert_array_equal(second_stage(solved, few=8), [False, True, False, False])


def test_what_is_solved_sometimes_is_drawn_more_often():
    curriculum = MediumTasks(rate=1.0).make(DATA, 0)
    np.testing.assert_array_equal(curriculum.distribution, 1 / 6)
    nan = math.nan
    groups = [seen(DATA[0], [1, 0]), seen(DATA[1], [1, 1]), seen(DATA[2], [0, 0]), seen(Example("other"), [1, 0])]
    curriculum.see(0, [*groups, seen(DATA[3], [nan, nan]), seen(DATA[4], [nan, 7.0])])
    weights = np.array([0.27, 0.02, 0.02, 0.27, 0.02, 0.27])  # the fourth has no reward, the fifth is solved
    np.testing.assert_allclose(curriculum.distribution, weights / weights.sum())

    first = [curriculum.sample(step, 2)[0].prompt for step in range(4000)]
    shares = np.array([first.count(e.prompt) / 4000 for e in DATA])
    np.testing.assert_allclose(shares, curriculum.distribution, atol=0.025)
    assert all(len({e.id for e in curriculum.sample(step, 4)}) == 4 for step in range(20))


def test_the_second_stage_begins_once_with_what_is_hard_and_not_hopeless():
    curriculum = TwoStageTasks(at=2, few=2, many=4, least=2).make(DATA, 0)
    player = Solves({"p0": [0], "p1": [3], "p2": range(4), "p4": [2]})
    assert curriculum.evolve(1, player) == {"tasks": 6.0, "hard_tasks": 0.0} and not player.played
    assert len(curriculum.sample(1, 6)) == 6
    for step in (2, 3):
        assert curriculum.evolve(step, player) == {"tasks": 2.0, "hard_tasks": 2.0}
        assert {e.prompt for e in curriculum.sample(step, 2)} == {"p1", "p4"}
    assert player.played == 6 * 4


def test_where_few_tasks_are_hard_the_next_hardest_are_drawn_beside_them(caplog):
    curriculum = TwoStageTasks(at=1, few=2, many=4, least=3).make(DATA, 0)
    stats = curriculum.evolve(1, Solves({"p0": [0], "p1": [3], "p2": range(4), "p3": [0, 1]}))
    assert stats == {"tasks": 3.0, "hard_tasks": 1.0}
    assert {e.prompt for e in curriculum.sample(1, 3)} == {"p1", "p0", "p3"}

    hopeless = TwoStageTasks(at=1, few=2, many=4).make(DATA, 0)
    assert hopeless.evolve(1, Solves({}))["tasks"] == 6 and "no task was solved in 4 attempts" in caplog.text


@pytest.mark.parametrize("source", [MediumTasks(), TwoStageTasks(at=3, few=1, many=3, least=3)])
def test_the_state_goes_on_exactly(source):
    player = Solves({"p0": [1], "p1": [2], "p2": [0]})

    def go(curriculum, steps):
        drawn = []
        for step in steps:
            curriculum.evolve(step, player)
            batch = curriculum.sample(step, 2)
            curriculum.see(step, [seen(e, [1, e.id % 2]) for e in batch])
            drawn.append([e.id for e in batch])
        return drawn

    whole = source.make(DATA, 5)
    assert isinstance(whole, Curriculum) and isinstance(whole, Evolving)
    expected = go(whole, range(9))
    for stop in (1, 4, 6):
        first, second = source.make(DATA, 5), source.make(DATA, 5)
        go(first, range(stop))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert go(second, range(stop, 9)) == expected[stop:]
        assert second.state_dict() == whole.state_dict()
    with pytest.raises(ValueError, match="this curriculum state has data"):
        source.make(DATA[1:], 5).load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (MediumTasks(rate=0.0), r"config\.curriculum\.rate=0\.0"),
        (MediumTasks(floor=0.0), r"config\.curriculum\.floor=0\.0"),
        (MediumTasks(start=2.0), r"config\.curriculum\.start=2\.0"),
        (TwoStageTasks(at=0), r"config\.curriculum\.at=0 must be at least 1"),
        (TwoStageTasks(many=8), r"config\.curriculum\.many=8 must be above few=8"),
    ],
)
def test_what_is_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        settings.make(DATA, 0)
