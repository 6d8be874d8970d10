"""A divergence of whole distributions from a teacher, on the student's own samples."""

import dataclasses

from rljax.advantages import group_normalized, scaled
from rljax.algorithms.base import Algorithm, Recipe, check_at_least
from rljax.losses import (
    DivergenceFn,
    clipped,
    divergence_penalty,
    forward_kl,
    jensen_shannon,
    policy_loss,
    reverse_kl,
    token_mean,
    token_ratio,
)
from rljax.plans import TeacherSpec


@dataclasses.dataclass
class GKD(Recipe):
    """Generalised knowledge distillation on the student's samples, arXiv 2306.13649.

        D = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q,  p the teacher's, q the student's
        loss = mean over all tokens of the minibatch of divergence_coef D + rl_coef max(-A r, -A clip(r, ...))

    `beta` 0 is KL(p || q) and 1 is KL(q || p). No gradient goes through what was sampled. With `rl_coef` the rewards
    count as well, A being GRPO's. `support` 0 compares over the whole vocabulary.

    Deviations: with a `support`, what lies outside the teacher's most likely tokens is one cell: the exact divergence
    of coarser distributions, where others renormalise and are blind to it. At `beta` 0 and 1 it is the KL itself, as
    in TRL, and not the limit of D, which is 0.
    """

    needs_group = False

    group_size: int = 4
    beta: float = 0.5
    """Where between forward (0) and reverse (1) KL the divergence lies."""
    support: int = 0
    """Most likely tokens of the teacher that are told apart, e.g. 64 where a vocabulary is large or there are several
    teachers; 0 is all."""
    divergence_coef: float = 1.0
    """Weight of the divergence."""
    rl_coef: float = 0.0
    """Weight of the policy loss on the rewards; 0 leaves rewards to metrics."""
    clip_low: float = 0.2
    """How far below 1 a ratio keeps its gradient."""
    clip_high: float = 0.2
    """How far above 1 a ratio keeps its gradient."""

    def check(self) -> None:
        super().check()
        check_at_least(self, 0, "support", "rl_coef")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"GKD: beta={self.beta} must be between 0 and 1")
        if not self.divergence_coef > 0:
            raise ValueError(f"GKD: divergence_coef={self.divergence_coef} must be above 0; without it take GRPO")
        if self.rl_coef and self.group_size < 2:
            raise ValueError(f"GKD: group_size={self.group_size} with rl_coef={self.rl_coef} must be at least 2")

    def divergence(self) -> DivergenceFn:
        """The one that `beta` names."""
        if self.beta == 0:
            return forward_kl()
        return reverse_kl() if self.beta == 1 else jensen_shannon(self.beta)

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        self.check()
        loss = policy_loss(
            token_ratio,
            clipped(clip_low=self.clip_low, clip_high=self.clip_high),
            token_mean,
            penalties=(divergence_penalty(self.divergence_coef), *self.penalties()),
        )
        spec = TeacherSpec(self.divergence(), self.support)
        credit = scaled(group_normalized(), self.rl_coef)
        return self.compose(credit, loss, self.plan()._replace(teacher=spec))
