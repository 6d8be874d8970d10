"""How far a pairwise judge can be trusted: the measures of "Judging the Judges", 2406.07791.

A judge sees two answers and says A (the first), B (the second) or C (equal). A verdict pair such as `AB` holds its
verdict and that with the answers swapped: AB, BA and CC are consistent, AA, AC and CA lean to the first position
(primacy), BB, BC and CB to the second (recency).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

CONSISTENT = frozenset({"AB", "BA", "CC"})
PRIMACY = frozenset({"AA", "AC", "CA"})
RECENCY = frozenset({"BB", "BC", "CB"})


@dataclass(frozen=True)
class PositionBias:
    """`pairs` valid pairs; `consistency`, `ties` (share of CC) and `fairness` in [-1, 1]: below 0 is primacy, above
    recency. All are NaN without a valid pair."""

    pairs: int
    primacy: int
    recency: int
    consistency: float
    fairness: float
    ties: float


def position_bias(pairs: Sequence[str]) -> PositionBias:
    """Counts verdict pairs. What is none of the nine (an unreadable verdict) is left out of all counts.

    `fairness = (rc irr - pc ipr) / n`, with `pc` primacy and `rc` recency pairs of n, `ipr = pc / (pc + rc)` and `irr`
    the other share; 0 without either.
    """
    counts = Counter(p for p in pairs if p in CONSISTENT | PRIMACY | RECENCY)
    total = counts.total()
    first, second = (sum(counts[p] for p in kind) for kind in (PRIMACY, RECENCY))
    if not total:
        return PositionBias(0, 0, 0, math.nan, math.nan, math.nan)
    leaning = max(first + second, 1)
    fairness = (second * second / leaning - first * first / leaning) / total
    consistent = sum(counts[p] for p in CONSISTENT)
    return PositionBias(total, first, second, consistent / total, fairness, counts["CC"] / total)


def repetition_stability(votes: Sequence[Sequence[str]]) -> float:
    """The mean over items of the share of the most frequent verdict among repetitions of the same question, positions
    *not* swapped. NaN without items; an item without votes is left out."""
    shares = [Counter(item).most_common(1)[0][1] / len(item) for item in votes if item]
    return math.fsum(shares) / len(shares) if shares else math.nan


def is_trustworthy(
    bias: PositionBias,
    stability: float,
    *,
    min_pairs: int = 200,
    min_stability: float = 0.95,
    min_consistency: float = 0.8,
    max_unfairness: float = 0.1,
    max_ties: float = 0.5,
) -> bool:
    """Whether a judge may serve as a reward. A judge that always calls a tie is consistent, so ties are limited too.

    Measure it again on fresh outputs of the policy every few hundred updates, which drift into its blind spots.
    """
    return (
        bias.pairs >= min_pairs
        and stability >= min_stability
        and bias.consistency >= min_consistency
        and abs(bias.fairness) <= max_unfairness
        and bias.ties < max_ties
    )
