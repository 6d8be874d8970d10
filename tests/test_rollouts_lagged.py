"""Two policies in one rollout: chains by the weights before the last update, forks by the newest."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward import row_logprobs
from test_rollouts_multi_turn import CONFIG as TURNS_CONFIG
from test_rollouts_multi_turn import EXAMPLES, make_actor, play
from test_rollouts_multi_turn import params as turn_params
from test_sampling_generate import CONFIG, NEW, make_params, make_sampler

from rljax.algorithms import APPO
from rljax.plans import ForkPlan, ForkPoint
from rljax.rollouts.lagged import LaggedChains
from rljax.sampling import Fork, Request, RowScorer, Stops, sampling_params
from rljax.sampling.spec import NO_STOPS
from rljax.sampling.weights import take_weights

PROMPT = [7, 200, 31]


@jax.jit
def moved(params):
    """Weights as an update might leave them."""
    keys = iter(jax.random.split(jax.random.key(5), 64))
    return jax.tree.map(lambda x: x + 0.3 * jnp.std(x) * jax.random.normal(next(keys), x.shape), params)


def dense(config, params, prompt, tokens):
    """Log-probs of a completion by one plain forward pass."""
    return row_logprobs(config, params, [*prompt, *tokens])[len(prompt) :]


def test_rows_are_scored_as_by_one_forward_pass():
    scorer = RowScorer(CONFIG, None, rows=2, length=16)
    with pytest.raises(ValueError, match="no weights"):
        scorer(PROMPT, [[1, 2]], sampling_params())
    scorer.set_params(make_params(CONFIG))
    completions = [[5, 6, 7, 8], [299], [8, 7]]  # more than the program has rows
    got = scorer(PROMPT, completions, sampling_params())
    for values, tokens in zip(got, completions, strict=True):
        np.testing.assert_allclose(values, dense(CONFIG, make_params(CONFIG), PROMPT, tokens), atol=3e-5)


def test_chains_are_of_the_weights_before_and_forks_of_the_newest():
    old = make_params(CONFIG)
    new = moved(old)
    lagged = LaggedChains(make_sampler(prompt_slots=1, sample_slots=2, prompt_buckets=(4,)), NO_STOPS)
    lagged.set_params(old, 3)
    lagged.set_params(old, 3)  # an evaluation of the same weights changes nothing
    lagged.set_params(new, 4)

    def rounds(samples):
        place = {2: 5, 4: 0}.get(len(samples))
        return [] if place is None else [Fork(0, place, 50 + len(samples) + i, inject=[9] * i) for i in range(2)]

    (group,) = lagged.generate([Request(PROMPT, 1, (0, 1), rounds=rounds)], sampling_params(), seed=1, step=2)
    assert [(s.parent, s.fork_index) for s in group] == [(-1, 0), (-1, 0), (0, 5), (0, 5), (0, 0), (0, 0)]
    assert all(len(s.tokens) == NEW for s in group)
    for sample in group:
        before, after = (dense(CONFIG, weights, PROMPT, sample.tokens) for weights in (old, new))
        own = np.arange(NEW) >= (sample.fork_index if sample.parent >= 0 else NEW)
        np.testing.assert_array_equal(sample.versions, np.where(own, 4, 3))
        np.testing.assert_allclose(
            sample.logprobs, np.where(sample.sampled, np.where(own, after, before), 0), atol=3e-5
        )
    assert [s.forced for s in group] == [(), (), (), ((5, 6),), (), ((0, 1),)]
    assert len({tuple(s.tokens) for s in group}) == 6


def test_a_stop_string_that_begins_in_what_a_fork_inherits_ends_it():
    """As with the forks of a `Sampler`, though here what is inherited is a prompt to the sampler."""

    def decode(ids):
        return "".join(f"<{i}>" for i in ids)

    def first_fork(stops, **fork):
        sampler = make_sampler(prompt_slots=1, sample_slots=1, prompt_buckets=(4,), stops=stops)
        lagged = LaggedChains(sampler, stops)
        lagged.set_params(make_params(CONFIG), 0)
        rounds = lambda samples: [Fork(0, 4, 50, **fork)] if len(samples) == 1 else []  # noqa: E731
        (group,) = lagged.generate([Request(PROMPT, 1, (0,), rounds=rounds)], sampling_params(), seed=1, step=2)
        return group[1]

    for fork in ({}, {"inject": [9]}):
        place = 4 + len(fork.get("inject", ()))
        plain = first_fork(NO_STOPS, **fork)
        assert len(plain.tokens) == NEW
        last, own = plain.tokens[place - 1 : place + 1].tolist()
        cut = first_fork(Stops(strings=(f"{last}><{own}",), decode_text=decode), **fork)
        assert (cut.tokens.tolist(), cut.finish_reason) == (plain.tokens[: place + 1].tolist(), "stop_string")


def test_without_a_version_before_both_are_the_same():
    params = make_params(CONFIG)
    lagged = LaggedChains(make_sampler(prompt_slots=1, sample_slots=2, prompt_buckets=(4,)), NO_STOPS)
    lagged.set_params(params, 0)
    (group,) = lagged.generate([Request(PROMPT, 1, (0, 1))], sampling_params(), seed=1, step=2)
    (want,) = lagged.sampler.generate([Request(PROMPT, 1, (0, 1))], sampling_params(), seed=1, step=2)
    for a, b in zip(group, want, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert set(a.versions) == {0}


def test_there_are_two_copies_of_the_weights_at_most(monkeypatch):
    """When new ones are taken there is one: of a new version, and of the same one again."""
    params = make_params(CONFIG)
    lagged = LaggedChains(make_sampler(prompt_slots=1, sample_slots=2, prompt_buckets=(4,)), NO_STOPS)
    copies = []
    held = []

    def take(*args):
        held.append(sum(copy() is not None for copy in copies))
        weights = take_weights(*args)
        copies.append(weakref.ref(jax.tree.leaves(weights)[0]))
        return weights

    monkeypatch.setattr("rljax.sampling.sampler.take_weights", take)
    for version in (1, 2, 3, 4):
        lagged.set_params(params, version)
        lagged.set_params(params, version)
    assert held == [0, 1, 1, 1, 1, 1, 1, 1]


def test_episodes_have_lagged_chains_too():
    """Each token's log-prob is that of the weights which its version names, and the rule is told the newest."""
    seen = []

    def rule(group):
        seen.append(np.asarray(group.batch.columns["newest_logprobs"]))
        return [ForkPoint(0, 2), ForkPoint(1, 3)]

    scorer = RowScorer(TURNS_CONFIG, None, rows=2, length=120)
    actor = make_actor(decoders=2, scorer=scorer)
    new = moved(turn_params())
    actor.set_params(new, version=1)
    forks = ForkPlan(chains=2, points=1, rule=rule, lagged_chains=True)
    (group,) = play(actor, EXAMPLES[:1], forks=forks)

    for sample in group.samples:
        inherited = np.arange(len(sample.tokens)) < (sample.fork_index if sample.parent >= 0 else len(sample.tokens))
        np.testing.assert_array_equal(sample.versions[sample.sampled], np.where(inherited, 0, 1)[sample.sampled])
        by = [dense(TURNS_CONFIG, weights, group.prompt, sample.tokens) for weights in (turn_params(), new)]
        want = np.where(inherited, *by)
        np.testing.assert_allclose(sample.logprobs, np.where(sample.sampled, want, 0), atol=5e-5)
    chain = group.samples[0]
    newest = dense(TURNS_CONFIG, new, group.prompt, chain.tokens)
    np.testing.assert_allclose(seen[0][0, : len(newest)], newest, atol=5e-5)


def test_appo_lags_and_tokens_cannot_be_suppressed_beside_it():
    assert APPO().build().plan.forks.lagged_chains and not APPO(lagged=False).build().plan.forks.lagged_chains
    assert APPO().build().compared_with() == (True, False)
    assert APPO(lagged=False).build().compared_with() == (False, True)
    with pytest.raises(ValueError, match="lagged chains cannot suppress"):
        ForkPlan(2, 1, rule=list, lagged_chains=True, suppressed=(1,)).check()
