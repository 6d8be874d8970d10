"""The configs of actors refuse what cannot work, naming the setting."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from rljax.plans import ForkPlan, RolloutPlan
from rljax.rollouts import ActorParts, BlackBox, Guided, MultiTurn, ScoredGroup, SingleTurn
from rljax.rollouts.trajectories import record_of, trajectory_of
from rljax.sampling import Sample, SamplingConfig
from rljax.tasks import Example, FileRows, RewardResult
from rljax.text import CharTokenizer

FORKS = ForkPlan(chains=2, points=1, rule=lambda group: [])


@pytest.mark.parametrize(
    ("actor", "plan", "message"),
    [
        (SingleTurn(prompt_buckets=()), RolloutPlan(2), r"^config.actor.prompt_buckets=\(\) must be increasing"),
        (SingleTurn(prompt_buckets=(8, 8)), RolloutPlan(2), r"^config.actor.prompt_buckets=\(8, 8\) must be incr"),
        (SingleTurn(sample_slots=-1), RolloutPlan(2), r"^config.actor.sample_slots=-1 must be at least 0"),
        (MultiTurn(make="a:b", decode_rows=-1), RolloutPlan(2), r"^config.actor.decode_rows=-1 must be at least 0"),
        (MultiTurn(make="a:b", workers=0), RolloutPlan(2), r"^config.actor.workers=0 must be at least 1"),
        (MultiTurn(make="a:b", context_length=64), RolloutPlan(2), r"^config.actor.context_length=64, the length of"),
        (BlackBox(agent="a:b", timeout_s=0.0), RolloutPlan(2), r"^config.actor.timeout_s=0.0 must be a positive"),
        (BlackBox(agent="a:b"), RolloutPlan(4, forks=FORKS), r"cannot be forked"),
        (BlackBox(agent="a:b", trained_conversations=3), RolloutPlan(4), r"must be a multiple of .*=3"),
        (Guided(SingleTurn(), probes=0), RolloutPlan(2), r"^config.actor.probes=0 must be at least 1"),
        (Guided(SingleTurn(prompt_buckets=())), RolloutPlan(2), r"prompt_buckets=\(\) must be increasing"),
        (Guided(), RolloutPlan(4, forks=FORKS), r"an algorithm that forks do not go together"),
    ],
)
def test_impossible_actors_are_refused(actor, plan, message):
    with pytest.raises(ValueError, match=message):
        actor.check(plan, SamplingConfig(max_new_tokens=64), 1024)


@pytest.mark.parametrize("actor", [SingleTurn(), MultiTurn(make="a:b"), BlackBox(agent="a:b"), Guided()])
def test_a_possible_actor_is_taken(actor):
    actor.check(RolloutPlan(4), SamplingConfig(max_new_tokens=64), 1024)


def parts(*prompts):
    examples = [Example(prompt, place=f"data.jsonl, line {i}") for i, prompt in enumerate(prompts, start=1)]
    made = ActorParts.__new__(ActorParts)
    fields = dict(
        tokenizer=CharTokenizer("abc"),
        dataset=FileRows(examples[:-1], examples[-1:]),
        sampling=SamplingConfig(max_new_tokens=4),
        decoder=SimpleNamespace(longest_sequence=256),
        settings=SimpleNamespace(chat=None),
    )
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


@pytest.mark.parametrize(
    ("pack_length", "message"),
    [
        (64, r"1 of 3 prompts have more than 4 tokens: .*line 2 has 5, the longest 5; add a bucket of at least 5 "),
        (7, r"1 of 3 .* 3 tokens: .*line 2 .* config.update.pack_length=7 must .* to at least 9, or set"),
    ],
)  # fmt: skip
def test_a_long_prompt_is_refused_by_its_line_or_dropped(pack_length, message):
    data = parts("ab", "abcab", "a")
    with pytest.raises(ValueError, match=message):
        SingleTurn(prompt_buckets=(2, 4)).check_prompts(data, pack_length)
    kept = Guided(SingleTurn(prompt_buckets=(2, 4), drop_long_prompts=True)).check_prompts(data, pack_length)
    assert ([e.prompt for e in kept.train], [e.prompt for e in kept.test]) == (["ab"], ["a"])


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user"}, "has the content None"),
        # A template such as `<|{{ role }}|>` would write the end of a turn.
        ({"role": "end", "content": "x"}, "has the role 'end'; it must be one of system, .*user"),
    ],
)
def test_a_prompt_that_cannot_be_rendered_is_named(message, says):
    with pytest.raises(ValueError, match=rf"^data.jsonl, line 2: message 1 {says}"):
        SingleTurn().check_prompts(parts("ab", [{"role": "user", "content": "x"}, message], "a"), 64)


def test_a_line_of_the_rollout_log_has_the_columns_of_its_row():
    example = Example("1 + 1 =", {"answer": "2", "metadata": {3: (1, 2), 4: None}})
    zeros = np.zeros(1, np.float32)
    sample = Sample(np.array([5], np.int32), zeros, zeros, "stop")
    group = ScoredGroup(example, [1], [sample], ["2"], [RewardResult(1.0, {"match": 1.0})], [np.zeros(1, np.int32)])
    trajectory = trajectory_of(RolloutPlan(1), group, 0, 0, [], group_id=0, first_row=0)
    record = record_of(group, 0, trajectory, 0)
    assert record["columns"] == {"answer": "2", "metadata": {"3": [1, 2], "4": None}}
    json.dumps(record)
