"""Earlier checkpoints of a model bring back what a later stage has made it forget."""

import dataclasses

from rljax.advantages import from_teacher
from rljax.algorithms.base import Algorithm, check_at_least, check_clip
from rljax.algorithms.on_policy_distillation import OnPolicyDistillation
from rljax.losses import clipped, masked_is, policy_loss, sequence_mean, teacher_report, token_ratio
from rljax.plans import TeacherSpec


@dataclasses.dataclass
class CrossStageDistillation(OnPolicyDistillation):
    """Cross-stage distillation as in GLM-5, arXiv 2602.15763: the teachers are the checkpoints that ended earlier
    stages, each on the prompts of its stage, and the loss is IcePop's.

        A = sg(lp_teacher(row) - lp_behavior)
        rho = exp(lp_old - lp_behavior),  w = rho where 1 / mismatch <= rho <= mismatch, else 0
        loss = mean_rows mean_tokens of w max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    Name the run folders of the stages in `config.teachers` (`RunModel`), and by their `tasks` whose rows each teaches.

    Deviations: those of `OnPolicyDistillation`. The paper's batch is 1024 prompts of one sample each.
    """

    group_size: int = 1
    mismatch: float = 2.0
    """Tokens whose probability differs by more than this factor between sampler and trainer are dropped."""
    clip_low: float = 0.2
    """How far below 1 a ratio keeps its gradient."""
    clip_high: float = 0.28
    """How far above 1 a ratio keeps its gradient."""

    def check(self) -> None:
        super().check()
        check_at_least(self, 1, "mismatch")
        check_clip(self)

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        loss = policy_loss(
            token_ratio,
            clipped(clip_low=self.clip_low, clip_high=self.clip_high),
            sequence_mean,
            weight_fns=(masked_is(1 / self.mismatch, self.mismatch),),
            penalties=self.penalties(),
            report_fns=(teacher_report(clip=self.clip, discount=self.discount),),
        )
        credit = from_teacher(clip=self.clip, discount=self.discount)
        return self.compose(credit, loss, self.plan()._replace(teacher=TeacherSpec()))
