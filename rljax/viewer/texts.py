"""What each metric means, from docs/not-learning.md."""

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path


def metric_texts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """`meaning` and `healthy` of each of the metrics that docs/not-learning.md explains."""
    found = {}
    for name in names:
        for pattern, text in _patterns():
            if pattern.fullmatch(name):
                found[name] = text
                break
    return found


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], dict[str, str]]]:
    """`NAME`, `N` and `k` of a name stand for anything, and so does `...`."""
    texts = json.loads((Path(__file__).parent / "page" / "metrics.json").read_text(encoding="utf-8"))
    patterns = []
    for name, text in texts.items():
        pattern = re.escape(name).replace("NAME", ".+").replace(re.escape("..."), ".+")
        pattern = re.sub(r"_N$", r"_\\d+", pattern)
        pattern = re.sub(r"@k$", r"@\\d+", pattern)
        patterns.append((re.compile(pattern), text))
    return patterns
