"""D2Evo: the worked examples, what a questioner earns, what enters a round, and states that go on exactly."""

import json

import numpy as np
import pytest
from evolving_tasks import EchoMaker, Script
from objectives import float64, make_batch

from rljax.advantages import group_normalized
from rljax.tasks import D2EvoTasks, Evolving, Example, Judging, QuestionMaker, SeenGroup, TaggedQuestions
from rljax.tasks.d2evo import anchors_of, difficulty_reward, is_within, majority

DATA = [Example(f"{x}{y}=", {"answer": x}) for x in "ab" for y in "ab"]


class Questions(EchoMaker):
    def labelled(self, task, label):
        return Example(task.prompt, {"answer": label}) if label != "z" else None


def d2evo(seed=0, **changes):
    given = dict(
        maker="test_tasks_d2evo:Questions",
        questioner_steps=2,
        solver_steps=3,
        attempts=4,
        least_anchors=1,
        votes=4,
        proposals=4,
        second_votes=2,
    )
    return D2EvoTasks(**(given | changes)).make(DATA, seed)


@pytest.mark.parametrize(
    ("votes", "worth"),
    [*enumerate([0, 0.0625, 0.25, 0.5625, 1, 1, 1, 0.5625, 0.25, 0.0625, 0])],
)
def test_the_reward_of_a_question_meets_the_worked_example(votes, worth):
    # Of float32 shares too, whose 4 of 10 is above 0.4 and 6 of 10 above 0.6.
    for share in (votes / 10, float(np.float32(votes) / np.float32(10))):
        assert difficulty_reward(share, band=(0.4, 0.6), steepness=2.0) == pytest.approx(worth, abs=1e-6)


def test_the_reward_of_a_question_meets_other_bands():
    for share in (0.2, 0.8):
        assert difficulty_reward(share, band=(0.4, 0.6), steepness=1.0) == pytest.approx(0.5)
    for share in (0.15, 0.85):
        assert difficulty_reward(share, band=(0.3, 0.7), steepness=2.0) == pytest.approx(0.25)
    assert difficulty_reward(1.0, band=(0.4, 1.0), steepness=2.0) == 1  # nothing lies above, nothing is divided by 0


def test_anchors_meet_the_worked_example():
    solved = [n / 32 for n in (32, 26, 25, 20, 16, 13, 12, 0)]
    assert anchors_of(solved, band=(0.4, 0.8), least=1) == [2, 3, 4, 5]
    # As a band on difficulty, which is one on 1 - solved.
    assert anchors_of(solved, band=(0.2, 0.6), least=1) == [4, 5, 6]
    # Fewer than asked for: the most solved of the harder ones, and never what nothing solves.
    assert anchors_of(solved, band=(0.4, 0.8), least=9) == [2, 3, 4, 5, 6]


def test_votes_meet_the_worked_examples():
    none = None
    assert majority(["7", "7", "3", "7", "3", none, "7", "2", "7", "3"]) == ("7", 0.5)
    assert majority(["3", "7", "3", "7", "1", none]) == ("3", pytest.approx(1 / 3))
    assert majority([none, none]) == (None, 0.0) and majority([]) == (None, 0.0)
    assert is_within(0.5, (0.4, 0.6))


def test_the_questioners_group_meets_the_worked_example():
    batch = make_batch(group_id=np.zeros(4, np.int32), rewards=[1, 1, 0.25, 0], lengths=[1] * 4, dtype=np.float64)
    for ddof, wanted in (
        (1, [0.848873, 0.848873, -0.606338, -1.091408]),
        (0, [0.980194, 0.980194, -0.700138, -1.260249]),
    ):
        with float64():
            advantages = np.asarray(group_normalized(ddof=ddof)(batch))
        np.testing.assert_allclose(advantages.sum(axis=1), wanted, atol=1e-6)


def test_a_questioner_is_paid_for_medium_questions_alone():
    curriculum = d2evo()
    curriculum.keep_out([Example("hh=", {"answer": "h"})])
    solved = {"aa=": ["a", "?"], "ab=": ["a"], "ba=": ["?"], "bb=": ["b", "b", "b", "?"]}
    stats = curriculum.evolve(0, Script(solved))
    # Half of the attempts solve "aa=", three of four "bb="; all or none the others.
    assert stats["anchors"] == 2 and stats["tasks"] == 2

    # The questioner is asked in the words of its anchors, which come again where a step has more prompts.
    asks = curriculum.sample(0, 4)
    assert sorted(e.prompt for e in asks) == ["=aa=", "=aa=", "=bb=", "=bb="]
    by_prompt = {e.prompt: e for e in asks}

    texts = ["cd", "cd", "ce", "cf", "1", "aa", "hh"]
    player = Script({"cd=": ["x", "x", "y", "?"], "ce=": ["x"], "cf=": ["x", "y", "z", "?"]})
    groups = [SeenGroup(by_prompt["=aa="], texts, [0.0] * 7), SeenGroup(DATA[0], ["a"], [1.0])]
    rewards = curriculum.judge(0, groups, player)
    # Two of four votes; all; one of four; no question; its anchor; held out.
    assert rewards == [[1, 1, 0, pytest.approx((0.25 / 0.4) ** 2), 0, 0, 0], None]
    assert player.played == [(["cd=", "ce=", "cf="], 4)]
    assert curriculum.evolve(1, player)["questions_in_band"] == pytest.approx(1 / 3)


