"""Skills that users share: a gate of pairs, evidence apart from validation, a repository in which nothing is lost."""

import concurrent.futures
import dataclasses
import json
import math

import numpy as np
import pytest

from rljax.tasks import (
    AskedEvolver,
    Candidate,
    Completion,
    Episode,
    Example,
    Gate,
    Proposal,
    RowsData,
    SeenGroup,
    Skill,
    SkilledData,
    SkillRepository,
    Trial,
    admit,
    by_skill,
    episodes_of,
    paired_gate,
    proposals,
    read_proposal,
    refuse_shared_tasks,
    success_rates,
    with_prefix,
    with_skills,
)


def skill(text="k backward", name="k", version=0):
    return Skill(name, text, name, version)


def episode(task, reward, *labels, topic="k", text="dcba"):
    return Episode("user-1", task, f"{topic} abcd=", text, reward, labels, {"topic": topic})


def test_the_gate_gives_the_worked_example():
    incumbent = [0, 1, 0, 1]
    assert paired_gate(incumbent, [1, 1, 0, 1]) == (True, 0.25, 0)
    assert paired_gate(incumbent, [1, 0, 1, 1]) == (False, 0.25, 1)
    assert paired_gate(incumbent, incumbent) == (False, 0.0, 0)
    assert paired_gate(incumbent, [1, 0, 1, 1], max_broken=1).accepted
    assert paired_gate(incumbent, incumbent, margin=0.0).accepted


def test_the_gate_takes_the_mean_of_repeats_and_a_run_that_failed_for_nothing():
    once_lucky = [[1, 0, 0, 0], [1, 1, 1, 0]]
    verdict = paired_gate(once_lucky, [[0, 0, 1, 1], [1, 1, 0, math.nan]])
    assert verdict == (False, 0.0, 0)  # 1/4 and 3/4 become 2/4 and 2/4: neither has broken
    assert paired_gate([[1, 1]], [[math.nan, math.nan]]).broken == 1
    assert not paired_gate([0], [math.nan], margin=-1.0).accepted and paired_gate([0], [0], margin=-1.0).accepted
    for old, new in (([1, 0], [1]), ([], []), ([[[1]]], [[[1]]])):
        with pytest.raises(ValueError, match="need the same tasks, at least one"):
            paired_gate(old, new)


@pytest.mark.parametrize("seed", range(3))
def test_the_gate_is_a_loop_over_tasks(seed):
    rng = np.random.default_rng(seed)
    old, new = rng.random((2, 7, 3))
    gains = [sum(n) / 3 - sum(o) / 3 for o, n in zip(old.tolist(), new.tolist(), strict=True)]
    broken = sum(sum(o) / 3 >= 0.5 > sum(n) / 3 for o, n in zip(old.tolist(), new.tolist(), strict=True))
    verdict = paired_gate(old, new, margin=0.0, max_broken=1)
    assert verdict.broken == broken
    np.testing.assert_allclose(verdict.delta, sum(gains) / 7, atol=1e-15)
    assert verdict.accepted == (sum(gains) / 7 >= 0 and broken <= 1)


def test_a_prompt_is_given_the_skills_of_its_topic_and_names_them():
    example = Example("k abcd=", {"topic": "k", "answer": "dcba"})
    skills = [skill(version=2), skill("l turn", "l", 1)]
    given = with_skills(example, skills, form="{text}\n")
    assert given.prompt == "k backward\nk abcd=" and given.columns == {**example.columns, "given_skills": ["k@2"]}
    # The same random numbers, with and without.
    assert given.id == example.id
    assert with_skills(example, []).prompt == example.prompt
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "k abcd="}]
    assert with_prefix(chat, "Hint. ")[1]["content"] == "Hint. k abcd=" and chat[1]["content"] == "k abcd="
    with pytest.raises(ValueError, match="no user message of text that a skill could stand in"):
        with_prefix(chat[:1], "Hint. ")


