"""What a rollout is to collect, as plain data and host functions; no jax here."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rljax.types import TEACHER_DIVERGENCE, TEACHER_LOGPROBS

NEWEST_LOGPROBS = "newest_logprobs"
"""Column of a `PartialGroup`'s batch, float32 [B, T]: log-probs of its samples under the weights that forks are sampled
with, where those are not the ones that the samples are of."""


class ForkPoint(NamedTuple):
    """Where new samples start: after the first `fork_index` completion tokens of sample `parent` of the prompt, and
    after the tokens `inject`. `score` chose it; `intervention` is one of those in `rljax.types`."""

    parent: int
    fork_index: int
    score: float = 0.0
    inject: tuple[int, ...] = ()
    intervention: int = 0


ForkRule = Callable[[Any], Sequence[ForkPoint]]
"""(`rljax.plans.fork_rules.PartialGroup`: a prompt's samples so far) -> where to fork, best first; fewer than asked for
leaves slots unused."""


class ForkPlan(NamedTuple):
    """How the samples of a prompt branch: `chains` independent ones first (M), then `rounds` times (L) up to `points`
    fork points for each chain (N), and `branches` new samples from each of them (B).

    Attributes:
        rule: chooses the points of a round, `points * chains` at most; what it returns beyond them is not used.
        fork_forks: whether forks may be forked again; else only chains are.
        max_injected: most tokens that a fork begins with and that are given to it.
        lagged_chains: whether the chains are sampled by the weights before the last update, and their forks by the
            newest. Rules then find the newest log-probs of the samples in the column `NEWEST_LOGPROBS`.
        suppressed: tokens that a fork of intervention SUPPRESS cannot begin with. Its first token is then not drawn as
            the policy would, and gets no gradient.
        step_delimiters: a token whose text contains one of these ends a step of the completion.
    """

    chains: int
    points: int
    rule: ForkRule
    rounds: int = 1
    branches: int = 1
    fork_forks: bool = True
    max_injected: int = 0
    lagged_chains: bool = False
    suppressed: tuple[int, ...] = ()
    step_delimiters: tuple[str, ...] = ()

    @property
    def leaves(self) -> int:
        """Samples of a prompt when every fork is made: M (1 + N L B)."""
        return self.chains * (1 + self.points * self.rounds * self.branches)

    @property
    def parents(self) -> int:
        """Samples that may be forked: what the decoder keeps the keys and values of."""
        rounds = self.rounds - 1 if self.fork_forks else 0
        return self.chains * (1 + self.points * rounds * self.branches)

    def check(self) -> None:
        """Raises ValueError for a plan that cannot be met."""
        for name in ("chains", "points", "rounds", "branches"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"a fork plan of {self.chains} chains, {self.points} points, {self.rounds} rounds and "
                    f"{self.branches} branches forks nothing: {name} must be at least 1"
                )
        if self.lagged_chains and self.suppressed:
            raise ValueError("forks of lagged chains cannot suppress tokens; leave one of the two out")


class CriticSpec(NamedTuple):
    """What a value function is trained towards beside the policy.

    Attributes:
        returns_fn: (`RolloutBatch` with its `values`) -> targets [B, T].
        loss: as `rljax.losses.value_loss` makes it.
    """

    returns_fn: Callable[[Any], Any]
    loss: Any


class Column(NamedTuple):
    """A signal that an algorithm wants beside the tokens, by the name under which the rollout has it: a count of the
    environment's steps, a component of the reward, a numeric column of the example, or what `mark` finds.

    Attributes:
        name: where it is found in `columns` of `RolloutBatch` and `Rows`.
        per: "row" is a number a row, a count summed over the episode. "turn" is a number a turn, on each of its action
            tokens; "token" a number a token. Both are what their row has where nothing finer is known.
        mark: (token ids of a completion [T], bool [T]: those that were sampled) -> places of the tokens that have 1;
            all others have 0. For a column per "token"; None looks for the name.

    A row without the name has 0.
    """

    name: str
    per: Literal["row", "turn", "token"]
    mark: Callable[[np.ndarray, np.ndarray], Sequence[int]] | None = None


class TeacherSpec(NamedTuple):
    """What teachers are asked of the distribution that each sampled token comes from. The log-prob of the token itself
    is always asked for (the column `rljax.types.TEACHER_LOGPROBS`).

    Attributes:
        divergence: one of `rljax.losses`, between the whole distributions of teacher and student, live in the student;
            the loss finds it in the column `rljax.types.TEACHER_DIVERGENCE`. None compares the sampled tokens alone.
        support: how many tokens of the teacher's distribution, its most likely ones, are told apart; all others count
            as one. 0 is the whole vocabulary, for which one teacher's last hidden states and head are kept.
    """

    divergence: Callable[..., Any] | None = None
    support: int = 0


class RolloutPlan(NamedTuple):
    """How the rollout of an algorithm is collected.

    Attributes:
        group_size: samples per prompt, with `forks` at most.
        keep_group: dynamic sampling: told the raw rewards (float64, valid samples only) of a group, says whether the
            group is kept; None keeps all.
        signal_reward: the reward, by name, whose unweighted values `keep_group` is told; empty is the weighted sum.
        max_sampling_rounds: rounds of prompts drawn to fill a batch under `keep_group` before giving up.
        shape_reward: (raw reward, completion length in tokens) -> the reward that advantages see; None leaves it.
        mask_truncated: overlong filtering: completions cut off by the length limit count in the statistics of their
            group, but receive no gradient (their `action_mask` is False).
        needs_ref: log-probs of the reference model are needed, in the reward or in the loss.
        forks: how the samples of a prompt branch; None samples them independently.
        needs_uniforms: the loss wants a uniform random number per token (`Rows.uniforms`).
        refresh_every: steps after which the reference becomes a copy of the policy; 0 is never. A run's own
            `reference_refresh` goes before it.
        refresh_gate: told the held-out scores per problem now and at the last refresh (the start counts as one), says
            whether a refresh that is due takes place; None always lets it.
        critic: advantages need the values of a critic (`RolloutBatch.values`), which is trained as this says.
        columns: signals of the rollout that the advantages or the loss read.
        teacher: teachers score what was sampled, as this says, before the advantages; None has none.
    """

    group_size: int
    keep_group: Callable[[np.ndarray], bool] | None = None
    max_sampling_rounds: int = 10
    shape_reward: Callable[[float, int], float] | None = None
    mask_truncated: bool = False
    needs_ref: bool = False
    needs_uniforms: bool = False
    refresh_every: int = 0
    refresh_gate: Callable[[np.ndarray, np.ndarray], bool] | None = None
    forks: ForkPlan | None = None
    critic: CriticSpec | None = None
    columns: tuple[Column, ...] = ()
    signal_reward: str = ""
    teacher: TeacherSpec | None = None

    @property
    def teacher_columns(self) -> tuple[str, ...]:
        """Names of the columns per token that the teachers fill."""
        if self.teacher is None:
            return ()
        return (TEACHER_LOGPROBS,) if self.teacher.divergence is None else (TEACHER_LOGPROBS, TEACHER_DIVERGENCE)


def has_signal(rewards: np.ndarray) -> bool:
    """Whether the raw rewards of a group differ (DAPO's dynamic sampling, 2503.14476)."""
    rewards = np.asarray(rewards, np.float64)
    return bool(rewards.size and rewards.max() > rewards.min())


def not_worse(now: np.ndarray, before: np.ndarray) -> bool:
    """Whether the mean of scores per problem [N] has fallen by no more than one standard error of the paired difference
    (ddof 1; 0 for a single problem)."""
    difference = np.asarray(now, np.float64) - np.asarray(before, np.float64)
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return bool(difference.mean() >= -error)


def soft_overlong_punishment(*, max_length: int, buffer: int, factor: float = 1.0) -> Callable[[float, int], float]:
    """`R + min(-(length - (max_length - buffer)) / buffer * factor, 0)`, lengths in tokens (DAPO, 2503.14476).

    Raises ValueError unless `0 < buffer <= max_length`.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"overlong buffer {buffer} must be positive and at most the maximal length {max_length}")

    def shape(reward: float, length: int) -> float:
        return reward + min(-(length - (max_length - buffer)) / buffer * factor, 0.0)

    return shape
