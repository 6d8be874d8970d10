"""Advantages for the best of k samples: pass@k where rewards are 0 and 1, else the expected maximum.

A group has `n` valid rows. `M(i)` is the mean, over all sets of k rows of the group that hold row i, of the set's
largest reward; `M` the mean over all sets of k rows. Sets are not drawn but counted: sorted by reward, a row is the
largest of a set as often as the others can be chosen below it. With `k` 1, `M(i)` is the reward and `M` its mean.

A group of fewer than `k` valid rows has no such sets and gets 0; equal rewards give exactly 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.advantages.group import AdvantageFn
from rljax.ops import as_float, segment_count, segment_sum
from rljax.types import RolloutBatch


def pass_at_k_normalized(k: int, *, epsilon: float = 1e-6) -> AdvantageFn:
    """`(M(i) - M) / (std + epsilon)`, std that of the largest reward over all sets (Pass@k Training, 2508.10751).

    With c right answers of n: `M = 1 - C(n - c, k) / C(n, k)`, `std^2 = M (1 - M)`, `M(i)` is 1 for a right answer and
    `1 - C(n - c - 1, k - 1) / C(n - 1, k - 1)` for a wrong one. `k` 1 is GRPO with ddof 0; `k = n` gives 0.
    """
    _check(k)

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        rank = _Ranked.of(batch)
        mean = rank.group_sum(rank.reward * rank.largest_of_all(k))
        spread = jnp.sqrt(rank.group_sum(jnp.square(rank.reward - mean) * rank.largest_of_all(k)))
        values = jnp.where(spread > 0, (rank.mean_with(k) - mean) / (spread + epsilon), 0)
        return rank.on_tokens(jnp.where(rank.size >= k, values, 0), batch)

    return advantages


def pass_at_k_unbiased(k: int, *, baseline: int | None = None) -> AdvantageFn:
    """`k (M(i) - L(i))`, `L(i)` the mean over all sets of `baseline` *other* rows of their largest reward
    (PKPO, 2505.15201).

    The policy gradient with it is unbiased for the gradient of the expected best of k. `baseline` k (default) needs
    `n > k` and is leave-one-out; with k 1 it is RLOO. `baseline` k - 1, of lower variance, credits a row with what it
    adds to the others, so that no advantage is negative.

    Raises ValueError for another `baseline`.
    """
    _check(k)
    size = k if baseline is None else baseline
    if size not in (k - 1, k) or size < 1:
        raise ValueError(f"baseline={baseline} must be k - 1 or k, and at least 1, for k={k}; leave it out for k")

    def advantages(batch: RolloutBatch) -> Float[Array, "B T"]:
        rank = _Ranked.of(batch)
        values = k * (rank.mean_with(k) - rank.mean_without(size))
        return rank.on_tokens(jnp.where((rank.size >= k) & (rank.size > size), values, 0), batch)

    return advantages


class _Ranked(NamedTuple):
    """The rows sorted by group, validity and reward; every field and result is [B] in this order."""

    order: Array
    group: Array
    place: Array  # in the ascending order of the group's valid rows, from 0
    size: Array  # valid rows of the group
    is_valid: Array
    reward: Array  # less the group's largest, so that equal rewards are exactly 0

    @classmethod
    def of(cls, batch: RolloutBatch) -> "_Ranked":
        group = jnp.asarray(batch.group_id)
        valid = jnp.asarray(batch.is_valid)
        rows = len(group)
        reward = as_float(batch.reward)
        largest = jax.ops.segment_max(jnp.where(valid, reward, -jnp.inf), group, num_segments=rows)[group]
        reward = jnp.where(valid, reward - largest, 0)
        order = jnp.lexsort((reward, ~valid, group))
        sizes = segment_count(group, jnp.ones_like(valid))
        starts = jnp.cumsum(sizes) - sizes
        place = jnp.arange(rows) - starts[group[order]]
        count = segment_count(group, valid)[group]
        return cls(order, group[order], place, count[order], valid[order], reward[order])

    def largest_of_all(self, k: int) -> Array:
        """The share of sets of k rows in which the row is the largest: `C(place, k - 1) / C(n, k)`."""
        return _choose_share(self.place, self.size - 1, k - 1) * k / jnp.maximum(self.size, 1)

    def mean_with(self, k: int) -> Array:
        """M(i): the row itself where it is the largest, and what lies above it where that is."""
        own = self.reward * _choose_share(self.place, self.size - 1, k - 1)
        if k == 1:
            return own
        others = jnp.maximum(self.size - 1, 1)
        share = _choose_share(self.place - 1, self.size - 2, k - 2) * (k - 1) / others
        return own + self._sum_above(self.reward * share)

    def mean_without(self, k: int) -> Array:
        """L(i), sets of k: rows below i keep their place among the others, rows above move one down."""
        others = jnp.maximum(self.size - 1, 1)
        below = self.reward * _choose_share(self.place, self.size - 2, k - 1) * k / others
        above = self.reward * _choose_share(self.place - 1, self.size - 2, k - 1) * k / others
        return self._sum_up_to(below) - below + self._sum_above(above)

    def group_sum(self, x: Array) -> Array:
        return segment_sum(x, self.group, self.is_valid)[self.group]

    def _sum_up_to(self, x: Array) -> Array:
        """Sum over the rows of the group from its first to this one."""

        def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
            return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

        x = jnp.where(self.is_valid, x, 0)
        return jax.lax.associative_scan(combine, (self.place == 0, x))[1]

    def _sum_above(self, x: Array) -> Array:
        return self.group_sum(x) - self._sum_up_to(x)

    def on_tokens(self, values: Array, batch: RolloutBatch) -> Array:
        """The values in the order of the batch, on the action tokens of valid rows."""
        rows = jnp.zeros_like(values).at[self.order].set(values)
        mask = jnp.asarray(batch.action_mask) & jnp.asarray(batch.is_valid)[:, None]
        return jax.lax.stop_gradient(jnp.where(mask, rows[:, None], 0))


def _choose_share(below: Array, of: Array, k: int) -> Array:
    """`C(below, k) / C(of, k)`, as a product; 0 where there is no such choice."""
    steps = jnp.arange(k)
    top = below[:, None] - steps
    bottom = of[:, None] - steps
    factors = jnp.where((top > 0) & (bottom > 0), top / jnp.maximum(bottom, 1), 0.0)
    return jnp.prod(factors, axis=1)


def _check(k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
