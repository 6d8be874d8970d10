"""Where and how RL has changed the next-token distribution, in a few numbers (2603.22446)."""

import numpy as np
from jaxtyping import Bool

from rljax.analysis.shifts import Shifts
from rljax.types import ArrayLike


def summarize_shifts(
    shifts: Shifts, mask: Bool[ArrayLike, "B T"], *, threshold: float = 0.1, bins: int = 10
) -> dict[str, float | list[float]]:
    """Statistics over the tokens in `mask` (responses alone; tokens off it do not count as 0).

    `divergence_mean` (nats); `high_share`, tokens of divergence above `threshold`, and of these the shares whose
    policy's favourite is the base's too (`same_favourite`), is among the base's first three (`in_base_top3`), or has
    there a probability below 0.01 (`rare_in_base`); `profile`, the mean divergence by place in the response, in
    `bins` equal parts. A share of nothing is 0.
    """
    mask = np.asarray(mask, bool)
    divergence, rank, logprob = (np.asarray(x) for x in (shifts.divergence, shifts.base_rank, shifts.base_logprob))
    high = mask & (divergence > threshold)
    place = np.cumsum(mask, axis=1) - 1
    lengths = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    part = np.minimum(place * bins // lengths, bins - 1)
    return {
        "divergence_mean": _mean(divergence, mask),
        "high_share": _mean(high, mask),
        "same_favourite": _mean(rank == 0, high),
        "in_base_top3": _mean(rank < 3, high),
        "rare_in_base": _mean(logprob < np.log(0.01), high),
        "profile": [_mean(divergence, mask & (part == i)) for i in range(bins)],
    }


def _mean(values: np.ndarray, mask: np.ndarray) -> float:
    return float(values[mask].mean()) if mask.any() else 0.0
