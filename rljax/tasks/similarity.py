"""How alike two texts are, in words that follow each other in the same order."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from difflib import SequenceMatcher

TextSimilarity = Callable[[str, str], float]
"""(text, text) -> similarity in [0, 1]; 0 where either has no words."""


def words(text: str) -> list[str]:
    """Lower-cased words and single signs."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def lcs_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence. A row of the usual table is the bits of one integer, so texts of
    thousands of words take milliseconds."""
    places: dict[Hashable, int] = defaultdict(int)
    for i, item in enumerate(a):
        places[item] |= 1 << i

    everywhere = (1 << len(a)) - 1
    row = everywhere  # bit i is 0 where the row of the table rises from i to i + 1
    for item in b:
        found = row & places.get(item, 0)
        row = ((row + found) | (row - found)) & everywhere
    return len(a) - row.bit_count()


def dice(a: str, b: str) -> float:
    """`2 LCS / (len a + len b)` of the words."""
    x = _words(a)
    y = _words(b)
    return 2 * lcs_length(x, y) / (len(x) + len(y)) if x and y else 0.0


def of_longer(a: str, b: str) -> float:
    """`LCS / max(len a, len b)` of the words."""
    x = _words(a)
    y = _words(b)
    return lcs_length(x, y) / max(len(x), len(y)) if x and y else 0.0


def gestalt(a: str, b: str) -> float:
    """`2 M / (len a + len b)`, M the characters of matching blocks, the longest first (Ratcliff and Obershelp, as in
    `difflib`). Slow for long texts."""
    return SequenceMatcher(None, a, b, autojunk=False).ratio() if a and b else 0.0


def _words(text: str) -> Sequence[str]:
    """Prompts are compared again and again, and short; observations once."""
    return _prompt_words(text) if len(text) <= 1000 else words(text)


@functools.lru_cache(maxsize=2048)
def _prompt_words(text: str) -> tuple[str, ...]:
    return tuple(words(text))


SIMILARITIES: dict[str, TextSimilarity] = {"dice": dice, "of_longer": of_longer, "gestalt": gestalt}
