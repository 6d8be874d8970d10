"""Rules fork where they say, rounds keep to their plan, and a run over forks trains on every leaf."""

import dataclasses

import jax
import numpy as np
import pytest

from rljax.algorithms import GRPO
from rljax.experiment.train import train
from rljax.plans import NEWEST_LOGPROBS, ForkPlan, ForkPoint
from rljax.plans.fork_rules import (
    PartialGroup,
    _between,
    entropy_jump,
    partial_batch,
    random_step,
    random_token,
    summary_points,
    top_branching_score,
    top_entropy,
    top_surprisal,
    top_turn_surprisal,
)
from rljax.plans.phrases import PhraseFinder
from rljax.rollouts.forks import ForkRounds
from rljax.sampling import Sample
from rljax.testing import rollout_records, run_metrics, tiny_config
from rljax.text import CharTokenizer, StepSplitter
from rljax.training import read_jsonl
from rljax.types import INTERVENTION_INJECT, INTERVENTION_SUPPRESS

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz .")
SPLITTER = StepSplitter(TOKENIZER, (".",))


def sample(text, *, logprobs=None, entropies=None, **fork):
    tokens = np.array(TOKENIZER.encode(text), np.int32)
    zeros = np.zeros(len(tokens), np.float32)
    logprobs = zeros if logprobs is None else np.array(logprobs, np.float32)
    entropies = zeros if entropies is None else np.array(entropies, np.float32)
    return Sample(tokens, logprobs, entropies, "stop", **fork)


def grown(samples, chains=1, seed=0, round=0):
    batch = partial_batch(samples, 4, 24, [SPLITTER(s.tokens) for s in samples])
    return PartialGroup(batch, chains, round, jax.random.key(seed), TOKENIZER.decode)


def places(points):
    return [(p.parent, p.fork_index) for p in points]


def test_steps_end_with_their_delimiter_and_prefixes_share_them():
    assert SPLITTER(TOKENIZER.encode("ab.c..d")).tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert StepSplitter(TOKENIZER, ())(TOKENIZER.encode("a.b")).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="delimiter is empty"):
        StepSplitter(TOKENIZER, ("",))


def count(points):
    found = places(points)
    return {place: found.count(place) for place in found}


def test_random_steps_are_inner_ends_of_steps_and_the_root_evenly():
    trees = grown([sample("ab.cd.e"), sample("q."), sample("ab.x.y", parent=0, fork_index=3)], chains=2)
    counts = count(random_step(6000, 2)(trees))
    # Tree 0: its root, after "ab.", after "cd.", after the fork's own "x."; tree 1 has no inner end, so its root.
    assert counts.keys() == {(0, 0), (0, 3), (0, 6), (2, 5), (1, 0)}
    assert counts.pop((1, 0)) == 6000
    assert all(abs(n - 1500) < 200 for n in counts.values())  # six standard deviations
    assert count(random_step(50, 2, from_root=False)(trees)).keys() == {(0, 3), (0, 6), (2, 5)}


def test_a_node_may_be_drawn_again_in_a_later_round():
    trees = grown([sample("ab.cd"), sample("ab.xy", parent=0, fork_index=3)])
    assert count(random_step(50, 1)(trees)).keys() == {(0, 0), (0, 3)}


def test_top_tokens_are_pooled_over_a_tree_with_ties_to_the_first():
    first = sample("abcdef", logprobs=[-9, -1, -5, -1, -2, -9], entropies=[9, 1, 2, 3, 4, 5])
    fork = sample("abxyzw", logprobs=[-9, -1, -8, -5, -5, -1], entropies=np.arange(6), parent=0, fork_index=2)
    other = sample("qrst", logprobs=[-1, -2, -3, -4])
    trees = grown([first, other, fork], chains=2)
    points = top_surprisal(3, 2, tail=0.0)(trees)
    # Position 0 of a chain, the fork's first token and where it forked (2 of the first) are no places to fork.
    assert [(p.parent, p.fork_index, p.score) for p in points[:3]] == [(0, 5, 9.0), (2, 3, 5.0), (2, 4, 5.0)]
    assert places(points[3:]) == [(1, 3), (1, 2), (1, 1)]
    assert places(top_entropy(2, 2, tail=0.0)(trees))[:2] == [(0, 5), (2, 5)]
    assert places(top_surprisal(1, 2, tail=0.5)(trees)) == [(0, 1), (1, 1)]


