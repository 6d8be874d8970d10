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
    """Of a judge; the shares are NaN without a valid pair."""

    pairs: int
    """Valid pairs of verdicts."""
    primacy: int
    """Pairs that lean to the first position."""
    recency: int
    """Pairs that lean to the second."""
    consistency: float
    """Share of pairs whose verdicts agree."""
    fairness: float
    """In [-1, 1]: below 0 is primacy, above recency."""
    ties: float
    """Share of CC. A judge that always calls a tie is consistent, and useless."""


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
