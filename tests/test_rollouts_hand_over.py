"""New weights come while conversations are under way: what is said behind the hand-over, and what was computed."""

import functools
import json

import jax
import numpy as np
import pytest
from forward import mixed_logprobs, row_logprobs
from test_rollouts_multi_turn import CONFIG, EXAMPLES, make_actor, play

from rljax.envs import Step
from rljax.models import init_params
from rljax.plans import RolloutPlan
from rljax.sampling import sampling_params
from rljax.tasks import Example


@functools.lru_cache
def weights(version):
    return jax.tree.map(lambda x: 3 * x, init_params(CONFIG, jax.random.key(version)))


class Once:
    """A single turn, whose completion is worth its length."""

    def reset(self, row):
        return f"{row['prompt']}#"

    def step(self, action):
        return Step("", float(len(action)), True)


@functools.lru_cache
def spanning(at_hand_over, *, steps=4):
    """Samples with their prompts: those that several versions of the weights have spoken, and the others; and the
    tokens that were computed before turns."""
    actor = make_actor(conversations=24, groups_in_flight=3, answers_after=1, at_hand_over=at_hand_over)
    found = []
    computed = 0.0
    for step in range(steps):
        actor.set_params(weights(step), version=step)
        # All begin alike, so that a new conversation could take what an old one has computed.
        examples = [Example(f"abc no {step} {i}") for i in range(actor.missing(1))]
        groups = play(actor, examples, step=step, n=1)
        found += [(group.prompt, sample) for group in groups for sample in group.samples]
        computed += actor.stats["prefill_tokens"]

    mixed = [(prompt, sample) for prompt, sample in found if len(set(sample.versions.tolist())) > 1]
    plain = [(prompt, sample) for prompt, sample in found if len(set(sample.versions.tolist())) == 1]
    # Some were cut off in the middle of a turn.
    assert any(len(set(s.versions[s.sampled & (s.turns == turn)].tolist())) > 1 for _, s in mixed for turn in range(4))
    return mixed, plain, computed


def by_new_weights(prompt, sample):
    """Log-probs of the sampled tokens by full forward passes, each token's by the version that it carries."""
    ids = [*prompt, *sample.tokens.tolist()]
    passes = {v: row_logprobs(CONFIG, weights(v), ids)[len(prompt) :] for v in set(sample.versions.tolist())}
    want = np.array([passes[v][t] for t, v in enumerate(sample.versions.tolist())])
    return np.where(sample.sampled, want, 0)


def over_mixed_cache(prompt, sample):
    """The same over keys and values of the weights that read each token first: a token is read when the one behind it
    is sampled, or, of an observation, when the first behind all of it is."""
    readers = np.zeros(len(prompt) + len(sample.tokens), np.int32)
    reader = 0
    for t in range(len(readers) - 2, -1, -1):
        place = t + 1 - len(prompt)
        if place >= 0 and sample.sampled[place]:
            reader = int(sample.versions[place])
        readers[t] = reader
    ids = [*prompt, *sample.tokens.tolist()]
    want = mixed_logprobs(CONFIG, [weights(int(v)) for v in readers], ids)[len(prompt) :]
    return np.where(sample.sampled, want, 0)


def test_the_oracle_of_a_mixed_cache_is_a_forward_pass_where_nothing_is_mixed():
    ids = list(range(3, 30))
    np.testing.assert_allclose(
        mixed_logprobs(CONFIG, [weights(0)] * len(ids), ids), row_logprobs(CONFIG, weights(0), ids), atol=2e-5
    )


def test_recomputed_conversations_go_on_as_the_new_weights_would():
    """After a hand-over the recorded log-probs are those of the full forward pass by the new weights."""
    mixed, plain, _ = spanning("recompute")
    for prompt, sample in [*mixed, *plain]:
        np.testing.assert_allclose(sample.logprobs, by_new_weights(prompt, sample), atol=3e-5)
    # Which is something else than a mixed cache.
    assert max(np.abs(s.logprobs - over_mixed_cache(p, s)).max() for p, s in mixed[:2]) > 0.1


