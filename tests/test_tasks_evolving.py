"""Curricula that make tasks: the worked examples of CoEvolve, what never enters, and states that go on exactly."""

import json
import math

import numpy as np
import pytest
from evolving_tasks import EchoMaker, Script

from rljax.tasks import CoEvolvedTasks, Curriculum, Evolving, Example, SeenGroup, medium_share
from rljax.tasks.coevolve import (
    action_patterns,
    is_accepted,
    is_boundary,
    is_forgotten,
    is_rare,
    relative_energy_distance,
    self_similarity,
    stratified,
)

DATA = [Example(f"{x}{y}=", {"answer": x}) for x in "ab" for y in "ab"]
A, B, C, D = DATA


def seen(example, rewards, texts=None):
    return SeenGroup(example, texts or [f"{example.prompt}{i}" for i in range(len(rewards))], [*map(float, rewards)])


def coevolved(seed=0, **changes):
    settings = CoEvolvedTasks(maker="evolving_tasks:EchoMaker", every=2, **changes)
    return settings.make(DATA, seed)


@pytest.mark.parametrize(
    ("past", "score", "is_marked"),
    [
        ([0, 1, 0, 0], 0, True),
        ([0, 0, 0], 0, False),
        ([0, 1], 0.5, False),
        ([], 0, False),
        ([0.5], 0.49, True),
        ([1], math.nan, False),
    ],
)
def test_forgetting_meets_the_worked_examples(past, score, is_marked):
    assert is_forgotten([*map(float, past)], float(score)) is is_marked


@pytest.mark.parametrize(
    ("scores", "is_marked"),
    [([1, 0, 0], True), ([0, 0, 0], False), ([1, 1], False), ([0.5, 0], False), ([0.6, 0.5], False)],
)
def test_the_boundary_meets_the_worked_examples(scores, is_marked):
    assert is_boundary([*map(float, scores)]) is is_marked


@pytest.mark.parametrize(
    ("count", "observed", "is_marked"),
    [(2, 50, True), (3, 60, False), (3, 40, False), (0, 60, False), (2, 49, False)],
)
def test_rare_patterns_meet_the_worked_examples(count, observed, is_marked):
    assert is_rare(count, observed, percent=5, least=50) is is_marked


def test_acceptance_meets_the_worked_examples():
    assert is_accepted([0.0, 1.0], partial=False) and is_accepted([0.3], partial=True)
    assert not is_accepted([0.3], partial=False) and not is_accepted([0.0, 0.0], partial=True)
    assert not is_accepted([], partial=True)


def test_patterns_are_actions_without_repeats_and_their_triples():
    assert action_patterns(["a", "a", "b", "a", "c"]) == [("a", "b", "a", "c"), ("a", "b", "a"), ("b", "a", "c")]
    assert action_patterns(["a", "b", "c"]) == [("a", "b", "c")]
    assert action_patterns([]) == [] and action_patterns(["x", "x"]) == [("x",)]
    assert action_patterns("abcdefghij")[0] == tuple("abcdefgh")


def test_quality_metrics_meet_the_worked_examples():
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1]])
    np.testing.assert_allclose(self_similarity(vectors, 1), 0.733333, atol=5e-7)
    np.testing.assert_allclose(self_similarity(vectors, 2), 0.466667, atol=5e-7)
    with pytest.raises(ValueError, match="k=3 must be at least 1 and below the number of vectors, 3"):
        self_similarity(vectors, 3)
    target = np.array([[0.0, 0], [1, 0]])
    np.testing.assert_allclose(relative_energy_distance(target, target + np.array([0, 1])), 1.414214, atol=5e-7)
    assert relative_energy_distance(target, target) == 0


def test_no_signal_crowds_out_the_others():
    marked = {"forgetting": [1], "boundary": [2, 3, 4, 5], "rare": []}
    assert stratified(marked, 3) == [("forgetting", 1), ("boundary", 5), ("boundary", 4)]
    assert len(stratified(marked, 99)) == 5


def test_a_task_that_cannot_be_checked_or_solved_never_enters():
    curriculum = coevolved(proposals=8, attempts=4)
    curriculum.keep_out([Example("hh=", {"answer": "h"})])
    curriculum.see(0, [seen(A, [1, 0]), seen(B, [0, 0]), seen(Example("elsewhere"), [1, 0])])
    written = ["12", "aa", "hh", "cd", "cdx", "ef", "gh", "x"]
    script = Script({"=aa=": written, "cd=": ["?", "c"], "ef=": ["?", "f"]}, longest=8)

    assert curriculum.evolve(1, script)["tasks"] == 4 and not script.played  # not yet
    stats = curriculum.evolve(2, script)

    # Only the task that was marked was explored, and only what may enter was tried.
    assert script.played == [(["=aa="], 8), (["cd=", "ef=", "gh="], 4)]
    assert stats["proposed"] == 8
    assert stats["unreadable"] == 2  # "12" and "x"
    assert stats["repeated"] == 2  # one of the data, one of this round
    assert stats["held_out"] == 1
    assert stats["unsolved"] == 2  # "ef" and "gh": no attempt was right
    assert stats["accepted"] == 1 and stats["tasks"] == 5
    assert [task.prompt for task in curriculum.tasks] == ["aa=", "ab=", "ba=", "bb=", "cd="]
    assert curriculum.tasks[-1].columns == {"answer": "c"}

    # What is new is drawn with the rest, and proposing it again changes nothing.
    assert {e.prompt for e in curriculum.sample(3, 5)} == {"aa=", "ab=", "ba=", "bb=", "cd="}
    curriculum.see(3, [seen(A, [1, 0])])
    again = curriculum.evolve(4, Script({"=aa=": ["cd"]}))
    # Two signals mark it now: its group is mixed, and it had been solved before.
    assert again["repeated"] == 2 + 2 * 8 and again["tasks"] == 5


