"""Which groups of a rollout are kept."""

from unittest.mock import Mock

import numpy as np
import pytest

from rljax.plans import RolloutPlan, has_signal
from rljax.rollouts import Actor, NoSignal, ScoredGroup, collect, rejudged
from rljax.sampling import Sample
from rljax.tasks import JUDGED, SKILLS, Example, RewardInput, RewardResult, RewardRunner, RewardSpec


def scored(request):
    """Samples that have the parts which a column of their example says."""
    sample = Sample(np.zeros(2, np.int32), np.zeros(2, np.float32), np.zeros(2, np.float32), "stop")
    parts = request.example.columns["parts"]
    results = [RewardResult(right + 0.1 * form, {"right": right, "form": form}) for right, form in parts]
    return ScoredGroup(request.example, [1], [sample] * 2, ["a", "b"], results, [np.zeros(2, np.int32)] * 2)


def judged():
    actor = Mock(spec=Actor, stats={}, seconds={})
    actor.missing.side_effect = lambda n: n
    actor.ready.side_effect = lambda n: list(map(scored, actor.submit.call_args.args[0]))
    return actor


ALL_WRONG = Example("wrong", {"parts": [(0.0, 1.0), (0.0, 0.0)]}, id=1)
MIXED = Example("mixed", {"parts": [(1.0, 0.0), (0.0, 1.0)]}, id=2)


def kept(signal_reward):
    plan = RolloutPlan(2, keep_group=has_signal, max_sampling_rounds=2, signal_reward=signal_reward)
    draws = iter([[ALL_WRONG], [MIXED]])
    return [example.id for example in collect(judged(), plan, lambda n: next(draws), 1, 0).examples]


def test_a_group_whose_rewards_differ_by_the_format_alone_is_dropped_when_the_answer_is_the_signal():
    assert kept("right") == [MIXED.id]
    assert kept("") == kept("form") == [ALL_WRONG.id]


def test_success_is_told_by_the_skills_that_prompts_hold():
    one = Example("one", {"parts": [(1.0, 0.0), (0.0, 1.0)], SKILLS: ["k@1"]}, id=4)
    two = Example("two", {"parts": [(1.0, 0.0), (1.0, 0.0)], SKILLS: ["k@2", "l@1"]}, id=5)
    stats = collect(judged(), RolloutPlan(2), lambda n: [one, two, MIXED], 3, 0).stats
    assert {name: value for name, value in stats.items() if name.startswith("skill/")} == {
        "skill/k": 0.75,
        "skill/l": 1,
    }


def test_a_signal_that_no_sample_has_is_refused():
    with pytest.raises(ValueError, match=r"signal_reward='rihgt' is none of the samples' rewards: form, right"):
        kept("rihgt")


def test_where_the_signal_does_not_apply_a_group_is_judged_by_the_sum():
    other = Example("of another task", {"parts": [(0.0, 0.0), (0.0, 1.0)]}, id=3)

    def without_right(group):
        is_other = group.example.id == other.id
        results = [RewardResult(r.value, {"form": r.components["form"]}) if is_other else r for r in group.results]
        return group._replace(results=results)

    actor = judged()
    actor.ready.side_effect = lambda n: [without_right(scored(r)) for r in actor.submit.call_args.args[0]]
    plan = RolloutPlan(2, keep_group=has_signal, max_sampling_rounds=2, signal_reward="right")
    draws = iter([[ALL_WRONG, MIXED], [other, other]])
    found = collect(actor, plan, lambda n: next(draws), 2, 0)
    assert [example.id for example in found.examples] == [MIXED.id, other.id]


def test_what_a_curriculum_judged_is_kept_and_trained_by_its_rewards_alone():
    draws = iter([[ALL_WRONG], [MIXED]])
    plan = RolloutPlan(2, keep_group=has_signal, max_sampling_rounds=2, signal_reward="right")
    own = {ALL_WRONG.id: [0.5, 0.5], MIXED.id: [0.25, 1.0]}

    def rejudge(groups):
        return [rejudged(group, own[group.example.id]) for group in groups]

    found = collect(judged(), plan, lambda n: next(draws), 1, 0, rejudge=rejudge)
    assert [example.id for example in found.examples] == [MIXED.id] and found.rewards.tolist() == [[0.25, 1.0]]
    assert [trajectory.reward for trajectory in found.trajectories] == [0.25, 1.0]
    parts = {group.example.id: [part[JUDGED] for part in group.components] for group in found.seen()}
    assert parts == own
    assert rejudged(found.drawn[0], None) is found.drawn[0]


def of_result(change):
    """An actor whose results are `change(index, result)` of those in the data."""
    actor = judged()

    def changed(group):
        return group._replace(results=[change(i, result) for i, result in enumerate(group.results)])

    actor.ready.side_effect = lambda n: [changed(scored(r)) for r in actor.submit.call_args.args[0]]
    return actor


def test_a_step_in_which_the_signal_applies_to_no_row_goes_on():
    def apart(_, result):
        return RewardResult(result.value, {"form": result.components["form"]}, not_applied=("right",))

    plan = RolloutPlan(2, keep_group=has_signal, signal_reward="right")
    assert len(collect(of_result(apart), plan, lambda n: [ALL_WRONG], 1, 0).examples) == 1


def test_a_sample_to_which_the_signal_does_not_apply_is_not_compared_with_the_others():
    """The first completion has right=0, and a sum of 1 beside it says nothing of what is right."""

    def apart(index, result):
        return result if index == 0 else RewardResult(1.0, {"form": 1.0}, not_applied=("right",))

    plan = RolloutPlan(2, keep_group=has_signal, max_sampling_rounds=1, signal_reward="right")
    with pytest.raises(NoSignal, match="kept 0 of the 1 groups"):
        collect(of_result(apart), plan, lambda n: [ALL_WRONG], 1, 0)


FORM = RewardSpec(lambda completion: 1.0, name="form", in_process=True)


def test_the_rewards_say_which_of_them_does_not_apply():
    runner = RewardRunner([RewardSpec(lambda completion: None, name="right", in_process=True), FORM])
    (result,) = runner.score([RewardInput("p", "c")])
    assert result.not_applied == ("right",)
    assert result.voided().not_applied == ("right",)