def test_too_few_candidates_leave_slots_unused():
    assert places(top_surprisal(5, 1, tail=0.0)(grown([sample("ab")]))) == [(0, 1)]
    assert random_token(5, 1)(grown([sample("a")])) == []
    assert random_step(5, 1, from_root=False)(grown([sample("abc")])) == []


def test_nothing_is_forked_after_the_answer_or_in_given_tokens():
    one = grown([sample("so the answer is no", forced=((3, 6),))])
    rule = random_token(24, 1, tail=0.0, last_words=("answer",))
    # The word is complete with its last letter, which may still be drawn anew.
    assert sorted(places(rule(one))) == [(0, t) for t in (1, 2, *range(6, 13))]
    assert sorted(places(random_token(24, 1, tail=0.5)(one))) == [(0, t) for t in (1, 2, *range(6, 11))]


def test_random_tokens_are_drawn_evenly_and_without_repeats():
    counts = {}
    rule = random_token(2, 1, tail=0.2)
    for seed in range(400):
        points = rule(grown([sample("abcdef")], seed=seed))
        assert len(set(places(points))) == 2
        for key, n in count(points).items():
            counts[key] = counts.get(key, 0) + n
    assert counts.keys() == {(0, 1), (0, 2), (0, 3)}
    assert all(abs(n - 800 / 3) < 45 for n in counts.values())


@pytest.mark.slow
def test_entropy_jumps_fork_in_proportion_to_the_jump():
    """clip(0.5 + 0.2 D, 0, 1) with D = sums over the window / ln V, as the method sheet has it."""
    low, high = [1.0, 1, 0, 0, 1, 0, 0], [0.0, 0, 0, 2, 2, 0, 0]
    rule = entropy_jump(3, scale=float(np.log(4)), window=2)
    for text, entropies, jump in (("abc.def", low, -1), ("ab.cdef", high, 4)):
        chance = 0.5 + 0.2 * jump / np.log(4)
        found = [rule(grown([sample(text, entropies=entropies)], seed=seed)) for seed in range(400)]
        assert abs(np.mean([len(points) for points in found]) - min(chance, 1)) < 0.07
        np.testing.assert_allclose([p.score for points in found for p in points], jump / np.log(4), rtol=1e-6)


def test_the_branching_score_of_the_policys_own_samples_is_their_entropy():
    one = sample("abcdef", entropies=[1, 5, 2, 4, 1, 1])
    other = sample("abcd", entropies=[0, 0, 9, 1])
    points = top_branching_score(4)(grown([one, other], chains=2))
    # By z-score of each row, positive ones first: (1, 2) 1.7, (0, 1) 1.7, (0, 3) 1.0; then what is next.
    assert set(places(points)[:2]) == {(1, 2), (0, 1)} and places(points)[2:] == [(0, 3), (0, 2)]


def test_the_branching_score_sees_how_the_policy_has_moved_since():
    """The worked example of APPO: of the pooled four, the two strict ones first, then by entropy."""
    moves = [[0.10, -0.05, 0.20, 0.90, 0.00, 0.05], [-0.10, 0.15, 0.05, -0.20, 0.10, 0.30]]
    entropies = [[0.2, 1.5, 0.9, 9.9, 0.4, 1.1], [0.6, 0.3, 1.8, 0.7, 1.4, 7.7]]
    logprobs = -np.arange(1.0, 13).reshape(2, 6).astype(np.float32)
    samples = [
        sample("abcdef", logprobs=logprobs[i], entropies=entropies[i], forced=((3 + 2 * i, 4 + 2 * i),))
        for i in range(2)
    ]
    newest = {NEWEST_LOGPROBS: [logprobs[i] + np.float32(moves[i]) for i in range(2)]}
    batch = partial_batch(samples, 4, 24, [SPLITTER(s.tokens) for s in samples], newest)
    group = grown(samples, chains=2)
    rule = top_branching_score(4, discount=0.5)
    points = rule(dataclasses.replace(group, batch=batch))
    assert places(points) == [(1, 4), (0, 2), (1, 2), (0, 1)]
    np.testing.assert_allclose([p.score for p in points[:2]], [0.722164, 0.279979], atol=1e-4)
    # Without the newest log-probs the policy has not moved, and the entropy decides.
    assert places(rule(group)) == [(1, 2), (0, 1), (1, 4), (0, 5)]