def test_kept_conversations_go_on_over_what_older_weights_have_computed():
    mixed, plain, computed = spanning("keep")
    for prompt, sample in mixed[:4]:
        np.testing.assert_allclose(sample.logprobs, over_mixed_cache(prompt, sample), atol=3e-5)
    assert max(np.abs(s.logprobs - by_new_weights(p, s)).max() for p, s in mixed) > 0.1
    assert computed < spanning("recompute")[2]

    # What begins behind a hand-over has nothing of older weights, although it begins as others did.
    for prompt, sample in plain:
        np.testing.assert_allclose(sample.logprobs, by_new_weights(prompt, sample), atol=3e-5)


def test_a_long_completion_of_a_single_turn_spans_updates():
    actor = make_actor(Once, rows=5, conversations=24, groups_in_flight=3, answers_after=1)
    spans = 0
    for step in range(4):
        actor.set_params(weights(step), version=step)
        groups = play(actor, [Example(f"abc no {step} {i}") for i in range(actor.missing(1))], step=step, n=1)
        for group in groups:
            for sample in group.samples:
                np.testing.assert_allclose(sample.logprobs, by_new_weights(group.prompt, sample), atol=3e-5)
                assert sample.turns.max() == 0
                spans += len(set(sample.versions.tolist())) > 1
    assert spans


def test_an_evaluation_is_by_the_newest_weights_alone():
    def evaluated(actor):
        evaluation = actor.for_evaluation(sampling_params())
        # On the conversations of the groups under way, and beginning as these do.
        groups = play(evaluation, EXAMPLES[:1] * 3, step=9)
        return [sample.logprobs for group in groups for sample in group.samples]

    actor = make_actor(conversations=24, groups_in_flight=3, answers_after=1, at_hand_over="keep")
    play(actor, EXAMPLES[:1] * actor.missing(1), n=1)
    actor.set_params(weights(1), version=1)
    fresh = make_actor(conversations=24)
    fresh.set_params(weights(1), version=1)
    for one, other in zip(evaluated(actor), evaluated(fresh), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


def test_conversations_go_on_without_what_an_evaluation_has_computed():
    """Rollouts have not been handed its weights, where these are pushed every few steps alone."""
    actor = make_actor(conversations=24, groups_in_flight=3, answers_after=1, at_hand_over="keep")
    actor.set_params(weights(0), version=0)
    play(actor, EXAMPLES[:1] * actor.missing(1), n=1)

    # It begins as the groups under way do, and on their conversations.
    actor.set_params(weights(5), version=0)
    play(actor.for_evaluation(sampling_params()), EXAMPLES[:1] * 6, step=9)
    actor.set_params(weights(1), version=1)
    groups = play(actor, [], step=1, n=2)
    found = [(group.prompt, sample) for group in groups for sample in group.samples]
    assert any(len(set(sample.versions.tolist())) > 1 for _, sample in found)
    for prompt, sample in found:
        np.testing.assert_allclose(sample.logprobs, by_new_weights(prompt, sample), atol=3e-5)


@pytest.mark.parametrize("at_hand_over", ["recompute", "keep"])
def test_a_resumed_actor_goes_on_with_the_same_numbers(at_hand_over):
    """A checkpoint has no keys and values: where they are kept, it ends that for both."""
    plan = RolloutPlan(group_size=4)
    examples = [Example(f"task {i}") for i in range(6)]

    def made():
        return make_actor(conversations=24, groups_in_flight=3, answers_after=1, at_hand_over=at_hand_over)

    def said(actor):
        actor.set_params(weights(1), version=1)
        groups = play(actor, [], step=1, n=2)
        return [sample for group in groups for sample in group.samples]

    actor = made()
    actor.set_params(weights(0), version=0)
    play(actor, examples[: actor.missing(1)], n=1)
    state = json.loads(json.dumps(actor.state_dict()))
    actor.checkpointed()
    resumed = made()
    resumed.load_state_dict(state, plan, {example.id: example for example in examples})
    for one, other in zip(said(resumed), said(actor), strict=True):
        for name in ("tokens", "versions", "logprobs"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
