"""The policy reads its failures: what is read of its answers, and what is drawn then."""

import json

import numpy as np
import pytest

from rljax.experiment import BlackBox
from rljax.experiment.check import check
from rljax.tasks import (
    FAILURE_MODES,
    Evolving,
    Example,
    ReflectedCurriculum,
    ReflectedTasks,
    Reflection,
    SeenGroup,
    UniformCurriculum,
    failure_distribution,
    failure_mass,
    read_reflection,
    read_selected,
    reflection_prompt,
    retrieval_prompt,
    shown_failures,
)
from rljax.tasks.evolving import ASKED
from rljax.testing import tiny_config

SEARCH = FAILURE_MODES["search"]
PLAIN = Reflection("wrong_answer", "it guessed", "the last one", "look first", "guesses")


def told(one, before="", after=""):
    fields = zip(("DOMINANT_TYPE", "DETAIL", "CRITICAL_STEP", "CORE_LESSON", "RETRIEVAL_QUERY"), one, strict=True)
    lines = "\n".join(f"{name}: {value}" for name, value in fields)
    return f"{before}<reflection>\n{lines}\n</reflection>{after}"


def test_the_ways_to_fail_are_the_papers():
    assert {name: len(modes) for name, modes in FAILURE_MODES.items()} == {"household": 11, "shopping": 11, "search": 9}
    assert all("action_format_error" in modes and len(set(modes)) == len(modes) for modes in FAILURE_MODES.values())
    prompt = reflection_prompt("find it", "I give up", SEARCH)
    assert "find it" in prompt and "I give up" in prompt and ", ".join(SEARCH) in prompt
    # The form that it shows is itself no reflection.
    assert read_reflection(prompt, SEARCH) is None


@pytest.mark.parametrize(
    "text",
    [
        told(PLAIN),
        told(PLAIN, "I think.\n", " Done."),
        told(PLAIN._replace(mode="Wrong Answer")),
        told(PLAIN._replace(mode="wrong-answer")),
        told(PLAIN._replace(mode="partial_answer")) + told(PLAIN),
        told(PLAIN).replace("DETAIL:", "  **DETAIL**:"),
        "<reflection> not yet " + told(PLAIN),
    ],
)
def test_a_reflection_is_read(text):
    assert read_reflection(text, SEARCH) == PLAIN


def test_values_may_have_several_lines():
    long = PLAIN._replace(detail="it guessed\nthen: it guessed again")
    assert read_reflection(told(long), SEARCH) == long


@pytest.mark.parametrize(
    "text",
    [
        "",
        "wrong_answer",
        told(PLAIN).removesuffix("</reflection>"),
        told(PLAIN._replace(mode="bad luck")),
        told(PLAIN._replace(lesson="  ")),
        told(PLAIN).replace("RETRIEVAL_QUERY: guesses\n", ""),
        told(PLAIN) + "<reflection></reflection>",
    ],
)
def test_what_is_no_reflection_is_none(text):
    assert read_reflection(text, SEARCH) is None


def test_selected_tasks_are_distinct_and_among_those_shown():
    text = (
        "<selected_tasks>\nINDEX: 3\nREASON: INDEX: 1 is not\n- **INDEX**: 1\nINDEX: 3\nINDEX: 0\nINDEX: 9\nINDEX: x\n"
        "INDEX: 2\nINDEX: 4</selected_tasks>"
    )
    assert read_selected(text, 4, count=3) == [2, 0, 1]
    assert read_selected(text, 2, count=3) == [0, 1]
    assert read_selected(text, 4, count=9) == [2, 0, 1, 3]
    assert read_selected("INDEX: 1", 4, count=3) == [] == read_selected("<selected_tasks>", 4, count=3)
    past = [("find a", PLAIN), ("find b", PLAIN._replace(mode="partial_answer"))]
    prompt = retrieval_prompt(PLAIN, past)
    assert prompt.index("INDEX: 1") < prompt.index("find a") < prompt.index("INDEX: 2") < prompt.index("find b")
    assert read_selected(prompt, 2, count=3) == []