def test_episodes_of_several_users_are_sorted_by_skill_and_counted():
    shared = Example("k l abcd=", {"topic": "k", "given_skills": ["k@1", "l@3"]})
    alone = Example("m abcd=", {"topic": "m"})
    episodes = episodes_of("user-1", [SeenGroup(shared, ["dcba"], [1.0])])
    episodes += episodes_of("user-2", [SeenGroup(alone, ["abcd", "dcba"], [0.0, math.nan])])
    evidence = by_skill(episodes)
    # One episode is evidence of both of its skills.
    assert {name: [e.user for e in group] for name, group in evidence.of_skill.items()} == {
        "k": ["user-1"],
        "l": ["user-1"],
    }
    assert [e.task for e in evidence.unguided] == [alone.id, alone.id]
    assert episodes[0].skills == ("k@1", "l@3") and episodes[0].columns == {"topic": "k"}
    assert success_rates(episodes) == {"": 0.0, "k": 1.0, "l": 1.0}


def test_a_skill_without_evidence_is_left_alone_and_nothing_is_refined_from_episodes_without_it():
    deployed = [skill(version=1), skill("l turn", "l", 1)]
    asked = []

    def evolve(one, episodes):
        asked.append(one and one.name)
        return [skill("k first"), skill("m last", "m")]

    evidence = by_skill([episode(1, 0.0, "k@1"), episode(2, 0.0)])
    made = proposals(evolve, deployed, evidence)
    assert asked == ["k", None]
    # k is refined by its own episodes alone, m is taken once.
    assert made == [Proposal(skill("k first"), 1, (1,)), Proposal(skill("m last", "m"), 0, (1,))]
    assert proposals(evolve, deployed, evidence, least=2) == []
    assert proposals(lambda one, episodes: [one] if one else [], deployed, evidence) == []


def test_a_harmful_skill_is_rejected_and_the_deployed_pool_only_grows(tmp_path):
    repository = SkillRepository(tmp_path)
    worth = {"k backward": 0.9, "k turn": 0.1, "k best": 1.0}
    tried = []

    def validate(one, before, after):
        tried.append(([s.label for s in before], [s.label for s in after]))
        old = next((worth[s.text] for s in before if s.name == "k"), 0.0)
        return Trial([10, 11], [[old]] * 2, [[worth[one.text]]] * 2)

    def hand_in(text, base):
        (decision,) = admit(repository, [Proposal(skill(text), base, (1,))], validate, Gate(margin=0.05))
        return decision

    assert hand_in("k backward", 0).outcome == skill("k backward", version=1)
    harmful = hand_in("k turn", 1)
    assert not harmful.is_deployed and harmful.verdict.broken == 2
    assert repository.deployed() == [skill("k backward", version=1)]
    (kept,) = repository.candidates("k")
    assert kept.skill.text == "k turn" and kept.status == "rejected" and kept.notes["validation"] == [10, 11]
    # The same words are not tried again beside the same version.
    assert hand_in("k turn", 1).verdict is None and len(tried) == 2
    assert hand_in("k best", 1).outcome.version == 2
    assert [s.text for s in repository.versions("k")] == ["k backward", "k best"]
    assert tried == [([], ["k@0"]), (["k@1"], ["k@0"]), (["k@1"], ["k@0"])]
    assert repository.notes("k", 2)["evidence"] == [1]


def test_a_skill_for_which_no_task_is_left_to_try_it_on_is_rejected(tmp_path):
    repository = SkillRepository(tmp_path)
    (decision,) = admit(repository, [Proposal(skill(), 0, (1,))], lambda *given: Trial([], [], []))
    assert decision.verdict is None and not repository.deployed()
    (kept,) = repository.candidates("k")
    assert kept.reason == "no validation task is of the topic 'k'"
    assert decision.describe() == "k kept as a candidate (rejected: no validation task is of the topic 'k')"


def test_what_a_skill_was_written_from_is_not_what_it_is_tried_on(tmp_path):
    refuse_shared_tasks([1, 2], [3])
    trial = Trial([2, 3], [[0], [0]], [[1], [1]])
    with pytest.raises(ValueError, match="1 tasks are evidence and validation at once, such as 2"):
        admit(SkillRepository(tmp_path), [Proposal(skill(), 0, (1, 2))], lambda *given: trial)
    assert SkillRepository(tmp_path).deployed() == []


