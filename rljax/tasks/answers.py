"""Finds the answer in a completion. An extractor maps text to text, or to None where there is no answer."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

Extractor = Callable[[str], str | None]

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
# a minus behind a letter, digit or bracket is a subtraction or a hyphen, not a sign
_NUMBER = re.compile(rf"(?:(?<![\w)\]])[-+\u2212])?(?:{_UNSIGNED})(?:[eE][-+]?\d{{1,3}}(?!\d))?")


def whole_completion(completion: str) -> str | None:
    """All of it, without surrounding white space."""
    return completion.strip()


@dataclass(frozen=True)
class InTag:
    """What stands in the last `<tag>...</tag>`; no answer without one."""

    tag: str = "answer"

    def __call__(self, completion: str) -> str | None:
        opening = f"<{self.tag}>"
        closing = f"</{self.tag}>"
        end = completion.rfind(closing)
        start = completion.rfind(opening, 0, end) if end >= 0 else -1
        return completion[start + len(opening) : end].strip() if start >= 0 else None


@dataclass(frozen=True)
class AfterMarker:
    """What follows the last `marker`, to the end of its line, such as `#### 42`; no answer without one."""

    marker: str = "####"

    def __call__(self, completion: str) -> str | None:
        _, found, rest = completion.rpartition(self.marker)
        return rest.strip().split("\n", 1)[0].strip() if found else None


def in_box(completion: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, braces matched; no answer without one."""
    start = completion.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for i in range(begin, len(completion)):
        depth += {"{": 1, "}": -1}.get(completion[i], 0)
        if depth == 0:
            return completion[begin:i].strip()
    return None


def last_number(text: str) -> Fraction | None:
    """The last number in the text, exactly. `1,234.5` is one number; `3-2` ends with 2."""
    found = _NUMBER.findall(text)
    return _fraction(found[-1]) if found else None


def final_number(completion: str) -> str | None:
    """The last number of the completion, as an extractor gives it: `The sum is 4 + 3 = 7.` has the answer `7`."""
    number = last_number(completion)
    return None if number is None else str(number)


def whole_number(text: str) -> Fraction | None:
    """The number that the text is, exactly; None if anything stands beside it. Also `3/4`."""
    numerator, slash, denominator = text.strip().partition("/")
    values = [
        _fraction(part) if _NUMBER.fullmatch(part) else None for part in (numerator, *([denominator] if slash else []))
    ]
    if None in values or (slash and not values[1]):
        return None
    return values[0] / values[1] if slash else values[0]  # type: ignore[operator]


def _fraction(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", "").replace("\u2212", "-"))
    except ValueError:  # more digits than Python converts
        return None