def test_turns_are_chosen_by_their_surprisal_less_what_is_there():
    one = sample("ab.cd.ef", logprobs=[-1, -1, -1, -4, -4, -4, -2, -2])
    fork = sample("ab.xyz", logprobs=[-1, -1, -1, -1, -1, -1], parent=0, fork_index=3)
    assert places(top_turn_surprisal(2)(grown([one]))) == [(0, 3), (0, 6)]
    assert places(top_turn_surprisal(1, penalty=3.0)(grown([one, fork]))) == [(0, 6)]


def test_summaries_fork_at_natural_phrases_first_then_with_given_ones():
    inject = [TOKENIZER.encode("to sum up"), TOKENIZER.encode("so")]
    rule = summary_points(PhraseFinder(("in sum",), TOKENIZER.decode), inject, chains=2, middle=0.5)
    samples = [sample("one two. in sum three"), sample("abcdefghijklmnopqrst")]
    natural, given = rule(grown(samples, chains=2))
    assert natural == ForkPoint(0, 9, 1.0, (), INTERVENTION_SUPPRESS)
    assert (given.parent, given.inject, given.intervention) == (1, tuple(inject[1]), INTERVENTION_INJECT)
    hit = {rule(grown(samples, chains=2, seed=seed))[1].fork_index for seed in range(300)}
    assert hit == set(range(5, 15))  # the middle half
    assert rule(grown(samples, chains=2, round=1))[0].intervention == INTERVENTION_INJECT  # the natural one is used
    twice = [sample("one in sum two in sum"), samples[1]]
    assert [rule(grown(twice, chains=2, round=i))[0].fork_index for i in range(2)] == [4, 15]


def plan_of(**changes):
    return ForkPlan(**{"chains": 2, "points": 2, "rule": random_token(2, 2, tail=0.0), **changes})


