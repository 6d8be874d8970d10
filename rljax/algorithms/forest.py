"""What the tree methods have in common: a fork plan, the clipped surrogate, and a weight for shared prefixes; and
random forks with plain group credit, the control that each of them is to be compared with."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rljax.advantages import AdvantageFn, group_normalized, prefix_weighted
from rljax.algorithms.base import Algorithm, check_at_least, check_clip, kl_and_entropy
from rljax.losses import AggregateFn, RatioFn, SurrogateFn, WeightFn, clipped, policy_loss, token_mean, token_ratio
from rljax.plans import ForkPlan, ForkRule, RolloutPlan
from rljax.plans.fork_rules import random_token


@dataclasses.dataclass
class ForestRecipe:
    """`chains` independent samples of a prompt (M), then `rounds` times (L) up to `points` fork points for each chain
    (N) with `branches` new samples each (B): at most M (1 + N L B) samples, which make the group.

    A prefix that `count` leaves share gets the sum of their gradients; `prefix_power` p weighs it by count^(p - 1): 1
    is the sum, 0.5 sqrt(count) times the mean, 0 the mean. A token whose text holds one of `step_delimiters` ends a
    step.
    """

    chains: int = 2
    points: int = 2
    rounds: int = 1
    branches: int = 1
    prefix_power: float = 1.0
    step_delimiters: tuple[str, ...] = ("\n",)
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    epsilon: float = 1e-6

    @property
    def group_size(self) -> int:
        """Samples of a prompt when every fork is made."""
        return self.chains * (1 + self.points * self.rounds * self.branches)

    def compose(
        self,
        rule: ForkRule,
        advantage_fn: AdvantageFn,
        *,
        ratio_fn: RatioFn = token_ratio,
        surrogate_fn: SurrogateFn | None = None,
        aggregate_fn: AggregateFn = token_mean,
        weight_fns: Sequence[WeightFn] = (),
        fork_plan: dict[str, Any] | None = None,
    ) -> Algorithm:
        """The algorithm of these hyperparameters. Raises ValueError for ones that cannot work."""
        check_clip(self)
        check_at_least(self, 0, "kl_coef", "entropy_coef", "epsilon", "prefix_power")

        forks = ForkPlan(
            chains=self.chains,
            points=self.points,
            rule=rule,
            rounds=self.rounds,
            branches=self.branches,
            step_delimiters=self.step_delimiters,
        )._replace(**fork_plan or {})
        forks.check()

        # At power 1 the weight is 1, and the tree need not be built.
        if self.prefix_power != 1:
            advantage_fn = prefix_weighted(advantage_fn, power=self.prefix_power)
        if surrogate_fn is None:
            surrogate_fn = clipped(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip)

        return Algorithm(
            plan=RolloutPlan(group_size=forks.leaves, needs_ref=self.kl_coef > 0, forks=forks),
            advantage_fn=advantage_fn,
            loss=policy_loss(
                ratio_fn=ratio_fn,
                surrogate_fn=surrogate_fn,
                aggregate_fn=aggregate_fn,
                weight_fns=weight_fns,
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )


@dataclasses.dataclass
class RandomForks(ForestRecipe):
    """Forks at random tokens, and GRPO's credit (2402.03300) on every leaf: `A = (R - mean) / (std + epsilon)` over the
    leaves of a prompt. Its rule does not look at the path that it leaves, so that every leaf is a fair sample."""

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        rule = random_token(self.points, self.chains, tail=0.0)
        return self.compose(rule, group_normalized(epsilon=self.epsilon))