def test_a_question_without_a_medium_confirmed_label_never_enters():
    curriculum = d2evo(per_anchor=1.0)
    told = {"aa=": ["a", "?"], "bb=": ["b", "b", "b", "?"]}
    written = {"=aa=": ["cd", "ce", "x", "ef"], "=bb=": ["cf", "aa", "gh", "dd"]}
    votes = {
        "cd=": ["c", "?", "c", "?"],  # medium; the second vote has it too
        "ce=": ["c"],  # all agree
        "ef=": ["?", "?", "e", "e"],  # medium; no second vote is told below, so none agrees
        "cf=": ["z", "z", "?", "?"],  # medium, and refused by the other check
        "gh=": ["?"],  # nobody answers
        "dd=": ["d", "?", "d", "?"],
    }
    player = Script(told | written | votes)
    for step in range(3):
        stats = curriculum.evolve(step, player)

    assert stats["proposed"] == 8 and stats["unreadable"] == 1 and stats["repeated"] == 1
    assert stats["not_medium"] == 2 and stats["unconfirmed"] == 2
    assert stats["accepted"] == 2 and stats["surplus"] == 0 and stats["tasks"] == 4
    parts = ("unreadable", "repeated", "held_out", "unplayable", "not_medium", "unconfirmed", "surplus", "accepted")
    assert sum(stats[part] for part in parts) == stats["proposed"]

    # Solver steps draw anchors and questions, these with the labels of the vote.
    drawn = {e.prompt: e.columns["answer"] for e in curriculum.sample(2, 4)}
    assert drawn == {"aa=": "a", "bb=": "b", "cd=": "c", "dd=": "d"}
    assert not set(e.id for e in curriculum.sample(2, 4)) - {e.id for e in curriculum.tasks}

    assert d2evo(per_anchor=0.5).evolve(0, player)["surplus"] == 0
    half = d2evo(per_anchor=0.5)
    assert [half.evolve(step, player) for step in range(3)][-1]["surplus"] == 1


def test_the_state_goes_on_exactly():
    written = {"=aa=": ["cd", "ce"], "=bb=": ["ef", "dd"], "=ab=": ["gh"]}
    script = Script(
        {"aa=": ["a", "?"], "bb=": ["b", "?"], "cd=": ["c", "?"], "dd=": ["d", "?"], "ef=": ["e", "?"]} | written
    )

    def go(curriculum, steps):
        made = []
        for step in steps:
            stats = curriculum.evolve(step, script)
            batch = curriculum.sample(step, 3)
            groups = [SeenGroup(e, written.get(e.prompt, ["?"]), [0.0]) for e in batch]
            made.append(([e.id for e in batch], stats, curriculum.judge(step, groups, script)))
        return made

    whole = d2evo(seed=3)
    expected = go(whole, range(12))
    assert whole.tasks[4:-4], "nothing was added, so nothing was tested"
    for stop in (0, 1, 2, 4, 5, 8):
        first, second = d2evo(seed=3), d2evo(seed=3)
        go(first, range(stop))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert go(second, range(stop, 12)) == expected[stop:]
        assert second.state_dict() == whole.state_dict()

    with pytest.raises(ValueError, match="this curriculum state has seed"):
        d2evo(seed=4).load_state_dict(whole.state_dict())


def test_questions_in_words_are_read_between_tags():
    maker = TaggedQuestions(instruction="Another one.")
    source = Example(
        [{"role": "user", "content": "1 + 1?"}], {"answer": "2", "solution": "It is 2.", "subject": "sums"}
    )
    (asked,) = maker.prompt_of(source, "anchor", ())
    assert asked["content"] == "1 + 1?\n\nSolution: It is 2.\n\nSubject: sums\n\nAnother one."
    task = maker.task_of("So: <question> 2 + 2? </question>", source)
    assert task.prompt == [{"role": "user", "content": "2 + 2?"}]
    with_columns = Example(task.prompt, source.columns)
    assert maker.labelled(with_columns, "4").columns == {"subject": "sums", "answer": "4"}
    for text in ("2 + 2?", "<question>2 + 2?", "<question></question>"):
        assert maker.task_of(text, source) is None
    assert isinstance(maker, QuestionMaker)


def test_a_questioner_whose_prompt_cannot_be_sampled_is_refused_at_once():
    with pytest.raises(ValueError, match=r"4 of 4 prompts with which .* cannot be sampled, such as '=aa='; raise"):
        d2evo().evolve(0, Script({}, longest=3))


def test_a_vote_needs_answers():
    class Silent(Script):
        def play(self, examples, samples):
            return [group._replace(answers=[]) for group in super().play(examples, samples)]

    curriculum = d2evo()
    curriculum.evolve(0, Silent({}))
    with pytest.raises(ValueError, match="votes on answers, and the reward that decides extracts none"):
        curriculum.judge(0, [SeenGroup(curriculum.sample(0, 1)[0], ["cd"], [0.0])], Silent({}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"votes": 0}, r"config\.curriculum\.votes=0 must be at least 1"),
        ({"second_votes": -1}, r"config\.curriculum\.second_votes=-1 must be at least 0"),
        ({"question_band": (0.0, 0.5)}, r"config\.curriculum\.question_band=\(0\.0, 0\.5\) must be \(low, high\)"),
        ({"maker": "evolving_tasks:OnlyTasks"}, r"makes a OnlyTasks, which lacks labelled; add it"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        d2evo(**changes)


def test_it_is_a_curriculum_that_judges():
    assert isinstance(d2evo(), Evolving) and isinstance(d2evo(), Judging)