def test_a_plan_counts_its_leaves_and_parents():
    assert (plan_of(points=2).leaves, plan_of().parents) == (6, 2)  # Tree-GRPO (2, 2, 1)
    assert plan_of(chains=6, branches=2).leaves == 30  # EPTree (6, 2, 1, 2)
    eptree = plan_of(chains=8, points=4, rounds=2, branches=2)
    assert (eptree.leaves, eptree.parents) == (136, 72)
    assert eptree._replace(fork_forks=False).parents == 8
    for name in ("chains", "points", "rounds", "branches"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            plan_of(**{name: 0}).check()


def test_rounds_number_their_forks_and_leave_out_what_has_no_room():
    def rule(grown):
        return [ForkPoint(0, 1, 2.0, (5,)), ForkPoint(0, 9), ForkPoint(1, 2), ForkPoint(1, 3), ForkPoint(0, 2)]

    plan = plan_of(rule=rule, branches=2, rounds=2)
    rounds = ForkRounds(
        plan, TOKENIZER.decode, lambda s: SPLITTER(s.tokens), seed=0, step=0, prompt_id=0, first_id=30, limit=9
    )
    samples = [sample("abcdefghi"), sample("abcdefghi")]
    forks = rounds(samples)
    assert [(f.parent, f.fork_index, f.sample_id) for f in forks] == [
        (0, 1, 32), (0, 1, 33), (1, 2, 34), (1, 2, 35), (1, 3, 36), (1, 3, 37), (0, 2, 38), (0, 2, 39),
    ]  # fmt: skip
    assert forks[0].inject == (5,) and forks[0].score == 2.0
    assert rounds(samples * 5)[0].sample_id == 40 and rounds(samples * 9) == []


@dataclasses.dataclass
class ForkedGRPO(GRPO):
    """Random forks with GRPO's credit: the control of the tree methods."""

    plan: ForkPlan = dataclasses.field(default_factory=lambda: plan_of(rounds=2))

    def build(self):
        algorithm = dataclasses.replace(self, group_size=self.plan.leaves)
        built = GRPO(group_size=algorithm.group_size, kl_coef=0.0).build()
        return built._replace(plan=built.plan._replace(forks=self.plan))


def forked_config(**changes):
    tiny = tiny_config(algorithm=ForkedGRPO(), steps=3)
    update = dataclasses.replace(tiny.update, row_buckets=(48,), microbatch_buckets=(8,))
    sampling = dataclasses.replace(tiny.sampling, max_new_tokens=8)
    return dataclasses.replace(tiny, update=update, sampling=sampling, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks") / "run"
    train(forked_config(), str(folder))
    return folder


def test_a_run_over_forks_logs_leaves_that_share_their_parents_tokens(run):
    for line, records in zip(run_metrics(run), rollout_records(run).values(), strict=True):
        groups = {}
        for record in records:
            groups.setdefault(record["prompt_id"], []).append(record)
        new = reused = 0
        for group in groups.values():
            assert len(group) <= 10
            for record in group:
                at = record.get("fork_index", 0)
                if "parent" in record:
                    assert record["tokens"][:at] == group[record["parent"]]["tokens"][:at] and at
                    assert record["logprobs"][:at] == group[record["parent"]]["logprobs"][:at]
                new, reused = new + len(record["tokens"]) - at, reused + at
        assert (line["rollout/new_tokens"], line["rollout/reused_tokens"]) == (new, reused)
        assert line["rollout/leaves"] == len(records) and line["rollout/unused_forks"] == 40 - len(records)
        assert line["rollout/logprob_gap_max"] < 2e-5


def test_a_run_over_forks_compiles_nothing_once_it_has_begun(run):
    assert [line["compile/count"] for line in read_jsonl(run / "metrics.jsonl")][1:] == [0, 0]


@pytest.mark.slow
def test_a_run_over_forks_repeats_bit_for_bit(run, tmp_path):
    train(forked_config(), str(tmp_path / "again"))
    assert run_metrics(tmp_path / "again") == run_metrics(run)
    assert rollout_records(tmp_path / "again") == rollout_records(run)


def test_a_span_holds_the_tokens_between_its_two_texts():
    pieces = ["a", "<th", "ink>", "bc", "d", "</", "think>e", "f", "<think>", "g"]

    def decode(ids):
        return "".join(pieces[i] for i in ids)

    inside = _between(decode, list(range(len(pieces))), "<think>", "</think>")
    assert [pieces[i] for i in np.flatnonzero(inside)] == ["bc", "d", "g"]
    assert not any(_between(decode, [0, 3, 4], "<think>", "</think>"))


def test_forks_stay_within_a_span():
    """Every token of `branching` rules lies between the texts; without a span some do not."""
    grown, outside = make_spanned(), 0
    for span in (("b", "d"), ()):
        for point in top_branching_score(4, span=span)(grown):
            is_inside = 2 <= point.fork_index <= 4
            assert is_inside or not span
            outside += not is_inside
    assert outside


def make_spanned():
    """Two samples whose tokens 2 to 4 stand between a b and a d; entropy is high everywhere but at the start."""
    tokens = np.array([[0, 1, 2, 2, 2, 3, 0, 0]] * 2, np.int32)
    samples = [
        Sample(line, np.full(8, -1.0, np.float32), (np.arange(8) * 0.3 + row).astype(np.float32), "stop")
        for row, line in enumerate(tokens)
    ]
    return PartialGroup(
        batch=partial_batch(samples, 2, 8, [np.zeros(8, np.int32)] * 2),
        chains=2,
        round=0,
        key=jax.random.key(0),
        decode=lambda ids: "".join("abcd"[i] for i in ids),
    )
