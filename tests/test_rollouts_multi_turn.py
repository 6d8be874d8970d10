"""Episodes over the decoder: the ids that were sampled are those that are trained on, whatever tools and rows do."""

import functools
import json
import random
import time

import jax
import numpy as np
import pytest
from counting import Echo
from forward import row_logprobs

from rljax.envs import EnvironmentLimits, EnvironmentPool
from rljax.models import DecoderConfig, init_params
from rljax.plans import Column, ForkPlan, ForkPoint, RolloutPlan
from rljax.plans.fork_rules import random_step, top_entropy
from rljax.rollouts import MultiTurn, MultiTurnActor, RolloutSettings, collect, number_groups
from rljax.sampling import Stops, TurnDecoder, TurnDecoderSpec, sampling_params
from rljax.tasks import Example
from rljax.text import CharTokenizer, Dialogue
from rljax.types import INTERVENTION_SUPPRESS

TOKENIZER = CharTokenizer("abcdefghijklmnoprstw?!#0123456789 ")
CONFIG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
)
LENGTH = 120


@functools.lru_cache
def params():
    return jax.tree.map(lambda x: 3 * x, init_params(CONFIG, jax.random.key(0)))


class Slow(Echo):
    def step(self, action):
        time.sleep(random.uniform(0, 0.03))
        return super().step(action)


class Broken(Echo):
    def step(self, action):
        if self.row["prompt"] == "bad":
            raise OSError("the tool is gone")
        return super().step(action)


def make_actor(
    make=Echo,
    *,
    rows=3,
    conversations=12,
    decoders=1,
    limits=None,
    workers=8,
    length=LENGTH,
    pick=None,
    scorer=None,
    suppressed=(),
    batch=0,
    **settings,
):
    spec = TurnDecoderSpec(
        conversations=conversations,
        rows=rows,
        context_length=length,
        max_new_tokens=9,
        prefill_chunks=(4, 16),
        check_every=3,
        suppressed=suppressed,
    )
    stops = Stops(tokens=[*TOKENIZER.stop_ids, *TOKENIZER.encode("abcd")])
    made = [TurnDecoder(CONFIG, spec, stops) for _ in range(decoders)]
    pool = EnvironmentPool(make, workers=workers, limits=limits or EnvironmentLimits())
    pool.open()
    how = RolloutSettings(seed=3, sampling=sampling_params())
    dialogue = Dialogue(TOKENIZER, wrap=(" ", "#"))
    actor = MultiTurnActor(made, pool, dialogue, how, MultiTurn(**settings), pick=pick, scorer=scorer, batch=batch)
    actor.set_params(params(), version=0)
    return actor


EXAMPLES = [Example(prompt) for prompt in ("abc", "no more", "dig")]


def play(actor, examples=EXAMPLES, samples=4, *, step=0, n=None, seen=None, forks=None):
    plan = RolloutPlan(group_size=forks.leaves if forks else samples, forks=forks)
    actor.submit(number_groups(examples, plan.group_size, seen), plan, step)
    return actor.ready(len(examples) if n is None else n)


def check_sample(group, sample):
    """Sampled tokens have the log-probs of the full forward pass over exactly these ids."""
    want = row_logprobs(CONFIG, params(), group.prompt + sample.tokens.tolist())[len(group.prompt) :]
    np.testing.assert_allclose(sample.logprobs, np.where(sample.sampled, want, 0), atol=3e-5)


def turns_of(sample):
    """(what was sampled, what came back) of every turn, as text."""
    out = []
    for turn in range(int(sample.turns.max()) + 1):
        here = sample.turns == turn
        parts = [sample.tokens[here & mask].tolist() for mask in (sample.sampled, ~sample.sampled)]
        out.append((TOKENIZER.decode(parts[0]), TOKENIZER.decode(parts[1])))
    return out


def test_what_was_sampled_is_what_is_kept_and_observations_are_given():
    actor = make_actor()
    groups = play(actor)
    assert [g.example for g in groups] == EXAMPLES
    for group in groups:
        assert TOKENIZER.decode(group.prompt) == f"{group.example.prompt}#"
        for sample, result in zip(group.samples, group.results, strict=True):
            check_sample(group, sample)
            said = turns_of(sample)
            heard = np.cumsum([len(text) for text, _ in said])
            assert [back for _, back in said[:-1]] == [f" ?{n}!#" for n in heard[:-1]]
            if sample.finish_reason == "stop":
                assert len(said) == 4 and result.value == 10.0 and result.components["turns"] == 4
            else:
                assert result.value == sum(range(len(said)))
    samples = [s for g in groups for s in g.samples]
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    assert len({tuple(s.tokens.tolist()) for s in samples}) == len(samples)
    assert actor.stats["reused_share"] > 0.6