def test_of_two_writers_one_is_first_and_the_other_is_kept_by_name(tmp_path):
    first, second = SkillRepository(tmp_path), SkillRepository(tmp_path)
    first.deploy(skill("k one"), 0)
    assert first.deploy(skill("k two"), 1).version == 2
    met = second.deploy(skill("k other"), 1, {"delta": 0.5})
    assert isinstance(met, Candidate) and met.status == "conflict"
    assert met.reason == "made from version 1, beside k@2, which was deployed first"
    assert first.candidates("k") == [met] and first.newest("k").text == "k two"
    # The same words twice are one version, not a conflict.
    assert second.deploy(skill("k two"), 1).version == 2
    with pytest.raises(ValueError, match="skill k has no version 7"):
        second.deploy(skill("k two"), 7)


def test_nothing_that_many_writers_hand_in_at_once_is_lost(tmp_path):
    def write(number):
        return SkillRepository(tmp_path).deploy(skill(f"k {number}"), 0)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(write, range(16)))
    repository = SkillRepository(tmp_path)
    (deployed,) = repository.versions("k")
    texts = [deployed.text, *(c.skill.text for c in repository.candidates("k"))]
    assert sorted(texts) == sorted(f"k {number}" for number in range(16))
    assert sum(isinstance(one, Skill) for one in found) == 1
    assert not list(tmp_path.rglob(".writing-*"))


def test_a_file_that_is_no_skill_is_named(tmp_path):
    (tmp_path / "k").mkdir()
    (tmp_path / "k" / "0001.json").write_text("{}")
    with pytest.raises(ValueError, match=r"0001.json is no skill"):
        SkillRepository(tmp_path).deployed()
    for name, text, match in (("../k", "x", "letters, digits"), ("k", " ", "the text is empty")):
        with pytest.raises(ValueError, match=match):
            Skill(name, text, "k")


class Told:
    """A language model that says one thing."""

    at_once = 1

    def __init__(self, reply):
        self.settings = {}
        self.reply = reply
        self.prompts = []

    def __call__(self, prompts, count):
        self.prompts += prompts
        return [[Completion(self.reply)] for _ in prompts]


def test_an_evolver_that_is_asked_reads_the_skill_and_its_evidence_at_once():
    told = Told('They all turn {the word}.\n{"choice": "refine", "text": "k turn"}')
    episodes = [episode(i, float(i % 3 == 0), "k@1", text=f"no{i}") for i in range(12)]
    assert AskedEvolver(told, most=6)(skill(version=1), episodes) == [skill("k turn")]
    (prompt,) = told.prompts
    assert "The skill k, for k:\nk backward" in prompt and "who were given the skill k" in prompt
    assert prompt.count(", solved,") == 3 and prompt.count(", failed,") == 3

    created = Told(json.dumps({"choice": "create", "name": "m", "topic": "m", "text": "m last"}))
    assert AskedEvolver(created)(None, episodes) == [skill("m last", "m")]
    for reply in ("{", "nothing", '{"choice": "refine"}', '{"choice": "create", "name": 3}', '{"choice": "skip"}'):
        assert AskedEvolver(Told(reply))(None, episodes) == []
    with pytest.raises(ValueError, match="the choice is 'burn'"):
        read_proposal('{"choice": "burn"}', None)


def topic_rows(topics="kl"):
    return [{"prompt": f"{topic} {word}=", "topic": topic} for topic in topics for word in ("ab", "ba", "aa", "bb")]


def test_data_begins_with_the_skills_of_a_repository(tmp_path):
    SkillRepository(tmp_path).deploy(skill(), 0)
    rows = RowsData("test_tasks_skills:topic_rows", test_fraction=0.3, chat=False)
    data = SkilledData(rows, str(tmp_path), form="{text}\n")
    loaded = data.load()
    plain = rows.load()
    assert data.chat is False and len(loaded.train) == len(plain.train) and len(loaded.test) == len(plain.test)
    for given, before in zip([*loaded.train, *loaded.test], [*plain.train, *plain.test], strict=True):
        told = before.columns["topic"] == "k"
        assert given.prompt == ("k backward\n" if told else "") + before.prompt
        assert given.columns["given_skills"] == (["k@1"] if told else []) and given.id != before.id
    with pytest.raises(ValueError, match="no training row is given a skill; topics there are k"):
        dataclasses.replace(data, topic_column="subject").load()
    with pytest.raises(ValueError, match="is no folder; name a repository"):
        SkilledData(rows, str(tmp_path / "none")).load()