def test_shown_are_other_tasks_of_the_same_mode_first_then_newer_ones():
    other = PLAIN._replace(mode="partial_answer")
    memory = [(0, PLAIN), (1, PLAIN), (2, other), (0, other), (3, other), (4, PLAIN)]
    assert [task for task, _ in shown_failures(memory, 9, "wrong_answer", most=9)] == [4, 1, 3, 0, 2]
    assert [task for task, _ in shown_failures(memory, 4, "wrong_answer", most=2)] == [1, 3]
    assert shown_failures(memory, 0, "partial_answer", most=9)[0] == (3, other)


EXAMPLES = [Example(f"find {name}", {"answer": name}) for name in ("a", "b", "c", "d")]


class Reader:
    """A player that answers by `say(prompt)`, and plays no prompt with one of `refused` in it."""

    def __init__(self, say, refused="nothing"):
        self.say = say
        self.refused = refused
        self.asked = []

    def can_play(self, example):
        return self.refused not in example.prompt

    def play(self, examples, samples, *, temperature=None):
        assert samples == 1 and temperature == 0.5
        assert all(example.columns[ASKED] and "answer" in example.columns for example in examples)
        self.asked.append([example.prompt for example in examples])
        return [SeenGroup(example, [self.say(example.prompt)], [np.nan]) for example in examples]


def group(task, *rewards):
    return SeenGroup(EXAMPLES[task], [f"rollout {task}.{i} of it" for i in range(len(rewards))], rewards)


def fading(mass, own, similar):
    return failure_mass(mass, np.array(own), np.array(similar), decay=0.9, kappa=0.5)


def say(prompt):
    """Every failure is alike, and the first two that are shown are selected."""
    if "Earlier failures" in prompt:
        return "<selected_tasks>\nINDEX: 1\nREASON: x\nINDEX: 2\nREASON: x\n</selected_tasks>"
    return told(PLAIN)


def test_failures_and_what_the_policy_selects_are_drawn_more_often():
    """The recommended weights of the worked example's form, with similarities of 1."""
    curriculum = ReflectedCurriculum(EXAMPLES)
    assert isinstance(curriculum, Evolving)
    player = Reader(say)
    np.testing.assert_array_equal(curriculum.distribution, 0.25)
    curriculum.see(0, [group(0, 0.0, 0.0), group(1, 1.0, 0.0, np.nan), group(2, 1.0), group(3, np.nan)])
    metrics = curriculum.evolve(1, player)

    # All failed rollouts are read, of task 1 too; and each that has others before it selects among these.
    assert [[prompt.count("<reflection>") for prompt in asked] for asked in player.asked] == [[1] * 3, [0]]
    for text, prompt in zip(("rollout 0.0", "rollout 0.1", "rollout 1.1"), player.asked[0], strict=True):
        assert text in prompt
    assert metrics == {
        "tasks": 4.0,
        "reflections": 3.0,
        "unread_reflections": 0.0,
        "retrieved": 1.0,
        "modes": 1.0,
    }
    mass = fading(np.zeros(4), [1, 0, 0, 0], [1, 0, 0, 0])
    np.testing.assert_allclose(curriculum.distribution, failure_distribution(mass, eta=0.5), rtol=1e-12)

    # Task 2 fails now: both that are shown are selected, the newer first. What was solved is forgotten by a step.
    curriculum.see(1, [group(2, 0.0), group(0, 1.0)])
    curriculum.evolve(2, player)
    shown = player.asked[-1][0]
    assert shown.index("TASK: find b") < shown.index("TASK: find a") and "TASK: find c" not in shown
    mass = fading(mass, [0, 0, 1, 0], [1, 1, 0, 0])
    np.testing.assert_allclose(curriculum.distribution, failure_distribution(mass, eta=0.5), rtol=1e-12)

    # Nothing was seen since: nothing is asked, and nothing fades.
    before = len(player.asked), curriculum.distribution
    curriculum.evolve(3, player)
    assert len(player.asked) == before[0]
    np.testing.assert_array_equal(curriculum.distribution, before[1])
    curriculum.see(3, [group(0, 1.0)])
    curriculum.evolve(4, player)
    assert len(player.asked) == before[0]
    np.testing.assert_allclose(
        curriculum.distribution, failure_distribution(0.9 * np.asarray(mass), eta=0.5), rtol=1e-12
    )


