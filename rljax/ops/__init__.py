"""Masked reductions, statistics per group, and scans over rows with gaps."""

from rljax.ops.masked import as_float, masked_max, masked_mean, masked_std, masked_sum, masked_var, masked_whiten
from rljax.ops.scans import discounted_sum, next_unmasked
from rljax.ops.segments import segment_count, segment_mean, segment_std, segment_sum

__all__ = [
    "as_float",
    "discounted_sum",
    "masked_max",
    "masked_mean",
    "masked_std",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "next_unmasked",
    "segment_count",
    "segment_mean",
    "segment_std",
    "segment_sum",
]
