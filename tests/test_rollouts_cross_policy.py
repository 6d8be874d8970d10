"""What rollouts by two policies go by: the worked examples of AgentRL."""

import numpy as np
import pytest
from objectives import make_batch, make_rows, value_and_grad

from rljax.advantages import group_normalized
from rljax.algorithms import AgentRL
from rljax.envs import END_REASONS, FAILED
from rljax.rollouts.cross_policy import (
    buffer_take,
    episode_reward,
    mixed_share,
    pick_engine,
    stale_version,
    turn_uniform,
    warmup_minimum,
)


def test_episodes_are_worth_what_their_end_says():
    assert [episode_reward("done", r) for r in (-0.5, 0.0, 0.3, 2.0)] == [0, 0, 0.3, 1]
    for end in ("turns", "tool_calls", "seconds", "length"):
        assert episode_reward(end, 1.0) == -0.2
    assert episode_reward("turns", 1.0, incomplete=0.0) == 0
    assert all(episode_reward(end, 1.0) is None for end in FAILED)
    assert all(episode_reward(end, 0.5) in (0.5, -0.2, None) for end in END_REASONS)
    with pytest.raises(ValueError, match="end 'bored' must be 'length' or one of done, turns"):
        episode_reward("bored", 1.0)


@pytest.mark.parametrize(
    ("ready", "minimum", "multiple", "expected"), [(24, 16, 16, 16), (40, 16, 16, 32), (8, 16, 16, 0), (56, 32, 12, 48)]
)
def test_the_learner_takes_whole_groups_and_multiples(ready, minimum, multiple, expected):
    assert buffer_take(ready, minimum=minimum, multiple=multiple, group=8) == expected


def test_the_first_take_waits_for_more():
    assert warmup_minimum(2048) == 3482
    with pytest.raises(ValueError, match="group=0"):
        buffer_take(8, minimum=1, multiple=1, group=0)


def test_the_older_policy_speaks_where_the_number_is_small():
    assert [pick_engine(u) for u in (0.10, 0.30, 0.24, 0.75, 0.25)] == [True, False, True, False, False]
    assert not pick_engine(0.0, stale_share=0.0) and pick_engine(0.999, stale_share=1.0)
    with pytest.raises(ValueError, match=r"stale_share=1\.5"):
        pick_engine(0.1, stale_share=1.5)


def test_the_older_policy_lags_by_so_many_steps():
    assert [step - stale_version(step) for step in (0, 1, 24, 25, 37, 50)] == [0, 1, 24, 0, 12, 0]
    with pytest.raises(ValueError, match="every=0"):
        stale_version(3, every=0)


def test_how_many_episodes_mix_policies():
    np.testing.assert_allclose(
        [mixed_share(t) for t in (1, 2, 4, 10, 20)], [0, 0.375, 0.6797, 0.9437, 0.9968], atol=5e-5
    )


def test_the_number_of_a_turn_depends_on_what_it_is_called_alone():
    names = [(0, s, p, i, t) for s in range(3) for p in (5, 2**31 - 1) for i in range(20) for t in range(25)]
    numbers = np.array([turn_uniform(*name) for name in names])
    shuffled = np.random.default_rng(0).permutation(len(names))
    np.testing.assert_array_equal([turn_uniform(*names[i]) for i in shuffled], numbers[shuffled])
    assert len(set(numbers)) == len(names)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02 and abs(np.mean(numbers < 0.25) - 0.25) < 0.02
    assert turn_uniform(0, 1, 12, 3, 4) != turn_uniform(0, 11, 2, 3, 4)


@pytest.mark.parametrize(
    ("ddof", "expected"),
    [(1, [1.477095, -0.369274, -0.369274, -0.738548]), (0, [1.705602, -0.426401, -0.426401, -0.852801])],
)
def test_an_unfinished_episode_lowers_its_group(ddof, expected):
    batch = make_batch(group_id=[0] * 4, rewards=[1, 0, 0, episode_reward("turns", 0.0)], lengths=[1] * 4)
    np.testing.assert_allclose(group_normalized(ddof=ddof)(batch)[:, -1], expected, atol=2e-6)


def test_the_loss_meets_the_worked_example():
    ratio, advantages, expected = [1.5, 0.5, 5.0, 1.1], [1.0, 1.0, -1.0, -1.0], [-1.2, -0.5, 3.0, 1.1]
    loss = AgentRL(kl_coef=0.0).build().loss
    for t in range(4):
        rows = make_rows(
            np.arange(4)[None] == t, aggregate=loss.token_weights, old=np.zeros((1, 4)), advantages=[advantages]
        )
        value, _, _ = value_and_grad(loss, rows, np.log([ratio]))
        assert value == pytest.approx(expected[t], abs=1e-6)