def test_what_cannot_be_read_or_asked_counts_for_its_own_task_alone():
    for player in (Reader(lambda prompt: "I do not know"), Reader(say, refused="A rollout")):
        curriculum = ReflectedCurriculum(EXAMPLES)
        curriculum.see(0, [group(0, 0.0), group(1, 0.0)])
        metrics = curriculum.evolve(1, player)
        assert (metrics["reflections"], metrics["unread_reflections"], metrics["modes"]) == (2.0, 2.0, 0.0)
        mass = fading(np.zeros(4), [1, 1, 0, 0], np.zeros(4))
        np.testing.assert_allclose(curriculum.distribution, failure_distribution(mass, eta=0.5), rtol=1e-12)


def test_examples_of_other_data_are_never_read():
    curriculum = ReflectedCurriculum(EXAMPLES)
    player = Reader(say)
    curriculum.see(0, [SeenGroup(Example("held out"), ["wrong"], [0.0])])
    curriculum.evolve(1, player)
    assert not player.asked and set(curriculum.distribution) == {0.25}


def test_bounds_hold():
    """Of rollouts of an example, of characters, and of what is remembered."""
    curriculum = ReflectedCurriculum(EXAMPLES, ReflectedTasks(rollouts=1, chars=6, history=2))
    player = Reader(say)
    curriculum.see(0, [group(task, 0.0, 0.0) for task in range(4)])
    curriculum.evolve(1, player)
    assert len(player.asked[0]) == 4 and "rol\n[...]\n it\n" in player.asked[0][0]
    assert [task for task, _ in curriculum.state_dict()["memory"]] == [2, 3]


def test_messages_are_asked_as_messages():
    chat = [Example([{"role": "user", "content": "find a"}])]

    class Chat(Reader):
        def can_play(self, example):
            ((message),) = example.prompt
            return message["role"] == "user" and "Task:\nfind a\n" in message["content"]

        def play(self, examples, samples, *, temperature=None):
            return [SeenGroup(example, [told(PLAIN)], [np.nan]) for example in examples]

    curriculum = ReflectedCurriculum(chat)
    curriculum.see(0, [SeenGroup(chat[0], ["wrong"], [0.0])])
    assert curriculum.evolve(1, Chat(say))["unread_reflections"] == 0


def test_it_resumes_bit_for_bit_through_json():
    """Also between a rollout that was seen and its reflections."""

    def go(curriculum, steps):
        rng = np.random.default_rng(0)
        answers = (rng.random((12, 2, 2)) < 0.4).astype(float)
        batches = []
        for step in steps:
            curriculum.evolve(step, Reader(say))
            batch = curriculum.sample(step, 2)
            curriculum.see(step, [group(EXAMPLES.index(e), *answers[step, i]) for i, e in enumerate(batch)])
            batches.append([e.id for e in batch])
        return batches

    whole = ReflectedCurriculum(EXAMPLES, seed=3)
    expected = go(whole, range(12))
    first, second = ReflectedCurriculum(EXAMPLES, seed=3), ReflectedCurriculum(EXAMPLES, seed=3)
    assert go(first, range(5)) == expected[:5]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert go(second, range(5, 12)) == expected[5:]
    assert second.state_dict() == whole.state_dict()
    assert go(ReflectedCurriculum(EXAMPLES, seed=4), range(12)) != expected
    for other in (ReflectedCurriculum(EXAMPLES, seed=4), ReflectedCurriculum(EXAMPLES[1:], seed=3)):
        with pytest.raises(ValueError, match="this curriculum state has"):
            other.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="this curriculum state has kind"):
        UniformCurriculum(EXAMPLES, seed=3).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ("Wrong one",)}, "must be distinct lower-cased words joined by underscores"),
        ({"modes": ("a", "a")}, "must be distinct"),
        ({"eta": 1.0}, "eta=1.0"),
        ({"decay": -0.1}, "decay=-0.1"),
        ({"rollouts": -1}, "rollouts=-1"),
        ({"count": 0}, "count=0 must be at least 1"),
        ({"temperature": 1e-3}, "temperature=0.001 must be 0, which is greedy"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ReflectedCurriculum(EXAMPLES, ReflectedTasks(**changes))
    with pytest.raises(ValueError, match="at least one example"):
        ReflectedCurriculum([])


def test_a_policy_that_only_a_program_talks_to_reads_nothing():
    agent = BlackBox(agent="agent_tasks:chat", context_length=64)
    with pytest.raises(ValueError, match=r"config\.actor=BlackBox\(\.\.\.\) asks it nothing but what its agents ask"):
        check(tiny_config(actor=agent, curriculum=ReflectedTasks()))
