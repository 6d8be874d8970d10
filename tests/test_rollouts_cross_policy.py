"""What rollouts by two policies go by: the worked examples of AgentRL."""

import numpy as np
import pytest
from objectives import make_batch, make_rows, value_and_grad

from rljax.advantages import group_normalized
from rljax.algorithms import AgentRL
from rljax.rollouts.cross_policy import pick_engine, stale_turns, turn_uniform


def test_the_older_policy_speaks_where_the_number_is_small():
    assert [pick_engine(u) for u in (0.10, 0.30, 0.24, 0.75, 0.25)] == [True, False, True, False, False]
    assert not pick_engine(0.0, stale_share=0.0) and pick_engine(0.999, stale_share=1.0)
    with pytest.raises(ValueError, match=r"stale_share=1\.5"):
        pick_engine(0.1, stale_share=1.5)


def test_the_number_of_a_turn_depends_on_what_it_is_called_alone():
    names = [(0, s, p, i, t) for s in range(3) for p in (5, 2**31 - 1) for i in range(20) for t in range(25)]
    numbers = np.array([turn_uniform(*name) for name in names])
    shuffled = np.random.default_rng(0).permutation(len(names))
    np.testing.assert_array_equal([turn_uniform(*names[i]) for i in shuffled], numbers[shuffled])
    assert len(set(numbers)) == len(names)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02 and abs(np.mean(numbers < 0.25) - 0.25) < 0.02
    assert turn_uniform(0, 1, 12, 3, 4) != turn_uniform(0, 11, 2, 3, 4)


def test_a_turn_goes_on_with_the_policy_that_began_it():
    pick = stale_turns(3, 0.25)
    turns = [(prompt_id, sample_id, turn) for prompt_id in (5, 9) for sample_id in range(20) for turn in range(25)]
    picked = [pick(*turn) for turn in turns]
    assert set(picked) == {0, 1} and abs(np.mean(picked) - 0.25) < 0.05
    assert [stale_turns(3, 0.25)(*turn) for turn in reversed(turns)] == picked[::-1]
    assert not any(stale_turns(3, 0.0)(*turn) for turn in turns)


@pytest.mark.parametrize(
    ("ddof", "expected"),
    [(1, [1.477095, -0.369274, -0.369274, -0.738548]), (0, [1.705602, -0.426401, -0.426401, -0.852801])],
)
def test_an_unfinished_episode_lowers_its_group(ddof, expected):
    batch = make_batch(group_id=[0] * 4, rewards=[1, 0, 0, -0.2], lengths=[1] * 4)
    np.testing.assert_allclose(group_normalized(ddof=ddof)(batch)[:, -1], expected, atol=2e-6)


def test_the_loss_meets_the_worked_example():
    """The ratio is to the weights that spoke; that to the policy before the update is 1."""
    ratio, advantages, expected = [1.5, 0.5, 5.0, 1.1], [1.0, 1.0, -1.0, -1.0], [-1.2, -0.5, 3.0, 1.1]
    loss = AgentRL(kl_coef=0.0).build().loss
    for t in range(4):
        rows = make_rows(
            np.arange(4)[None] == t,
            aggregate=loss.token_weights,
            old=np.log([ratio]),
            behavior=np.zeros((1, 4)),
            advantages=[advantages],
        )
        value, _, _ = value_and_grad(loss, rows, np.log([ratio]))
        assert value == pytest.approx(expected[t], abs=1e-6)
