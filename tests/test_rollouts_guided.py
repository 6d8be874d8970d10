"""Guidance from recorded actions and the search for the shortest that helps, by the worked examples of ActGuide-RL."""

import itertools
import string

import jax
import numpy as np
import pytest

from rljax.algorithms import ActGuideRL
from rljax.batching import stack
from rljax.models import DecoderConfig, init_params
from rljax.plans import RolloutPlan
from rljax.rollouts import Guided, GuidedActor, RolloutSettings, ScoredGroup, SingleTurnActor, number_groups
from rljax.rollouts.guided import collect_guided
from rljax.rollouts.guided.guidance import (
    HEADING,
    MINIMAL_SEARCH,
    RELEASED_SEARCH,
    guidance_text,
    guided_prompt,
    reference_actions,
)
from rljax.rollouts.trajectories import trajectory_of
from rljax.sampling import Sample, Sampler, SamplerSpec, sampling_params
from rljax.tasks import Example, RewardResult, RewardRunner, RewardSpec
from rljax.text import CharTokenizer
from rljax.training import Learner, OptimizerConfig, UpdateConfig
from rljax.types import SOURCE_GUIDED, SOURCE_POLICY

ACTIONS = [{"name": "search", "arguments": {"query": f"q{i}", "goal": "why"}} for i in range(1, 9)]

TABLE = [  # L, the level from which it succeeds, budget; release; recommended
    (8, 5, 5, "4F 6S 5S", 5, "4F 6S 5S", 5, True),
    (8, 1, 5, "4S 2S 1S 0F", 1, "4S 2S 1S", 1, True),
    (8, 8, 5, "4F 6F 7F", 8, "4F 6F 7F 8S", 8, True),
    (8, None, 5, "4F 6F 7F", 8, "4F 6F 7F 8F", 8, False),
    (30, 3, 2, "15S 7S", 0, "15S 7S", 7, True),
    (30, 20, 3, "15F 23S 19F", 20, "15F 23S 19F", 23, True),
    (1, 1, 5, "0F", 1, "1S", 1, True),
]


def run(rule, lengths, needed, budget):
    """Probes of each task as text, and what is found; `needed` None never succeeds."""
    state = rule.begin(np.array(lengths, np.int32), budget)
    wanted = np.array([10**6 if n is None else n for n in needed])
    history = [[] for _ in lengths]
    while (probe := rule.next_probe(state))[1].any():
        success = probe[0] >= wanted
        for i in np.flatnonzero(probe[1]):
            history[i].append(f"{probe[0][i]}{'FS'[int(success[i])]}")
        state = rule.update_probe(state, success)
    assert {x.dtype for x in state} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(state.probes, [len(h) for h in history])
    return [" ".join(h) for h in history], rule.found(state)


@pytest.mark.parametrize(("length", "needed", "budget", "r_probes", "r_level", "probes", "level", "verified"), TABLE)
def test_the_search_meets_the_worked_example(length, needed, budget, r_probes, r_level, probes, level, verified):
    history, found = run(MINIMAL_SEARCH, [length], [needed], budget)
    assert (history, found.level[0], bool(found.is_verified[0])) == ([probes], level, verified)
    history, found = run(RELEASED_SEARCH, [length], [needed], budget)
    assert (history, found.level[0]) == ([r_probes], r_level)


def test_the_release_knows_when_its_level_was_not_tried():
    verified = [run(RELEASED_SEARCH, [row[0]], [row[1]], row[2])[1].is_verified[0] for row in TABLE]
    assert verified == [True, True, False, False, False, False, False]


@pytest.mark.parametrize("rule", [MINIMAL_SEARCH, RELEASED_SEARCH])
def test_tasks_side_by_side_are_searched_as_if_alone(rule):
    rows = [row for row in TABLE if row[2] == 5]
    lengths, needed = [r[0] for r in rows], [r[1] for r in rows]
    together, found = run(rule, lengths, needed, 5)
    for i, (length, need) in enumerate(zip(lengths, needed, strict=True)):
        alone, one = run(rule, [length], [need], 5)
        assert alone[0] == together[i] and one.level[0] == found.level[i]


