"""Credit from a teacher that has scored the sampled tokens: how far each is from where the teacher would have it."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.advantages.group import AdvantageFn, _constant, _valid_tokens
from rljax.ops import as_float, discounted_sum, masked_mean
from rljax.types import TEACHER_LOGPROBS, ArrayLike, RolloutBatch


def teacher_credit(
    teacher: Float[ArrayLike, "B T"],
    student: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    clip: float = 5.0,
    discount: float = 0.0,
) -> Float[Array, "B T"]:
    """`A[t] = d[t] + discount * A[next]` with `d = clip(teacher - student, -clip, clip)`, log-probs in nats; 0 off
    `mask`.

    With discount 0, each token answers for its own distribution: the policy gradient of A is that of the reverse KL at
    every prefix (MiMo-V2-Flash, 2601.02780, eq. 8). With 1, A is to go, and it is that of the reverse KL of whole rows
    (MiniLLM, 2306.08543).
    """
    mask = jnp.asarray(mask)
    difference = jnp.where(mask, as_float(teacher) - as_float(student), 0)
    return discounted_sum(jnp.clip(difference, -clip, clip), mask, discount=discount)


def from_teacher(*, clip: float = 5.0, discount: float = 0.0) -> AdvantageFn:
    """`teacher_credit` alone, whatever the rewards are; the student is the policy that sampled. ValueError for a batch
    that no teacher has scored."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        return _constant(_credit(batch, clip, discount))

    return advantages


def beside_teacher(
    advantage_fn: AdvantageFn,
    *,
    alpha: float = 1.0,
    match_scale: bool = False,
    clip: float = 5.0,
    discount: float = 0.0,
) -> AdvantageFn:
    """`teacher_credit + alpha * advantage_fn` (2601.02780, eq. 9).

    With `match_scale`, the verifier's credit is first scaled to the root mean square of the teacher's, both over all
    valid action tokens of the batch: a teacher's log-ratios have a scale of their own. ValueError as `from_teacher`.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        taught = _credit(batch, clip, discount)
        verified = advantage_fn(batch)
        if match_scale:
            mask = _valid_tokens(batch)
            size = _root_mean_square(verified, mask)
            verified = verified * _root_mean_square(taught, mask) / jnp.where(size > 0, size, 1)
        return _constant(taught + alpha * verified)

    return advantages


def _credit(batch: RolloutBatch, clip: float, discount: float) -> Array:
    if TEACHER_LOGPROBS not in batch.columns:
        raise ValueError(
            f"credit from a teacher needs the column {TEACHER_LOGPROBS!r}, which the batch lacks; name a teacher in "
            "config.teachers, or score the rows with one before"
        )
    return teacher_credit(
        batch.columns[TEACHER_LOGPROBS], batch.behavior_logprobs, _valid_tokens(batch), clip=clip, discount=discount
    )


def _root_mean_square(x: Array, mask: Array) -> Array:
    return jnp.sqrt(masked_mean(jnp.square(x), mask))
