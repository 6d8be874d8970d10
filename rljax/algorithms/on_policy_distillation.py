"""The student samples, a teacher scores every token."""

import dataclasses

from rljax.advantages import from_teacher
from rljax.algorithms.base import Algorithm, Recipe, check_at_least
from rljax.losses import behavior_ratio, policy_loss, teacher_report, token_mean, unclipped
from rljax.plans import TeacherSpec


@dataclasses.dataclass
class OnPolicyDistillation(Recipe):
    """On-policy distillation: the reverse KL to a teacher as a dense advantage; arXiv 2601.02780, eq. 8, names it so.

        A = sg(clip(lp_teacher - lp_behavior, -clip, clip)),  to go with `discount`
        loss = mean over all tokens of the minibatch of -A exp(lp - lp_behavior)

    Rewards play no part but in metrics. Teachers are `config.teachers`. One sample per prompt suffices.

    Deviations: the student's side of A is the sampler's log-prob, as in the public tinker cookbook; a clip of the
    advantage, since a single token that the teacher finds impossible would outweigh a batch.
    """

    needs_group = False

    group_size: int = 4
    clip: float = 5.0
    """Largest advantage of a token, in nats."""
    discount: float = 0.0
    """Of later tokens' advantages: 0 has each token answer for its own distribution, 1 for the KL of rows."""

    def check(self) -> None:
        super().check()
        check_teacher(self)

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        loss = policy_loss(
            behavior_ratio,
            unclipped(),
            token_mean,
            penalties=self.penalties(),
            report_fns=(teacher_report(clip=self.clip, discount=self.discount),),
        )
        credit = from_teacher(clip=self.clip, discount=self.discount)
        return self.compose(credit, loss, self.plan()._replace(teacher=TeacherSpec()))


def check_teacher(recipe: OnPolicyDistillation) -> None:
    """Raises ValueError for a clip or discount that cannot work."""
    name = type(recipe).__name__
    if not recipe.clip > 0:
        raise ValueError(f"{name}: clip={recipe.clip} must be above 0, or no token has an advantage")
    check_at_least(recipe, 0, "discount")
    if recipe.discount > 1:
        raise ValueError(f"{name}: discount={recipe.discount} must be at most 1")
