"""A fork goes on from any token of an earlier sample as if its whole path had been sampled or given at once."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from test_sampling_generate import (
    CONFIG,
    NEW,
    OTHERWISE,
    PROMPTS,
    VOCAB,
    assert_matches_forward,
    assert_same,
    full_logits,
    make_sampler,
)

from rljax.models.cache import ring_size
from rljax.sampling import Fork, Request, Stops, compile_count, sampling_params, spec
from rljax.types import INTERVENTION_NONE, INTERVENTION_SUPPRESS

ROUNDS, FORKS = 3, 3
PATHS = 3 + FORKS * (ROUNDS - 1)
SUPPRESSED = tuple(range(0, VOCAB, 2))


def random_rounds(prompt_id):
    """Forks at random tokens of random samples, some at the first or after the last, some with given tokens."""
    rng, made = np.random.default_rng(prompt_id), []

    def rounds(samples):
        if len(made) == ROUNDS:
            return []
        forks = []
        for i in range(FORKS):
            parent = int(rng.integers(len(samples)))
            inject = rng.integers(0, VOCAB, rng.integers(0, 4)).tolist()
            last = min(len(samples[parent].tokens), NEW - len(inject) - 1)
            index = [0, last, int(rng.integers(0, last + 1))][(i + len(made)) % 3]
            forks.append(Fork(parent, index, 100 * len(made) + i + 50, inject, score=float(i)))
        made.append(forks)
        return forks

    return rounds


def forking_requests(samples=3):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in PROMPTS]
    return [Request(p, 100 + i, range(samples), rounds=random_rounds(i)) for i, p in enumerate(prompts)]


def generate(sampler, requests):
    return sampler.generate(requests, sampling_params(), seed=1, step=2)


@pytest.fixture(scope="module")
def sampler():
    return make_sampler(path_slots=PATHS, max_injected=3, prompt_slots=2, suppressed=SUPPRESSED)


@pytest.fixture(scope="module")
def trees(sampler):
    sampler.warmup()
    before = compile_count()
    samples = generate(sampler, forking_requests())
    assert compile_count() == before
    return samples


@pytest.mark.slow
def test_a_ring_that_grows_and_shrinks_gives_the_same_trees(trees, monkeypatch):
    monkeypatch.setattr(spec, "_SMALLEST_RING", 2)
    short = make_sampler(path_slots=PATHS, max_injected=3, prompt_slots=2, suppressed=SUPPRESSED, prompt_buckets=(16,))
    assert short.spec.ring_sizes == (2, 4, 8, NEW)
    sizes = []
    fit = short._fit_ring

    def spy(*args):
        cache, column = fit(*args)
        sizes.append(ring_size(cache))
        return cache, column

    monkeypatch.setattr(short, "_fit_ring", spy)
    short.warmup()
    before = compile_count()
    assert_same(generate(short, forking_requests()), trees)
    assert compile_count() == before

    # Each size is used, and a ring becomes shorter once the old rows are gone.
    assert set(sizes) == {2, 4, 8, NEW} and any(a > b for a, b in itertools.pairwise(sizes))


def check_against_forward(config, groups):
    """Log-probs of sampled tokens are those of one forward pass over prompt and path."""
    requests = forking_requests()
    for chunk in range(0, len(groups), 2):
        pairs = list(zip(requests[chunk : chunk + 2], groups[chunk : chunk + 2], strict=True))
        masked = [_with_true_values_where_given(config, r, g) for r, g in pairs]
        assert_matches_forward(config, [r for r, _ in pairs], masked, sampling_params())


def _with_true_values_where_given(config, request, group):
    """The group with what the forward pass says in place of the zeros of given tokens, so that these compare equal."""
    out = []
    for sample, z in zip(group, full_logits(config, [request], [group]), strict=True):
        assert not sample.logprobs[~sample.sampled].any() and not sample.entropies[~sample.sampled].any()
        true = np.asarray(jax.nn.log_softmax(z, axis=-1))
        chosen, spread = true[np.arange(len(true)), sample.tokens], -(np.exp(true) * true).sum(-1)
        out.append(
            sample._replace(
                logprobs=np.where(sample.sampled, sample.logprobs, chosen),
                entropies=np.where(sample.sampled, sample.entropies, spread),
            )
        )
    return out


def test_logprobs_of_every_path_equal_one_forward_pass_over_it(trees):
    assert [len(group) for group in trees] == [3 + ROUNDS * FORKS] * len(PROMPTS)
    check_against_forward(CONFIG, trees)


def test_a_fork_cannot_begin_with_what_is_suppressed_and_its_first_token_is_not_the_policys(sampler, trees):
    """Only that token, and only of such forks; what follows goes on from it as from any other."""

    def rounds(samples):
        if len(samples) > 3:
            return []
        kinds = [(i, INTERVENTION_SUPPRESS if i % 2 else INTERVENTION_NONE) for i in range(40)]
        return [Fork(i % 3, 2, 200 + i, intervention=kind) for i, kind in kinds]

    (group,) = generate(sampler, [forking_requests()[0]._replace(rounds=rounds)])
    plain, suppressed = group[3::2], group[4::2]
    assert {s.tokens[2] in SUPPRESSED for s in plain} == {True, False}
    assert not any(s.tokens[2] in SUPPRESSED for s in suppressed)
    assert {t in SUPPRESSED for s in suppressed for t in s.tokens[3:]} == {True, False}
    assert all(s.forced == ((2, 3),) and s.sampled.sum() == len(s.tokens) - 1 for s in suppressed)
    assert all(s.sampled.all() for s in plain)
    masked = _with_true_values_where_given(CONFIG, forking_requests()[0], group[:12])
    assert_matches_forward(CONFIG, forking_requests()[:1], [masked], sampling_params())


VARIANTS = {
    "sliding window of 5 in one layer": {"sliding_window": 5, "sliding_layers": (True, False)},
    "one key head, biases, qk-norm": {"num_kv_heads": 1, "attention_bias": True, "qk_norm": True},
    "layers that rotate otherwise": OTHERWISE,
}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=() if changes is OTHERWISE else pytest.mark.slow)
        for name, changes in VARIANTS.items()
    ],
)
def test_forks_of_other_models_too(changes):
    config = dataclasses.replace(CONFIG, **changes)
    check_against_forward(config, generate(make_sampler(config, path_slots=PATHS, max_injected=3), forking_requests()))


def test_a_fork_holds_its_parent_up_to_the_fork_then_what_is_given(trees):
    for request, group in zip(forking_requests(), trees, strict=True):
        done = 3
        for _ in range(ROUNDS):
            for fork in request.rounds(group[:done]):
                sample, parent = group[done], group[fork.parent]
                assert (sample.parent, sample.fork_index, sample.fork_score) == (
                    fork.parent,
                    fork.fork_index,
                    fork.score,
                )
                for name in ("tokens", "logprobs", "entropies"):
                    np.testing.assert_array_equal(
                        getattr(sample, name)[: fork.fork_index], getattr(parent, name)[: fork.fork_index]
                    )
                own = fork.fork_index + len(fork.inject)
                assert sample.tokens[fork.fork_index : own].tolist() == list(fork.inject)
                assert sample.sampled[own:].all() and not sample.sampled[fork.fork_index : own].any()
                assert sample.sampled[: fork.fork_index].tolist() == parent.sampled[: fork.fork_index].tolist()
                assert own < len(sample.tokens) <= NEW
                done += 1
        assert all(x.parent == -1 and x.sampled.all() for x in group[:3])


@pytest.mark.parametrize("prompt_slots, sample_slots", [(1, 1), (3, 5), (6, 2)])
def test_where_a_fork_runs_does_not_change_it(trees, prompt_slots, sample_slots):
    other = make_sampler(
        path_slots=PATHS, max_injected=3, prompt_slots=prompt_slots, sample_slots=sample_slots, refill_rows=1
    )
    assert_same(generate(other, forking_requests()), trees)


def test_a_fork_with_the_random_numbers_of_its_parent_is_its_parent(sampler):
    def again(samples):
        if len(samples) > 3:
            return []
        return [Fork(parent, index, parent) for parent in range(3) for index in (1, 5)]

    requests = [r._replace(rounds=again) for r in forking_requests()]
    for group in generate(sampler, requests):
        for fork in group[3:]:
            assert fork.tokens.tolist() == group[fork.parent].tokens.tolist()
            np.testing.assert_allclose(fork.logprobs, group[fork.parent].logprobs, atol=1e-5)


def test_stop_tokens_end_forks_but_given_ones_do_not(sampler):
    seen = {int(t) for group in generate(sampler, forking_requests()) for x in group for t in x.tokens[2:6]}
    stops = sorted(seen)[:20]
    stopping = make_sampler(path_slots=4, max_injected=3, stops=Stops(tokens=stops))

    def rounds(samples):
        return [Fork(0, 0, 9, [stops[0], stops[1]])] if len(samples) == 1 else []

    requests = [r._replace(rounds=rounds) for r in forking_requests(1)]
    reasons = set()
    for first, fork in generate(stopping, requests):
        assert fork.tokens[:2].tolist() == stops[:2] and len(fork.tokens) > 2
        for sample, own in ((first, 0), (fork, 2)):
            inside = [int(t) in stops for t in sample.tokens[own:]]
            assert not any(inside[:-1]) and (sample.finish_reason == "stop") == inside[-1]
            reasons.add(sample.finish_reason)
    assert reasons == {"stop", "length"}


def test_a_stop_string_that_begins_before_a_fork_ends_it_where_it_ends_its_parent(trees):
    """The parent ends at its 7th token, which completes a string that begins in the 6th. With the parent's random
    numbers a fork is the parent again, wherever it begins and whether the 6th token is inherited or given."""
    first, last = trees[0][0].tokens[5:7].tolist()
    stops = Stops(strings=(f"{first}><{last}",), decode_text=lambda ids: "".join(f"<{i}>" for i in ids))
    stopping = make_sampler(path_slots=PATHS, max_injected=3, prompt_slots=2, stops=stops)
    forks = [Fork(0, index, 0) for index in (4, 5, 6)] + [Fork(0, 5, 0, [first]), Fork(0, 7, 0)]

    request = forking_requests(1)[0]._replace(rounds=lambda samples: forks if len(samples) == 1 else [])
    [[parent, *children]] = generate(stopping, [request])

    assert parent.tokens.tolist() == trees[0][0].tokens[:7].tolist()
    for child in children[:-1]:
        assert (child.tokens.tolist(), child.finish_reason) == (parent.tokens.tolist(), "stop_string")
    # A string that is inherited as a whole ends nobody.
    assert len(children[-1].tokens) > 7 and children[-1].tokens[:7].tolist() == parent.tokens.tolist()


def test_plain_requests_and_trees_mix(sampler, trees):
    requests = forking_requests()
    mixed = [r if i % 2 else r._replace(rounds=None) for i, r in enumerate(requests)]
    got = generate(sampler, mixed)
    assert_same(got, [group if i % 2 else group[:3] for i, group in enumerate(trees)])


def test_stats_tell_new_given_and_reused_tokens(sampler):
    groups = generate(sampler, forking_requests())
    samples = [x for group in groups for x in group]
    own = sum(len(x.tokens) - x.fork_index for x in samples)
    given = sum(b - a for x in samples for a, b in x.forced if a >= x.fork_index)
    stats = sampler.last_stats
    assert stats["reused_tokens"] == sum(x.fork_index for x in samples) > 0
    assert (stats["forced_tokens"], stats["new_tokens"]) == (given, own - given) and given
    assert stats["prefill_tokens"] == sum(n - 1 for n in PROMPTS)  # each prompt once, whatever is forked from it


@pytest.mark.parametrize(
    "fork, message",
    [
        (Fork(PATHS, 1, 0), "raise path_slots"),
        (Fork(-1, 1, 0), "parent must be below"),
        (Fork(0, NEW + 1, 0), "index must lie between 0 and"),
        (Fork(0, 1, 0, [1] * 4), "raise max_injected"),
        (Fork(0, NEW - 2, 0, [1, 2]), "no room for a token within max_new_tokens"),
    ],
)
def test_a_fork_that_cannot_be_decoded_is_refused(sampler, fork, message):
    requests = [forking_requests()[0]._replace(rounds=lambda samples: [fork])]
    with pytest.raises(ValueError, match=message):
        generate(sampler, requests)
