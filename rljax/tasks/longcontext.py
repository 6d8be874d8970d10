"""The rows of `rljax.tasks.prelude` and of `rljax.tasks.chartom` as one set of data: what a long text says is not where
the question is."""

from collections.abc import Mapping, Sequence
from typing import Any

from rljax.tasks import chartom, prelude
from rljax.tasks.stories import FULL

SUITES = (prelude.SUITE, chartom.SUITE)


def rows(
    size: int,
    *,
    seed: int = 0,
    split: str = "all",
    length: int = 4000,
    windows: Sequence[int] = (FULL,),
    modes: Sequence[str] = (chartom.CHOICE,),
) -> list[dict[str, Any]]:
    """The rows of `size` chronicles and of `size` stories, in turn. The column `suite` tells them apart."""
    by_suite = (
        prelude.rows(size, seed=seed, split=split, length=length, windows=windows),
        chartom.rows(size, seed=seed, split=split, length=length, windows=windows, modes=modes),
    )
    return [row for item in range(size) for made in by_suite for row in made if row["item"] == item]


def score(row: Mapping[str, Any], text: str) -> dict[str, float]:
    """The `score` of the row's suite. ValueError for a row of neither."""
    suite = row.get("suite")
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} must be one of {', '.join(SUITES)}")
    return (prelude if suite == prelude.SUITE else chartom).score(row, text)


def right(completion: str, **columns: Any) -> float:
    """The reward: 1 for the right label or letter, without options the share of points that are told; else 0."""
    found = score(columns, completion)
    return found["right"] if "right" in found else found["covered"]


def readable(completion: str, **columns: Any) -> float:
    """1 if a text has a label, a letter or, where it is a sentence, any word; else 0."""
    return score(columns, completion)["readable"]
