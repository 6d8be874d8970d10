"""Solutions with a summary against solutions without: ReSum, 2606.13316.

A *natural* phrase is one that the policy produced: a column of the batch has 1 on the token with which it begins. An
*injected* one was given to a fork (`intervention` INJECT). A fork from before a natural phrase (`intervention`
SUPPRESS) goes on without it. `R` is the task's reward; rows that are not valid take no part.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.advantages.group import AdvantageFn, _on_tokens, _valid_tokens
from rljax.ops import as_float, segment_count, segment_mean, segment_sum, segment_whiten, segment_zscore
from rljax.trees import build_tree
from rljax.types import INTERVENTION_INJECT, INTERVENTION_SUPPRESS, NO_PARENT, ArrayLike, RolloutBatch

SUMMARIES = "summaries"
"""The column that marks natural phrases."""


def summary_contrast(
    *,
    column: str = SUMMARIES,
    natural: float = 0.2,
    injected: float = 0.05,
    only_if_correct: bool = False,
    ddof: int = 0,
    epsilon: float = 1e-6,
) -> AdvantageFn:
    """Every row against the rows with a summary and against those without (ReSum 5.3).

        A = (R' - mean_with) / (std_with + epsilon) + (R' - mean_without) / (std_without + epsilon)

    `R' = R + summary_reward`. A set of fewer than two rows or without spread adds nothing, so that a prompt without
    any summary is left with GRPO. Where a set of two and more rows has no spread, its own rows get 0: the rows of the
    other set are scored by their own set alone. Rows of equal `R` but different summaries differ in `R'`.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        reward, has_summary = _shaped(batch, column, natural, injected, only_if_correct)
        is_valid = jnp.asarray(batch.is_valid)

        credit = jnp.zeros_like(reward)
        is_flat = jnp.zeros(reward.shape, bool)
        for members in (is_valid & has_summary, is_valid & ~has_summary):
            score, is_usable = segment_zscore(reward, batch.group_id, members, ddof=ddof, epsilon=epsilon)
            count = segment_count(batch.group_id, members)[jnp.asarray(batch.group_id)]
            credit = credit + score
            is_flat |= members & (count > 1) & ~is_usable

        return _on_tokens(jnp.where(is_flat, 0, credit), batch)

    return advantages


def summary_own_group(
    *,
    column: str = SUMMARIES,
    natural: float = 0.2,
    injected: float = 0.05,
    only_if_correct: bool = False,
    ddof: int = 0,
    epsilon: float = 1e-6,
) -> AdvantageFn:
    """The other reading of ReSum 5.3: a row against the rows of its own kind alone, with a summary or without."""

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        reward, has_summary = _shaped(batch, column, natural, injected, only_if_correct)
        is_valid = jnp.asarray(batch.is_valid)
        having, lacking = (
            segment_whiten(reward, batch.group_id, is_valid & members, ddof=ddof, epsilon=epsilon)
            for members in (has_summary, ~has_summary)
        )
        return _on_tokens(having + lacking, batch)

    return advantages


def summary_bonus_released(
    *, column: str = SUMMARIES, bonus: float = 0.3, suppressed_weight: float = 2.0, epsilon: float = 1e-4
) -> AdvantageFn:
    """What ReSum's released code does instead: forked rows only shift the statistics, and get no credit themselves.

        A = (R - mean) / (std + epsilon) + bonus [the row holds a natural phrase]        for initial rows, else 0

    mean and population std over all rows of the prompt, those forked without the phrase (SUPPRESS) counting
    `suppressed_weight` times. The bonus does not depend on the reward, so equal rewards do not give 0.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        natural, _ = summary_counts(batch, column)
        is_valid = jnp.asarray(batch.is_valid)
        group_id = jnp.asarray(batch.group_id)
        reward = jnp.where(is_valid, as_float(batch.reward), 0)
        weight = jnp.where(jnp.asarray(batch.intervention) == INTERVENTION_SUPPRESS, suppressed_weight, 1.0)
        weight = weight.astype(reward.dtype)
        total = segment_sum(weight, group_id, is_valid)
        total = jnp.where(total > 0, total, 1)
        # Less the plain mean first, so that equal rewards leave no rounding.
        centered = jnp.where(is_valid, reward - segment_mean(reward, group_id, is_valid)[group_id], 0)
        centered = centered - (segment_sum(weight * centered, group_id, is_valid) / total)[group_id]
        std = jnp.sqrt(segment_sum(weight * jnp.square(centered), group_id, is_valid) / total)
        credit = centered / (std[group_id] + epsilon) + bonus * (natural > 0)
        is_root = jnp.asarray(batch.parent_row) == NO_PARENT
        return _on_tokens(jnp.where(is_root & is_valid, credit, 0), batch)

    return advantages


def summary_counts(batch: RolloutBatch, column: str = SUMMARIES) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many natural and how many injected phrases each path holds, inherited ones included.

    Natural phrases are counted on action tokens, by `column`, none where the batch lacks it. A phrase injected into a
    row counts where that row forks; a row forked before it does not have it.
    """
    marks = batch.columns.get(column, jnp.zeros(jnp.shape(batch.tokens)))
    natural = jnp.sum(jnp.where(_valid_tokens(batch), marks, 0) > 0, axis=1)
    owners = jnp.asarray(build_tree(batch).owners)
    fork = jnp.where(jnp.asarray(batch.intervention) == INTERVENTION_INJECT, jnp.asarray(batch.fork_index), -1)
    injected = jnp.sum(fork[owners] == jnp.arange(owners.shape[1]), axis=1)
    return natural.astype(jnp.int32), injected.astype(jnp.int32)


def summary_reward(
    natural: Int[ArrayLike, " B"],
    injected: Int[ArrayLike, " B"],
    *,
    natural_weight: float = 0.2,
    injected_weight: float = 0.05,
) -> Float[Array, " B"]:
    """`(0.2 natural + 0.05 injected) / (natural + injected)` of the counts, 0 for none: an average, which more phrases
    do not raise (ReSum 5.1)."""
    natural = jnp.asarray(natural)
    injected = jnp.asarray(injected)
    total = natural_weight * natural + injected_weight * injected
    return total / jnp.maximum(natural + injected, 1)


def _shaped(
    batch: RolloutBatch, column: str, natural_weight: float, injected_weight: float, only_if_correct: bool
) -> tuple[Array, Array]:
    """`R'` of each row, and whether it has a summary."""
    natural, injected = summary_counts(batch, column)
    extra = summary_reward(natural, injected, natural_weight=natural_weight, injected_weight=injected_weight)
    reward = as_float(batch.reward)
    if only_if_correct:
        extra = jnp.where(reward > 0, extra, 0)
    has_summary = (natural + injected > 0) | (jnp.asarray(batch.intervention) == INTERVENTION_INJECT)
    return jnp.where(batch.is_valid, reward + extra, 0), has_summary
