"""What a loss reads of a teacher: log-probs of the sampled tokens, or a divergence of whole distributions."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.losses.penalties import KlEstimator, Penalty, PenaltyFn, k2
from rljax.losses.ratios import log_difference
from rljax.losses.signatures import ReportFn
from rljax.ops import as_float, discounted_sum
from rljax.types import TEACHER_DIVERGENCE, TEACHER_LOGPROBS, ArrayLike, Rows


def teacher_penalty(coef: float, estimator: KlEstimator = k2) -> PenaltyFn:
    """`coef * estimator(lp - lp_teacher)` per token, live in `lp`: a pull to the teacher beside any policy loss. The
    metric is `loss/teacher_penalty`, without the coefficient.

    On the policy's own samples `k2` has the gradient of the reverse KL(policy || teacher), and `k3` that of the
    forward one; `k1` has none and is for rewards. ValueError for rows that no teacher has scored.
    """

    def penalty(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Penalty:
        value = estimator(_gap(logprobs, rows))
        return Penalty(coef * value, {"loss/teacher_penalty": value})

    return penalty


def divergence_penalty(coef: float = 1.0) -> PenaltyFn:
    """`coef *` the divergence between teacher and policy at each token, live in the policy's weights. The metric is
    `loss/teacher_divergence`, without the coefficient. ValueError for rows without one (`TeacherSpec.divergence`)."""

    def penalty(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> Penalty:
        if TEACHER_DIVERGENCE not in rows.columns:
            raise ValueError(
                f"the divergence to a teacher needs the column {TEACHER_DIVERGENCE!r}, which the rows lack; give the "
                "rollout plan a TeacherSpec with a divergence"
            )
        value = as_float(rows.columns[TEACHER_DIVERGENCE])
        return Penalty(coef * value, {"loss/teacher_divergence": value})

    return penalty


def teacher_report(*, clip: float = 5.0, discount: float = 0.0) -> ReportFn:
    """`loss/teacher_kl`, the mean of `lp - lp_teacher` (k1, nats: reverse KL per token on the policy's samples);
    `loss/teacher_clipped`, the share of tokens beyond `clip`; and `loss/teacher_reversal`, the share whose advantage
    has another sign than without the teacher's part, which is that of `rljax.advantages.teacher_credit`. A token that
    the verifier gives no credit is none."""

    def report(logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows) -> dict[str, Array]:
        gap = _gap(logprobs, rows)
        sampled_gap = _gap(rows.behavior_logprobs, rows)
        taught = discounted_sum(-jnp.clip(sampled_gap, -clip, clip), rows.loss_mask, discount=discount)
        advantages = as_float(rows.advantages)
        verified = advantages - taught
        # Without a verifier's part what is left is rounding, which has a sign too.
        has_own = jnp.abs(verified) > 1e-6 * (1 + jnp.abs(advantages))
        reversed_ = has_own & (advantages * verified < 0)
        return {
            "loss/teacher_kl": gap,
            "loss/teacher_clipped": jnp.abs(sampled_gap) > clip,
            "loss/teacher_reversal": reversed_,
        }

    return report


def _gap(logprobs: ArrayLike, rows: Rows) -> Array:
    """`lp - lp_teacher`, 0 off the loss mask."""
    if TEACHER_LOGPROBS not in rows.columns:
        raise ValueError(
            f"a teacher's part of a loss needs the column {TEACHER_LOGPROBS!r}, which the rows lack; name a teacher in "
            "config.teachers, and give the rollout plan a TeacherSpec"
        )
    return log_difference(logprobs, rows.columns[TEACHER_LOGPROBS], rows.loss_mask)
