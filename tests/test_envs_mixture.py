"""Mixtures: every row acts in its own environment, small tasks are repeated, all take turns."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rljax.envs import EnvironmentPool, Step
from rljax.envs.library import MixedEnvironment, mixed_rows
from rljax.envs.library.sharing import made_once
from rljax.tasks import Example, split_by_hash
from rljax.tasks.mixture import balanced, interleave, replications


class Echo:
    """Right is the row's word, said in the case that was asked for."""

    def __init__(self, upper=False):
        self.upper = upper

    def reset(self, row):
        self.word = row["word"].upper() if self.upper else row["word"]
        return row["prompt"]

    def step(self, action):
        return Step("again", reward=float(action == self.word), done=action == self.word)


def words(prefix, size):
    return [{"prompt": f"Say {prefix}{i}.", "word": f"{prefix}{i}"} for i in range(size)]


HERE = "tests.test_envs_mixture" if __name__.startswith("tests.") else __name__
ENVIRONMENTS = {"low": {"make": f"{HERE}:Echo"}, "high": {"make": f"{HERE}:Echo", "args": {"upper": True}}}
PARTS = {
    "one": {"rows": f"{HERE}:words", "args": {"prefix": "a", "size": 3}, "environment": "low"},
    "two": {"rows": f"{HERE}:words", "args": {"prefix": "b", "size": 1}, "environment": "high"},
    "high": {"rows": f"{HERE}:words", "args": {"prefix": "c", "size": 2}},
}


def test_replications_of_the_sheet():
    assert replications([3500, 1000, 700, 250, 2400]) == [1, 4, 5, 14, 1]
    assert replications([7]) == [1]
    for sizes in ([], [3, 0]):
        with pytest.raises(ValueError, match=re.escape(str(sizes))):
            replications(sizes)


def test_parts_take_turns_and_keep_their_order():
    assert interleave(["abc", "x", "12"]) == list("ax1b2c")
    assert interleave([]) == []


def test_small_tasks_are_seen_as_often_as_the_largest():
    sizes = {"a": 35, "b": 10, "c": 7, "d": 3, "e": 24}
    examples = [Example(f"{t}{i}", {"task": t}) for t, size in sizes.items() for i in range(size)]
    mixed = balanced(examples)
    assert [e.columns["task"] for e in mixed[:10]] == list("abcdeabcde")
    seen = {task: sum(e.columns["task"] == task for e in mixed) for task in sizes}
    assert seen == {"a": 35, "b": 40, "c": 35, "d": 36, "e": 24}
    assert len({e.id for e in mixed}) == len(mixed)  # copies draw samples of their own
    assert {e.prompt for e in mixed} == {e.prompt for e in examples}
    assert {e.task_id for e in mixed} == {e.task_id for e in examples} and len({e.task_id for e in mixed}) == 5


def test_rows_of_several_sources_are_tagged_and_take_turns():
    rows = mixed_rows(json.loads(json.dumps(PARTS)))
    assert [row["word"] for row in rows] == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert [row["task"] for row in rows] == ["one", "two", "high", "one", "high", "one"]
    assert [row["environment"] for row in rows] == ["low", "high", "high", "low", "high", "low"]
    examples = [Example(row["prompt"], row) for row in rows]
    assert len({e.task_id for e in split_by_hash(examples, test_fraction=0.0).train}) == 3


def test_every_row_acts_in_its_own_environment():
    make_args = json.loads(json.dumps(ENVIRONMENTS))
    with EnvironmentPool(lambda: MixedEnvironment(environments=make_args), workers=4) as pool:
        episodes = [future.result() for future in [pool.start(row) for row in mixed_rows(PARTS)]]
        for episode in episodes:
            pool.step(episode, episode.row["word"]).result()
        assert [episode.reward for episode in episodes] == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
        second = pool.fork(episodes[1], 1).result()
        assert pool.step(second, "B0").result().reward == 1.0
        stray = pool.start({"prompt": "x", "environment": "other"}).result()
        assert stray.end == "raised" and "'other' is not one of low, high" in stray.error


@pytest.mark.parametrize(
    "entry", [{}, {"make": "Echo"}, {"make": f"{HERE}:Echo", "arg": {}}, {"make": f"{HERE}:Echo", "args": [1]}]
)
def test_entries_of_another_form_are_refused(entry):
    with pytest.raises(ValueError, match="the entry 'x' is"):
        MixedEnvironment({"x": entry})
    with pytest.raises(ValueError, match="the entry 'x' is"):
        mixed_rows({"x": {("rows" if key == "make" else key): value for key, value in entry.items()}})


def test_what_is_shared_is_made_once_however_many_ask_at_a_time():
    made = []

    @made_once
    def heavy(size):
        time.sleep(0.05)
        made.append(size)
        if size < 0:
            raise ValueError("no")
        return object()

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(heavy, [1] * 8 + [2]))) == 2
    assert sorted(made) == [1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            heavy(-1)
    assert made[2:] == [-1, -1]


def test_empty_sources_and_environments_are_refused():
    with pytest.raises(ValueError, match="at least one environment"):
        MixedEnvironment({})
    with pytest.raises(ValueError, match="non-empty list of rows"):
        mixed_rows({"x": {"rows": f"{HERE}:words", "args": {"prefix": "a", "size": 0}}})
    with pytest.raises(ValueError, match="step before reset"):
        MixedEnvironment(ENVIRONMENTS).step("a")
