"""From prompts to scored trajectories: one step's rollout, whatever the actor is."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax.plans import RolloutPlan
from rljax.rollouts.actor import Actor, ScoredGroup, number_groups
from rljax.rollouts.groups import GroupRules, complete, group_weight, judge
from rljax.rollouts.stats import rollout_stats, staleness_stats
from rljax.rollouts.trajectories import columns_of, record_of, trajectory_of
from rljax.tasks import JUDGED, Example, RewardResult, SeenGroup
from rljax.types import ROW_WEIGHT, Trajectory

AS_THEY_ARE = GroupRules()


class Rollout(NamedTuple):
    """What one step collected: a trajectory and a record for each sample, groups in order.

    A group has `group_size` samples, or fewer where forks were left out; `rewards` is NaN there and where a reward
    failed.

    Attributes:
        trajectories: one a sample.
        records: JSON-ready lines for the rollout log, one a sample.
        examples: one a group.
        rewards: float64 [groups, group_size], raw: before shaping.
        stats: metrics of this rollout, without prefix.
        actor_stats: metrics that the actor itself reports, without prefix.
        seconds: wall seconds by phase.
        untrained: records of what dynamic sampling drew and left out.
        drawn: everything that was sampled for it; empty where the rollout was read from a file.
    """

    trajectories: list[Trajectory]
    records: list[dict[str, Any]]
    examples: list[Example]
    rewards: np.ndarray
    stats: dict[str, float]
    actor_stats: dict[str, float]
    seconds: dict[str, float]
    untrained: Sequence[dict[str, Any]] = ()
    drawn: Sequence[ScoredGroup] = ()

    def seen(self) -> list[SeenGroup]:
        """What a curriculum that makes tasks learns from."""
        return [seen_group(group) for group in self.drawn]

    def observed(self) -> tuple[list[Example], list[float]]:
        """The examples that have a valid reward, and its mean over their valid samples: what a curriculum learns from.
        A reward that failed says nothing about an example."""
        scored = [(example, row[~np.isnan(row)]) for example, row in zip(self.examples, self.rewards, strict=True)]
        scored = [(example, valid) for example, valid in scored if len(valid)]
        return [example for example, _ in scored], [float(valid.mean()) for _, valid in scored]


def seen_group(group: ScoredGroup) -> SeenGroup:
    """A group as curricula see it."""
    return SeenGroup(
        example=group.example,
        texts=list(group.texts),
        rewards=[float(result.value) if result.is_valid else np.nan for result in group.results],
        components=[result.components for result in group.results],
        answers=list(group.answers),
        tokens=sum(int(sample.sampled.sum()) for sample in group.samples),
    )


def rejudged(group: ScoredGroup, rewards: Sequence[float] | None) -> ScoredGroup:
    """The group with the `rewards` that a curriculum gives its samples; itself for None."""
    if rewards is None:
        return group
    return group._replace(results=[RewardResult(value, {JUDGED: value}) for value in rewards])


class When(NamedTuple):
    """The place of a rollout in its run."""

    step: int
    """The step that trains on it: it enters random numbers."""
    version: int
    """Version of the weights that sampled it."""
    trained: int
    """Version of the weights that it is the first to train."""


class NoSignal(RuntimeError):
    """Dynamic sampling did not find the groups that it needs. `rollout` holds everything that was drawn; the message
    says what the groups lack."""

    def __init__(self, message: str, rollout: Rollout):
        super().__init__(message)
        self.rollout = rollout


def collect(
    actor: Actor,
    plan: RolloutPlan,
    draw: Callable[[int], Sequence[Example]],
    n: int,
    step: int,
    version: int | None = None,
    *,
    rules: GroupRules = AS_THEY_ARE,
    rejudge: Callable[[Sequence[ScoredGroup]], Sequence[ScoredGroup]] = list,
) -> Rollout:
    """Collects `n` groups of `plan.group_size` samples for `step`; of at most so many if the plan forks.

    `version` is that of the actor's weights, `step` if None. `draw(k)` gives the next `k` examples. `rejudge` may give
    groups other rewards than the actor's. Under dynamic sampling (`plan.keep_group`, DAPO 2503.14476) groups whose raw
    rewards, or what of them `plan.signal_reward` names, carry no signal are dropped and more prompts are drawn, up to
    `plan.max_sampling_rounds` times; `NoSignal` says what they lack when that does not fill the batch. The same holds
    of groups that `rules` leave out: for these as many are drawn as were left out.
    """
    trained = step if rules.version is None else rules.version
    when = When(step, step if version is None else version, trained)
    drawn = _Drawn([], [], {}, dict.fromkeys(("failed", "too_old", "groups_left_out"), 0), [])
    seen: dict[int, int] = {}  # a prompt drawn again in a later round gets fresh samples

    for _ in range(plan.max_sampling_rounds if plan.keep_group or rules.leave_out() else 1):
        # Dynamic sampling asks for whole batches, since most of what it draws may go.
        wanted = n if plan.keep_group else n - len(drawn.kept)
        examples = draw(actor.missing(wanted))
        actor.submit(number_groups(examples, plan.group_size, seen), plan, step)

        found = actor.ready(wanted)
        for phase, spent in actor.seconds.items():
            drawn.seconds[phase] = drawn.seconds.get(phase, 0.0) + spent
        for group in rejudge(found):
            drawn.add(group, plan, rules, trained)
        if len(drawn.kept) >= n:
            break

    _check_signal(plan, drawn.groups)
    if len(drawn.kept) < n:
        # Nothing of it is trained on, so nothing is completed either.
        raise NoSignal(_what_is_missing(plan, drawn, n), _rollout(actor, plan, drawn, drawn.groups, when, AS_THEY_ARE))
    return _rollout(actor, plan, drawn, drawn.kept[:n], when, rules)


class _Drawn(NamedTuple):
    """What the rounds of one step have brought so far."""

    kept: list[ScoredGroup]
    dropped: list[ScoredGroup]
    seconds: dict[str, float]
    counts: dict[str, int]
    errors: list[str]

    @property
    def groups(self) -> list[ScoredGroup]:
        return [*self.kept, *self.dropped]

    def add(self, found: ScoredGroup, plan: RolloutPlan, rules: GroupRules, trained: int) -> None:
        """Keeps a group or drops it, and counts why."""
        group, is_taken, too_old = judge(found, rules, trained)
        failed = [result for result in found.results if not result.is_valid]
        self.errors.extend(str(result.error) for result in failed)
        self.counts["failed"] += len(failed)
        self.counts["too_old"] += too_old
        self.counts["groups_left_out"] += not is_taken

        is_kept = is_taken and (plan.keep_group is None or plan.keep_group(_signal(plan, group)))
        (self.kept if is_kept else self.dropped).append(group)


def _rollout(
    actor: Actor, plan: RolloutPlan, drawn: _Drawn, groups: Sequence[ScoredGroup], when: When, rules: GroupRules
) -> Rollout:
    """The rollout of `groups`, which were found among those drawn, completed as `rules` say."""
    rewards = _rewards_of(plan, groups)
    completed = [complete(group, rules) for group in groups]
    trajectories, records = _rows_of([group for group, _ in completed], plan, when)
    if rules.incomplete == "reweight":
        trajectories = _weighted(trajectories, rewards)

    is_used = {id(group) for group in groups}
    untrained = _rows_of([group for group in drawn.groups if id(group) not in is_used], plan, when)[1]

    # A sample that another one stands for is to be found in the log, with what it failed with.
    repeated = [place for _, order in completed for place in order]
    if rules.incomplete == "pad":
        for record, place in zip(records, repeated, strict=True):
            record["sample"] = place
        untrained += [record for record in _rows_of(groups, plan, when)[1] if record["reward"] is None]

    stats = rollout_stats(plan, groups, rewards, drawn=len(drawn.groups), failed=drawn.counts["failed"])
    stats |= staleness_stats(trajectories, when.trained)
    if rules.leave_out():
        stats |= {name: float(drawn.counts[name]) for name in ("too_old", "groups_left_out")}
        stats["incomplete_groups"] = float(sum(not all(r.is_valid for r in group.results) for group in groups))

    examples = [group.example for group in groups]
    return Rollout(
        trajectories, records, examples, rewards, stats, dict(actor.stats), drawn.seconds, untrained, drawn.groups
    )


def _weighted(trajectories: Sequence[Trajectory], rewards: np.ndarray) -> list[Trajectory]:
    """The trajectories with the weights at which all groups count alike; every one has one, or the column would be
    missing for all of them."""
    valid = (~np.isnan(rewards)).sum(axis=1)
    made = np.bincount([t.group_id for t in trajectories], minlength=len(rewards))
    weights = [group_weight(int(n), int(size)) for n, size in zip(valid, made, strict=True)]
    return [dataclasses.replace(t, columns={**t.columns, ROW_WEIGHT: weights[t.group_id]}) for t in trajectories]


def _what_is_missing(plan: RolloutPlan, drawn: _Drawn, wanted: int) -> str:
    """Why so few groups of those drawn can be trained on, and what to change."""
    groups = drawn.groups
    samples = [sample for group in groups for sample in group.samples]
    cut = float(np.mean([sample.finish_reason == "length" for sample in samples]))
    equal = float(np.mean([len(set(_signal(plan, group).tolist())) < 2 for group in groups]))
    failed = drawn.counts["failed"]
    too_old = drawn.counts["too_old"]

    reasons = []
    remedies = []
    if drawn.counts["groups_left_out"]:
        reasons.append(f"{drawn.counts['groups_left_out']} groups are left out as incomplete or too old")
    if too_old:
        reasons.append(f"{too_old / len(samples):.0%} of the samples are too old")
        remedies.append("raise config.rollout.groups.max_age, or lower config.actor.groups_in_flight")
    if failed and failed >= len(samples) / 2:
        remedies.append(f"repair the reward ({drawn.errors[0]})")
    if plan.keep_group:
        reasons.append(f"{equal:.0%} of the groups have equal rewards")
        reasons.append(f"{cut:.0%} of the samples are cut off by the length limit")
        if cut >= 0.5:
            remedies.append("raise config.sampling.max_new_tokens, since a completion that is cut off may not earn")
        remedies.append(
            "choose easier or harder prompts, a larger group_size, or an algorithm without dynamic sampling"
        )
    elif not remedies:
        remedies.append("repair what fails, or set config.rollout.groups.incomplete='as_is'")

    reasons.append(f"and {failed / len(samples):.0%} of the rewards are invalid")
    what = "dynamic sampling" if plan.keep_group else "a step"
    return (
        f"{what} kept {len(drawn.kept)} of the {wanted} groups it needs after {plan.max_sampling_rounds} rounds "
        f"({len(groups)} prompts): {', '.join(reasons)}; {'; '.join(remedies)}"
    )


def _rows_of(
    groups: Sequence[ScoredGroup], plan: RolloutPlan, when: When
) -> tuple[list[Trajectory], list[dict[str, Any]]]:
    """Trajectories and their records."""
    trajectories: list[Trajectory] = []
    records: list[dict[str, Any]] = []
    columns = columns_of(plan, groups)

    for group_id, group in enumerate(groups):
        first_row = len(trajectories)  # parents and episodes are named by row of the whole rollout
        for index in range(len(group.results)):
            trajectory = trajectory_of(
                plan, group, index, when.version, columns, group_id=group_id, first_row=first_row
            )
            trajectories.append(trajectory)
            records.append(record_of(group, index, trajectory, when.step))

    return trajectories, records


def _rewards_of(plan: RolloutPlan, groups: Sequence[ScoredGroup]) -> np.ndarray:
    """Raw rewards [groups, group_size] of what was sampled."""
    rewards = np.full((len(groups), plan.group_size), np.nan)
    for group_id, group in enumerate(groups):
        for index, result in enumerate(group.results):
            if result.is_valid:
                rewards[group_id, index] = result.value
    return rewards


def _signal(plan: RolloutPlan, group: ScoredGroup) -> np.ndarray:
    """What dynamic sampling judges a group by: of its valid samples the reward that the plan names, of those that it
    applies to; or the sum, where the plan names none or one that applies to none of them."""
    valid = [result for result in group.results if result.is_valid]
    # A sum beside a reward would differ from it without saying anything.
    named = [result for result in valid if plan.signal_reward in result.components]
    return np.array([result.part(plan.signal_reward) for result in named or valid], dtype=np.float64)


def _check_signal(plan: RolloutPlan, groups: Sequence[ScoredGroup]) -> None:
    """ValueError where the plan names what no valid sample of a step was asked for: names of what an environment counts
    are known to nobody before."""
    if not plan.keep_group or not plan.signal_reward:
        return
    valid = [result for group in groups for result in group.results if result.is_valid]
    # What a curriculum judged has no other reward, and is no sample of a task.
    valid = [result for result in valid if JUDGED not in result.components]
    names = {name for result in valid for name in (*result.components, *result.not_applied)}
    if names and plan.signal_reward not in names:
        raise ValueError(
            f"config.algorithm.signal_reward={plan.signal_reward!r} is none of the samples' rewards: "
            f"{', '.join(sorted(names))}"
        )