def test_the_budget_that_is_given_by_itself_always_suffices():
    for length in range(1, 40):
        needed = [*range(1, length + 1), None]
        history, found = run(MINIMAL_SEARCH, [length] * len(needed), needed, None)
        np.testing.assert_array_equal(found.level, [*range(1, length + 1), length])
        np.testing.assert_array_equal(found.is_verified, [n is not None for n in needed])
        assert max(len(h.split()) for h in history) <= int(np.floor(np.log2(length))) + 1


def test_a_search_without_actions_or_probes_is_refused():
    with pytest.raises(ValueError, match="a task of 0 reference actions cannot be guided"):
        MINIMAL_SEARCH.begin(np.array([3, 0], np.int32))
    with pytest.raises(ValueError, match="budget of 0 finds nothing"):
        MINIMAL_SEARCH.begin(np.array([3], np.int32), 0)


def test_guidance_is_nested_and_empty_at_level_0():
    shown = reference_actions(ACTIONS)
    texts = [guidance_text(shown, k) for k in range(9)]
    assert texts[0] == ""
    assert texts[2] == f'{HEADING}\n1. search: {{"query": "q1"}}\n2. search: {{"query": "q2"}}'
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    with pytest.raises(ValueError, match="k=9 actions of guidance must be from 0 to 8"):
        guidance_text(shown, 9)


def test_what_holds_the_answer_or_the_intent_is_left_out():
    recorded = [*ACTIONS[:1], {"name": "answer", "arguments": {"answer": "42"}}, {"name": "finish"}]
    assert reference_actions(recorded) == [{"name": "search", "arguments": {"query": "q1"}}]
    for bad in ("search", {"arguments": {}}, {"name": "search", "arguments": "x"}):
        with pytest.raises(ValueError, match=r"action 0 is .* it must have a text as name"):
            reference_actions([bad])


def test_guidance_ends_the_users_turn_and_level_0_is_the_plain_prompt():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "second"},
    ]
    for prompt in ("question", messages):
        assert guided_prompt(prompt, ACTIONS, 0) is prompt
    text = guidance_text(ACTIONS, 1)
    assert guided_prompt("question", ACTIONS, 1) == f"question\n\n{text}"
    got = guided_prompt(messages, ACTIONS, 1)
    assert got[:3] == messages[:3] and got[3] == {"role": "user", "content": f"second\n\n{text}"}
    assert messages[3]["content"] == "second"
    with pytest.raises(ValueError, match="no user message"):
        guided_prompt(messages[:1], ACTIONS, 1)


class Player:
    """Plays examples that succeed from a level of guidance on; writes down what it was asked."""

    def __init__(self, needed, rewards=(0.0, 1.0), is_valid=True):
        self.needed, self.rewards, self.is_valid, self.calls = needed, rewards, is_valid, []

    def __call__(self, examples, samples_each):
        self.calls.append((examples, samples_each))
        return [self.group(example, samples_each) for example in examples]

    def group(self, example, count):
        level = example.prompt.count("search:")
        wins = level >= self.needed[example.columns["name"]]
        rewards = [self.rewards[wins] if i % 2 == 0 else 0.0 for i in range(count)]
        samples = [
            Sample(
                tokens=np.array([7, 8, i], np.int32),
                logprobs=np.full(3, -0.1 * (level + 1), np.float32),
                entropies=np.zeros(3, np.float32),
                finish_reason="stop",
                forced=((1, 2),),
            )
            for i in range(count)
        ]
        texts = ["as the plan says" if level and i == 0 else "hm" for i in range(count)]
        results = [RewardResult(value=r, components={}, is_valid=self.is_valid, error=None) for r in rewards]
        prompt = [ord(c) for c in example.prompt]
        return ScoredGroup(example, prompt, samples, texts, results, [np.zeros(3, np.int32)] * count)


def make(name, actions=8):
    return Example(prompt=f"question {name}", columns={"name": name, "actions": ACTIONS[:actions]})


