"""A run whose completions follow a grammar trains on the distribution that they were sampled from."""

import dataclasses
import re

import numpy as np
import pytest

from rljax.algorithms import GRPO
from rljax.batching import PackConfig, layout, loss_mask, stack
from rljax.experiment import MultiTurn, RewardConfig, SamplingConfig
from rljax.experiment.build import build, check_single_turns, stack_rows
from rljax.plans import RolloutPlan
from rljax.rollouts import ScoredGroup, collect
from rljax.rollouts.trajectories import allowed_in, trajectory_of
from rljax.sampling import Sample
from rljax.tasks import Example, RewardResult
from rljax.testing import tiny_config

PATTERN = "(ab|cd)?[e-h]{1,3}"
ROUNDING = 1e-6


def length_reward(completion):
    return float(len(completion))


@pytest.fixture(scope="module")
def run():
    config = tiny_config(
        algorithm=GRPO(group_size=4, kl_coef=0.1),
        sampling=SamplingConfig(max_new_tokens=6, truncated_is_wrong=False, regex=PATTERN, logit_bias=(("e", 1.0),)),
    )
    rewards = (RewardConfig("test_rollouts_grammar:length_reward"),)
    config = dataclasses.replace(config, actor=dataclasses.replace(config.actor, rewards=rewards))
    return build(config)


@pytest.mark.slow
def test_the_ratio_is_one_under_a_grammar_and_the_reference_stands_under_it_too(run):
    run.state = run.init_state(run.initial_params())
    params = run.learner.pushed_params(run.state)
    with run.actor:
        run.actor.set_params(params, 0)
        rollout = collect(run.actor, run.algorithm.plan, lambda n: run.curriculum.sample(0, n), 4, 0)
    ended = [record["completion"] for record in rollout.records if record["finish_reason"] == "stop"]
    assert len(ended) >= 8 and all(re.fullmatch(PATTERN, text) for text in ended)

    batch = stack_rows(run.config, rollout.trajectories)
    allowed = allowed_in(rollout.trajectories, run.grammars, np.asarray(batch.tokens))
    sampled = np.asarray(batch.action_mask)
    reference = run.learner.score_rows(run.learner.reference_params(run.state), batch, allowed=allowed)
    np.testing.assert_allclose(reference[sampled], np.asarray(batch.behavior_logprobs)[sampled], atol=ROUNDING)
    # Under the model's own distribution, which knows no grammar, they would be others.
    unbound = allowed._replace(which=np.full_like(allowed.which, -1))
    free = run.learner.score_rows(run.learner.reference_params(run.state), batch, allowed=unbound)
    assert np.abs(free - np.asarray(batch.behavior_logprobs))[sampled].max() > 0.1

    advantages = np.where(sampled, 1.0, 0.0)
    (minibatch,) = run.learner.prepare(run.state, batch, advantages, allowed=allowed)
    run.state, metrics = run.learner.update(run.state, minibatch)
    assert float(metrics["rollout/logprob_gap_max"]) < ROUNDING
    assert float(metrics["loss/kl_ref"]) < ROUNDING


def rows_of(grammar):
    """A completion behind a prompt of one token, and its end behind a prompt that holds its beginning."""

    def trajectory(prompt, tokens, index):
        zeros = np.zeros(len(tokens), np.float32)
        sample = Sample(np.array(tokens, np.int32), zeros, zeros, "stop", grammar=grammar)
        example = Example(prompt="", columns={}, id=index)
        group = ScoredGroup(example, prompt, [sample], [""], [RewardResult(1.0, {})], [np.zeros(len(tokens), np.int32)])
        return trajectory_of(RolloutPlan(group_size=1), group, 0, 0, group_id=index, first_row=index)

    return [trajectory([3], [4, 5], 0), trajectory([3, 4], [5], 1)]


@pytest.mark.parametrize(("grammar", "unique"), [("", 3), ("regex ab", 5)])
def test_rows_share_no_token_that_was_drawn_under_another_mask(grammar, unique):
    batch = stack(rows_of(grammar))
    assert layout(batch, loss_mask(batch), PackConfig(pack_length=16, microbatch_size=1)).unique_tokens == unique


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regex": "[a"}, r"^config.sampling: regex '\[a': .*unclosed"),
        ({"regex": "a", "lark": "b"}, r"^config.sampling.regex and config.sampling.lark: set one of them"),
        ({"schema_column": "answer"}, r"column answer: json_schema '\w' is no JSON"),
    ],
)
def test_a_grammar_that_cannot_be_read_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_config(sampling=SamplingConfig(max_new_tokens=4, **changes)))


@pytest.mark.parametrize("changes", [{"regex": "a+"}, {"stop_column": "answer"}, {"top_logprobs": 2}])
def test_what_an_actor_does_not_do_is_refused(changes):
    ((name, value),) = changes.items()
    message = f"config.sampling.{name}={value!r} has no effect with config.actor=MultiTurn(...); use"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_single_turns(
            tiny_config(actor=MultiTurn(make="m:f"), sampling=SamplingConfig(max_new_tokens=4, **changes))
        )


def test_rows_have_stops_of_their_own():
    """Every row of the toy task ends at its answer, which its reward is not shown."""
    config = tiny_config(sampling=SamplingConfig(max_new_tokens=8, truncated_is_wrong=False, stop_column="answer"))
    run = build(config)
    with run.actor:
        run.actor.set_params(run.initial_params(), 0)
        rollout = collect(run.actor, run.algorithm.plan, lambda n: run.curriculum.sample(0, n), 4, 0)
    ended = [record for record in rollout.records if record["finish_reason"] == "stop_string"]
    assert len(ended) >= 4
    for record in ended:
        answer = record["columns"]["answer"]
        assert (
            run.tokenizer.decode(record["tokens"]) == record["completion"] + answer
            and answer not in record["completion"]
        )
