"""ReSum: phrases in rows, rewards of summaries, and the contrast of rows with and without one."""

import dataclasses

import numpy as np
import pytest
from forests import forest_batch
from objectives import NAN, float64

from rljax import advantages as A
from rljax.ops import find_phrases
from rljax.types import INTERVENTION_INJECT, INTERVENTION_NONE, INTERVENTION_SUPPRESS

PHRASES = [[7, 3]]
INJECT, SUPPRESS, NONE = INTERVENTION_INJECT, INTERVENTION_SUPPRESS, INTERVENTION_NONE


def run(function, batch):
    with float64():
        return np.asarray(function(batch))


def example(rewards=(1, 0, 1, 0, 1, 0), **more):
    """Three chains, the first with a phrase; a branch without it, and two with one injected, of which one summarises
    again. Column 0 is the prompt."""
    batch = forest_batch(
        parent_row=[-1, -1, -1, 0, 1, 2],
        fork_index=[0, 0, 0, 3, 3, 3],
        lengths=[9] * 6,
        rewards=rewards,
        intervention=np.array([NONE, NONE, NONE, SUPPRESS, INJECT, INJECT], np.int32),
        dtype=np.float64,
        **more,
    )
    tokens = np.full((6, 9), 1, np.int32)
    mask = np.array(batch.action_mask)
    tokens[0, 3:5] = tokens[4, 3:5] = tokens[5, 3:5] = tokens[4, 7:9] = [7, 3]
    mask[4, 3:5] = mask[5, 3:5] = False
    return dataclasses.replace(batch, tokens=tokens, action_mask=mask)


def check(function, batch, want):
    got = run(function, batch)
    np.testing.assert_allclose(got, np.where(batch.action_mask, np.reshape(want, (-1, 1)), 0), atol=1e-5)


def test_phrases_are_found_where_they_begin():
    row = np.array([[5, 9, 7, 7, 3, 4, 8, 7, 3, 2]])
    every = np.ones(row.shape, bool)
    assert np.flatnonzero(find_phrases(row, every, PHRASES)[0]).tolist() == [3, 7]
    partly = every.copy()
    partly[0, 8] = False  # half of the second one was not sampled
    assert np.flatnonzero(find_phrases(row, partly, PHRASES)[0]).tolist() == [3]
    assert np.flatnonzero(find_phrases(row, every, [[2], [7], [7, 3]])[0]).tolist() == [2, 3, 7, 9]
    assert not find_phrases(row, every, [[3, 2, 5], [2, 5], list(range(20))]).any()
    assert not find_phrases(row, every, []).any()


def test_an_empty_phrase_is_refused():
    with pytest.raises(ValueError, match="phrase without tokens"):
        find_phrases(np.zeros((1, 3), int), np.ones((1, 3), bool), [[7], []])


