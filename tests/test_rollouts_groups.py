"""Groups that lack members or are old: what is left out, completed, weighed and counted."""

import dataclasses
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from rljax.advantages import group_centered
from rljax.batching import stack
from rljax.batching.config import PackConfig
from rljax.batching.pack import pack
from rljax.envs import DONE, END_REASONS, FAILED
from rljax.losses import sequence_mean, token_mean
from rljax.plans import ForkPlan, RolloutPlan, has_signal
from rljax.plans.fork_rules import random_step
from rljax.rollouts import Actor, GroupRules, GroupsConfig, NoSignal, ScoredGroup, collect
from rljax.rollouts.groups import group_weight, has_enough, is_fresh, repair, terminal_class
from rljax.sampling import Sample
from rljax.tasks import Example, RewardResult


@pytest.mark.parametrize(
    ("version", "oldest", "max_age", "keep"),
    [(10, 7, 3, True), (10, 6, 3, False), (10, 10, 0, True), (11, 7, 3, False)],
)
def test_what_is_too_old(version, oldest, max_age, keep):
    """The worked examples of GLM-5's rule."""
    assert is_fresh(oldest, version, max_age) == keep


def test_an_incomplete_group_is_filled_in_turn_or_drawn_again():
    """The worked examples of GLM-5's repair."""
    valid = np.array([1, 0, 1, 1, 0, 1, 1, 0], bool)
    np.testing.assert_array_equal(repair(valid), [0, 2, 3, 5, 6, 0, 2, 3])
    np.testing.assert_array_equal(repair(np.array([1, 0, 1, 1], bool)), [0, 2, 3, 0])
    assert has_enough(5, 8) and not has_enough(4, 8) and not has_enough(0, 8) and has_enough(1, 1)
    assert group_weight(5, 8) == 1.6 and group_weight(8, 8) == 1.0
    for impossible in (lambda: repair(np.zeros(4, bool)), lambda: group_weight(0, 4)):
        with pytest.raises(ValueError, match="without a valid"):
            impossible()


def test_how_an_episode_ends_says_what_becomes_of_it():
    assert {terminal_class(end) for end in FAILED} == {"environment"}
    # A failure is one even where the episode had run into a limit of tokens as well.
    assert {terminal_class(end, is_truncated=True) for end in FAILED} == {"environment"}
    assert {terminal_class(end) for end in set(END_REASONS) - {DONE, *FAILED}} == {"policy"}
    assert terminal_class(DONE) == "finished" and terminal_class(None) == "under_way"
    assert terminal_class(None, is_truncated=True) == "policy"


def group_of(example, rewards, versions=None):
    """A group whose member i said `i + 1` tokens; a reward of None is a failure."""
    samples = [
        Sample(
            np.full(i + 1, i, np.int32),
            np.zeros(i + 1, np.float32),
            np.zeros(i + 1, np.float32),
            "stop",
            versions=None if versions is None else np.array([versions[i], *[9] * i], np.int32),
        )
        for i in range(len(rewards))
    ]
    results = [RewardResult(0.0, {}, False, "gone") if r is None else RewardResult(r, {}) for r in rewards]
    texts = [f"{i}" for i in range(len(rewards))]
    steps = [np.zeros(i + 1, np.int32) for i in range(len(rewards))]
    return ScoredGroup(example, [1], samples, texts, results, steps)


def acting(*groups):
    """An actor that gives these groups, in order, and the number of groups that it was asked for each time."""
    waiting = list(groups)
    asked = []

    def ready(n):
        asked.append(n)
        return [waiting.pop(0) for _ in range(n)]

    actor = Mock(spec=Actor, stats={}, seconds={})
    actor.missing.side_effect = lambda n: n
    actor.ready.side_effect = ready
    return actor, asked


def collected(groups, rules, *, n, size, step=9, **plan):
    actor, asked = acting(*groups)
    rollout = collect(actor, RolloutPlan(size, **plan), lambda k: [Example("p")] * k, n, step, rules=rules)
    return rollout, asked


E = [Example("p", {}, id=i) for i in range(6)]


def advantages_of(rollout):
    """Of each trajectory, which has one on all of its tokens."""
    advantages = np.asarray(group_centered()(stack(rollout.trajectories)))
    return np.array([values[np.abs(values).argmax()] for values in advantages[: len(rollout.trajectories)]])


FIVE_OF_EIGHT = (1.0, None, 0.0, 1.0, None, 0.0, 1.0, None)


