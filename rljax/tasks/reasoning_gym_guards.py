"""What a reasoning-gym verifier forgets to check, and what must not reach it.

Found by giving every verifier of reasoning-gym 0.1.25 junk, prefixes, negations and answers of other items. A guard
takes (answer found, right answer, metadata) and must hold besides a full score.
"""

import ast
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

REFUSED: Mapping[str, str] = {
    "composite": "it only mixes other data sets; make a task of each and join their examples",
    "game_of_life_halting": (
        "its verifier compares bool(answer) with bool(right answer), and both are true for any text: junk scores 1.0"
    ),
}
"""Tasks that cannot be used, and why."""

Guard = Callable[[str, Any, Mapping[str, Any]], bool]

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_FUNCTIONS = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
_FUNCTIONS |= {"exp", "log", "ln", "sqrt", "pi", "Abs"}


def _same_probability(found: str, right: Any, metadata: Mapping[str, Any]) -> bool:
    """Else any prefix of the digits scores 1.0, "0" for instance. The tolerance is the verifier's own."""
    return abs(float(Fraction(found.replace(",", ""))) - float(Fraction(str(right)))) <= 1e-4


def _is_finite_complex(found: str, right: Any, metadata: Mapping[str, Any]) -> bool:
    """Else "nan" scores 1.0, since min(1.0, nan) is 1.0."""
    return re.search(r"nan|inf", found, re.IGNORECASE) is None


def _one_signed_number(found: str, right: Any, metadata: Mapping[str, Any]) -> bool:
    """Else a wrong sign passes, and any text in which the right number comes first."""
    numbers = set(map(float, _NUMBER.findall(found.replace(",", ""))))
    return numbers == {float(str(right).replace(",", ""))}


def _plain_sum(found: str, right: Any, metadata: Mapping[str, Any]) -> bool:
    """Only + - * / and brackets: sympy's parser would run anything else as Python."""
    return re.fullmatch(r"[\d\s+\-*/().]+", found) is not None and "**" not in found and "//" not in found


def _makes_24(found: str, right: Any, metadata: Mapping[str, Any]) -> bool:
    """Else any four numbers pass, and 24.9."""
    if not _plain_sum(found, right, metadata):
        return False
    given = sorted(map(int, re.findall(r"\d+", found)))
    return given == sorted(metadata["numbers"]) and _exact(ast.parse(found.strip(), mode="eval")) == 24


def _exact(node: Any) -> Fraction:
    match node:
        case ast.Expression(body):
            return _exact(body)
        case ast.Constant(int(value)):
            return Fraction(value)
        case ast.UnaryOp(ast.USub(), operand):
            return -_exact(operand)
        case ast.BinOp(left, ast.Add(), right):
            return _exact(left) + _exact(right)
        case ast.BinOp(left, ast.Sub(), right):
            return _exact(left) - _exact(right)
        case ast.BinOp(left, ast.Mult(), right):
            return _exact(left) * _exact(right)
        case ast.BinOp(left, ast.Div(), right):
            return _exact(left) / _exact(right)
    raise ValueError("not a sum")


def _is_formula(found: str, right: Any, metadata: Mapping[str, Any]) -> bool:
    """sympy's parser runs Python: allow one-letter symbols and common functions, no strings, attributes or towers of
    powers."""
    names = re.findall(r"[^\W\d]\w*", found)
    tight = re.sub(r"\s", "", found)
    return (
        all(len(name) == 1 or name in _FUNCTIONS for name in names)
        and re.search(r"['\"\[\]{}!:;=_]|\.[^\d]", tight) is None
        and re.search(r"\*\*\(*-?\d{4}|\*\*\(*-?[\w./]*\)*\*\*", tight) is None
    )


def _is_literal(found: str, right: Any, metadata: Mapping[str, Any]) -> bool:
    """These verifiers call eval on the answer: nothing may be called, multiplied or shifted in it."""
    return re.search(r"[()*<]|lambda", found) is None


GUARDS: Mapping[str, Guard] = {
    "binary_matrix": _is_literal,
    "coin_flip": _same_probability,
    "complex_arithmetic": _is_finite_complex,
    "countdown": _plain_sum,
    "gsm_symbolic": _one_signed_number,
    "intermediate_integration": _is_formula,
    "n_queens": _is_literal,
    "polynomial_multiplication": _is_formula,
    "puzzle24": _makes_24,
    "simple_integration": _is_formula,
    "spiral_matrix": _is_literal,
    "string_insertion": _is_literal,
}


def passes_guard(name: str, found: str, right: Any, metadata: Mapping[str, Any]) -> bool:
    """Whether the verifier of the task `name` may see the answer `found`."""
    guard = GUARDS.get(name)
    try:
        return guard is None or guard(found, right, metadata)
    except (ArithmeticError, KeyError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        return False