def test_tools_rows_and_workers_do_not_change_what_is_said():
    want = [s.tokens.tolist() for g in play(make_actor()) for s in g.samples]
    for settings in ({"make": Slow}, {"rows": 1, "workers": 1}, {"make": Slow, "rows": 8, "conversations": 5}):
        assert [s.tokens.tolist() for g in play(make_actor(**settings)) for s in g.samples] == want


def test_a_repeated_prompt_gets_other_samples():
    actor, seen = make_actor(), {}
    first, second = play(actor, EXAMPLES[:1] * 2, seen=seen)
    third = play(actor, EXAMPLES[:1], seen=seen)[0]
    texts = [tuple(s.tokens.tolist()) for g in (first, second, third) for s in g.samples]
    assert len(set(texts)) == len(texts)


def test_an_environment_that_fails_costs_its_episode_alone():
    actor = make_actor(Broken)
    bad, good = play(actor, [Example("bad"), Example("good")])
    failed = [r for r in bad.results if not r.is_valid]
    assert failed and all("the tool is gone" in r.error for r in failed)
    assert all(r.is_valid == (s.finish_reason == "length") for r, s in zip(bad.results, bad.samples, strict=True))
    assert all(r.is_valid for r in good.results)
    assert actor.stats["failed"] == len(failed)
    unknown = play(make_actor(), [Example("ABC"), Example("good")])  # letters the tokenizer lacks
    assert not any(r.is_valid for r in unknown[0].results) and all(r.is_valid for r in unknown[1].results)


def test_limits_end_an_episode_and_may_set_its_reward():
    limits = EnvironmentLimits(turns=2)
    for reward, want in ((None, 3.0), (-0.2, -0.2)):
        group = play(make_actor(limits=limits, unfinished_reward=reward))[0]
        full = [r.value for r in group.results if r.components["turns"] == 2]
        assert full and set(full) == {want}


def test_a_full_context_truncates():
    samples = [(g, s) for length in (17, 20, 24) for g in play(make_actor(length=length)) for s in g.samples]
    lengths = [len(group.prompt) + len(sample.tokens) for group, sample in samples]
    assert all(length <= 24 for length in lengths)
    assert {sample.finish_reason for _, sample in samples} == {"length"}
    assert max(lengths) == 24 and all(sample.sampled[-1] for _, sample in samples)  # no observation that nobody reads


def test_an_opening_longer_than_the_context_costs_its_episode_alone():
    long, short = play(make_actor(length=24), [Example("no" * 12), Example("dig")])
    assert {r.error for r in long.results} == {"its opening has 25 tokens, the whole context only 24"}
    assert len(long.prompt) == 1 and all(r.is_valid for r in short.results)


@pytest.mark.parametrize("rule", [random_step(2, 2), top_entropy(2, 2, tail=0.0, last_words=())])
def test_forks_go_on_from_the_environment_as_it_stood(rule):
    plan = ForkPlan(chains=2, points=2, rule=rule, rounds=2)
    actor = make_actor(conversations=20)
    for group in play(actor, forks=plan):
        assert 2 < len(group.samples) <= plan.leaves
        for i, (sample, result) in enumerate(zip(group.samples, group.results, strict=True)):
            check_sample(group, sample)
            heard = np.cumsum([len(text) for text, _ in turns_of(sample)])
            assert [back for _, back in turns_of(sample)[:-1]] == [f" ?{n}!#" for n in heard[:-1]]
            if i >= 2:
                parent = group.samples[sample.parent]
                np.testing.assert_array_equal(sample.tokens[: sample.fork_index], parent.tokens[: sample.fork_index])
                assert sample.sampled[sample.fork_index]  # what comes first is the policy's
                assert result.is_valid
    assert actor.stats["reused_share"] > 0.6


def test_forks_at_turns_begin_after_an_observation():
    plan = ForkPlan(chains=2, points=2, rule=random_step(2, 2, from_root=False), rounds=1)
    children = [s for g in play(make_actor(conversations=12), forks=plan) for s in g.samples if s.parent >= 0]
    assert children
    for sample in children:
        assert not sample.sampled[sample.fork_index - 1]  # the token before belongs to an observation
        assert sample.turns[sample.fork_index] == sample.turns[sample.fork_index - 1] + 1