def test_a_padded_group_is_compared_with_the_mean_of_what_stands_in_it():
    """Valid rewards (1,0,1,0,1) have a mean of .6, those that stand in the places one of .625."""
    rollout, _ = collected([group_of(E[0], FIVE_OF_EIGHT)], GroupRules("pad"), n=1, size=8)
    assert [t.reward for t in rollout.trajectories] == [1, 0, 1, 0, 1, 1, 0, 1]
    assert [len(t.tokens) - 1 for t in rollout.trajectories] == [1, 3, 4, 6, 7, 1, 3, 4]
    assert len({t.episode_id for t in rollout.trajectories}) == 8
    want = [0.375, -0.625, 0.375, -0.625, 0.375, 0.375, -0.625, 0.375]
    np.testing.assert_allclose(advantages_of(rollout), want, atol=1e-6)

    # What was sampled is what a curriculum and the metrics learn of.
    assert rollout.observed()[1] == [pytest.approx(0.6)] and rollout.stats["reward_mean"] == pytest.approx(0.6)
    assert rollout.stats["incomplete_groups"] == 1 and rollout.stats["invalid_rewards"] == 3
    assert [record["sample"] for record in rollout.records] == [0, 2, 3, 5, 6, 0, 2, 3]
    assert [record["error"] for record in rollout.untrained] == ["gone"] * 3


def weights_of(rollout, aggregate):
    """Weight in the loss of each trajectory's tokens, summed over the row, by the number that is its log-probs."""
    batch = stack(numbered(rollout).trajectories)
    packed = pack(batch, np.zeros(batch.tokens.shape, np.float32), PackConfig(pack_length=64), token_weights=aggregate)
    numbers = np.asarray(packed.rows.behavior_logprobs, np.int32)[packed.rows.loss_mask]
    return np.bincount(numbers, packed.rows.loss_weights[packed.rows.loss_mask], minlength=len(rollout.trajectories))


def numbered(rollout):
    """The rollout with the number of each trajectory as its log-probs."""
    trajectories = [
        dataclasses.replace(t, behavior_logprobs=np.full(len(t.tokens), i, np.float32))
        for i, t in enumerate(rollout.trajectories)
    ]
    return rollout._replace(trajectories=trajectories)


def test_reweighted_groups_count_alike():
    groups = [group_of(E[0], (1.0, None, 0.0, 1.0)), group_of(E[1], (1.0, 0.0, 0.0, 1.0))]
    rollout, _ = collected(groups, GroupRules("reweight"), n=2, size=4)
    assert len(rollout.trajectories) == 8

    # By rows: B' is 7, and the denominator has to be the 8 places: 4/3 and 1 of an eighth.
    by_row = weights_of(rollout, sequence_mean)
    np.testing.assert_allclose(by_row, np.array([4 / 3, 0, 4 / 3, 4 / 3, 1, 1, 1, 1]) / 8, rtol=1e-6)

    # By tokens a long member still counts more: lengths 1, 3, 4 and 1 to 4.
    lengths = np.array([1, 0, 3, 4, 1, 2, 3, 4])
    by_token = weights_of(rollout, token_mean)
    want = np.array([4 / 3, 0, 4 / 3, 4 / 3, 1, 1, 1, 1]) * 7 / 8 * lengths / lengths.sum()
    np.testing.assert_allclose(by_token, want, rtol=1e-6)

    # The mean that they are compared with is that of the valid members.
    np.testing.assert_allclose(advantages_of(rollout)[:4], [1 / 3, 0, -2 / 3, 1 / 3], atol=1e-6)


