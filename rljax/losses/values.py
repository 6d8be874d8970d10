"""The critic's loss, per token and for the trainer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.aggregation import token_mean
from rljax.losses.policy_loss import Loss
from rljax.ops import as_float, masked_sum
from rljax.types import ArrayLike, Rows


def clipped_value_loss(
    values: Float[ArrayLike, "B T"],
    old_values: Float[ArrayLike, "B T"],
    returns: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    clip: float = 0.2,
) -> Float[Array, "B T"]:
    """`max((v - ret)^2, (clip(v, v_old - c, v_old + c) - ret)^2) / 2` per token (1707.06347), 0 where masked.

    Gradient flows through `values` only. `clip` is c.
    """
    v = jnp.where(mask, as_float(values), 0)
    old, target = (jax.lax.stop_gradient(jnp.where(mask, as_float(x), 0)) for x in (old_values, returns))
    bounded = jnp.clip(v, old - clip, old + clip)
    return jnp.maximum(jnp.square(v - target), jnp.square(bounded - target)) / 2


def value_loss(*, clip: float | None = 0.2) -> Loss:
    """`clipped_value_loss`, the mean over all tokens of the minibatch; `clip` None is `(v - ret)^2 / 2`.

    `loss(values, zeros, rows)` reads rows as a critic's trainer fills them: `old_logprobs` are the values before the
    update, `advantages` the returns. Metrics, means over tokens: `critic/loss`, `critic/clip_fraction` (tokens without
    gradient), `critic/value_mean`, `critic/return_mean`. ValueError unless `clip` is positive.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} of the value loss must be above 0; None is off")
    width = float("inf") if clip is None else clip

    def loss(
        values: Float[ArrayLike, "B T"], zeros: Float[ArrayLike, "B T"], rows: Rows
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        mask = jnp.asarray(rows.loss_mask)
        clean = (jnp.where(mask, as_float(x), 0) for x in (values, rows.old_logprobs, rows.advantages))
        v, old, target = clean
        token_loss = clipped_value_loss(v, old, target, mask, clip=width)

        total = masked_sum(rows.loss_weights * token_loss, mask)
        # Clipped means without gradient: outside the interval, and worse off there than at its edge.
        is_clipped = (jnp.abs(v - old) > width) & (2 * token_loss > jnp.square(v - target))
        reported = {
            "critic/clip_fraction": is_clipped.astype(v.dtype),
            "critic/value_mean": v,
            "critic/return_mean": target,
        }

        count = jnp.maximum(rows.token_count, 1)
        metrics = {name: masked_sum(value, mask) / count for name, value in reported.items()}
        return total, jax.lax.stop_gradient(metrics | {"critic/loss": total})

    return Loss(token_mean, loss, select_fn=None, correct_fn=None)