def test_a_fork_in_mid_turn_cannot_begin_with_what_is_suppressed():
    """Its first token gets no gradient; what follows is sampled as ever, suppressed tokens too."""
    suppressed = tuple(range(0, TOKENIZER.vocab_size, 2))

    def rule(group):
        return [ForkPoint(i, 1 + i, intervention=INTERVENTION_SUPPRESS) for i in range(2)]

    plan = ForkPlan(chains=2, points=1, rule=rule, branches=3, suppressed=suppressed)
    (group,) = play(make_actor(suppressed=suppressed), EXAMPLES[:1], forks=plan)
    forks = [sample for sample in group.samples if sample.parent >= 0]
    assert len(forks) == 6
    for fork in forks:
        check_sample(group, fork)
        place = fork.fork_index
        assert fork.tokens[place] not in suppressed and not fork.sampled[place] and (place, place + 1) in fork.forced
    later = [t for fork in forks for t in fork.tokens[fork.fork_index + 1 :][fork.sampled[fork.fork_index + 1 :]]]
    assert {t in suppressed for t in later} == {True, False}


def test_groups_in_flight_span_versions():
    actor = make_actor(Slow, conversations=24, groups_in_flight=2)
    versions, drawn, kept = [], 0, 0
    for step in range(4):
        actor.set_params(params(), version=step)
        examples = [Example(f"task {step} {i}") for i in range(actor.missing(2))]
        drawn += len(examples)
        groups = play(actor, examples, step=step, n=2)
        assert len(groups) == 2
        kept += 2
        for group in groups:
            for sample in group.samples:
                check_sample(group, sample)
                assert (np.diff(sample.versions) >= 0).all() and sample.versions.max() <= step
                versions.append(sample.versions)
    assert drawn == kept + 2 == kept + actor.num_pending
    assert any(len(set(v.tolist())) > 1 for v in versions)


@pytest.mark.parametrize("is_forked", [False, True])
def test_a_step_that_is_asked_for_in_parts_says_what_it_says_at_once(is_forked):
    """Turns are cut off where a part ends and go on in the same step, as under dynamic sampling: none of their tokens
    is decided by the number of another."""

    def rule(group):
        return [ForkPoint(i, 1 + i) for i in range(2)]

    def said(groups):
        return {group.example.id: [sample.tokens.tolist() for sample in group.samples] for group in groups}

    forks = ForkPlan(chains=2, points=1, rule=rule, branches=2) if is_forked else None
    want = said(play(make_actor(conversations=18), forks=forks))

    actor = make_actor(conversations=18)
    after = actor._after

    def wait(play, then, future):
        future.exception()  # so that what is cut off does not depend on time
        after(play, then, future)

    actor._after = wait
    parts = [*play(actor, forks=forks, n=1)]
    plays = [p for group in actor.state_dict()["groups"] for p in group["plays"] if p["then"] == "speak"]
    cut = [p["fork"]["parent"] for p in plays if len(p["tokens"]) > max(p["turn_start"], p["fork"]["fork_index"])]
    assert cut and (max(cut) >= 0) == is_forked
    for _ in EXAMPLES[1:]:
        parts += actor.ready(1)
    assert said(parts) == want


def test_decoders_share_an_episode():
    def pick(prompt_id, sample_id, turn):
        return turn % 2

    actor = make_actor(decoders=2, pick=pick, stale_every=10)
    actor.set_params(params(), version=7)
    want = [s.tokens.tolist() for g in play(make_actor(), step=7) for s in g.samples]
    groups = play(actor, step=7)
    assert [s.tokens.tolist() for g in groups for s in g.samples] == want
    for sample in (s for g in groups for s in g.samples):
        own = sample.versions[sample.sampled]
        np.testing.assert_array_equal(own, np.where(sample.turns[sample.sampled] % 2, 0, 7))


def test_collect_makes_trajectories_of_episodes():
    plan = RolloutPlan(group_size=4, columns=(Column("foresight", per="turn"), Column("tool_calls", per="row")))
    rollout = collect(make_actor(), plan, lambda n: EXAMPLES[:n], 3, 5)
    assert rollout.rewards.shape == (3, 4) and rollout.stats["component/turns"] > 1
    for t in rollout.trajectories:
        own = t.action_mask
        assert t.turn_ids.max() >= 0 and not own[: len("abc#")].any()
        foresight = t.columns["foresight"]
        np.testing.assert_array_equal(foresight, np.where(own, 0.5, 0.0) * (foresight > 0))
        assert t.columns["tool_calls"] == len(np.unique(t.turn_ids[foresight > 0]))
        assert (t.state_ids[~own] == -1).all() and (t.state_ids[own] >= 0).all()
        rewards = [t.turn_rewards[own & (t.turn_ids == turn)] for turn in range(t.turn_ids.max() + 1)]
        assert all(len(set(values.tolist())) <= 1 for values in rewards)
        assert sum(values[0] for values in rewards if len(values)) == t.reward


