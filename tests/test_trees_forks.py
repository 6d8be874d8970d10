"""Fork scores against the worked examples, and the choice of places against plain sorting."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from forests import WIDTH, forest_batch, owner, pad, random_forests
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import NAN, float64, map_fields
from test_advantages_branch import LOG_RATIO, MASK

from rljax.ops import future_value
from rljax.trees import build_tree
from rljax.trees import forks as B

H = np.array([[0.2, 1.5, 0.9, 9.9, 0.4, 1.1], [0.6, 0.3, 1.8, 0.7, 1.4, 7.7]])


def numpy_of(forks):
    return [np.asarray(x).tolist() for x in forks]


def omega():
    return future_value(np.where(MASK, LOG_RATIO, NAN), MASK, discount=0.5)


# Scores


def test_branching_score_example():
    with float64():
        value = B.standardized(np.clip(omega(), 0.8, 1.2), MASK)
        entropy = B.standardized(H, MASK)
        score = B.branching_score(omega(), H, MASK, low=0.8, high=1.2)
    want_value = [
        [0.643445, -0.596319, 1.647483, 0, -1.047527, -0.647082],
        [-0.410854, 1.318383, -0.351876, -1.464160, 0.908507, 0],
    ]
    want_entropy = [
        [-1.317061, 1.444519, 0.169943, 0, -0.892203, 0.594802],
        [-0.650365, -1.192336, 1.517519, -0.469708, 0.794891, 0],
    ]
    want = [
        [-0.847457, -0.861394, 0.279979, 0, 0.934606, -0.384886],
        [0.267205, -1.571956, -0.533979, 0.687728, 0.722164, 0],
    ]
    np.testing.assert_allclose(value, want_value, atol=1e-5)
    np.testing.assert_allclose(entropy, want_entropy, atol=1e-5)
    np.testing.assert_allclose(score, want, atol=1e-5)


def test_ungated_branching_score_takes_double_negatives_and_the_gate_does_not():
    with float64():
        score = B.branching_score(omega(), H, MASK)
        candidates = B.branching_candidates(omega(), H, MASK)
        ungated = B.select_forks_per_row(score, MASK, 2)
        gated = B.select_forks_per_row(
            candidates.scores, candidates.is_strict, 2, then=(candidates.fill, candidates.is_allowed)
        )
        pooled = B.select_forks(candidates.scores, candidates.is_strict, 4, then=(score, candidates.is_allowed))
    assert np.asarray(ungated.position).tolist() == [[4, 2], [4, 3]]
    assert np.asarray(gated.position).tolist() == [[2, 1], [4, 2]]
    assert np.asarray(gated.row).tolist() == [[0, 0], [1, 1]]
    assert numpy_of(pooled) == [[1, 0, 0, 1], [4, 2, 4, 3], [True] * 4]


def test_before_the_policy_moves_the_score_is_0_and_entropy_decides():
    still = future_value(np.zeros(MASK.shape), MASK, discount=0.5)
    np.testing.assert_array_equal(B.branching_score(still, H, MASK), 0)
    candidates = B.branching_candidates(still, H, MASK)
    np.testing.assert_allclose(candidates.scores, B.standardized(H, MASK), atol=1e-6)
    np.testing.assert_array_equal(candidates.is_strict, np.asarray(B.standardized(H, MASK)) > 0)
    chosen = B.select_forks_per_row(candidates.scores, candidates.is_strict, 2)
    assert np.asarray(chosen.position).tolist() == [[1, 5], [2, 4]]


def test_rows_of_one_token_or_of_one_entropy_have_no_branch_points():
    mask = np.array([[1, 0, 0], [1, 1, 1], [1, 1, 1]], bool)
    entropies = np.array([[1.0, 2.0, 3.0], [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]])
    candidates = B.branching_candidates(np.array([[1.0, 1.1, 1.2]] * 3), entropies, mask)
    assert np.asarray(candidates.is_allowed).any(axis=1).tolist() == [False, False, True]
    assert np.asarray(candidates.is_strict).any(axis=1).tolist() == [False, False, True]


def test_surprisal_is_minus_the_logprob_on_the_mask():
    got = B.surprisal(np.array([[NAN, -1.5, -0.25]]), np.array([[False, True, True]]))
    np.testing.assert_array_equal(got, [[0, 1.5, 0.25]])


def test_entropy_change_example():
    """The paper's numbers: two turns of four tokens after a prompt, a tool result between them."""
    first = [0.5, 0.4, 0.3, 0.2]
    for after, change, score in (([1.5, 1.2, 0.9, 0.6], 0.35, 0.57), ([0.3, 0.2, 0.2, 0.1], -0.075, 0.485)):
        entropies = np.array([[NAN, *first, NAN, NAN, *after, 9.0]])
        mask = np.array([[0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]], bool)
        turns = np.array([[0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
        got = np.asarray(B.entropy_change(entropies, mask, turns, window=4, scale=8.0))
        want = np.zeros((1, 12))
        want[0, 7] = change
        np.testing.assert_allclose(got, want, atol=1e-6)
        np.testing.assert_allclose(0.5 + 0.2 * got[0, 7], score, atol=1e-6)


def test_entropy_change_compares_as_many_tokens_as_both_turns_have():
    rng = np.random.default_rng(0)
    rows, width, window = 6, 24, 5
    entropies = rng.random((rows, width)).astype(np.float32)
    turns = np.sort(rng.integers(0, 4, (rows, width)), axis=1)
    mask = rng.random((rows, width)) < 0.8
    mask[0] = False
    got = np.asarray(B.entropy_change(np.where(mask, entropies, NAN), mask, turns, window=window, scale=2.0))
    for b in range(rows):
        want = np.zeros(width)
        pieces = [np.flatnonzero(mask[b] & (turns[b] == k)) for k in range(4)]
        pieces = [p for p in pieces if len(p)]
        for piece in pieces[1:]:
            count = min(window, len(piece), len(pieces[0]))
            want[piece[0]] = (entropies[b, piece[:count]] - entropies[b, pieces[0][:count]]).sum() / 2
        np.testing.assert_allclose(got[b], want, atol=1e-5)


def test_released_fork_probability_example():
    def entropy(pairs):
        return -sum(p * np.log(p) for pair in pairs for p in pair) / np.log(1000)

    change = entropy([[0.5, 0.3], [0.4, 0.35]]) - entropy([[0.9, 0.05], [0.8, 0.1]])
    np.testing.assert_allclose(change, 0.114123, atol=1e-6)
    got = float(B.fork_probability(float(change)))
    assert got == pytest.approx(0.522825, abs=1e-6)
    assert [u <= got for u in (0.50, 0.52, 0.53, 0.60)] == [True, True, False, False]
    np.testing.assert_array_equal(B.fork_probability(np.array([-9.0, 9.0], np.float32)), [0, 1])


def test_penalty_of_consecutive_forks_example():
    got = B.penalized(np.full(4, 0.5 + 0.2 * 0.8, np.float32), np.arange(4))
    np.testing.assert_allclose(got, [0.66, 0.627, 0.594, 0.561], atol=1e-6)
    np.testing.assert_array_equal(B.penalized(np.ones(2, np.float32), np.array([20, 30])), 0)


def test_consecutive_forks_begin_anew_after_a_turn_without_one():
    starts = np.array([[0, 1, 0, 1, 1, 0, 1, 1, 1, 1]], bool)
    forked = np.array([[0, 1, 0, 2, 0, 5, 1, 1, 0, 0]])
    want = [[0, 0, 0, 1, 2, 0, 0, 1, 2, 0]]
    np.testing.assert_array_equal(B.consecutive_forks(forked, starts), want)


def test_initial_rows_example():
    for prompt, tool, formula, released in ((1.2, 0.6, 10.3305, 10), (0.6, 1.2, 5.6695, 7)):
        with float64():
            args = (16, prompt, tool)
            assert float(B.initial_rows(*args)) == pytest.approx(formula, abs=1e-4)
            assert np.clip(int(B.initial_rows(*args, beta=0.5)) + 1, 1, 16) == released


def test_turn_surprisal_is_the_mean_of_a_turn_less_what_its_place_has_grown():
    mask = np.array([[0, 1, 1, 0, 1, 1, 1]], bool)
    turns = np.array([[0, 0, 0, 0, 1, 1, 1]])
    logprobs = np.array([[NAN, -1.0, -2.0, NAN, -3.0, -1.0, -2.0]])
    counts = np.array([[0, 0, 0, 0, 2, 0, 0]])
    got = B.turn_surprisal(logprobs, mask, turns, counts, penalty=0.1)
    np.testing.assert_allclose(got, [[0, 1.5 - 0.1, 0, 0, 2 - 0.3, 0, 0]], atol=1e-6)


# Places


def test_turns_start_with_sampled_tokens():
    mask = np.array([[0, 0, 1, 1, 0, 1, 1, 0, 1, 0], [0] * 10], bool)
    turns = np.array([[0, 0, 0, 0, 0, 1, 1, 2, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert np.flatnonzero(B.turn_starts(turns, mask)[0]).tolist() == [2, 5, 8]
    assert not np.asarray(B.turn_starts(turns, mask))[1].any()


def test_the_ends_of_a_row_are_left_out():
    mask = np.zeros((3, 14), bool)
    mask[0, 2:12] = mask[1, 3] = True
    mask[0, 5] = False  # nine tokens, of which 0.2 is rounded up to two
    got = np.asarray(B.without_tail(mask, fraction=0.2))
    assert np.flatnonzero(got[0]).tolist() == [3, 4, 6, 7, 8, 9]
    assert not got[1:].any()
    assert np.flatnonzero(B.without_tail(mask, fraction=0.0)[0]).tolist() == [3, 4, 6, 7, 8, 9, 10, 11]


jit_tree, jit_counts, jit_first = jax.jit(build_tree), jax.jit(B.fork_counts), jax.jit(B.first_of_place)


@settings(max_examples=100, deadline=None)
@given(random_forests(invalid=False))
def test_places_are_counted_on_every_row_that_passes_them(forest):
    prompt, batch = forest
    rows = len(batch.group_id)
    batch = map_fields(pad(batch, 10 - rows, 0), np.asarray)
    tree = jit_tree(batch)
    counts = np.asarray(jit_counts(tree, batch.parent_row, batch.fork_index))
    first = np.asarray(jit_first(tree, batch.action_mask))

    def place(row, t):  # the group's prompt is one row's, and all rows have it
        held = int(batch.group_id[row]) if 0 < t <= prompt else (owner(batch, row, t - 1) if t else row)
        return held, t

    forks = [place(p, f) for p, f in zip(batch.parent_row, batch.fork_index, strict=True) if p >= 0 and f < WIDTH]
    for b in range(rows):
        for t in range(1, WIDTH):
            if t > prompt:
                assert counts[b, t] == forks.count(place(b, t))
    # Every place that an action token stands at is there exactly once.
    names = [place(b, t) for b, t in np.argwhere(first) if t > prompt]
    assert len(names) == len(set(names))
    everything = {place(b, t) for b in range(rows) for t in range(prompt + 1, batch.lengths[b])}
    assert set(names) == {(o, t) for o, t in everything if t < batch.lengths[o]}  # else the row that made it ends there


def test_forked_places_of_a_small_tree():
    """A chain forked twice at 3 and its fork forked at 5; the fork's first token stands at its parent's place."""
    batch = forest_batch(parent_row=[-1, 0, 0, 1], fork_index=[0, 3, 3, 5], lengths=[6, 7, 4, 7])
    tree = build_tree(batch)
    counts = np.asarray(B.fork_counts(tree, batch.parent_row, batch.fork_index))
    np.testing.assert_array_equal(
        counts[:, 1:], [[0, 0, 2, 0, 0, 0], [0, 0, 2, 0, 1, 0], [0, 0, 2, 0, 0, 0], [0, 0, 2, 0, 1, 0]]
    )
    first = np.asarray(B.first_of_place(tree, batch.action_mask))
    assert [np.flatnonzero(r).tolist() for r in first] == [[1, 2, 3, 4, 5], [4, 5, 6], [], [6]]


# Choice


def best(scores, eligible, n, min_distance):
    """Sorted by falling score, then row, then position."""
    order = sorted((-scores[b, t], b, t) for b, t in np.argwhere(eligible))
    chosen = []
    for _, b, t in order:
        if len(chosen) < n and all(b != r or abs(t - s) >= min_distance for r, s in chosen):
            chosen.append((int(b), int(t)))
    return chosen


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 3]), st.sampled_from([0.0, 0.1, 0.6]))
def test_selection_equals_sorting(seed, min_distance, density):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-2, 3, (4, 9)).astype(np.float32)  # many ties
    eligible = rng.random(scores.shape) < density
    row, position, is_active = numpy_of(select(np.where(eligible, scores, NAN), eligible, min_distance))
    want = best(scores, eligible, 5, min_distance)
    assert is_active == [True] * len(want) + [False] * (5 - len(want))
    assert list(zip(row, position, strict=True)) == want + [(0, 0)] * (5 - len(want))
    per_row = select_rows(scores, eligible, min_distance)
    for b in range(4):
        mine = eligible & (np.arange(4) == b)[:, None]
        assert [(b, t) for t, a in zip(*np.asarray(per_row[1:])[:, b], strict=True) if a] == best(
            scores, mine, 5, min_distance
        )


select = functools.partial(jax.jit, static_argnums=2)(
    lambda scores, eligible, min_distance: B.select_forks(scores, eligible, 5, min_distance=min_distance)
)
select_rows = functools.partial(jax.jit, static_argnums=2)(
    lambda scores, eligible, min_distance: B.select_forks_per_row(scores, eligible, 5, min_distance=min_distance)
)


def test_nothing_that_is_not_a_number_is_chosen():
    scores = np.array([[NAN, -np.inf, 1.0, 2.0]], np.float32)
    forks = B.select_forks(scores, np.ones((1, 4), bool), 3)
    assert numpy_of(forks) == [[0, 0, 0], [3, 2, 0], [True, True, False]]


def test_more_forks_than_tokens_leave_slots_inactive():
    forks = B.select_forks(np.ones((1, 2), np.float32), np.ones((1, 2), bool), 5)
    assert np.asarray(forks.is_active).tolist() == [True, True, False, False, False]


def test_the_second_choice_fills_up_and_keeps_its_distance():
    scores = np.array([[5.0, 4, 3, 2, 1, 0]], np.float32)
    strict = np.array([[0, 0, 1, 0, 0, 0]], bool)
    forks = B.select_forks(scores, strict, 4, min_distance=2, then=(scores, np.ones((1, 6), bool)))
    assert numpy_of(forks) == [[0] * 4, [2, 0, 4, 0], [True, True, True, False]]


def test_choosing_for_each_tree_is_a_vmap_over_eligible():
    batch = forest_batch(parent_row=[-1, -1, 0, 1], fork_index=[0, 0, 3, 2], lengths=[6] * 4)
    tree = build_tree(batch)
    scores = np.random.default_rng(0).random((4, 6)).astype(np.float32)
    eligible = np.asarray(B.first_of_place(tree, batch.action_mask))
    by_tree = eligible & (np.asarray(tree.root_rows) == np.arange(2)[:, None])[:, :, None]
    forks = jax.vmap(lambda e: B.select_forks(scores, e, 2))(by_tree)
    for i in range(2):
        got = list(zip(np.asarray(forks.row)[i].tolist(), np.asarray(forks.position)[i].tolist(), strict=True))
        assert got == best(scores, by_tree[i], 2, 1)


def test_draws_are_uniform_over_eligible_places_with_replacement():
    eligible = np.zeros((3, 5), bool)
    places = [(0, 1), (1, 0), (1, 4), (2, 2)]
    for place in places:
        eligible[place] = True
    forks = B.draw_forks(jax.random.key(0), eligible, 4000)
    drawn, counts = np.unique(np.stack([forks.row, forks.position]), axis=1, return_counts=True)
    assert [tuple(p) for p in drawn.T.tolist()] == places
    assert np.asarray(forks.is_active).all()
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000 * 0.75)
    none = B.draw_forks(jax.random.key(0), np.zeros((3, 5), bool), 3)
    assert numpy_of(none) == [[0] * 3, [0] * 3, [False] * 3]


def test_eptree_forks_its_most_surprising_own_tokens():
    """The rule of TreeRL composed: own tokens, not the ends, not where a fork was before."""
    batch = forest_batch(parent_row=[-1, 0], fork_index=[0, 5], lengths=[12, 12], prompt=1)
    logprobs = np.full((2, 12), -0.1, np.float32)
    logprobs[0, [1, 4, 5, 11]] = [-9, -3, -8, -7]  # the first, a good one, where the fork was, the last
    logprobs[1, [2, 5, 8]] = [-6, -5, -2]  # inherited, the fork's first, a good one
    batch = dataclasses.replace(batch, behavior_logprobs=logprobs)
    tree = build_tree(batch)
    eligible = B.first_of_place(tree, B.without_tail(batch.action_mask, fraction=0.1))
    eligible &= B.fork_counts(tree, batch.parent_row, batch.fork_index) == 0
    forks = B.select_forks(B.surprisal(logprobs, batch.action_mask), eligible, 2)
    assert numpy_of(forks) == [[0, 1], [4, 8], [True, True]]
