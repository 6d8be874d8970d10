"""How recorded experts reach trajectories and metrics, and where a record is refused."""

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rljax.plans import ForkPlan, RolloutPlan
from rljax.rollouts import SingleTurn
from rljax.rollouts.actor import ScoredGroup
from rljax.rollouts.guided import Guided
from rljax.rollouts.stats import expert_stats
from rljax.rollouts.trajectories import trajectory_of
from rljax.sampling import Sample, SamplingConfig
from rljax.tasks import Example, RewardResult


def sample(experts, tokens=3, **fields):
    zeros = np.zeros(tokens, np.float32)
    return Sample(np.arange(tokens, dtype=np.int32), zeros, zeros, "stop", experts=experts, **fields)


def test_metrics_of_experts_count_each_sampled_token_once():
    # Two layers, two experts a token; the first entry is of the prompt, and the fork's next two are its parent's.
    even = np.array([[[9, 9], [9, 9]], [[0, 1], [0, 1]], [[2, 3], [0, 1]], [[0, 1], [0, 1]]], np.int16)
    fork = np.array([[[9, 9], [9, 9]], [[0, 1], [0, 1]], [[2, 3], [0, 1]], [[2, 3], [0, 2]]], np.int16)
    found = expert_stats([sample(even), sample(fork, parent=0, fork_index=2)])
    # Layer 0: four experts, two of four tokens each. Layer 1: expert 0 has 4 of 8 places, 1 has 3 and 2 has 1.
    shares = np.array([4, 3, 1]) / 8
    assert found["experts_in_use"] == pytest.approx((4 + np.exp(-(shares * np.log(shares)).sum())) / 2)
    assert found["busiest_expert"] == pytest.approx((0.5 + 1.0) / 2)
    assert expert_stats([sample(even), sample(None)]) == {}


def test_a_trajectory_has_the_record_of_every_token_but_the_last():
    record = np.arange(16, dtype=np.int16).reshape(4, 2, 2)
    group = ScoredGroup(
        example=Example(prompt="x", columns={}),
        prompt=[5, 6],
        samples=[sample(record)],
        texts=["abc"],
        results=[RewardResult(1.0, {})],
        steps=[np.zeros(3, np.int32)],
    )
    trajectory = trajectory_of(RolloutPlan(group_size=1), group, 0, 0)
    assert np.array_equal(trajectory.experts[:-1], record)
    assert (trajectory.experts[-1] == -1).all()


def test_a_record_is_refused_where_it_would_be_of_other_rows_than_are_trained():
    recording = SingleTurn(record_experts=True)
    sampling = SamplingConfig()
    lagged = ForkPlan(chains=2, points=1, rule=lambda group: [], lagged_chains=True)
    with pytest.raises(ValueError, match=r"config.actor.record_experts=True does not go with forks of chains of older"):
        recording.check(RolloutPlan(group_size=2, forks=lagged), sampling, 64)
    with pytest.raises(ValueError, match=r"config.actor.actor.record_experts=True and guidance exclude each other"):
        Guided(actor=recording).check(RolloutPlan(group_size=2), sampling, 64)
    parts: Any = SimpleNamespace(plan=RolloutPlan(group_size=2), decoder=SimpleNamespace(experts=None))
    with pytest.raises(ValueError, match=r"config.actor.record_experts=True needs a model with experts"):
        inspect.unwrap(SingleTurn.build)(recording, parts)  # past the check of its types, where there is one
