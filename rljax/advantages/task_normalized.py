"""Advantages brought to one scale across tasks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.advantages.group import AdvantageFn
from rljax.ops import masked_sum, segment_sum
from rljax.types import RolloutBatch


def task_normalized(advantage_fn: AdvantageFn, *, epsilon: float = 1e-6, min_std: float = 1e-4) -> AdvantageFn:
    """`(A - mean) / (std + epsilon)` of the results of `advantage_fn`, over all action tokens of valid rows with one
    `task_id` (AgentRL, 2510.04206), std with ddof 0.

    Groups compare the samples of a prompt; this takes out what is left of the tasks' scales, lengths and difficulties.
    Long rows weigh more. A task whose std is below `min_std`, such as one of nothing but ties, gets 0 rather than
    rounding noise blown up. A batch without `task_id` is one task. Statistics are of the whole rollout.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        raw = advantage_fn(batch)
        valid = jnp.asarray(batch.is_valid)
        mask = jnp.asarray(batch.action_mask) & valid[:, None]
        task = jnp.zeros(valid.shape, jnp.int32) if batch.task_id is None else jnp.asarray(batch.task_id)

        def total(x: Array) -> Array:
            return segment_sum(masked_sum(x, mask, axis=1), task, valid)

        count = jnp.maximum(total(jnp.ones_like(raw)), 1)
        centered = raw - (total(raw) / count)[task][:, None]
        std = jnp.sqrt(total(jnp.square(centered)) / count)[task][:, None]
        return jax.lax.stop_gradient(jnp.where(mask & (std >= min_std), centered / (std + epsilon), 0))

    return advantages