def test_what_is_too_long_for_the_run_never_enters():
    curriculum = coevolved(proposals=1)
    curriculum.see(0, [seen(A, [1, 0])])

    class Short(Script):
        def can_play(self, example):
            return not example.prompt.startswith("c")

    assert curriculum.evolve(2, Short({"=aa=": ["cd"], "cd=": ["c"]}))["unplayable"] == 1
    assert len(curriculum.tasks) == 4


def test_partial_credit_enters_only_where_it_counts():
    for partial, tasks in ((True, 5), (False, 4)):
        curriculum = coevolved(proposals=1, accept_partial=partial)
        curriculum.see(0, [seen(A, [1, 0])])
        curriculum.evolve(2, Script({"=aa=": ["cd"], "cd=": ["cx"]}, partial=0.3))
        assert len(curriculum.tasks) == tasks


def test_a_task_is_forgotten_by_what_it_was_before_this_group():
    curriculum = coevolved()
    player = Script({})
    curriculum.see(0, [seen(A, [1, 0]), seen(B, [math.nan, 0])])
    stats = curriculum.evolve(1, player)
    assert (stats["marked_boundary"], stats["marked_forgetting"]) == (1, 0)
    curriculum.see(1, [seen(A, [0, 0]), seen(B, [0, 0])])
    stats = curriculum.evolve(1, player)
    assert (stats["marked_boundary"], stats["marked_forgetting"]) == (1, 1)
    # A round clears the marks, not the memory.
    curriculum.evolve(2, player)
    curriculum.see(2, [seen(A, [0, 0])])
    assert curriculum.evolve(3, player)["marked_forgetting"] == 1


def test_rare_patterns_mark_what_shows_them():
    curriculum = coevolved(actions="builtins:list", rare_least=10, rare_percent=20)
    curriculum.see(0, [seen(A, [1] * 9, ["x"] * 9), seen(B, [1], ["y"])])
    assert curriculum.evolve(1, Script({}))["marked_rare"] == 1
    assert coevolved().evolve(1, Script({}))["marked_rare"] == 0


def test_the_state_goes_on_exactly():
    script = Script({"=aa=": ["cd", "ce"], "=ab=": ["dd"], "cd=": ["c"], "ce=": ["c"], "dd=": ["d"]})

    def go(curriculum, steps):
        drawn = []
        for step in steps:
            stats = curriculum.evolve(step, script)
            batch = curriculum.sample(step, 3)
            curriculum.see(step, [seen(e, [1, step % 2]) for e in batch])
            drawn.append(([e.id for e in batch], stats))
        return drawn

    whole = coevolved(seed=3)
    expected = go(whole, range(12))
    assert whole.tasks[4:], "nothing was added, so nothing was tested"
    for stop in (1, 2, 5, 9):
        first, second = coevolved(seed=3), coevolved(seed=3)
        go(first, range(stop))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert go(second, range(stop, 12)) == expected[stop:]
        assert second.state_dict() == whole.state_dict()

    with pytest.raises(ValueError, match="this curriculum state has seed"):
        coevolved(seed=4).load_state_dict(whole.state_dict())


def test_a_maker_that_fails_on_a_text_costs_that_text(caplog):
    class Failing(EchoMaker):
        def task_of(self, text, source):
            raise RuntimeError("no")

    curriculum = coevolved(proposals=2)
    curriculum._maker = Failing()
    curriculum.see(0, [seen(A, [1, 0])])
    assert curriculum.evolve(2, Script({}))["unreadable"] == 2
    assert "no task could be read" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, r"config\.curriculum\.every=0 must be at least 1"),
        ({"rare_percent": 100}, r"config\.curriculum\.rare_percent=100 must be above 0 and below 100"),
    ],
)
def test_what_is_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CoEvolvedTasks(maker="evolving_tasks:EchoMaker", **changes).make(DATA, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"maker": "nothing"}, r"config\.curriculum\.maker='nothing' must have the form 'module:Class'"),
        ({"maker": "builtins:dict"}, r"config\.curriculum\.maker=builtins:dict makes a dict, which lacks prompt_of"),
        (
            {"maker": "evolving_tasks:EchoMaker", "args": {"colour": 1}},
            r"config\.curriculum\.maker=evolving_tasks:EchoMaker: args .* do not fit",
        ),
    ],
)
def test_a_maker_that_is_none_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CoEvolvedTasks(**settings).make(DATA, 0)


def test_the_share_of_medium_tasks_counts_groups_with_a_reward():
    nan = math.nan
    groups = [seen(A, [1, 0]), seen(B, [1, 1]), seen(C, [nan, nan]), seen(D, [nan, 0])]
    assert medium_share(groups) == 1 / 3
    assert math.isnan(medium_share([seen(C, [nan])]))


def test_it_is_a_curriculum():
    curriculum = coevolved()
    assert isinstance(curriculum, Curriculum) and isinstance(curriculum, Evolving)
