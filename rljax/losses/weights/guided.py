"""Learning without guidance from what was sampled with it (ActGuide-RL, 2605.12004).

The policy is trained on the plain prompt; `behavior_logprobs` are those of the prompt that was used. The mixed
objective is `policy_loss(behavior_ratio, clipped(dual_clip=3.0), token_mean)`: its ratio is far from 1 where the
guidance told the policy what it would not have said itself, already on the first update. Here is what stands beside it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.ratios import behavior_ratio, is_guided, log_difference
from rljax.losses.signatures import WeightFn
from rljax.ops import masked_sum
from rljax.types import ArrayLike, Rows


def shaped_guidance(shaping: float = 0.1) -> WeightFn:
    """Token weights `r / (r + shaping)`, `r = exp(lp - lp_behavior)`, in guided rows, 1 in others: a token that the
    plain prompt makes unlikely keeps more of its gradient than by its ratio."""

    def weights(
        logprobs: Float[ArrayLike, "B T"], entropies: Float[ArrayLike, "B T"], rows: Rows
    ) -> Float[Array, "B T"]:
        ratio = behavior_ratio(logprobs, rows)
        return jnp.where(is_guided(rows), ratio / (ratio + shaping), 1)

    return weights


def shift_stats(
    plain_logprobs: Float[ArrayLike, "B T"], guided_logprobs: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]
) -> dict[str, Float[Array, ""]]:
    """How far guided rows are from the plain prompt: `L = sum_t (lp_plain - lp_guided)` of each row with a token in
    `mask`, its mean over rows (`shift_mean`) and its variance, of the population (`shift_var`) and unbiased
    (`shift_var_unbiased`, 0 for one row)."""
    mask = jnp.asarray(mask)
    rows = jnp.any(mask, axis=1)
    shift = masked_sum(log_difference(plain_logprobs, guided_logprobs, mask), mask, axis=1)
    count = jnp.sum(rows)
    mean = masked_sum(shift, rows) / jnp.maximum(count, 1)
    squares = masked_sum(jnp.square(shift - mean), rows)
    return {
        "shift_mean": mean,
        "shift_var": squares / jnp.maximum(count, 1),
        "shift_var_unbiased": squares / jnp.maximum(count - 1, 1),
    }
