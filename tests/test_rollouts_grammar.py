"""A run whose completions follow a grammar trains on the distribution that they were sampled from."""

import dataclasses
import re

import numpy as np
import pytest
from test_run_environment import make_config

from rljax.algorithms import ARPO, GRPO
from rljax.batching import PackConfig, layout, loss_mask, stack
from rljax.experiment import MultiTurn, RemoteMultiTurn, RewardConfig, SamplingConfig
from rljax.experiment.build import build, check_sampled_so, stack_rows
from rljax.models import DecoderConfig
from rljax.plans import RolloutPlan
from rljax.rollouts import ScoredGroup, collect
from rljax.rollouts.engines.fleet import Fleet
from rljax.rollouts.engines.remote_sampler import RemoteSampler
from rljax.rollouts.engines.remote_turns import RemoteTurnDecoder
from rljax.rollouts.trajectories import allowed_in, trajectory_of
from rljax.sampling import Request, Sample, Stops, Turn, TurnDecoderSpec, sampling_params
from rljax.sampling.logits import Penalties
from rljax.tasks import Example, RewardResult
from rljax.testing import tiny_config
from rljax.text import CharTokenizer, Grammars

PATTERN = "(ab|cd)?[e-h]{1,3}"
ROUNDING = 1e-6
DECODER = DecoderConfig(vocab_size=8, num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8)


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


@pytest.mark.parametrize(
    ("actor", "changes"),
    [
        (MultiTurn, {"stop_column": "answer"}),
        (MultiTurn, {"top_logprobs": 2}),
        (RemoteMultiTurn, {"regex": "a+"}),
        (RemoteMultiTurn, {"presence_penalty": 1.0}),
    ],
)
def test_what_an_actor_does_not_do_is_refused(actor, changes):
    ((name, value),) = changes.items()
    message = f"config.sampling.{name}={value!r} has no effect with config.actor={actor.__name__}(...); use"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_sampled_so(tiny_config(actor=actor(make="m:f"), sampling=SamplingConfig(max_new_tokens=4, **changes)))


def test_engines_are_not_asked_for_what_they_would_do_otherwise():
    spec = TurnDecoderSpec(conversations=1, rows=1, context_length=8, max_new_tokens=2)
    fleet = object.__new__(Fleet)  # nothing is asked of it
    decoder = RemoteTurnDecoder(fleet, DECODER, spec, Stops())
    with pytest.raises(ValueError, match=r"^engines sample without penalties: leave repetition"):
        decoder.begin(sampling_params(penalties=Penalties(presence=1.0)), seed=0, step=0)
    decoder.begin(sampling_params(), seed=0, step=0)
    grammar = Grammars(CharTokenizer("ab"), 8)("regex a")
    with pytest.raises(ValueError, match=r"^conversation 0: engines follow no grammar, and 'regex a' was given"):
        decoder.submit(Turn(0, [1], 0, 0, grammar=grammar))
    with pytest.raises(ValueError, match=r"^prompt_id 3: engines follow no grammar, and 'regex a' was given"):
        RemoteSampler(fleet, DECODER, Stops(), max_new_tokens=2).generate(
            [Request([1], 3, [0], grammar=grammar)], sampling_params(), seed=0, step=0
        )


TURN = "[0-9]{1,2}[?y]?;"


@pytest.mark.parametrize("algorithm", [GRPO(group_size=4, kl_coef=0.0), ARPO()], ids=["episodes", "forks"])
def test_over_turns_the_ratio_is_one_under_a_grammar_and_penalties(algorithm):
    """Of episodes, and of forks in the middle of turns that share their beginnings in a forest."""
    penalties = {"repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.7}
    sampling = SamplingConfig(max_new_tokens=6, truncated_is_wrong=False, regex=TURN, **penalties)
    run = build(make_config(algorithm, sampling=sampling))
    run.state = run.init_state(run.initial_params())
    with run.actor:
        run.actor.set_params(run.learner.pushed_params(run.state), 0)
        rollout = collect(run.actor, run.algorithm.plan, lambda n: run.curriculum.sample(0, n), 4, 0)

    turns = 0
    for row in rollout.trajectories:
        assert row.grammar == f"regex {TURN}"
        np.testing.assert_array_equal(row.drawn, row.action_mask)
        for start, stop in row.grammar_turns.tolist():
            assert row.drawn[start:stop].all() and not row.drawn[start - 1]
            assert re.fullmatch(TURN, run.tokenizer.decode(row.tokens[start:stop].tolist()))
            turns += 1
    assert turns > 2 * len(rollout.trajectories)

    batch = stack_rows(run.config, rollout.trajectories)
    sampled = np.asarray(batch.action_mask)
    allowed = allowed_in(rollout.trajectories, run.grammars, np.asarray(batch.tokens))
    minibatches = run.learner.prepare(run.state, batch, np.where(sampled, 1.0, 0.0), allowed=allowed)
    run.state, metrics = run.learner.update(run.state, minibatches[0])
    assert float(metrics["rollout/logprob_gap_max"]) < 10 * ROUNDING
    # A trainer that knew nothing of what came before would be far off.
    unbound = dataclasses.replace(batch, drawn=np.zeros_like(sampled))
    free = run.learner.score_rows(run.learner.policy_params(run.state), unbound, allowed=allowed)
    assert np.abs(free - np.asarray(batch.behavior_logprobs))[sampled].max() > 0.1


def test_rows_share_no_token_that_one_has_sampled_and_the_other_was_given():
    """One prompt, `4 5`, then an observation `6`, or the policy's own `6`; and behind that the same again."""

    def trajectory(index, spoken, forced, is_penalised):
        zeros = np.zeros(4, np.float32)
        tokens = np.array([4, 5, 6, 7], np.int32)
        sample = Sample(tokens, zeros, zeros, "stop", spoken=spoken, forced=forced, is_penalised=is_penalised)
        example = Example(prompt="", columns={}, id=0)
        group = ScoredGroup(example, [3], [sample], [""], [RewardResult(1.0, {})], [np.zeros(4, np.int32)])
        return trajectory_of(RolloutPlan(group_size=1), group, 0, 0, first_row=index)

    for is_penalised, unique in ((False, 5), (True, 3 + 2 + 2)):
        rows = [
            trajectory(0, ((0, 2), (3, 4)), ((2, 3),), is_penalised),
            trajectory(1, ((0, 4),), (), is_penalised),
            trajectory(2, ((0, 4),), (), is_penalised),
        ]
        batch = stack(rows)
        packing = layout(batch, loss_mask(batch), PackConfig(pack_length=16, microbatch_size=1))
        assert packing.unique_tokens == unique
        if is_penalised:
            # 3 4 5, then the given 6 and its 7, and the sampled 6 and its 7.
            assert packing.packed.drawn.sum() == 2 + 1 + 2


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
