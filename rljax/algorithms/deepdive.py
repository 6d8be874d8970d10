"""Group relative credit for search agents, with a tax on queries that repeat themselves."""

import dataclasses

from rljax.advantages import group_normalized, penalized
from rljax.algorithms.base import Algorithm, check_at_least, check_clip, check_group, kl_and_entropy
from rljax.losses import clipped, policy_loss, token_mean, token_ratio
from rljax.plans import Column, RolloutPlan


@dataclasses.dataclass
class DeepDive:
    """DeepDive's objective, arXiv 2509.10446.

        A = (R - mean) / (std + epsilon) of the group - penalty_weight (S - mean S of the group)
        loss = mean over all tokens of the minibatch of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    S, the count `redundancy` of the episode, is the mean similarity of two queries (`rljax.tasks.query_redundancy`);
    where nothing counts it A has one term.

    Deviations: the paper has the penalty in the reward, `R - penalty_weight S`. Where all answers fail the group's std
    would blow it up to full-size advantages; here it keeps its scale. The std has ddof 0.
    """

    group_size: int = 8
    penalty_weight: float = 0.1
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    epsilon: float = 1e-6

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_group(self)
        check_clip(self)
        check_at_least(self, 0, "penalty_weight", "kl_coef", "entropy_coef", "epsilon")
        return Algorithm(
            plan=RolloutPlan(
                group_size=self.group_size, needs_ref=self.kl_coef > 0, columns=(Column("redundancy", per="row"),)
            ),
            advantage_fn=penalized(
                group_normalized(ddof=0, epsilon=self.epsilon), column="redundancy", weight=self.penalty_weight
            ),
            loss=policy_loss(
                ratio_fn=token_ratio,
                surrogate_fn=clipped(clip_low=self.clip_low, clip_high=self.clip_high),
                aggregate_fn=token_mean,
                penalties=kl_and_entropy(self.kl_coef, self.entropy_coef),
            ),
        )
