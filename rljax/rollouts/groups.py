"""Which groups are trained on, and as what, where members failed or are too old. Host.

How an episode ended says what becomes of it (`terminal_class`). What is left out for its age or for its environment
leaves a group incomplete, and an incomplete group is taken as it is, repaired, or drawn again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rljax.envs import DONE, FAILED
from rljax.plans import RolloutPlan
from rljax.rollouts.actor import ScoredGroup
from rljax.settings import field
from rljax.tasks import RewardResult

Incomplete = Literal["as_is", "pad", "reweight"]
"""What becomes of a group in which some member has no valid reward."""

TerminalClass = Literal["finished", "policy", "environment", "under_way"]
"""How an episode ended: by itself, whether the task was solved or not; at a limit that the policy ran into; by a
failure of its environment; or not at all."""


@dataclasses.dataclass
class GroupsConfig:
    """Groups that lack members, and groups that are old."""

    incomplete: Incomplete = "as_is"
    """What becomes of a group some of whose members have no valid reward. `as_is` trains on the others, each of which
    counts as a member of a complete group does. The other two (GLM-5, 2602.15763) draw another group where half of the
    members or more are missing. Else `reweight` lets each of `n` members of `size` count `size / n` times, so that all
    groups count the same, and `pad` repeats members in turn in the empty places, which also shifts the mean that they
    are compared with."""
    max_age: int | None = field(default=None, least=0)
    """Versions of the weights that the oldest token of a sample may be behind those that it trains; what is older is
    left out. With `as_is` that is its whole group, and another one is drawn; else the sample, which then is missing in
    its group. None is any age. It takes effect where a group may span updates (`groups_in_flight`, `stale_share`)."""

    def check(self, plan: RolloutPlan, *, spans_updates: bool, rows_per_member: int = 1) -> None:
        """ValueError, in one line that begins with the field, for rules that do not fit the plan or have no effect.

        `spans_updates` says whether a sample can hold tokens of several versions, `rows_per_member` how many samples
        belong together as one member of a group.
        """
        where = "config.rollout.groups"
        if self.max_age is not None and not spans_updates:
            raise ValueError(
                f"{where}.max_age={self.max_age} has no effect: no group of config.actor spans updates; set "
                "config.actor.groups_in_flight above 0, or leave it out"
            )
        if self.incomplete == "as_is":
            return
        if plan.forks is not None:
            raise ValueError(
                f"{where}.incomplete={self.incomplete!r} counts independent members, and this algorithm's samples fork "
                "from each other; set it to 'as_is'"
            )
        if rows_per_member > 1:
            raise ValueError(
                f"{where}.incomplete={self.incomplete!r} counts samples, and {rows_per_member} of them are one run of "
                "the agent; set it to 'as_is', or config.actor.trained_conversations=1"
            )


class GroupRules(NamedTuple):
    """`GroupsConfig` for the rollout of one step.

    Attributes:
        incomplete: as in the config.
        max_age: as in the config.
        version: of the weights that the rollout is the first to train; None is the number of the step.
    """

    incomplete: Incomplete = "as_is"
    max_age: int | None = None
    version: int | None = None

    def leave_out(self) -> bool:
        """Whether they can leave a group out, so that another one has to be drawn."""
        return self.incomplete != "as_is" or self.max_age is not None


class Judged(NamedTuple):
    """A group as the rules see it.

    Attributes:
        group: the group, without valid results where members were left out for their age.
        is_kept: whether it is trained on.
        too_old: samples that are left out for their age.
    """

    group: ScoredGroup
    is_kept: bool
    too_old: int


def terminal_class(end: str | None, *, is_truncated: bool = False) -> TerminalClass:
    """The class of an episode whose environment says `end` (`rljax.envs.END_REASONS`, None: not over) and that was
    `is_truncated` at a limit of tokens.

    An environment's failure says nothing about the policy, and the episode is left out. One that the policy has ended,
    at a limit or by itself, is trained with its reward. One that is not over, because a call or the process ended
    first, goes on later: it is never given a reward of 0.
    """
    if end in FAILED:
        return "environment"
    if is_truncated:
        return "policy"
    if end is None:
        return "under_way"
    return "finished" if end == DONE else "policy"


def is_fresh(oldest: int, version: int, max_age: int) -> bool:
    """Whether a sample whose oldest token is of version `oldest` may train weights of `version`:
    `version - oldest <= max_age` (GLM-5, 2602.15763)."""
    return version - oldest <= max_age


def has_enough(valid: int, size: int) -> bool:
    """Whether a group with `valid` members of `size` is completed rather than dropped: with more than half of them
    (GLM-5, 2602.15763)."""
    return 2 * valid > size


def repair(is_valid: np.ndarray) -> np.ndarray:
    """Which member stands in each of the places of a group, int32 [G], of the members bool [G]: the valid ones in
    order, then the same again in turn (GLM-5, 2602.15763). ValueError without a valid one."""
    valid = np.flatnonzero(np.asarray(is_valid, bool))
    if not len(valid):
        raise ValueError("a group without a valid member cannot be repaired; draw another one")
    return np.resize(valid, len(is_valid)).astype(np.int32)


def group_weight(valid: int, size: int) -> float:
    """How often each of `valid` members of a group of `size` counts so that the group counts as a complete one:
    `size / valid`. ValueError without a valid one."""
    if not valid:
        raise ValueError("a group without a valid member has no weight; draw another one")
    return size / valid


def judge(group: ScoredGroup, rules: GroupRules, version: int) -> Judged:
    """Leaves out what is too old of a group for weights of `version`, and says whether the group is trained on."""
    too_old = 0

    if rules.max_age is not None:
        oldest = [oldest_version(group, index, version) for index in range(len(group.samples))]
        is_old = [
            result.is_valid and not is_fresh(first, version, rules.max_age)
            for first, result in zip(oldest, group.results, strict=True)
        ]
        too_old = sum(is_old)
        results = [
            _aged(result, version - first, rules.max_age) if old else result
            for first, result, old in zip(oldest, group.results, is_old, strict=True)
        ]
        group = group._replace(results=results)

    # Without a way to complete it, a group with a member that is too old is left out as a whole.
    if rules.incomplete == "as_is":
        return Judged(group, not too_old, too_old)
    valid = sum(result.is_valid for result in group.results)
    return Judged(group, has_enough(valid, len(group.results)), too_old)


def _aged(result: RewardResult, age: int, max_age: int) -> RewardResult:
    error = f"its oldest token is {age} versions behind, and config.rollout.groups.max_age={max_age}"
    return dataclasses.replace(result, value=0.0, is_valid=False, error=error)


def oldest_version(group: ScoredGroup, index: int, newest: int) -> int:
    """The version of the oldest token that was sampled for this sample; `newest` where nothing was, or it carries no
    versions."""
    sample = group.samples[index]
    if sample.versions is None or not sample.sampled.any():
        return newest
    return int(sample.versions[sample.sampled].min())


def complete(group: ScoredGroup, rules: GroupRules) -> tuple[ScoredGroup, list[int]]:
    """The group as it is trained on, and the member that stands in each of its places: under `pad` empty ones are
    filled by `repair`."""
    if rules.incomplete != "pad":
        return group, list(range(len(group.samples)))
    order = repair(np.array([result.is_valid for result in group.results])).tolist()

    def taken(values: Sequence[Any]) -> list[Any]:
        return [values[index] for index in order] if values else []

    filled = group._replace(
        samples=taken(group.samples),
        texts=taken(group.texts),
        results=taken(group.results),
        steps=taken(group.steps),
        turn_fields=taken(group.turn_fields),
        signals=taken(group.signals),
        answers=taken(group.answers),
    )
    return filled, order
