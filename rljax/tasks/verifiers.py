"""Built-in rewards. Each is an object made from keyword arguments, and a plain reward callable.

`column` names the data column with the right answer; `extract` finds the answer in the completion. A completion
without an answer scores 0. A row without a usable right answer is an error of the data: the sample counts as failed.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar

from rljax.tasks.answers import Extractor, last_number, whole_completion


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """1 if the answer is, character for character, the right one, else 0; surrounding white space does not count.

    A list in the column holds alternatives.
    """

    column: str = "answer"
    extract: Extractor = whole_completion
    ignore_case: bool = False
    is_cheap: ClassVar[bool] = True

    @property
    def required_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def answer_in(self, completion: str) -> str | None:
        """The answer as it is compared."""
        answer = self.extract(completion)
        return None if answer is None else self._fold(answer)

    def __call__(self, completion: str, **columns: Any) -> float:
        answer = self.extract(completion)
        right = _right_answer(columns, self.column)
        alternatives = right if isinstance(right, (list, tuple)) else [right]
        return float(answer is not None and self._fold(answer) in {self._fold(str(a)) for a in alternatives})

    def _fold(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()


@dataclass(frozen=True, kw_only=True)
class NumberMatch:
    """1 if the answer's number is within `tolerance` of the right one, else 0; compared exactly, as fractions.

    `number` reads the number from the extracted answer: `last_number` or `whole_number`. Raises ValueError, in a
    call, if the column does not hold a number.
    """

    column: str = "answer"
    extract: Extractor = whole_completion
    number: Callable[[str], Fraction | None] = last_number
    tolerance: float = 0.0
    is_cheap: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance {self.tolerance} must be a finite number, 0 or more")

    @property
    def required_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def answer_in(self, completion: str) -> str | None:
        """The number, as a fraction in lowest terms."""
        answer = self.extract(completion)
        found = None if answer is None else self.number(answer)
        return None if found is None else str(found)

    def __call__(self, completion: str, **columns: Any) -> float:
        right = last_number(str(_right_answer(columns, self.column)))
        if right is None:
            raise ValueError(f"column {self.column!r} holds {columns[self.column]!r}, in which there is no number")
        answer = self.extract(completion)
        found = None if answer is None else self.number(answer)
        return float(found is not None and abs(found - right) <= Fraction(self.tolerance))


@dataclass(frozen=True, kw_only=True)
class MathVerify:
    """1 if the answer equals the right one as mathematics (numbers, LaTeX, expressions, sets), else 0.

    The package math-verify parses both; an answer it cannot read, or not within `timeout_s` seconds, scores 0.
    It relies on signals, so it always runs in a worker process. Raises ImportError, naming the extra, when made
    without the package.
    """

    column: str = "answer"
    extract: Extractor = whole_completion
    timeout_s: int = 3
    needs_process: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _import_math_verify()
        if self.timeout_s < 1:
            raise ValueError(f"timeout_s {self.timeout_s} must be at least 1 second")

    @property
    def required_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def warm_up(self) -> None:
        """Import the package and parse once, which takes a second."""
        _import_math_verify().parse("1")

    def __call__(self, completion: str, **columns: Any) -> float:
        package = _import_math_verify()
        right = _parse_right(str(_right_answer(columns, self.column)))
        answer = self.extract(completion)
        if answer is None:
            return 0.0
        parsed = package.parse(answer, parsing_timeout=self.timeout_s) or package.parse(
            f"${answer}$", parsing_timeout=self.timeout_s
        )
        return float(bool(parsed) and package.verify(list(right), parsed, timeout_seconds=self.timeout_s))


def _import_math_verify() -> Any:
    try:
        import math_verify
    except ImportError:
        raise ImportError("MathVerify needs the package math-verify: pip install 'rljax-lm[tasks]'") from None
    return math_verify


@lru_cache(maxsize=1024)
def _parse_right(text: str) -> tuple[Any, ...]:
    package = _import_math_verify()
    parsed = package.parse(text) or package.parse(f"${text}$")
    if not parsed:
        raise ValueError(f"the right answer {text!r} cannot be read by math-verify; repair the data row")
    return tuple(parsed)


@dataclass(frozen=True, kw_only=True)
class RegexMatch:
    """1 if the whole completion matches the pattern, else 0; `.` also matches line ends. For rewards on the format.

    With `anywhere` a match inside is enough. Raises ValueError for a pattern that does not compile.
    """

    pattern: str
    anywhere: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from None

    def __call__(self, completion: str) -> float:
        match = re.search if self.anywhere else re.fullmatch
        return float(match(self.pattern, completion, re.DOTALL) is not None)


@dataclass(frozen=True, kw_only=True)
class LengthReward:
    """1 for a completion of `min_tokens` to `max_tokens` tokens, falling linearly to 0 over `margin` tokens outside.

    Less 1, with `max_tokens = L_max - L_cache` and `margin = L_cache`, it is DAPO's soft overlong punishment
    (arXiv 2503.14476, eq. 13). Raises ValueError for an empty range.
    """

    max_tokens: int
    min_tokens: int = 0
    margin: int = 0
    is_cheap: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.min_tokens <= self.max_tokens or self.margin < 0:
            raise ValueError(
                f"min_tokens {self.min_tokens}, max_tokens {self.max_tokens}, margin {self.margin}: "
                "0 <= min_tokens <= max_tokens and margin >= 0 must hold"
            )

    def __call__(self, token_ids: Sequence[int]) -> float:
        outside = max(self.min_tokens - len(token_ids), len(token_ids) - self.max_tokens, 0)
        return 1.0 if outside == 0 else max(0.0, 1.0 - outside / self.margin) if self.margin else 0.0


def _right_answer(columns: dict[str, Any], column: str) -> Any:
    if columns.get(column) is None:
        raise ValueError(f"the data row has no {column!r}; its columns are {sorted(columns)}")
    return columns[column]
