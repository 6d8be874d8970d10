"""Group relative credit for search agents, with a tax on queries that repeat themselves."""

import dataclasses

from rljax.advantages import group_normalized, penalized
from rljax.algorithms.base import Algorithm, GroupRecipe, check_at_least
from rljax.losses import policy_loss, token_mean, token_ratio
from rljax.plans import Column


@dataclasses.dataclass
class DeepDive(GroupRecipe):
    """DeepDive's objective, arXiv 2509.10446.

        A = (R - mean) / (std + epsilon) of the group - penalty_weight (S - mean S of the group)
        loss = mean over all tokens of the minibatch of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    S, the count `redundancy` of the episode, is the mean similarity of two queries (`rljax.tasks.query_redundancy`);
    where nothing counts it A has one term.

    Deviations: the paper has the penalty in the reward, `R - penalty_weight S`. Where all answers fail the group's std
    would blow it up to full-size advantages; here it keeps its scale. The std has ddof 0.
    """

    penalty_weight: float = 0.1
    clip_high: float = 0.28

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        check_at_least(self, 0, "penalty_weight")
        redundancy = Column("redundancy", per="row")
        credit = group_normalized(ddof=0, epsilon=self.epsilon)
        return self.compose(
            penalized(credit, column=redundancy.name, weight=self.penalty_weight),
            policy_loss(token_ratio, self.surrogate(), token_mean, penalties=self.penalties()),
            self.plan()._replace(columns=(redundancy,)),
        )