EXAMPLES = [make("easy"), make("five"), make("never", 3), make("bare", 0), make("one", 1)]
NEEDED = {"easy": 0, "five": 5, "never": 100, "bare": 100, "one": 1}


def test_hard_tasks_are_guided_and_train_on_the_plain_prompt():
    play = Player(NEEDED)
    got = collect_guided(play, EXAMPLES, 4, Guided())
    np.testing.assert_array_equal(got.levels, [0, 5, 3, 0, 1])
    np.testing.assert_array_equal(got.is_verified, [False, True, False, False, True])
    for example, group, level in zip(EXAMPLES, got.groups, got.levels, strict=True):
        assert group.example is example
        assert group.prompt == [ord(c) for c in example.prompt]
        assert len(group.samples) == 4
        for sample in group.samples:  # log-probs of the prompt that was used, identical tokens
            np.testing.assert_allclose(sample.logprobs, -0.1 * (level + 1), rtol=1e-6)
    assert [max(r.value for r in group.results) for group in got.groups] == [1, 1, 0, 0, 1]


def test_guided_rows_say_so():
    groups = collect_guided(Player(NEEDED), EXAMPLES, 4, Guided()).groups
    sources = [group.source for group in groups]
    assert sources == [SOURCE_POLICY, SOURCE_GUIDED, SOURCE_GUIDED, SOURCE_POLICY, SOURCE_GUIDED]


def test_guidance_that_an_environment_keeps_to_itself_is_an_error():
    class Deaf(Player):
        def group(self, example, count):
            return super().group(example, count)._replace(prompt=[1, 2, 3])

    with pytest.raises(ValueError, match="did not reach the policy"):
        collect_guided(Deaf(NEEDED), EXAMPLES, 4, Guided())


def test_probes_of_all_tasks_go_together_and_are_thrown_away():
    play = Player(NEEDED)
    got = collect_guided(play, EXAMPLES, 4, Guided(probes=2))
    assert [(len(examples), n) for examples, n in play.calls] == [(5, 4), (3, 2), (2, 2), (1, 2), (3, 4)]
    assert got.stats["probe_rollouts"] == 12  # five: 4F 6S 5S; never: 2F 3F; one: 1S
    assert got.stats["probe_tokens"] == 24  # one of three tokens was given
    assert got.stats["replaced_tokens"] == 24
    assert got.stats["probes_per_hard_task"] == 2
    assert got.stats["guided_share"] == got.stats["hard_share"] == 0.6
    assert got.stats["guidance_level_mean"] == 3
    assert got.stats["guidance_share_of_plan"] == pytest.approx((5 / 8 + 1 + 1) / 3)
    assert got.stats["guidance_verified_share"] == pytest.approx(2 / 3)
    assert got.stats["solved_with_guidance"] == pytest.approx(2 / 3)
    assert got.stats["guided_no_signal_share"] == pytest.approx(1 / 3)
    assert got.stats["quotes_plan_share"] == pytest.approx(1 / 4)


def test_no_two_rollouts_share_their_random_numbers():
    play = Player(NEEDED)
    collect_guided(play, EXAMPLES, 4, Guided())
    ids = [example.id for examples, _ in play.calls for example in examples]
    assert len(ids) == len(set(ids))
    again = Player(NEEDED)
    collect_guided(again, EXAMPLES, 4, Guided())
    assert ids == [example.id for examples, _ in again.calls for example in examples]
    kept = [{k: v for k, v in e.columns.items()} for e in play.calls[-1][0]]
    assert kept == [dict(EXAMPLES[i].columns) for i in (1, 2, 4)]


def test_nothing_hard_costs_nothing():
    play = Player(NEEDED)
    got = collect_guided(play, [EXAMPLES[0], EXAMPLES[3]], 4, Guided())
    assert len(play.calls) == 1
    assert got.stats["probe_rollouts"] == got.stats["guided_share"] == got.stats["guidance_level_mean"] == 0
    assert got.stats["hard_share"] == 0


def test_rollouts_that_all_broke_do_not_make_a_task_hard():
    play = Player(NEEDED, is_valid=False)
    got = collect_guided(play, EXAMPLES, 4, Guided())
    assert len(play.calls) == 1 and not got.levels.any()


