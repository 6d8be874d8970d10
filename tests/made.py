"""A rollout that holds one of everything, for tests of the files that keep rollouts."""

import dataclasses
import json

import numpy as np

from rljax.experiment.journal import Made
from rljax.rollouts import Rollout
from rljax.tasks import Example
from rljax.types import Trajectory


def trajectory(length, **fields):
    """With numbers that no other row has."""
    rng = np.random.default_rng(length)
    values = {
        "tokens": rng.integers(0, 9, length).astype(np.int32),
        "action_mask": rng.random(length) < 0.5,
        "behavior_logprobs": rng.random(length).astype(np.float32),
        "entropies": rng.random(length).astype(np.float32),
        "turn_ids": np.zeros(length, np.int32),
        "policy_version": np.full(length, 3, np.int32),
    }
    return Trajectory(**values | fields, prompt_id=length, group_id=1, episode_id=2, reward=1 / 3)


EXAMPLES = {i: Example(f"{i}", {"answer": i}, id=i) for i in range(3)}


def made(step=5, version=4):
    columns = {"per_row": 0.1, "per_token": np.linspace(0, 1, 4).astype(np.float32)}
    rows = [
        trajectory(4, columns=columns, token_keys=np.array([1, 2**40, 3, 4]), is_valid=False),
        trajectory(
            2,
            turn_rewards=np.array([0.5, np.nan], np.float32),
            state_ids=np.array([-1, 7], np.int32),
            grammar="regex a",
            grammar_turns=np.array([[1, 2]], np.int32),
            drawn=np.array([False, True]),
        ),
        trajectory(
            7, parent_row=1, fork_index=2, is_truncated=True, experts=np.arange(28, dtype=np.int16).reshape(7, 2, 2)
        ),
    ]
    rollout = Rollout(
        trajectories=rows,
        records=[{"prompt": "\ud800 é", "reward": None, "components": {"x": np.float64(0.1)}}, {}, {}],
        examples=[EXAMPLES[2], EXAMPLES[0]],
        rewards=np.array([[0.1, np.nan], [1 / 3, 2.0]]),
        stats={"reward_mean": float("nan"), "staleness": 1.0},
        actor_stats={"turns": 3.0},
        seconds={"sample": 0.1},
        untrained=[{"prompt": "left out"}],
    )
    return Made(step, version, rollout, "no signal", json.dumps({"curriculum": {"cursor": 3}, "actor": {}}))


def assert_same_arrays(got, want):
    assert (got is None) == (want is None)
    if isinstance(want, np.ndarray):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    else:
        assert got == want


def assert_same_rollout(got, want):
    """Every bit of `made().rollout`, as a file gave it back."""
    for mine, theirs in zip(got.trajectories, want.trajectories, strict=True):
        for field in dataclasses.fields(theirs):
            if field.name != "columns":
                assert_same_arrays(getattr(mine, field.name), getattr(theirs, field.name))
        assert mine.columns.keys() == theirs.columns.keys()
        for name, value in theirs.columns.items():
            assert_same_arrays(mine.columns[name], value)
    assert_same_arrays(got.rewards, want.rewards)
    assert got.examples == want.examples and got.untrained == want.untrained
    assert got.records == [{"prompt": "\ud800 é", "reward": None, "components": {"x": 0.1}}, {}, {}]
    assert np.isnan(got.stats["reward_mean"]) and got.stats["staleness"] == 1.0
