"""Credit of methods that weigh branches or tokens by what the policy was unsure of: APPO, ARPO, AEPO.

As in `group`, rows that are not valid take no part, a result is 0 off `action_mask`, and rows of one prompt with equal
rewards get exactly 0. ARPO's soft credit is `group_normalized(ddof=0)`, its hard credit `shared_mean` of that.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.advantages.group import AdvantageFn, _constant, _on_tokens, _valid_tokens
from rljax.ops import as_float, future_value, masked_mean, masked_std, segment_whiten, segment_zscore
from rljax.trees import build_tree, leaf_mean, on_tokens
from rljax.types import NO_PARENT, RolloutBatch, Rows


def dual_group(*, ddof: int = 0, epsilon: float = 1e-6) -> AdvantageFn:
    """An initial sample against the initial samples of its prompt and against the branches (APPO, 2606.12384, Eq. 6).

        A = mean over G in {initial rows, forked rows} of (R - mean_G) / (std_G + epsilon)

    A set of fewer than two rows, or of equal rewards, is left out of the mean. Forked rows get 0; see `root_tokens`
    for leaving them out of the loss, and `procedure_weights` for the factor of Eq. 7.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        is_root = jnp.asarray(batch.parent_row) == NO_PARENT
        is_valid = jnp.asarray(batch.is_valid)
        scores = [
            segment_zscore(batch.reward, batch.group_id, is_valid & members, ddof=ddof, epsilon=epsilon)
            for members in (is_root, ~is_root)
        ]
        # An unusable set has score 0.
        total = sum(score for score, _ in scores)
        count = sum(is_usable.astype(jnp.int32) for _, is_usable in scores)
        return _on_tokens(jnp.where(is_root & is_valid, total / jnp.maximum(count, 1), 0), batch)

    return advantages


def shared_branch_credit(*, ddof: int = 0, epsilon: float = 1e-6) -> AdvantageFn:
    """What APPO's released code has in place of `dual_group`: an initial row's z-score among the initial rows, plus, on
    every token that branches inherited, the mean of their z-scores among the branches of the prompt.

    Forked rows get 0. The released forks keep the token they were chosen for, so their `fork_index` is one past it.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        tree = build_tree(batch)
        is_root, is_valid = jnp.asarray(batch.parent_row) == NO_PARENT, jnp.asarray(batch.is_valid)
        own, others = (
            segment_whiten(batch.reward, batch.group_id, is_valid & members, ddof=ddof, epsilon=epsilon)
            for members in (is_root, ~is_root)
        )
        inherited = on_tokens(tree, leaf_mean(tree, others, ~is_root))
        credit = jnp.where(is_root[:, None], own[:, None] + inherited, 0)
        return _constant(jnp.where(_valid_tokens(batch), credit, 0))

    return advantages


def procedure_weights(
    *, discount: float = 2 ** (-1 / 32), scale: float = 0.5, low: float = 1.0, high: float = 1.2
) -> Callable[[Array, Array, Rows], Array]:
    """Token weights `1 + scale * clip(Omega, low, high)` for `policy_loss` (APPO, 2606.12384, Eq. 7): the factor of the
    advantage that grows with the likelihood gain of the rest of the row under the current policy.

    Omega is `rljax.ops.future_value` of `lp - lp_old` over the loss tokens. A positive factor of the advantage is one
    of the clipped surrogate, so a weight serves; it is constant for differentiation.
    """

    def weights(logprobs: Float[Array, "B T"], entropies: Float[Array, "B T"], rows: Rows) -> Float[Array, "B T"]:
        log_ratio = as_float(logprobs) - as_float(rows.old_logprobs)
        omega = future_value(log_ratio, rows.loss_mask, discount=discount)
        return jax.lax.stop_gradient(1 + scale * jnp.clip(omega, low, high))

    return weights


def entropy_scaled(advantage_fn: AdvantageFn, *, scale: float = 0.2) -> AdvantageFn:
    """`A max(1 + scale z(H), 0)`, z over all valid action tokens of the batch with population std (AEPO, 2510.14545).

    H is the entropy of the behavior policy. Equal entropies leave `A` as it is. The floor keeps the sign of `A`.
    """

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        mask = _valid_tokens(batch)
        entropies = jnp.where(mask, as_float(batch.entropies), 0)
        std = masked_std(entropies, mask)
        score = (entropies - masked_mean(entropies, mask)) / jnp.where(std > 0, std, 1)
        return _constant(jnp.where(mask, advantage_fn(batch) * jnp.maximum(1 + scale * score, 0), 0))

    return advantages


def root_tokens(batch: RolloutBatch) -> Bool[Array, "B T"]:
    """The action tokens of initial samples: what methods train on whose branches are evidence only (APPO, VinePPO)."""
    return _valid_tokens(batch) & (jnp.asarray(batch.parent_row) == NO_PARENT)[:, None]
