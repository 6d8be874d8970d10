"""ReSum: phrases in rows, rewards of summaries, and the contrast of rows with and without one."""

import dataclasses

import numpy as np
import pytest
from forests import forest_batch
from objectives import NAN, float64

from rljax import advantages as A
from rljax.types import INTERVENTION_INJECT, INTERVENTION_NONE, INTERVENTION_SUPPRESS

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
    mask = np.array(batch.action_mask)
    mask[4, 3:5] = mask[5, 3:5] = False
    return marked(dataclasses.replace(batch, action_mask=mask), [(0, 3), (4, 7)])


def marked(batch, places):
    """The batch with natural phrases that begin at these places."""
    marks = np.zeros(np.shape(batch.tokens))
    marks[tuple(np.transpose(places))] = 1
    return dataclasses.replace(batch, columns={A.SUMMARIES: marks})


def check(function, batch, want):
    got = run(function, batch)
    np.testing.assert_allclose(got, np.where(batch.action_mask, np.reshape(want, (-1, 1)), 0), atol=1e-5)


def test_counts_and_rewards_of_summaries():
    natural, injected = A.summary_counts(example())
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
    _, injected = A.summary_counts(batch)
    np.testing.assert_array_equal(injected, [0, 1, 1, 1])
    twice = dataclasses.replace(batch, intervention=np.array([NONE, INJECT, INJECT, NONE], np.int32))
    np.testing.assert_array_equal(A.summary_counts(twice)[1], [0, 1, 2, 0])


def test_phrases_off_the_action_tokens_do_not_count():
    natural, _ = A.summary_counts(marked(example(), [(0, 3), (2, 0), (4, 3), (4, 7)]))
    np.testing.assert_array_equal(natural, [1, 0, 0, 0, 1, 0])


def test_contrast_example():
    both = [2.615761, -2.214090, 1.810785, -2.214090, 2.313895, -2.012846]
    own = [0.777287, -0.707105, 1.414211, -0.707105, 0.634520, -1.411807]
    check(A.summary_contrast(), example(), both)
    check(A.summary_own_group(), example(), own)
    reward = np.array([1.2, 0, 1, 0, 1.125, 0.05])
    plain = dataclasses.replace(example(), reward=reward)
    check(A.group_normalized(ddof=0), plain, [1.160789, -1.024225, 0.796620, -1.024225, 1.024225, -0.933183])


def test_released_example():
    want = [1.454467, -0.865850, 1.154467, 0, 0, 0]
    check(A.summary_bonus_released(), example(), want)


def test_rows_of_a_set_without_spread_get_no_credit_and_the_others_their_own_sets():
    """With all rows without a summary wrong, the unguarded term is of the order R / epsilon."""
    batch = forest_batch(
        parent_row=[-1] * 4, fork_index=[0] * 4, lengths=[6] * 4, rewards=[1.0, 0, 1.0, 0], dtype=np.float64
    )
    batch = marked(dataclasses.replace(batch, reward=np.array([1.0, 0, 0.925, 0])), [(0, 2), (2, 2)])
    got = run(A.summary_contrast(), batch)[:, 1]
    r = np.array([1.2, 1.125])
    own = (r - r.mean()) / (r.std() + 1e-6)
    np.testing.assert_allclose(got, [own[0], 0, own[1], 0], rtol=1e-6)
    # A set of one row has no spread to be without: it is scored against the other set.
    single = run(A.summary_contrast(), marked(batch, [(0, 2)]))[:, 1]
    rest = np.array([0, 0.925, 0])
    np.testing.assert_allclose(single[0], (1.2 - rest.mean()) / (rest.std() + 1e-6), rtol=1e-6)


def test_credit_of_a_fork_falls_on_its_own_tokens():
    """A fork that fails says nothing against the prefix that it was given, whose credit is its parent's."""
    batch = example()
    whole = run(A.summary_contrast(), batch)
    own = run(A.own_tokens(A.summary_contrast()), batch)
    np.testing.assert_array_equal(own[:3], whole[:3])
    assert (whole[3:, 1:3] != 0).all() and not own[3:, :3].any()
    np.testing.assert_array_equal(own[3:, 3:], whole[3:, 3:])


def test_without_any_summary_it_is_grpo():
    batch = dataclasses.replace(example(), columns={}, intervention=np.zeros(6, np.int32))
    got = run(A.summary_contrast(), batch)
    np.testing.assert_allclose(got, run(A.group_normalized(ddof=0), batch), atol=1e-9)
    np.testing.assert_allclose(got, run(A.summary_own_group(), batch), atol=1e-12)
    released = run(A.summary_bonus_released(epsilon=1e-6), batch)
    np.testing.assert_allclose(released[:3], run(A.group_normalized(ddof=0), batch)[:3], atol=1e-9)


def test_the_summary_reward_can_ask_for_a_right_answer():
    """All wrong: only the form differs, and with the option nothing does."""
    wrong = example(rewards=[0] * 6)
    assert run(A.summary_contrast(), wrong).any()
    np.testing.assert_array_equal(run(A.summary_contrast(only_if_correct=True), wrong), 0)
    np.testing.assert_array_equal(run(A.summary_own_group(only_if_correct=True), wrong), 0)
    right = run(A.summary_contrast(only_if_correct=True), example())
    shaped = np.array([1.2, 0, 1, 0, 1.125, 0])
    having, lacking = shaped[[0, 4, 5]], shaped[[1, 2, 3]]
    want = sum((shaped - g.mean()) / (g.std() + 1e-6) for g in (having, lacking))
    np.testing.assert_allclose(right[:, 5], want, atol=1e-6)


def test_the_released_bonus_does_not_ask_for_reward():
    got = run(A.summary_bonus_released(), example(rewards=[0.7] * 6))
    np.testing.assert_array_equal(got[0], np.where(example().action_mask[0], 0.3, 0))
    assert not got[1:].any()


@pytest.mark.parametrize("function", [A.summary_contrast, A.summary_own_group, A.summary_bonus_released])
def test_failed_rows_of_other_groups_and_padding_change_nothing(function):
    batch = example()
    got = run(function(), batch)
    more = forest_batch(
        parent_row=[-1, -1, -1, 0, 1, 2, 0, -1, -1],
        fork_index=[0, 0, 0, 3, 3, 3, 2, 0, 0],
        lengths=[9] * 8 + [0],
        group_id=[0] * 7 + [1, 2],
        is_valid=[True] * 6 + [False, True, False],
        rewards=[1, 0, 1, 0, 1, 0, NAN, 9, NAN],
        dtype=np.float64,
    )
    mask = np.array(more.action_mask)
    mask[:6] = batch.action_mask
    intervention = np.append(batch.intervention, [INJECT, NONE, NONE]).astype(np.int32)
    more = dataclasses.replace(more, action_mask=mask, intervention=intervention)
    more = marked(more, [(0, 3), (4, 7), (6, 4), (7, 4)])
    after = run(function(), more)
    np.testing.assert_allclose(after[:6], got, atol=1e-12)
    assert not after[6].any() and not after[8].any()
