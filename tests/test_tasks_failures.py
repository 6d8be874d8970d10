"""Tasks that fail are drawn more often: the worked examples of Role-Agent, and a curriculum that resumes exactly."""

import difflib
import json

import numpy as np
import pytest

from rljax.rollouts import Rollout
from rljax.tasks import (
    SIMILARITIES,
    Curriculum,
    Example,
    FailedTasks,
    FailureCurriculum,
    UniformCurriculum,
    failure_distribution,
    failure_mass,
    grown_weights,
    nearest,
)
from rljax.tasks.similarity import dice, gestalt, lcs_length, of_longer, words


def test_words_meet_the_worked_example():
    a, b = "the drawer 1 is open and empty", "the drawer 1 is open . in it you see a cup"
    assert (len(words(a)), len(words(b)), lcs_length(words(a), words(b))) == (7, 12, 5)
    assert of_longer(a, b) == pytest.approx(0.416667, abs=1e-6)
    assert dice(a, b) == pytest.approx(0.526316, abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "longer", "of_both"),
    [
        ("5 7 7 2", "7 5 7 2 9", 0.6, 0.666667),
        ("1 2 3", "1 2 3", 1, 1),
        ("1 2 3", "4 5", 0, 0),
        ("3 1 2", "1 2 3", 0.666667, 0.666667),
        ("", "1", 0, 0),
    ],
)
def test_texts_are_as_alike_as_their_tokens(a, b, longer, of_both):
    assert of_longer(a, b) == pytest.approx(longer, abs=1e-6) and dice(a, b) == pytest.approx(of_both, abs=1e-6)


def test_common_subsequences_by_bits_are_those_of_a_table():
    rng = np.random.default_rng(1)
    for _ in range(200):
        a, b = (rng.integers(0, 5, rng.integers(0, 90)).tolist() for _ in range(2))
        row = [0] * (len(b) + 1)
        for x in a:
            last = row
            row = [0]
            for j, y in enumerate(b):
                row.append(last[j] + 1 if x == y else max(last[j + 1], row[j]))
        assert lcs_length(a, b) == row[-1]


def test_the_releases_similarity_is_that_of_characters():
    a, b = "the drawer 1 is open", "the drawer 2 is closed"
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    assert gestalt(a, b) == pytest.approx(2 * sum(m.size for m in blocks) / (len(a) + len(b)))
    assert gestalt("", "a") == 0
    assert set(SIMILARITIES) == {"dice", "of_longer", "gestalt"}


def test_the_recommended_weights_meet_the_worked_example():
    own, similar = np.array([0, 0, 1, 0]), np.array([0.9, 0.4, 0, 0.1])
    mass = failure_mass(np.array([0.5, 0, 0, 0]), own, similar, decay=0.9, kappa=0.5)
    np.testing.assert_allclose(mass, [0.9, 0.2, 1, 0.05], atol=1e-12)
    np.testing.assert_allclose(failure_distribution(mass, eta=0.5), [0.334302, 0.171512, 0.357558, 0.136628], atol=1e-6)
    np.testing.assert_array_equal(failure_distribution(np.zeros(4), eta=0.5), 0.25)


def test_the_releases_weights_meet_the_worked_example():
    """Of a failure of task 2, with the failures of others in their order: the second of task 0 counts no more."""
    similar = np.zeros(4)
    for task, likeness in nearest([(0, 0.9), (1, 0.4), (0, 0.7), (3, 0.1)], count=3):
        similar[task] = likeness
    weights = grown_weights(np.ones(4), np.array([0, 0, 1, 0]), similar)
    np.testing.assert_allclose(weights, [1.315, 1.14, 1.15, 1.035], atol=1e-12)
    np.testing.assert_allclose(weights / weights.sum(), [0.283405, 0.245690, 0.247845, 0.223060], atol=1e-6)

    # A curriculum of such weights, which never fall.
    likeness = {"red car": 0.9, "green apple": 0.4, "old town": 0.1}
    curriculum = FailureCurriculum(
        EXAMPLES,
        FailedTasks(forgets=False, kappa=0.35),
        similarity=lambda a, b: likeness.get(b.removeprefix("find the "), 0.0) if a.endswith("blue sky") else 0.0,
    )
    for task in (NAMES.index("red car"), NAMES.index("green apple"), NAMES.index("old town")):
        fail(curriculum, task)
    fail(curriculum, NAMES.index("blue sky"))
    curriculum.observe(EXAMPLES, [1.0] * 8)
    want = np.ones(8)
    want[[2, 1, 4]] += 0.15 + 0.35 * np.array([0.9, 0.4, 0.1])
    want[3] += 0.15
    np.testing.assert_allclose(curriculum.distribution, want / want.sum(), rtol=1e-12)
    again = FailureCurriculum(EXAMPLES, FailedTasks(forgets=False, kappa=0.35))
    again.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    np.testing.assert_array_equal(again.distribution, curriculum.distribution)


def test_the_nearest_are_distinct_and_alike_at_all():
    assert nearest([(0, 0.9), (1, 0.4), (0, 0.7), (3, 0.1), (4, 0.2)], count=3) == [(0, 0.9), (1, 0.4), (4, 0.2)]
    assert nearest([(0, 0.0), (1, 0.2)], count=3) == [(1, 0.2)]


NAMES = ("red apple", "green apple", "red car", "blue sky", "old town", "far away", "deep sea", "high hill")
EXAMPLES = [Example(prompt=f"find the {name}") for name in NAMES]


def fail(curriculum, *indices):
    batch = [EXAMPLES[i] for i in indices]
    curriculum.observe(batch, [0.0] * len(batch))


