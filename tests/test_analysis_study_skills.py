"""The study of shared skills: days of users over one run, and what its report says."""

import dataclasses
import json

import pytest

from rljax.analysis.study_skills import study_skills, summarise, table, verdict
from rljax.experiment import OptimizerConfig, RewardConfig, RowsData, SamplingConfig, SkillsConfig, WarmupConfig
from rljax.tasks import AskedEvolver, Example, Proposal, Skill, SkillRepository
from rljax.testing import tiny_config


def letter_rows():
    """A topic wants one letter, which the prompt does not tell."""
    return [
        {"prompt": f"{topic}{a}{b}=", "answer": {"a": "g", "b": "h"}[topic], "topic": topic}
        for topic in "ab"
        for a in "abcdef"
        for b in "abcdef"
    ]


def as_told(examples):
    """The first letter of a prompt of two lines is the answer; without one g and h are as likely."""
    told = [Example(f"{'gh'[i % 2]}{e.prompt}", {"completion": "gh"[i % 2]}) for i, e in enumerate(examples)]
    return told + [Example(e.prompt, {"completion": "gh"[i % 2]}) for i, e in enumerate(examples)]


def reader(parts):
    """Of the letters that were right, the first; all else is noise."""

    def evolve(skill, episodes):
        right = {str(e.columns["topic"]): e.text for e in episodes if e.is_solved}
        return [Skill(topic, letter, topic) for topic, letter in sorted(right.items())] if skill is None else []

    return evolve


def asks_the_policy(parts):
    return AskedEvolver(parts.policy, template="ab=")


def hand_in(day, deployed):
    wrong = [Proposal(Skill(s.name, {"g": "h", "h": "g"}[s.text], s.topic), s.version, ()) for s in deployed]
    long = Proposal(Skill("long", "g" * 20, "a"), 0, ())
    lost = Proposal(Skill("lost", "g", "z"), 0, ())
    return [*wrong, long, lost] if day == 2 else []


def config_of(**changes):
    own = {"evolver": reader, "handed_in": hand_in, "form": "{text}", "days": 2, "users": 2, "episodes": 8} | changes
    return tiny_config(
        data=RowsData("test_analysis_study_skills:letter_rows", test_fraction=0.2, chat=False),
        actor=dataclasses.replace(
            tiny_config().actor,
            rewards=(RewardConfig("rljax.tasks.verifiers:ExactMatch"),),
            prompt_buckets=(8,),
        ),
        sampling=SamplingConfig(max_new_tokens=2),
        warmup=WarmupConfig(
            steps=120, batch_size=16, demonstrations=as_told, optimizer=OptimizerConfig(learning_rate=1e-2)
        ),
        skills=SkillsConfig(validation_tasks=4, repeats=4, **own),
    )


@pytest.mark.slow
def test_skills_evolve_and_what_does_not_fit_is_rejected(tmp_path):
    report = study_skills(config_of(), str(tmp_path), seeds=1)
    (seed,) = report["seeds"]
    none, *days = seed["gated"]
    assert none["deployed"] == [] and days[-1]["deployed"] == ["a@1", "b@1"]
    assert days[-1]["held_out"] > 0.9 > 0.75 > none["held_out"]
    assert report["handed_in"] == {"proposed": 4, "deployed": 0}
    # Without a gate the same proposals do harm.
    assert seed["open"][-1]["held_out"] < none["held_out"]

    place = tmp_path / "seed-0" / "gated"
    assert {s.name: s.text for s in SkillRepository(place / "repository").deployed()} == {"a": "g", "b": "h"}
    lines = [json.loads(line) for line in (place / "day-02" / "episodes.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and {line["user"] for line in lines} == {"user-1", "user-2"}
    assert all(line["skills"] == [f"{line['columns']['topic']}@1"] for line in lines)
    told = json.loads((place / "day-02" / "decisions.json").read_text())
    assert [one["skill"] for one in told] == ["a", "b", "long", "lost"] and not any(one["deployed"] for one in told)
    trained = {line["task"] for line in lines}
    assert all(
        not trained & set(one.notes["validation"]) for one in SkillRepository(place / "repository").candidates("a")
    )


@pytest.mark.slow
def test_the_policy_itself_can_be_the_evolver(tmp_path):
    report = study_skills(config_of(evolver=asks_the_policy, handed_in=None, days=1), str(tmp_path), seeds=1)
    # It writes letters, which are no proposal.
    assert report["seeds"][0]["gated"][-1]["deployed"] == []
    assert (tmp_path / "seed-0" / "gated" / "day-01" / "asked.jsonl").exists()


def test_a_config_that_cannot_evolve_skills_is_refused_before_training(tmp_path):
    for config, match in (
        (config_of(evolver=None), "config.skills.evolver=None proposes no skills"),
        (config_of(form="told: "), "config.skills.form='told: ' has no {text}"),
        (config_of(topic_column="subject"), "has no column 'subject', by which it is given skills"),
    ):
        with pytest.raises(ValueError, match=match):
            study_skills(config, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="--seeds=0 must be at least 1"):
        study_skills(config_of(), str(tmp_path / "none"), seeds=0)
    assert not (tmp_path / "none").exists()


def day(held_out, *decisions):
    return {"held_out": held_out, "decisions": [{"deployed": passed, "evidence": e} for passed, e in decisions]}


def test_the_report_tells_the_gain_the_largest_fall_and_what_was_handed_in():
    seed = {
        "gated": [day(0.2), day(0.6, (True, [1])), day(0.58, (False, []), (False, []))],
        "open": [day(0.2), day(0.6, (True, [1])), day(0.1, (True, []), (True, []))],
    }
    said = verdict([seed, seed])
    assert "is above that with none in every seed (+0.380, +0.380)" in said
    assert "largest fall of a night is 0.020" in said and "of 4 proposals that people handed in 0 passed" in said
    lines = summarise([seed, seed])
    assert lines[2]["gated"] == [0.58, 0.58] and (lines[2]["gated_proposed"], lines[2]["open_deployed"]) == (4, 4)
    assert table(lines).splitlines()[-1].split() == ["2", "0.580", "4", "0", "0.100", "4", "4"]
