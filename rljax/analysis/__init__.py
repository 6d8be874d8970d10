"""Studies: two models beside each other, distribution shifts, methods at equal cost."""

from rljax.analysis.shift_summary import summarize_shifts

__all__ = ["summarize_shifts"]
