"""Several teachers, one of them for each row of the data, beside the verifier."""

import dataclasses

from rljax.advantages import beside_teacher, group_normalized
from rljax.algorithms.base import Algorithm, check_at_least
from rljax.algorithms.on_policy_distillation import OnPolicyDistillation
from rljax.losses import behavior_ratio, double_sided, policy_loss, sequence_mean, teacher_report
from rljax.plans import TeacherSpec


@dataclasses.dataclass
class MOPD(OnPolicyDistillation):
    """Multi-teacher on-policy distillation, arXiv 2601.02780, eq. 7 to 9.

        r = exp(lp - lp_behavior),  w = sg(r) where low < r < high, else 0
        A = sg(lp_teacher(row) - lp_behavior) + alpha A_group,  A_group = (R - mean) / (std + epsilon)
        loss = mean_rows mean_tokens of -w A lp

    A row's teacher is the one of `config.teachers` whose `tasks` hold its column `task`. `alpha` 0 is eq. 8.

    Deviations: neither interval nor `alpha` is published; `match_scale` (on) gives both parts of A one root mean square
    at `alpha` 1. The student's side of A is the sampler's log-prob, and the teacher's part is clipped, as in
    `OnPolicyDistillation`.
    """

    needs_group = True

    group_size: int = 8
    low: float = 0.5
    """Ratio at and below which a token gets no gradient."""
    high: float = 2.0
    """Ratio at and above which a token gets no gradient."""
    alpha: float = 1.0
    """Weight of the verifier's advantage beside the teacher's."""
    match_scale: bool = True
    """Whether the verifier's advantage is scaled to the size of the teacher's before it is weighed."""
    epsilon: float = 1e-6
    """Added to the std of the group."""

    def check(self) -> None:
        super().check()
        check_at_least(self, 0, "alpha", "epsilon")
        if not 0 <= self.low < 1 < self.high:
            raise ValueError(f"MOPD: low={self.low} and high={self.high} must enclose 1, and low be at least 0")

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        loss = policy_loss(
            behavior_ratio,
            double_sided(clip_low=1 - self.low, clip_high=self.high - 1),
            sequence_mean,
            penalties=self.penalties(),
            report_fns=(teacher_report(clip=self.clip, discount=self.discount),),
        )
        credit = beside_teacher(
            group_normalized(epsilon=self.epsilon),
            alpha=self.alpha,
            match_scale=self.match_scale,
            clip=self.clip,
            discount=self.discount,
        )
        return self.compose(credit, loss, self.plan()._replace(teacher=TeacherSpec()))
