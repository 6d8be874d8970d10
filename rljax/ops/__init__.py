"""Masked reductions, statistics per group, scans over rows with gaps, common subsequences, and noise per token."""

from rljax.ops.masked import (
    as_float,
    masked_max,
    masked_mean,
    masked_quantile,
    masked_std,
    masked_sum,
    masked_var,
    masked_whiten,
)
from rljax.ops.noise import row_uniforms
from rljax.ops.scans import discounted_sum, future_value, next_unmasked
from rljax.ops.segments import (
    segment_count,
    segment_mean,
    segment_std,
    segment_sum,
    segment_whiten,
    segment_zscore,
)

__all__ = [
    "as_float",
    "discounted_sum",
    "future_value",
    "masked_max",
    "masked_mean",
    "masked_quantile",
    "masked_std",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "next_unmasked",
    "row_uniforms",
    "segment_count",
    "segment_mean",
    "segment_std",
    "segment_sum",
    "segment_whiten",
    "segment_zscore",
]
