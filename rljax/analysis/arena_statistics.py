"""What paired seeds allow to say: exact tests of few differences, corrected for their number, and verdicts in words."""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from rljax.evaluation import bootstrap_interval

Expected = Literal["above", "below", "level"]
"""Where a prediction sees a method beside the one that it is compared with."""

SHOWN = "shown"
NOT_SHOWN = "not shown at this scale"
REFUTED = "refuted here"
NO_VERDICT = "no verdict: too few seeds"

LEVEL = 0.05
"""The largest corrected p of a difference that counts."""
MARGIN = 0.1
"""Methods are level when their difference is within this share of the score of the one that is compared with."""


class Compared(NamedTuple):
    """A method beside another one, over paired seeds."""

    mean_difference: float
    """Of the scores, seed by seed; above 0 the method is better."""
    interval: tuple[float, float]
    """95% of its bootstrap distribution over seeds; with few seeds it is too narrow, so that p decides."""
    p: float
    """Two-sided, of the exact sign-flip test."""
    p_holm: float
    """Corrected for all comparisons of the task."""
    seeds: int
    verdict: str
    """One of the four above."""


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of paired `differences` under the hypothesis that each might as well have had the other sign.

    Exact: the share of all `2^n` patterns of signs whose mean is at least as far from 0, ties included. The smallest
    that it can be is `2^(1 - n)`. Raises ValueError for none, and for more than 20.
    """
    values = np.asarray(differences, np.float64)
    if not 1 <= len(values) <= 20:
        raise ValueError(f"an exact sign-flip test takes 1 to 20 paired differences, not {len(values)}")
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
    means = np.abs(signs @ values)
    # Sums of the same numbers in another order are ties, whatever their last bits.
    return float(np.mean(means >= means[0] - 1e-9 * np.abs(values).sum()))


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the order given (Holm 1979): the k-th smallest of m times `m - k + 1`,
    at least as large as those before it, at most 1."""
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest
    return corrected


def compare_paired(
    differences: Sequence[Sequence[float]], expected: Sequence[Expected], scores: Sequence[float]
) -> list[Compared]:
    """The comparisons of one task, corrected together.

    `differences` holds for each comparison those of its seeds, `expected` its prediction, and `scores` the mean score
    of the method that is compared with. ValueError for a comparison without seeds.
    """
    ps = [sign_flip_p(values) for values in differences]
    found = []
    for values, p, p_holm, prediction, score in zip(differences, ps, holm(ps), expected, scores, strict=True):
        mean = float(np.mean(values))
        interval = bootstrap_interval(values)
        said = verdict(prediction, mean, interval, p_holm, seeds=len(values), comparisons=len(ps), score=score)
        found.append(Compared(mean, interval, p, p_holm, len(values), said))
    return found


def verdict(
    expected: Expected,
    mean: float,
    interval: tuple[float, float],
    p_holm: float,
    *,
    seeds: int,
    comparisons: int,
    score: float,
) -> str:
    """What became of a prediction.

    A difference counts when `p_holm` is at most `LEVEL`. "above" and "below" are shown by one of their sign and refuted
    by one of the other. "level" is shown by an `interval` within `MARGIN` of `score`, and refuted by a difference that
    counts and whose mean lies outside it. Where so few `seeds` cannot bring a p below `LEVEL`, corrected for the
    task's `comparisons`, there is no verdict.
    """
    if comparisons * 2.0 ** (1 - seeds) > LEVEL:
        return NO_VERDICT
    counts = p_holm <= LEVEL
    if expected == "level":
        margin = MARGIN * score
        if max(abs(end) for end in interval) <= margin:
            return SHOWN
        return REFUTED if counts and abs(mean) > margin else NOT_SHOWN
    if not counts:
        return NOT_SHOWN
    return SHOWN if (mean > 0) == (expected == "above") else REFUTED
