"""Estimators of pass@k and its relatives in float64, on the host.

Everything is per problem; a benchmark's value is the mean over problems, the sampling unit of every interval.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = int | np.integer | Sequence[int] | NDArray[Any]
Values = Sequence[Any] | NDArray[Any]


def pass_at_k(n: Counts, c: Counts, k: int) -> NDArray[np.float64]:
    """Unbiased pass@k `1 - C(n - c, k) / C(n, k)` of problems with `c` correct among `n` samples (2107.03374).

    `n` and `c` broadcast; a scalar result is a 0-d array. Exactly 0 for c = 0 and exactly 1 for n - c < k. With n = k
    it is the 0/1 "any correct": unbiased, but of the largest variance, so draw n >= 2k where possible.

    Raises:
        ValueError: k < 1, k > n (this estimator does not extrapolate), or c outside [0, n].
    """
    n, c = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    _check_counts(n, c, k)
    i = np.arange(1, n.max(initial=0) + 1)
    lost = (i > (n - c)[..., None]) & (i <= n[..., None])
    # A factor can be negative only where n - c < k, which is set to 1 below.
    product = np.prod(np.where(lost, 1 - k / i, 1.0), axis=-1)
    return np.asarray(np.where(n - c < k, 1.0, 1.0 - product), np.float64)


def all_at_k(n: Counts, c: Counts, k: int) -> NDArray[np.float64]:
    """`C(c, k) / C(n, k)`: the chance that all of k samples are correct. Arguments and errors as `pass_at_k`."""
    n, c = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    return np.asarray(1.0 - pass_at_k(n, n - c, k))


def avg_at_k(correct: Values, k: int | None = None) -> NDArray[np.float64]:
    """Mean over the first `k` samples (all by default) of `correct` [N, n]: an estimate of pass@1 per problem, [N].

    Raises ValueError for k outside [1, n].
    """
    correct = np.asarray(correct, np.float64)
    k = correct.shape[-1] if k is None else k
    if not 1 <= k <= correct.shape[-1]:
        raise ValueError(f"avg@{k} needs 1 <= k <= {correct.shape[-1]}, the number of samples; draw more samples")
    return correct[..., :k].mean(axis=-1)


def maj_at_k(answers: Sequence[Hashable | None], gold: Hashable, k: int) -> float:
    """Expected score of the majority vote among k of the `answers` to one problem, over all subsets of size k.

    `answers` are in canonical form, so that equal ones compare equal; None (nothing could be parsed) has no vote. Ties
    share the credit: 1 / number of winners when `gold` is one of them, which is random tie-breaking in expectation.
    Exact at every n: no subset is enumerated or drawn. Raises ValueError for k outside [1, n].
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k} needs 1 <= k <= {n}, the number of answers; draw more samples")
    votes = Counter(answer for answer in answers if answer is not None)
    gold_votes = votes.pop(gold, 0)
    # A subset of size k is n independent coins of probability k / n, given that k of them fall. Under the coins answers
    # are independent, and the product over answers of their vote counts' distributions never overflows.
    p = k / n
    expected = 0.0
    for top in range(1, min(k, gold_votes) + 1):
        rivals = [count for count in votes.values() if count >= top]
        bystanders = n - gold_votes - sum(rivals)  # too few to reach `top`, or without a vote
        # state[s, w]: chance that s answers other than gold are drawn, w rivals have exactly `top`, none has more
        state = np.zeros((k - top + 1, len(rivals) + 1))
        drawn = min(bystanders, k - top)
        state[: drawn + 1, 0] = _binomial(bystanders, p)[: drawn + 1]
        for count in rivals:
            state = _add_rival(state, _binomial(count, p), top)
        share = state[k - top] / np.arange(1, len(rivals) + 2)
        expected += _binomial(gold_votes, p)[top] * share.sum()
    return float(min(expected / _binomial(n, p)[k], 1.0))


def standard_error(values: Values) -> float:
    """`std / sqrt(N)` of values per problem [N], ddof 1; NaN for a single problem, whose spread is unknown."""
    values = np.asarray(values, np.float64)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def bootstrap_interval(
    values: Values, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of values per problem [N], from resampled problems; the same for the same seed.

    Raises ValueError without values, or for a confidence outside (0, 1).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bootstrap needs one value per problem, a non-empty vector, and got shape {values.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, e.g. 0.95")
    rng = np.random.default_rng(seed)
    # Resampling N problems with replacement is a multinomial draw of how often each one occurs.
    distinct, counts = np.unique(values, return_counts=True)
    draws = rng.multinomial(len(values), counts / len(values), size=resamples)
    low, high = np.quantile(draws @ distinct / len(values), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


class Difference(NamedTuple):
    """Mean difference of paired values, its standard error and bootstrap interval."""

    mean: float
    standard_error: float
    low: float
    high: float


def paired_difference(
    after: Values, before: Values, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """`after - before` of the same problems in the same order, [N] each. Raises ValueError for unequal shapes."""
    after, before = np.asarray(after, np.float64), np.asarray(before, np.float64)
    if after.shape != before.shape:
        raise ValueError(f"paired values must belong to the same problems; got shapes {after.shape} and {before.shape}")
    difference = after - before
    low, high = bootstrap_interval(difference, confidence=confidence, resamples=resamples, seed=seed)
    return Difference(float(difference.mean()), standard_error(difference), low, high)


def _check_counts(n: NDArray, c: NDArray, k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    if n.size and k > n.min():
        raise ValueError(f"k={k} needs at least {k} samples of every problem, one has {n.min()}; draw more or lower k")
    if np.any((c < 0) | (c > n)):
        raise ValueError(f"correct counts must lie within [0, n]; got c from {c.min()} to {c.max()}")


def _binomial(n: int, p: float) -> NDArray[np.float64]:
    """Probabilities of 0 .. n successes."""
    if p == 1.0:
        return np.eye(n + 1)[n]
    i = np.arange(n + 1)
    log_factorial = np.array([math.lgamma(j + 1) for j in range(n + 1)])
    log_choose = log_factorial[n] - log_factorial - log_factorial[::-1]
    return np.exp(log_choose + i * math.log(p) + (n - i) * math.log1p(-p))


def _add_rival(state: NDArray, chances: NDArray, top: int) -> NDArray:
    """Adds one more answer, which is drawn i times with `chances[i]`, to the state of `maj_at_k`."""
    added = np.zeros_like(state)
    size = len(state)
    for i in range(min(top - 1, size - 1) + 1):
        added[i:] += chances[i] * state[: size - i]
    if top < size:
        added[top:, 1:] += chances[top] * state[: size - top, :-1]
    return added