def test_failures_and_what_is_like_them_are_drawn_more_often_and_forgotten():
    curriculum = FailureCurriculum(EXAMPLES)
    np.testing.assert_array_equal(curriculum.distribution, 1 / 8)
    fail(curriculum, 0)
    curriculum.observe([EXAMPLES[3]], [1.0])  # solved: no mass
    fail(curriculum, 1)
    p = curriculum.distribution
    like = dice("find the green apple", "find the red apple")
    mass = np.array([0.9**2 + 0.5 * like, 1.0])
    np.testing.assert_allclose(p[:2], 0.5 / 8 + 0.5 * mass / mass.sum(), rtol=1e-12)
    np.testing.assert_allclose(p[2:], 0.5 / 8)


def test_a_reward_that_failed_is_no_failure_of_the_example():
    """Three rows whose reward is broken, among eight: they are drawn as often as before."""
    rewards = np.array([[1.0, 0.0], [np.nan, np.nan], [np.nan, 0.0], [np.nan, np.nan]])
    rollout = Rollout([], [], EXAMPLES[:4], rewards, {}, {}, {})
    assert rollout.observed() == ([EXAMPLES[0], EXAMPLES[2]], [0.5, 0.0])

    curriculum = FailureCurriculum(EXAMPLES, similarity=lambda a, b: 0.0)
    for _ in range(20):
        curriculum.observe(*rollout.observed())
    assert curriculum.distribution[2] > 0.5 and set(np.delete(curriculum.distribution, 2)) == {0.5 / 8}

    before = curriculum.state_dict()
    curriculum.observe(*Rollout([], [], EXAMPLES[:1], np.full((1, 2), np.nan), {}, {}, {}).observed())
    assert curriculum.state_dict() == before


def test_what_is_solved_is_forgotten_beside_newer_failures_and_then_altogether():
    curriculum = FailureCurriculum(EXAMPLES, similarity=lambda a, b: 0.0)
    fail(curriculum, 0)
    for _ in range(30):
        curriculum.observe(EXAMPLES, [1.0] * 8)
    fail(curriculum, 7)
    assert curriculum.distribution[7] > 0.53 and curriculum.distribution[0] < 0.09
    for _ in range(250):
        curriculum.observe(EXAMPLES, [1.0] * 8)
    np.testing.assert_array_equal(curriculum.distribution, 1 / 8)


def test_draws_are_distinct_and_follow_the_distribution():
    curriculum = FailureCurriculum(EXAMPLES, FailedTasks(eta=0.8), similarity=lambda a, b: 0.0)
    fail(curriculum, 2)
    p = curriculum.distribution
    drawn = [curriculum.sample(step, 3) for step in range(3000)]
    assert all(len({e.id for e in batch}) == 3 for batch in drawn)
    first = np.bincount([EXAMPLES.index(batch[0]) for batch in drawn], minlength=8) / 3000
    np.testing.assert_allclose(first, p, atol=0.03)


def test_it_resumes_bit_for_bit_through_json():
    rng = np.random.default_rng(0)

    def go(curriculum, steps, answers):
        batches = []
        for step in steps:
            batch = curriculum.sample(step, 3)
            curriculum.observe(batch, answers[step])
            batches.append([e.id for e in batch])
        return batches

    answers = (rng.random((20, 3)) < 0.4).astype(float).tolist()
    whole = FailureCurriculum(EXAMPLES, seed=3)
    expected = go(whole, range(20), answers)
    first, second = FailureCurriculum(EXAMPLES, seed=3), FailureCurriculum(EXAMPLES, seed=3)
    assert go(first, range(8), answers) == expected[:8]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert go(second, range(8, 20), answers) == expected[8:]
    np.testing.assert_array_equal(second.distribution, whole.distribution)
    assert second.state_dict() == whole.state_dict()
    assert go(FailureCurriculum(EXAMPLES, seed=4), range(8), answers) != expected[:8]


def test_a_state_of_another_run_is_refused():
    state = FailureCurriculum(EXAMPLES, seed=3).state_dict()
    for other, name in (
        (FailureCurriculum(EXAMPLES, seed=4), "seed"),
        (FailureCurriculum(EXAMPLES[1:], seed=3), "data"),
        (UniformCurriculum(EXAMPLES, seed=3), "kind"),
    ):
        with pytest.raises(ValueError, match=f"this curriculum state has {name}"):
            other.load_state_dict(state)


def test_history_is_bounded_and_strangers_are_passed_over():
    curriculum = FailureCurriculum(EXAMPLES, FailedTasks(history=2))
    fail(curriculum, 0, 2, 4)
    assert curriculum.state_dict()["failures"] == [2, 4]
    curriculum.observe([Example(prompt="a test item")], [0.0])
    assert curriculum.state_dict()["failures"] == [2, 4]
    messages = FailureCurriculum([Example(prompt=[{"role": "user", "content": "a b"}]), *EXAMPLES])
    assert isinstance(messages, Curriculum) and isinstance(UniformCurriculum(EXAMPLES), Curriculum)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"eta": 1.0}, "eta=1.0"), ({"decay": 1.0}, "decay=1.0"), ({"count": -1}, "count=-1"), ({"kappa": -0.1}, "kappa")],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FailureCurriculum(EXAMPLES, FailedTasks(**changes))
    with pytest.raises(ValueError, match="at least one example"):
        FailureCurriculum([])
    with pytest.raises(ValueError, match="cannot draw 9 distinct examples from 8"):
        FailureCurriculum(EXAMPLES).sample(0, 9)
