"""Tasks in an order: the worked examples, parts, rows without a number, and a curriculum that goes on exactly."""

import json
import math

import pytest

from rljax.tasks import ORDERS, Curriculum, Example, OrderedCurriculum, OrderedTasks, arranged

DIFFICULTY = [0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8]
DATA = [Example(f"p{i}", {"hard": value, "pass_rate": 1 - value}) for i, value in enumerate(DIFFICULTY)]


def prompts(examples):
    return [example.prompt for example in examples]


def test_orders_meet_the_worked_examples():
    assert arranged(DIFFICULTY, "forward") == [1, 5, 3, 2, 4, 6, 0]
    assert arranged(DIFFICULTY, "reverse") == [0, 6, 4, 2, 3, 5, 1]
    # An accuracy is flipped first.
    assert arranged([1 - x for x in (0.9, 0.1, 0.5)], "forward") == [0, 2, 1]


def test_parts_are_thirds_and_the_last_takes_the_remainder():
    low, middle, high = {1, 5}, {3, 2}, {4, 6, 0}
    for seed in range(5):
        assert set(arranged(DIFFICULTY, "low", seed=seed)) == low
        assert set(arranged(DIFFICULTY, "middle", seed=seed)) == middle
        assert set(arranged(DIFFICULTY, "high", seed=seed)) == high
        forward = arranged(DIFFICULTY, "grouped_forward", seed=seed)
        assert (set(forward[:2]), set(forward[2:4]), set(forward[4:])) == (low, middle, high)
        reverse = arranged(DIFFICULTY, "grouped_reverse", seed=seed)
        assert (set(reverse[:3]), set(reverse[3:5]), set(reverse[5:])) == (high, middle, low)
        assert len(arranged(DIFFICULTY, "random_third", seed=seed)) == 2
        assert sorted(arranged(DIFFICULTY, "random", seed=seed)) == list(range(7))
    assert len({tuple(arranged(DIFFICULTY, "grouped_forward", seed=seed)) for seed in range(9)}) > 3


def test_ties_stay_as_they_stand_and_the_reverse_reverses_them():
    assert arranged([1.0, 0.0, 1.0, 0.0], "forward") == [1, 3, 0, 2]
    assert arranged([1.0, 0.0, 1.0, 0.0], "reverse") == [2, 0, 3, 1]


def test_tasks_without_a_difficulty_are_in_no_order():
    values = [0.3, math.nan, 0.1, 0.2]
    for order in ORDERS:
        assert 1 not in arranged(values, order), order
    assert arranged(values, "forward") == [2, 3, 0]


@pytest.mark.parametrize(
    ("values", "order", "message"),
    [
        ([1.0], "upward", "order='upward' must be one of random, forward"),
        ([math.nan] * 2, "forward", "none of the 2 tasks has a difficulty"),
        ([1.0, 2.0], "low", "a third of 2 is none"),
        ([1.0, 2.0], "random_third", "a third of 2 is none"),
    ],
)
def test_what_has_no_order_is_refused(values, order, message):
    with pytest.raises(ValueError, match=message):
        arranged(values, order)


def test_a_curriculum_follows_the_column_pass_after_pass():
    curriculum = OrderedTasks(column="hard").make(DATA, 0)
    assert isinstance(curriculum, Curriculum)
    once = ["p1", "p5", "p3", "p2", "p4", "p6", "p0"]
    assert prompts(curriculum.sample(0, 3) + curriculum.sample(1, 3) + curriculum.sample(2, 3)) == (once * 2)[:9]
    flipped = OrderedTasks(column="pass_rate", easy_is_high=True).make(DATA, 0)
    assert prompts(flipped.sample(0, 7)) == once


def test_a_batch_that_spans_two_passes_has_no_task_twice():
    curriculum = OrderedTasks(column="hard", order="reverse").make(DATA, 0)
    for step in range(5):
        assert len(set(prompts(curriculum.sample(step, 5)))) == 5
    with pytest.raises(ValueError, match="cannot draw 8 distinct"):
        curriculum.sample(0, 8)


def test_state_goes_on_exactly_and_belongs_to_one_order():
    tasks = OrderedTasks(column="hard", order="grouped_forward")
    whole, broken = tasks.make(DATA, 3), tasks.make(DATA, 3)
    for step in range(2):
        whole.sample(step, 4), broken.sample(step, 4)
    state = json.loads(json.dumps(broken.state_dict()))
    resumed = tasks.make(DATA, 3)
    resumed.load_state_dict(state)
    assert prompts(whole.sample(2, 4)) == prompts(resumed.sample(2, 4))
    for other in (OrderedTasks(column="hard").make(DATA, 3), tasks.make(DATA[:5], 3), tasks.make(DATA, 4)):
        with pytest.raises(ValueError, match="this curriculum state has"):
            other.load_state_dict(state)


def test_rows_without_a_number_are_left_out_with_a_word(caplog):
    curriculum = OrderedTasks(column="hard").make([*DATA, Example("none"), Example("null", {"hard": None})], 0)
    assert prompts(curriculum.sample(0, 7)) == ["p1", "p5", "p3", "p2", "p4", "p6", "p0"]
    assert "2 of 9 tasks have no hard" in caplog.text


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        (OrderedTasks(), DATA, "column='' names no column"),
        (
            OrderedTasks(column="letters"),
            DATA,
            r"column='letters': no row has it; the first has \['hard', 'pass_rate'\]",
        ),
        (OrderedTasks(column="x"), [Example("p", {"x": "4"}, place="row 1")], "row 1 has '4' as 'x'"),
        (OrderedTasks(column="x"), [Example("p", {"x": True}, place="row 1")], "row 1 has True as 'x'"),
    ],
)
def test_settings_and_rows_that_cannot_be_are_refused(settings, data, message):
    with pytest.raises(ValueError, match=message):
        settings.make(data, 0)


def test_a_curriculum_needs_tasks():
    with pytest.raises(ValueError, match="at least one example"):
        OrderedCurriculum([])