def test_complete_groups_have_the_same_numbers_under_every_rule():
    groups = [group_of(E[0], (1.0, 0.0, 0.5)), group_of(E[1], (0.0, 0.0, 1.0))]

    def packed(rules):
        rollout, asked = collected(groups, rules, n=2, size=3)
        assert asked == [2]
        batch = stack(rollout.trajectories)
        return pack(batch, np.asarray(group_centered()(batch)), PackConfig(pack_length=64), token_weights=sequence_mean)

    want = packed(GroupRules())
    for rules in (GroupRules("pad"), GroupRules("reweight"), GroupRules("reweight", max_age=0)):
        for a, b in zip(jax.tree.leaves(packed(rules)), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_group_without_enough_members_is_drawn_again_and_no_more():
    groups = [
        group_of(E[0], (1.0, None, None, 0.0)),
        group_of(E[1], (1.0, None, 0.0, 0.0)),
        group_of(E[2], (None, None, None, None)),
        group_of(E[3], (1.0, 1.0, 1.0, 0.0)),
    ]
    rollout, asked = collected(groups, GroupRules("reweight"), n=2, size=4)
    assert asked == [2, 1, 1]
    assert [example.id for example in rollout.examples] == [1, 3]
    assert rollout.stats["groups_left_out"] == 2 and rollout.stats["prompts_drawn"] == 4
    assert rollout.stats["invalid_rewards"] == 7 and rollout.stats["incomplete_groups"] == 1
    assert len(rollout.untrained) == 8

    # As they are, the first two would have been taken.
    rollout, asked = collected(groups, GroupRules(), n=2, size=4)
    assert asked == [2] and [example.id for example in rollout.examples] == [0, 1]
    assert not {"groups_left_out", "too_old", "incomplete_groups"} & set(rollout.stats)


def test_old_samples_are_left_out_and_their_group_completed_or_drawn_again():
    groups = [
        group_of(E[0], (1.0, 0.0, 0.0), versions=(9, 4, 7)),  # one of three is too old
        group_of(E[1], (1.0, 0.0, 0.0), versions=(3, 4, 9)),  # two of three are
        group_of(E[2], (1.0, 0.0, 0.0), versions=(6, 6, 6)),
        group_of(E[3], (1.0, 0.0, 0.0), versions=(9, 9, 9)),
    ]
    rollout, asked = collected(groups, GroupRules("reweight", max_age=3), n=2, size=3)
    assert asked == [2, 1] and [example.id for example in rollout.examples] == [0, 2]
    assert [t.is_valid for t in rollout.trajectories] == [True, False, True, True, True, True]
    assert rollout.stats["too_old"] == 3 and rollout.stats["groups_left_out"] == 1
    assert rollout.stats["invalid_rewards"] == 0 and rollout.stats["staleness_max"] == 5
    assert "5 versions behind" in rollout.records[1]["error"]

    # Without a way to complete them, groups with an old member are left out as a whole.
    rollout, asked = collected(groups, GroupRules(max_age=3), n=2, size=3)
    assert asked == [2, 2] and [example.id for example in rollout.examples] == [2, 3]
    assert rollout.stats["groups_left_out"] == 2 and rollout.stats["staleness_max"] == 3


def test_age_counts_from_the_weights_that_are_trained():
    groups = [group_of(E[0], (1.0, 0.0), versions=(2, 2))]
    rollout, _ = collected(groups, GroupRules(max_age=0, version=2), n=1, size=2, step=9)
    assert rollout.stats["too_old"] == 0 and rollout.stats["staleness_max"] == 0


def test_a_step_that_finds_no_groups_says_why():
    old = [group_of(E[0], (1.0, 0.0), versions=(1, 1)) for _ in range(20)]
    with pytest.raises(
        NoSignal, match=r"kept 0 of the 1 groups .* 3 groups are left out .* 100% of the samples are too old"
    ):
        collected(old, GroupRules(max_age=2), n=1, size=2, max_sampling_rounds=3)
    failed = [group_of(E[0], (None, None)) for _ in range(20)]
    with pytest.raises(NoSignal, match=r"100% of the rewards are invalid; repair the reward \(gone\)"):
        collected(failed, GroupRules("pad"), n=1, size=2, max_sampling_rounds=2)


def test_under_dynamic_sampling_incomplete_groups_go_the_same_way():
    groups = [group_of(E[0], (1.0, None)), group_of(E[1], (1.0, 1.0)), group_of(E[2], (1.0, 0.0))]
    rollout, asked = collected(groups, GroupRules("pad"), n=1, size=2, keep_group=has_signal)
    assert asked == [1, 1, 1] and [example.id for example in rollout.examples] == [2]
    assert rollout.stats["groups_left_out"] == 1


@pytest.mark.parametrize(
    ("config", "where", "message"),
    [
        (GroupsConfig(max_age=2), {"spans_updates": False}, r"config\.rollout\.groups\.max_age=2 has no effect"),
        (
            GroupsConfig("pad"),
            {"spans_updates": True, "forks": True},
            r"config\.rollout\.groups\.incomplete='pad' counts independent members",
        ),
        (
            GroupsConfig("reweight"),
            {"spans_updates": True, "rows_per_member": 2},
            r"groups\.incomplete='reweight' counts samples, and 2 of them are one run",
        ),
    ],
)
def test_rules_that_cannot_work_are_refused(config, where, message):
    forks = ForkPlan(chains=2, points=1, rule=random_step(1, 2)) if where.pop("forks", False) else None
    with pytest.raises(ValueError, match=message):
        config.check(RolloutPlan(4, forks=forks), **where)