def test_penalties_are_failures_and_the_budget_ends_the_search():
    play = Player(NEEDED, rewards=(-0.2, 1.0))
    got = collect_guided(play, EXAMPLES[1:2], 4, Guided(budget=1))
    np.testing.assert_array_equal(got.levels, [8])  # 4F, and then all of it
    assert not got.is_verified[0]
    released = collect_guided(Player(NEEDED), EXAMPLES[1:2], 4, Guided(budget=1), rule=RELEASED_SEARCH)
    np.testing.assert_array_equal(released.levels, [5])


def only_with_a_plan(completion, prompt):
    """1 for about every second answer to a prompt with guidance."""
    return float("Reference plan" in prompt and ord(completion[0]) % 2)


@pytest.mark.slow
def test_the_learner_compares_the_plain_prompt_with_what_was_sampled_under_guidance():
    """From a real decoder to an update: the ratio of a guided row is not 1 on its first update, that of a plain row is,
    and the recorded log-probs are those of the guided prompt."""
    tokenizer = CharTokenizer(string.ascii_letters + string.digits + string.punctuation + " \n")
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        embed_dim=32,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=32,
    )
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, init_params(config, jax.random.key(0)))
    spec = SamplerSpec(prompt_buckets=(256,), max_new_tokens=4, prompt_slots=2, sample_slots=8)
    sampler = Sampler(config, spec)
    sampler.set_params(params)
    hard = Example(prompt="how?", columns={"actions": [{"name": "search", "arguments": {"query": "x"}}]})
    examples = [Example(prompt="what?", columns={}), hard]
    settings = RolloutSettings(seed=0, sampling=sampling_params())
    plain = SingleTurnActor(sampler, tokenizer, RewardRunner([RewardSpec(only_with_a_plan)]), settings)
    with GuidedActor(plain, Guided(probes=8)) as actor:
        actor.submit(number_groups(examples, 8), RolloutPlan(group_size=8), 0)
        groups = actor.ready(2)
    assert [group.source for group in groups] == [SOURCE_POLICY, SOURCE_GUIDED]
    assert actor.stats["guidance_level_mean"] == 1 and actor.stats["solved_with_guidance"] == 1

    def batch_of(groups):
        return stack(
            [
                trajectory_of(RolloutPlan(8), g, i, 0, group_id=n, first_row=8 * n)
                for n, g in enumerate(groups)
                for i in range(8)
            ],
            length_buckets=(256,),
        )

    batch = batch_of(groups)
    np.testing.assert_array_equal(batch.source, [SOURCE_POLICY] * 8 + [SOURCE_GUIDED] * 8)
    algorithm = ActGuideRL(kl_coef=0.0).build()
    update = UpdateConfig(pack_length=256, microbatch_size=8, head_chunk=256)
    learner = Learner(config, algorithm.loss, OptimizerConfig(learning_rate=1e-3), update)
    plain = learner.score_rows(params, batch)
    shown = tokenizer.encode(guided_prompt(hard.prompt, reference_actions(hard.columns["actions"]), 1))
    as_sampled = batch_of([groups[0], groups[1]._replace(prompt=shown)])
    guided = learner.score_rows(params, as_sampled)
    for side, scored in ((batch, plain), (as_sampled, guided)):
        gap = np.where(side.action_mask, np.abs(scored - side.behavior_logprobs), 0).max(axis=1)
        assert gap[:8].max() < 1e-4
        assert gap[8:].max() < 1e-4 if side is as_sampled else gap[8:].min() > 1e-2
    state = learner.init_state(params)
    (minibatch,) = learner.prepare(state, batch, np.asarray(algorithm.advantage_fn(batch)))
    _, metrics = learner.update(state, minibatch)
    ratios = np.exp(plain - batch.behavior_logprobs)[batch.action_mask]
    np.testing.assert_allclose(metrics["loss/ratio_mean"], ratios.mean(), rtol=1e-4)
    assert abs(ratios.mean() - 1) > 1e-2
