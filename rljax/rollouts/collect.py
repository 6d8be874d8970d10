"""From prompts to scored trajectories: one step's rollout, whatever the actor is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax.plans import RolloutPlan
from rljax.rollouts.actor import Actor, ScoredGroup, number_groups
from rljax.rollouts.stats import rollout_stats, staleness_stats
from rljax.rollouts.trajectories import columns_of, record_of, trajectory_of
from rljax.tasks import Example
from rljax.types import Trajectory


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
    """

    trajectories: list[Trajectory]
    records: list[dict[str, Any]]
    examples: list[Example]
    rewards: np.ndarray
    stats: dict[str, float]
    actor_stats: dict[str, float]
    seconds: dict[str, float]
    untrained: Sequence[dict[str, Any]] = ()

    def observed(self) -> tuple[list[Example], list[float]]:
        """The examples that have a valid reward, and its mean over their valid samples: what a curriculum learns from.
        A reward that failed says nothing about an example."""
        scored = [(example, row[~np.isnan(row)]) for example, row in zip(self.examples, self.rewards, strict=True)]
        scored = [(example, valid) for example, valid in scored if len(valid)]
        return [example for example, _ in scored], [float(valid.mean()) for _, valid in scored]


class When(NamedTuple):
    """The place of a rollout in its run."""

    step: int
    """The step that trains on it: it enters random numbers."""
    version: int
    """Steps that the weights had been trained for which sampled it."""


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
) -> Rollout:
    """Collects `n` groups of `plan.group_size` samples for `step`; of at most so many if the plan forks.

    `version` is that of the actor's weights, `step` if None. `draw(k)` gives the next `k` examples. Under dynamic
    sampling (`plan.keep_group`, DAPO 2503.14476) groups whose raw rewards, or what of them `plan.signal_reward` names,
    carry no signal are dropped and more prompts are drawn, up to `plan.max_sampling_rounds` times; `NoSignal` says what
    they lack when that does not fill the batch.
    """
    when = When(step, step if version is None else version)
    kept: list[ScoredGroup] = []
    dropped: list[ScoredGroup] = []
    seconds: dict[str, float] = {}
    seen: dict[int, int] = {}  # a prompt drawn again in a later round gets fresh samples

    for _ in range(plan.max_sampling_rounds if plan.keep_group else 1):
        examples = draw(actor.missing(n))
        actor.submit(number_groups(examples, plan.group_size, seen), plan, step)

        for group in actor.ready(n):
            is_kept = plan.keep_group is None or plan.keep_group(_signal(plan, group))
            (kept if is_kept else dropped).append(group)
        for phase, spent in actor.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
        if len(kept) >= n:
            break

    drawn = [*kept, *dropped]
    _check_signal(plan, drawn)
    if len(kept) < n:
        rollout = _rollout(actor, plan, drawn, drawn, when, seconds)
        raise NoSignal(_what_is_missing(plan, kept, drawn, n), rollout)
    return _rollout(actor, plan, kept[:n], drawn, when, seconds)


def _rollout(
    actor: Actor,
    plan: RolloutPlan,
    groups: Sequence[ScoredGroup],
    drawn: Sequence[ScoredGroup],
    when: When,
    seconds: dict[str, float],
) -> Rollout:
    """The rollout of `groups`, which were found among `drawn`."""
    trajectories, records, rewards = _rows_of(groups, plan, when)
    is_used = {id(group) for group in groups}
    untrained = _rows_of([group for group in drawn if id(group) not in is_used], plan, when)[1]

    failed = sum(not result.is_valid for group in drawn for result in group.results)
    stats = rollout_stats(plan, groups, rewards, drawn=len(drawn), failed=failed)
    stats |= staleness_stats(trajectories, when.step)
    examples = [group.example for group in groups]
    return Rollout(trajectories, records, examples, rewards, stats, dict(actor.stats), seconds, untrained)


def _what_is_missing(plan: RolloutPlan, kept: Sequence[ScoredGroup], drawn: Sequence[ScoredGroup], wanted: int) -> str:
    """Why so few groups of those drawn carry a signal, and what to change."""
    samples = [sample for group in drawn for sample in group.samples]
    results = [result for group in drawn for result in group.results]
    cut = float(np.mean([sample.finish_reason == "length" for sample in samples]))
    failed = [result for result in results if not result.is_valid]
    equal = float(np.mean([len(set(_signal(plan, group).tolist())) < 2 for group in drawn]))

    remedies = []
    if failed and len(failed) >= len(results) / 2:
        remedies.append(f"repair the reward ({failed[0].error})")
    if cut >= 0.5:
        remedies.append("raise config.sampling.max_new_tokens, since a completion that is cut off may not earn")
    remedies.append("choose easier or harder prompts, a larger group_size, or an algorithm without dynamic sampling")
    return (
        f"dynamic sampling kept {len(kept)} of the {wanted} groups it needs after {plan.max_sampling_rounds} rounds "
        f"({len(drawn)} prompts): {equal:.0%} of the groups have equal rewards, {cut:.0%} of the samples are cut off "
        f"by the length limit, and {len(failed) / len(results):.0%} of the rewards are invalid; {'; '.join(remedies)}"
    )


def _rows_of(
    groups: Sequence[ScoredGroup], plan: RolloutPlan, when: When
) -> tuple[list[Trajectory], list[dict[str, Any]], np.ndarray]:
    """Trajectories, their records, and raw rewards [groups, group_size]."""
    if not groups:
        return [], [], np.empty((0, plan.group_size))

    trajectories: list[Trajectory] = []
    records: list[dict[str, Any]] = []
    rewards = np.full((len(groups), plan.group_size), np.nan)
    columns = columns_of(plan, groups)

    for group_id, group in enumerate(groups):
        first_row = len(trajectories)  # parents and episodes are named by row of the whole rollout
        for index, result in enumerate(group.results):
            trajectory = trajectory_of(
                plan, group, index, when.version, columns, group_id=group_id, first_row=first_row
            )
            trajectories.append(trajectory)
            records.append(record_of(group, index, trajectory, when.step))
            if result.is_valid:
                rewards[group_id, index] = result.value

    return trajectories, records, rewards


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
    names = {name for result in valid for name in (*result.components, *result.not_applied)}
    if names and plan.signal_reward not in names:
        raise ValueError(
            f"config.algorithm.signal_reward={plan.signal_reward!r} is none of the samples' rewards: "
            f"{', '.join(sorted(names))}"
        )
