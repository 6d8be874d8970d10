"""What docs/not-learning.md explains."""

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = (Path(__file__).parent.parent / "docs" / "not-learning.md").read_text()
EXPLAINED = set(re.findall(r"`((?:rollout|loss|pack|critic|preference|teacher|play|time|compile|eval)/[\w/@]+)`", PAGE))


def unexplained(logged: Iterable[str]) -> set[str]:
    """Names of a line of metrics that the page does not have; components and skills go by NAME there, estimators by
    k."""
    names = (name for name in logged if name != "step")
    names = (re.sub(r"^rollout/(component|skill)/.*", r"rollout/\1/NAME", name) for name in names)
    names = (re.sub(r"^(teacher/(?:kl|share))_\d+$", r"\1_N", name) for name in names)
    return {re.sub(r"@\d+$", "@k", name) for name in names} - EXPLAINED