def test_counts_and_rewards_of_summaries():
    natural, injected = A.summary_counts(example(), PHRASES)
    np.testing.assert_array_equal(natural, [1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(injected, [0, 0, 0, 0, 1, 1])
    np.testing.assert_allclose(A.summary_reward(natural, injected), [0.2, 0, 0, 0, 0.125, 0.05], atol=1e-7)
    np.testing.assert_allclose(A.summary_reward(np.array([5, 0]), np.array([0, 9])), [0.2, 0.05], atol=1e-7)


def test_an_injection_is_inherited_by_forks_behind_it_only():
    batch = forest_batch(
        parent_row=[-1, 0, 1, 1],
        fork_index=[0, 3, 6, 2],
        lengths=[8] * 4,
        intervention=np.array([NONE, INJECT, NONE, INJECT], np.int32),
    )
    _, injected = A.summary_counts(batch, PHRASES)
    np.testing.assert_array_equal(injected, [0, 1, 1, 1])
    twice = dataclasses.replace(batch, intervention=np.array([NONE, INJECT, INJECT, NONE], np.int32))
    np.testing.assert_array_equal(A.summary_counts(twice, PHRASES)[1], [0, 1, 2, 0])


def test_phrases_of_the_prompt_do_not_count():
    batch = example()
    tokens = np.array(batch.tokens)
    tokens[2, 0:2] = [7, 3]
    natural, _ = A.summary_counts(dataclasses.replace(batch, tokens=tokens), PHRASES)
    np.testing.assert_array_equal(natural, [1, 0, 0, 0, 1, 0])


def test_contrast_example():
    both = [2.615761, -2.214090, 1.810785, -2.214090, 2.313895, -2.012846]
    own = [0.777287, -0.707105, 1.414211, -0.707105, 0.634520, -1.411807]
    check(A.summary_contrast(PHRASES), example(), both)
    check(A.summary_own_group(PHRASES), example(), own)
    reward = np.array([1.2, 0, 1, 0, 1.125, 0.05])
    plain = dataclasses.replace(example(), reward=reward)
    check(A.group_normalized(ddof=0), plain, [1.160789, -1.024225, 0.796620, -1.024225, 1.024225, -0.933183])


def test_released_example():
    want = [1.454467, -0.865850, 1.154467, 0, 0, 0]
    check(A.summary_bonus_released(PHRASES), example(), want)


def test_a_group_without_spread_adds_nothing():
    """With all rows without a summary wrong, the unguarded term is of the order R / epsilon."""
    batch = forest_batch(
        parent_row=[-1] * 4, fork_index=[0] * 4, lengths=[6] * 4, rewards=[1.0, 0, 1.0, 0], dtype=np.float64
    )
    tokens = np.ones((4, 6), np.int32)
    tokens[[0, 2], 2:4] = [7, 3]
    batch = dataclasses.replace(batch, tokens=tokens, reward=np.array([1.0, 0, 0.925, 0]))
    got = run(A.summary_contrast(PHRASES), batch)[:, 1]
    r = np.array([1.2, 0, 1.125, 0])
    np.testing.assert_allclose(got, (r - r[[0, 2]].mean()) / (r[[0, 2]].std() + 1e-6), rtol=1e-6)


def test_without_any_summary_it_is_grpo():
    batch = dataclasses.replace(example(), tokens=np.ones((6, 9), np.int32), intervention=np.zeros(6, np.int32))
    got = run(A.summary_contrast(PHRASES), batch)
    np.testing.assert_allclose(got, run(A.group_normalized(ddof=0), batch), atol=1e-9)
    np.testing.assert_allclose(got, run(A.summary_own_group(PHRASES), batch), atol=1e-12)
    released = run(A.summary_bonus_released(PHRASES, epsilon=1e-6), batch)
    np.testing.assert_allclose(released[:3], run(A.group_normalized(ddof=0), batch)[:3], atol=1e-9)


def test_the_summary_reward_can_ask_for_a_right_answer():
    """All wrong: only the form differs, and with the option nothing does."""
    wrong = example(rewards=[0] * 6)
    assert run(A.summary_contrast(PHRASES), wrong).any()
    np.testing.assert_array_equal(run(A.summary_contrast(PHRASES, only_if_correct=True), wrong), 0)
    np.testing.assert_array_equal(run(A.summary_own_group(PHRASES, only_if_correct=True), wrong), 0)
    right = run(A.summary_contrast(PHRASES, only_if_correct=True), example())
    shaped = np.array([1.2, 0, 1, 0, 1.125, 0])
    having, lacking = shaped[[0, 4, 5]], shaped[[1, 2, 3]]
    want = sum((shaped - g.mean()) / (g.std() + 1e-6) for g in (having, lacking))
    np.testing.assert_allclose(right[:, 5], want, atol=1e-6)


def test_the_released_bonus_does_not_ask_for_reward():
    got = run(A.summary_bonus_released(PHRASES), example(rewards=[0.7] * 6))
    np.testing.assert_array_equal(got[0], np.where(example().action_mask[0], 0.3, 0))
    assert not got[1:].any()


@pytest.mark.parametrize("function", [A.summary_contrast, A.summary_own_group, A.summary_bonus_released])
def test_failed_rows_of_other_groups_and_padding_change_nothing(function):
    batch = example()
    got = run(function(PHRASES), batch)
    more = forest_batch(
        parent_row=[-1, -1, -1, 0, 1, 2, 0, -1, -1],
        fork_index=[0, 0, 0, 3, 3, 3, 2, 0, 0],
        lengths=[9] * 8 + [0],
        group_id=[0] * 7 + [1, 2],
        is_valid=[True] * 6 + [False, True, False],
        rewards=[1, 0, 1, 0, 1, 0, NAN, 9, NAN],
        dtype=np.float64,
    )
    tokens, mask = np.full((9, 9), 3, np.int32), np.array(more.action_mask)
    tokens[:6], mask[:6] = batch.tokens, batch.action_mask
    tokens[6:8, 4] = 7
    intervention = np.append(batch.intervention, [INJECT, NONE, NONE]).astype(np.int32)
    more = dataclasses.replace(more, tokens=tokens, action_mask=mask, intervention=intervention)
    after = run(function(PHRASES), more)
    np.testing.assert_allclose(after[:6], got, atol=1e-12)
    assert not after[6].any() and not after[8].any()