def test_a_group_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a group of 5 episodes needs as many conversations, but the decoder has 4"):
        play(make_actor(conversations=4), samples=5)


def test_a_group_whose_first_episode_is_over_goes_on_behind_a_restart():
    """That episode has no conversation there, whose beginning the others could share."""
    plan = RolloutPlan(group_size=4)
    examples = [Example(f"task {i}") for i in range(6)]
    actor = make_actor(groups_in_flight=5, answers_after=1)
    actor.submit(number_groups(examples, plan.group_size), plan, 0)
    actor.ready(2)
    state = json.loads(json.dumps(actor.state_dict()))
    ends = [[play["then"] for play in group["plays"]] for group in state["groups"]]
    assert any(then[:2] == ["finish", "speak"] for then in ends)

    resumed = make_actor(groups_in_flight=5, answers_after=1)
    resumed.load_state_dict(state, plan, {example.id: example for example in examples})
    for group in resumed.ready(4):
        for sample in group.samples:
            check_sample(group, sample)


@pytest.mark.parametrize("forks", [None, ForkPlan(chains=2, points=1, rule=random_step(1, 2), rounds=2)])
def test_what_is_under_way_survives_a_checkpoint(forks):
    """Groups cut off in mid-turn, at their environments, waiting and complete: all go on as they would have."""
    plan = RolloutPlan(group_size=forks.leaves if forks else 4, forks=forks)
    examples = [Example(f"task {i}") for i in range(6)]
    actor = make_actor(Slow, conversations=3 * plan.group_size, groups_in_flight=5)
    actor.submit(number_groups(examples, plan.group_size), plan, 0)
    actor.ready(1)
    state = json.loads(json.dumps(actor.state_dict(), allow_nan=False))
    assert len(state["groups"]) == 5

    resumed = make_actor(conversations=3 * plan.group_size, groups_in_flight=5)
    resumed.load_state_dict(state, plan, {example.id: example for example in examples})
    assert resumed.missing(1) == actor.missing(1) == 1

    def outcome(actor):
        groups = actor.ready(5)
        return {
            group.example.id: [(s.tokens.tolist(), s.fork_index, r.value) for s, r in zip(group.samples, group.results)]
            for group in groups
        }

    assert outcome(resumed) == outcome(actor)
    assert resumed.state_dict() == {}


@pytest.mark.parametrize(
    "forks",
    [
        pytest.param(None, marks=pytest.mark.slow),
        ForkPlan(chains=2, points=1, rule=random_step(1, 2), rounds=2),
    ],
)
def test_answers_at_fixed_places_make_groups_in_flight_repeat_to_the_last_bit(forks):
    """Which groups a step gets, where weights change within them, and every number; behind a restart too."""
    plan = RolloutPlan(group_size=forks.leaves if forks else 4, forks=forks)
    examples = {f"task {step} {i}": Example(f"task {step} {i}") for step in range(4) for i in range(5)}
    by_id = {example.id: example for example in examples.values()}

    def made():
        return make_actor(Slow, conversations=5 * plan.group_size, groups_in_flight=3, answers_after=1)

    def played(actor, steps):
        found = []
        for step in steps:
            actor.set_params(params(), version=step)
            drawn = [examples[f"task {step} {i}"] for i in range(actor.missing(2))]
            actor.submit(number_groups(drawn, plan.group_size), plan, step)
            found += [
                (step, group.example.id, s.tokens.tolist(), s.logprobs.tobytes(), s.versions.tolist(), r.value)
                for group in actor.ready(2)
                for s, r in zip(group.samples, group.results, strict=True)
            ]
        return found

    actor = made()
    first = played(actor, range(2))
    state = json.loads(json.dumps(actor.state_dict(), allow_nan=False))
    last = played(actor, range(2, 4))
    assert any(len(set(versions)) > 1 for *_, versions, _ in first + last)
    assert played(made(), range(4)) == first + last

    resumed = made()
    resumed.load_state_dict(state, plan, by_id)
    assert played(resumed, range(2, 4)) == last


def test_a_state_of_other_data_is_refused():
    actor = make_actor()
    state = {"groups": [{"example_id": 5, "first_sample": 0, "step": 0, "plays": []}]}
    with pytest.raises(ValueError, match="the data row 5, which the data does not hold"):
        actor.load_state_dict(state, RolloutPlan(group_size=4), {})
